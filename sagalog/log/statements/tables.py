"""The tables of one placement as statements name them, and the parts that several statements share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import (
    ColumnElement,
    TypeDecorator,
    and_,
    column,
    exists,
    func,
    literal_column,
    select,
    table,
    true,
    update,
)
from sqlalchemy.types import TypeEngine

from sagalog.log.statements.clause import bind, insert_into, literal, one_of
from sagalog.placement import Placement
from sagalog.states import OUTSTANDING, Actor, SagaState, saga_sources


def _stored(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    return kind.impl_instance if isinstance(kind, TypeDecorator) else kind


def _plain(model: Any) -> Any:
    source: Any = model.__table__
    return table(source.name, *(column(c.name, _stored(c.type)) for c in source.columns), schema=source.schema)


class Tables:
    """The tables of one placement."""

    def __init__(self, placement: Placement) -> None:
        # Here and not above: mapping the models costs more than importing all the rest of sagalog.
        from sagalog.models import models_at

        models = models_at(placement)
        self.models = models
        self.placement = placement
        self.saga = _plain(models.Saga)
        self.step = _plain(models.SagaStep)
        self.executor = _plain(models.SagaExecutor)
        self.audit_table = _plain(models.SagaAudit)
        self.meta = _plain(models.SagalogMeta)
        self.saga_fields = tuple(c.name for c in self.saga.c)
        self.step_fields = tuple(c.name for c in self.step.c)
        self.audit_fields = tuple(c.name for c in self.audit_table.c)
        self.snapshot_fields = tuple(
            name for name in self.saga_fields if name not in ("input_json", "result_json", "token", "trace_context")
        )

    # Parts

    @property
    def _this_saga(self) -> ColumnElement[bool]:
        return self.saga.c.saga_id == bind("id_")  # type: ignore[no-any-return]

    @property
    def _this_step(self) -> ColumnElement[bool]:
        return and_(self.step.c.saga_id == bind("id_"), self.step.c.step_index == bind("index_"))

    def _has_steps(self, states: Iterable[str]) -> ColumnElement[bool]:
        return exists(
            select(literal_column("1")).where(self.step.c.saga_id == bind("id_"), one_of(states, self.step.c.state))
        )

    def _saga_is(self, states: Iterable[str]) -> ColumnElement[bool]:
        return exists(
            select(literal_column("1")).select_from(self.saga).where(self._this_saga, one_of(states, self.saga.c.state))
        )

    def _insert_step(
        self, states: Iterable[str], values: dict[str, Any], also: ColumnElement[bool] | None = None
    ) -> Any:
        # From the saga's locked row, so that a missing or ended saga inserts nothing and no foreign key has to fail.
        source = (
            select(self.saga.c.saga_id, *values.values())
            .where(self._this_saga, one_of(states, self.saga.c.state), true() if also is None else also)
            .with_for_update(key_share=True)
        )
        return insert_into(self.step).from_select(["saga_id", *values], source, include_defaults=False)

    def _move_saga(self, target: SagaState, *by: Actor, also: ColumnElement[bool] | None = None, **values: Any) -> Any:
        outstanding = OUTSTANDING.get(target)
        return (
            update(self.saga)
            .where(self._this_saga, one_of(saga_sources(target, *by), self.saga.c.state))
            .where(~self._has_steps(outstanding) if outstanding else true(), true() if also is None else also)
            .values(state=literal(target), **values)
        )

    def _quoted(self, name: str) -> str:
        """A table's or sequence's name for SQL text of Postgres, with its schema."""
        from sqlalchemy.dialects.postgresql import dialect

        quote = dialect().identifier_preparer.quote  # type: ignore[no-untyped-call]
        return ".".join(quote(part) for part in (self.placement.schema, name) if part)

    @property
    def _recency(self) -> ColumnElement[int]:
        return func.coalesce(self.saga.c.terminal_at, self.saga.c.started_at)
