"""Declarative models of the saga log's tables, and where the tables are placed.

`Saga` and `SagaStep` are for reading and querying with the ORM; writes go
through `SagaLog`. Timestamps are aware UTC datetimes and payloads Python
values here; in the tables they are integers (Unix milliseconds) and JSON text.
"""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Text,
    func,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

from sagalog.moments import from_ms, to_ms
from sagalog.payload import decode, encode
from sagalog.placement import Placement

STORED_INTEGER = BigInteger().with_variant(Integer(), "sqlite")
"""64 bits on both: SQLite's INTEGER holds them, and only INTEGER PRIMARY KEY is the rowid."""


class Moment(TypeDecorator[datetime]):
    """An aware UTC datetime, stored as Unix milliseconds."""

    impl = STORED_INTEGER
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Refuse naive datetimes, which name no moment."""
        return None if value is None else to_ms(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        """The stored milliseconds as a datetime."""
        return None if value is None else from_ms(value)


class JsonText(TypeDecorator[Any]):
    """A payload, stored as JSON text, so that both databases' own JSON operators can query it."""

    impl = Text
    cache_ok = True
    should_evaluate_none = True

    def __init__(self, *, none_is_null: bool = False) -> None:
        super().__init__()
        self.none_is_null = none_is_null

    def process_bind_param(self, value: Any | None, dialect: Dialect) -> str | None:
        """JSON text; a None payload is the text null where the column must hold something."""
        return None if value is None and self.none_is_null else encode(value, "storing a payload")

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any | None:
        """The plain JSON value."""
        return decode(value, "payload", None)


def _index(prefix: str, name: str, *on: Any, unique: bool = False, where: str | None = None) -> Index:
    condition = None if where is None else text(where)
    return Index(prefix + name, *on, unique=unique, sqlite_where=condition, postgresql_where=condition)


class _SagaColumns:
    __prefix__ = ""

    saga_id: Mapped[int] = mapped_column(STORED_INTEGER, primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text)
    started_at: Mapped[datetime] = mapped_column(Moment)
    terminal_at: Mapped[datetime | None] = mapped_column(Moment)
    failure_reason: Mapped[str | None] = mapped_column(Text)
    input: Mapped[Any] = mapped_column("input_json", JsonText, nullable=False)
    key: Mapped[str | None] = mapped_column(Text)
    token: Mapped[str | None] = mapped_column(Text)
    version: Mapped[int | None] = mapped_column(Integer)
    result: Mapped[Any] = mapped_column("result_json", JsonText(none_is_null=True), nullable=True)
    executor_id: Mapped[str | None] = mapped_column(Text)
    epoch: Mapped[int] = mapped_column(STORED_INTEGER, server_default=text("0"))
    run_at: Mapped[datetime | None] = mapped_column(Moment)
    deadline_at: Mapped[datetime | None] = mapped_column(Moment)
    cancel_reason: Mapped[str | None] = mapped_column(Text)
    recoveries: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    trace_context: Mapped[str | None] = mapped_column(Text)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        columns: Any = cls

        def index(name: str, *on: Any, **options: Any) -> Index:
            return _index(cls.__prefix__, name, *on, **options)

        return (
            index("saga_state_idx", "state", where="state IN ('running', 'compensating')"),
            index("saga_terminal_idx", "terminal_at"),
            index("saga_key_idx", "key", "name", unique=True, where="key IS NOT NULL"),
            index("saga_token_idx", "token", unique=True, where="token IS NOT NULL"),
            index("saga_unresolved_idx", "saga_id", where="state IN ('running', 'compensating', 'failed')"),
            index("saga_attention_idx", "saga_id", where="state IN ('submitted', 'failed_compensation', 'abandoned')"),
            index("saga_name_idx", "name", "saga_id"),
            index("saga_recent_idx", func.coalesce(columns.terminal_at, columns.started_at), "saga_id"),
        )


class _StepColumns:
    __prefix__ = ""

    @declared_attr
    def saga_id(cls) -> Mapped[int]:
        """The saga it belongs to."""
        schema = getattr(cls, "metadata").schema  # noqa: B009 - the mixin has no metadata of its own
        target = f"{cls.__prefix__}saga.saga_id"
        return mapped_column(
            STORED_INTEGER, ForeignKey(f"{schema}.{target}" if schema else target), primary_key=True, sort_order=-1
        )

    step_index: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text)
    cmd: Mapped[Any] = mapped_column("cmd_json", JsonText, nullable=False)
    output: Mapped[Any] = mapped_column("output_json", JsonText(none_is_null=True), nullable=True)
    started_at: Mapped[datetime] = mapped_column(Moment)
    ended_at: Mapped[datetime | None] = mapped_column(Moment)
    compensated_by: Mapped[int | None] = mapped_column(Integer)
    error: Mapped[str | None] = mapped_column(Text)
    deadline_at: Mapped[datetime | None] = mapped_column(Moment)


class _ExecutorColumns:
    executor_id: Mapped[str] = mapped_column(Text, primary_key=True)
    label: Mapped[str | None] = mapped_column(Text)
    started_at: Mapped[datetime] = mapped_column(Moment)
    lease_until: Mapped[datetime] = mapped_column(Moment)


class _AuditColumns:
    __prefix__ = ""

    audit_id: Mapped[int] = mapped_column(STORED_INTEGER, primary_key=True)
    saga_id: Mapped[int] = mapped_column(STORED_INTEGER)
    step_index: Mapped[int | None] = mapped_column(Integer)
    action: Mapped[str] = mapped_column(Text)
    actor: Mapped[str] = mapped_column(Text)
    note: Mapped[str] = mapped_column(Text)
    at: Mapped[datetime] = mapped_column(Moment)
    state_before: Mapped[str | None] = mapped_column(Text)
    state_after: Mapped[str | None] = mapped_column(Text)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        return (_index(cls.__prefix__, "saga_audit_idx", "saga_id"),)


class _MetaColumns:
    name: Mapped[str] = mapped_column(Text, primary_key=True)
    value: Mapped[str | None] = mapped_column(Text)


class Base(DeclarativeBase):
    """sagalog's own registry and metadata; never added to a host's."""


class Saga(_SagaColumns, Base):
    """A saga, one row; `steps` are its steps by step_index."""

    __tablename__ = "saga"

    steps: Mapped[list[SagaStep]] = relationship(back_populates="saga", order_by="SagaStep.step_index", viewonly=True)


class SagaStep(_StepColumns, Base):
    """A step of a saga, keyed by (saga_id, step_index)."""

    __tablename__ = "saga_step"

    saga: Mapped[Saga] = relationship(back_populates="steps", viewonly=True)


class SagaExecutor(_ExecutorColumns, Base):
    """A process that runs sagas, and until when its lease holds."""

    __tablename__ = "saga_executor"


class SagaAudit(_AuditColumns, Base):
    """An operator's action."""

    __tablename__ = "saga_audit"


class SagalogMeta(_MetaColumns, Base):
    """Facts about the log itself: `log_id`, `environment`, `oldest_revision`."""

    __tablename__ = "sagalog_meta"


class Models(NamedTuple):
    """The mapped classes of one placement."""

    Saga: type[Any]
    SagaStep: type[Any]
    SagaExecutor: type[Any]
    SagaAudit: type[Any]
    SagalogMeta: type[Any]

    @property
    def metadata(self) -> MetaData:
        """The metadata that holds their tables."""
        found: MetaData = self.Saga.metadata
        return found


@lru_cache(maxsize=64)
def models_at(placement: Placement) -> Models:
    """The models of the tables at a placement, made once for each.

    Args:
        placement: The schema and prefix that `SagaLog` was given.

    Returns:
        `Saga` and `SagaStep` themselves for the default placement, otherwise
        classes of their own registry with the same columns and indexes.
    """
    if placement == Placement():
        return Models(Saga, SagaStep, SagaExecutor, SagaAudit, SagalogMeta)
    base: Any = type("Base", (DeclarativeBase,), {"metadata": MetaData(schema=placement.schema)})

    def place(name: str, table: str, columns: type[Any], **more: Any) -> type[Any]:
        body = {"__tablename__": placement.prefix + table, "__prefix__": placement.prefix, **more}
        return type(name, (columns, base), body)

    steps = relationship("SagaStep", back_populates="saga", order_by="SagaStep.step_index", viewonly=True)
    return Models(
        place("Saga", "saga", _SagaColumns, steps=steps),
        place("SagaStep", "saga_step", _StepColumns, saga=relationship("Saga", back_populates="steps", viewonly=True)),
        place("SagaExecutor", "saga_executor", _ExecutorColumns),
        place("SagaAudit", "saga_audit", _AuditColumns),
        place("SagalogMeta", "sagalog_meta", _MetaColumns),
    )
