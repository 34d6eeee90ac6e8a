"""Every SQL statement of the log, once, in SQLAlchemy Core, for one placement of the tables.

They speak stored values (integers, JSON text), so that the compiled text needs
no processors and runs on a driver's own cursor as well as through Core. Each
write carries its guard: the first statement acts, a second one only explains.
On Postgres a guard that reads the saga's row locks it (FOR NO KEY UPDATE),
without which it loses the race against a concurrent move; SQLite ignores that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import Any, TypeAlias

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Executable,
    FromClause,
    Integer,
    Select,
    Text,
    TypeDecorator,
    and_,
    bindparam,
    case,
    cast,
    column,
    delete,
    exists,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    table,
    true,
    tuple_,
    update,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeEngine

from sagalog.payload import MAX_SAGA_ID
from sagalog.placement import Placement
from sagalog.states import (
    CANCELLABLE,
    FINAL,
    NOT_FINAL,
    OPEN_FOR_STEPS,
    OUTSTANDING,
    UNRESOLVED,
    Actor,
    SagaState,
    StepState,
    saga_sources,
    step_sources,
)

HIGHEST_PRUNED = "highest_pruned_saga_id"
ATTENTION = (SagaState.SUBMITTED, SagaState.FAILED_COMPENSATION, SagaState.ABANDONED)
_BIGINT = BigInteger()
_INTEGER = Integer()
_TEXT = Text()

_BINDS: Mapping[str, TypeEngine[Any]] = {
    "id_": _BIGINT, "index_": _INTEGER, "at_": _BIGINT, "epoch_": _BIGINT, "until_": _BIGINT, "since_": _BIGINT,
    "before_": _BIGINT, "limit_": _BIGINT, "skip_": _BIGINT,
}  # fmt: skip


def _bind(name: str) -> Any:
    return bindparam(name, type_=_BINDS.get(name, _TEXT))


Ready: TypeAlias = tuple[str, Callable[[dict[str, Any]], Any]]
"""SQL text for a driver's cursor, and what puts named values into the form that the text wants."""


@lru_cache(maxsize=1)
def _sqlite_dialect() -> Dialect:
    from sqlalchemy.dialects import sqlite

    return sqlite.dialect(paramstyle="qmark")


def _insert(into: Any) -> Any:
    # Loaded when the statements are made: the dialect costs as much to import as the rest of sagalog. Its ON CONFLICT
    # compiles on SQLite too.
    from sqlalchemy.dialects.postgresql import insert

    return insert(into)


class Statement:
    """A Core clause, and its ready text for drivers' own cursors."""

    __slots__ = ("_ready", "clause", "sqlite")

    def __init__(self, clause: Executable) -> None:
        self.clause = clause
        self.sqlite = _ready(clause, _sqlite_dialect())
        self._ready: dict[str, Ready] = {}

    def ready(self, dialect: Dialect) -> Ready:
        """The text for a Postgres driver; compiled once for each."""
        made = self._ready.get(dialect.driver)
        if made is None:
            made = self._ready[dialect.driver] = _ready(self.clause, dialect)
        return made


def _ready(clause: Executable, dialect: Dialect) -> Ready:
    compiled: Any = clause.compile(dialect=dialect)  # type: ignore[attr-defined]
    if compiled._bind_processors:
        raise TypeError(f"these values would need SQLAlchemy's processors: {sorted(compiled._bind_processors)}")
    fixed = {name: value for name, value in compiled.params.items() if value is not None}
    if not compiled.positional:
        names = tuple(compiled.params)
        return str(compiled), lambda values: {name: values[name] for name in names}
    order: list[str] = compiled.positiontup
    if fixed or len(order) < 2:  # SQLite writes LIMIT as LIMIT ? OFFSET 0
        return str(compiled), lambda values: tuple({**fixed, **values}[name] for name in order)
    return str(compiled), itemgetter(*order)


def _literal(word: str) -> ColumnElement[str]:
    return literal_column(f"'{word}'", _TEXT)


def _in(states: Iterable[str], of: Any) -> ColumnElement[bool]:
    # Literals, in the order of the partial indexes' own predicates: a bound list would scan the table.
    held: ColumnElement[bool] = of.in_([_literal(state) for state in states])
    return held


def _stored(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    return kind.impl_instance if isinstance(kind, TypeDecorator) else kind


def _plain(model: Any) -> Any:
    source: Any = model.__table__
    return table(source.name, *(column(c.name, _stored(c.type)) for c in source.columns), schema=source.schema)


class Statements:
    """All statements for one placement; made once and shared by every `SagaLog` there."""

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
        self._finds: dict[tuple[frozenset[str], str | None], Statement] = {}

    # Parts

    @property
    def _this_saga(self) -> ColumnElement[bool]:
        return self.saga.c.saga_id == _bind("id_")  # type: ignore[no-any-return]

    @property
    def _this_step(self) -> ColumnElement[bool]:
        return and_(self.step.c.saga_id == _bind("id_"), self.step.c.step_index == _bind("index_"))

    def _has_steps(self, states: Iterable[str]) -> ColumnElement[bool]:
        return exists(
            select(literal_column("1")).where(self.step.c.saga_id == _bind("id_"), _in(states, self.step.c.state))
        )

    def _saga_is(self, states: Iterable[str]) -> ColumnElement[bool]:
        return exists(
            select(literal_column("1")).select_from(self.saga).where(self._this_saga, _in(states, self.saga.c.state))
        )

    def _insert_step(self, states: Iterable[str], values: dict[str, Any]) -> Any:
        # From the saga's locked row, so that a missing or ended saga inserts nothing and no foreign key has to fail.
        source = (
            select(self.saga.c.saga_id, *values.values())
            .where(self._this_saga, _in(states, self.saga.c.state))
            .with_for_update(key_share=True)
        )
        return _insert(self.step).from_select(["saga_id", *values], source, include_defaults=False)

    def _move_saga(self, target: SagaState, *by: Actor, also: ColumnElement[bool] | None = None, **values: Any) -> Any:
        outstanding = OUTSTANDING.get(target)
        return (
            update(self.saga)
            .where(self._this_saga, _in(saga_sources(target, *by), self.saga.c.state))
            .where(~self._has_steps(outstanding) if outstanding else true(), true() if also is None else also)
            .values(state=_literal(target), **values)
        )

    def _end_step(self, target: StepState) -> Statement:
        return Statement(
            update(self.step)
            .where(self._this_step, _in(step_sources(target), self.step.c.state))
            .values(state=_literal(target), output_json=_bind("output_"), ended_at=_bind("at_"))
        )

    # Starting

    @cached_property
    def max_saga_id(self) -> Statement:
        return Statement(select(func.coalesce(func.max(self.saga.c.saga_id), literal_column("0"))))

    @cached_property
    def start_saga(self) -> Statement:
        return Statement(_insert(self.saga).values(saga_id=_bind("id_"), **self._new_saga).on_conflict_do_nothing())

    @property
    def _new_saga(self) -> dict[str, Any]:
        return {
            "name": _bind("name_"),
            "state": _literal(SagaState.RUNNING),
            "started_at": _bind("at_"),
            "input_json": _bind("input_"),
            "token": _bind("token_"),
        }

    @property
    def _highest_id(self) -> Any:
        pruned = select(cast(self.meta.c.value, BigInteger)).where(self.meta.c.name == _literal(HIGHEST_PRUNED))
        held = select(func.max(self.saga.c.saga_id))
        zero = literal_column("0", _BIGINT)
        first = func.coalesce(held.scalar_subquery(), zero)
        second = func.coalesce(pruned.scalar_subquery(), zero)
        highest = case((first > second, first), else_=second).label("highest")
        return select(highest).subquery("known")

    @cached_property
    def create_saga_sqlite(self) -> Statement:
        known = self._highest_id
        return self._create_saga(known.c.highest + literal_column("1"), known, known.c.highest < _largest)

    @cached_property
    def create_saga_postgres(self) -> Statement:
        # A caller's explicit id may be ahead of the sequence: then nothing is inserted, and catch_up moves it.
        known = self._highest_id
        drawn = case((known.c.highest < _largest, func.nextval(literal_column(f"'{self.id_sequence}'"))))
        ahead = select(drawn.label("id"), known.c.highest).subquery("drawn")
        return self._create_saga(ahead.c.id, ahead, ahead.c.id > ahead.c.highest)

    def _create_saga(self, new_id: Any, source: FromClause, guard: ColumnElement[bool]) -> Statement:
        values = {**self._new_saga, "key": _bind("key_")}
        rows = select(new_id, *values.values()).select_from(source).where(guard)
        inserted = _insert(self.saga).from_select(["saga_id", *values], rows, include_defaults=False)
        return Statement(inserted.on_conflict_do_nothing().returning(self.saga.c.saga_id))

    @property
    def id_sequence(self) -> str:
        """The Postgres sequence of ids, quoted and with its schema."""
        from sqlalchemy.dialects.postgresql import dialect

        quote = dialect().identifier_preparer.quote  # type: ignore[no-untyped-call]
        name: str = quote(f"{self.placement.prefix}saga_id_seq")
        return f"{quote(self.placement.schema)}.{name}" if self.placement.schema else name

    @cached_property
    def catch_up_ids(self) -> Statement:
        known = self._highest_id
        moved = func.setval(literal_column(f"'{self.id_sequence}'"), known.c.highest)
        return Statement(
            select(moved).select_from(known).where(known.c.highest < _largest, known.c.highest > literal_column("0"))
        )

    @cached_property
    def highest_id(self) -> Statement:
        return Statement(select(self._highest_id.c.highest))

    @cached_property
    def saga_of_key(self) -> Statement:
        return Statement(
            select(self.saga.c.saga_id, self.saga.c.input_json, self.saga.c.state).where(
                self.saga.c.key == _bind("key_"), self.saga.c.name == _bind("name_")
            )
        )

    @cached_property
    def start_step(self) -> Statement:
        pending = {
            "step_index": _bind("index_"),
            "name": _bind("name_"),
            "state": _literal(StepState.PENDING),
            "cmd_json": _bind("cmd_"),
            "started_at": _bind("at_"),
        }
        return Statement(self._insert_step(OPEN_FOR_STEPS, pending).on_conflict_do_nothing())

    @cached_property
    def append_recovery_step(self) -> Statement:
        ended = {
            "step_index": _bind("index_"),
            "name": _bind("name_"),
            "state": _bind("state_"),
            "cmd_json": _bind("cmd_"),
            "output_json": _bind("output_"),
            "started_at": _bind("at_"),
            "ended_at": _bind("at_"),
        }
        return Statement(self._insert_step(NOT_FINAL, ended).on_conflict_do_nothing())

    # Ending steps

    @cached_property
    def finish_step(self) -> Statement:
        return self._end_step(StepState.SUCCEEDED)

    @cached_property
    def fail_step(self) -> Statement:
        return self._end_step(StepState.FAILED)

    @cached_property
    def compensate_step(self) -> Statement:
        ended = {
            "step_index": _bind("index_"),
            "name": _literal("compensate"),
            "state": _literal(StepState.COMPENSATED),
            "cmd_json": _literal("null"),
            "output_json": _bind("output_"),
            "started_at": _bind("at_"),
            "ended_at": _bind("at_"),
        }
        new = self._insert_step(NOT_FINAL, ended)
        return Statement(
            new.on_conflict_do_update(
                index_elements=["saga_id", "step_index"],
                set_={name: new.excluded[name] for name in ("state", "output_json", "ended_at")},
                where=_in(step_sources(StepState.COMPENSATED), self.step.c.state),
            )
        )

    def _mark_compensated(self, which: ColumnElement[bool], sources: Iterable[str]) -> Statement:
        return Statement(
            update(self.step)
            .where(which, _in(sources, self.step.c.state), self._saga_is(NOT_FINAL))
            .values(state=_literal(StepState.COMPENSATED), ended_at=func.coalesce(self.step.c.ended_at, _bind("at_")))
        )

    @cached_property
    def mark_step_compensated(self) -> Statement:
        return self._mark_compensated(self._this_step, step_sources(StepState.COMPENSATED))

    @cached_property
    def mark_all_succeeded_steps_compensated(self) -> Statement:
        return self._mark_compensated(self.step.c.saga_id == _bind("id_"), (StepState.SUCCEEDED,))

    # Moving sagas

    @cached_property
    def mark_compensating(self) -> Statement:
        return Statement(self._move_saga(SagaState.COMPENSATING, terminal_at=null()))

    @cached_property
    def mark_failed_compensation(self) -> Statement:
        return Statement(
            self._move_saga(SagaState.FAILED_COMPENSATION, failure_reason=_bind("reason_"), terminal_at=_bind("at_"))
        )

    @lru_cache(maxsize=8)  # noqa: B019 - one Statements a placement, kept for ever
    def terminate(self, target: SagaState) -> Statement:
        """Completed, failed or compensated; refused in SQL while a step stands in the way."""
        return Statement(self._move_saga(target, failure_reason=_bind("reason_"), terminal_at=_bind("at_")))

    @cached_property
    def lock_saga(self) -> Statement:
        level = func.current_setting(literal_column("'transaction_isolation'"), type_=_TEXT)
        return Statement(select(level).select_from(self.saga).where(self._this_saga).with_for_update(key_share=True))

    @cached_property
    def request_cancel(self) -> Statement:
        submitted = self.saga.c.state == _literal(SagaState.SUBMITTED)
        return Statement(
            update(self.saga)
            .where(self._this_saga, _in(CANCELLABLE, self.saga.c.state), self.saga.c.cancel_reason.is_(None))
            .values(
                cancel_reason=_bind("reason_"),
                state=case((submitted, _literal(SagaState.COMPENSATED)), else_=self.saga.c.state),
                terminal_at=case((submitted, _bind("at_")), else_=self.saga.c.terminal_at),
                failure_reason=case((submitted, _bind("reason_")), else_=self.saga.c.failure_reason),
            )
        )

    # An operator's settling

    @lru_cache(maxsize=8)  # noqa: B019 - one Statements a placement, kept for ever
    def resolve(self, target: SagaState) -> Statement:
        """An operator's settling of a saga that needs a person; it raises the epoch."""
        epoch = self.saga.c.epoch + literal_column("1")
        return Statement(self._move_saga(target, Actor.OPERATOR, terminal_at=_bind("at_"), epoch=epoch))

    @lru_cache(maxsize=8)  # noqa: B019 - one Statements a placement, kept for ever
    def resolve_step(self, target: StepState) -> Statement:
        """An operator's settling of a step; not before nothing of its last try can still be under way."""
        unowned = and_(
            self._this_saga,
            or_(
                _in((SagaState.FAILED, SagaState.FAILED_COMPENSATION), self.saga.c.state),
                and_(_in(OPEN_FOR_STEPS, self.saga.c.state), self.saga.c.executor_id.is_(None)),
            ),
        )
        settled = or_(self.step.c.deadline_at.is_(None), self.step.c.deadline_at <= _bind("at_"))
        return Statement(
            update(self.step)
            .where(self._this_step, _in(step_sources(target), self.step.c.state), settled)
            .where(exists(select(literal_column("1")).select_from(self.saga).where(unowned)))
            .values(
                state=_literal(target),
                output_json=func.coalesce(_bind("output_"), self.step.c.output_json),
                ended_at=func.coalesce(self.step.c.ended_at, _bind("at_")),
            )
        )

    @cached_property
    def raise_epoch(self) -> Statement:
        return Statement(update(self.saga).where(self._this_saga).values(epoch=self.saga.c.epoch + literal_column("1")))

    @cached_property
    def write_audit(self) -> Statement:
        names = ("saga_id", "step_index", "action", "actor", "note", "at", "state_before", "state_after")
        binds = ("id_", "index_", "action_", "actor_", "note_", "at_", "state_before_", "state_after_")
        return Statement(insert(self.audit_table).values(dict(zip(names, map(_bind, binds), strict=True))).inline())

    @cached_property
    def audit(self) -> Statement:
        return Statement(
            select(*self.audit_table.c)
            .where(self.audit_table.c.saga_id == _bind("id_"))
            .order_by(self.audit_table.c.audit_id)
        )

    # Explaining

    @cached_property
    def saga_head(self) -> Statement:
        c = self.saga.c
        fields = (c.name, c.state, c.epoch, c.input_json, c.failure_reason, c.cancel_reason, c.token, c.executor_id)
        return Statement(select(*fields).where(self._this_saga))

    @cached_property
    def step_row(self) -> Statement:
        c = self.step.c
        return Statement(select(c.name, c.state, c.cmd_json, c.output_json, c.deadline_at).where(self._this_step))

    @cached_property
    def outstanding_steps(self) -> Statement:
        c = self.step.c
        return Statement(
            select(c.step_index, c.state)
            .where(c.saga_id == _bind("id_"), _in((StepState.PENDING, StepState.SUCCEEDED), c.state))
            .order_by(c.step_index)
        )

    # Reading: one statement each, for two are no snapshot at READ COMMITTED

    @cached_property
    def next_step_index(self) -> Statement:
        highest = func.max(self.step.c.step_index) + literal_column("1")
        return Statement(select(func.coalesce(highest, literal_column("0"))).where(self.step.c.saga_id == _bind("id_")))

    def _with_steps(self, sagas: Select[Any]) -> Statement:
        picked = sagas.subquery("picked")
        joined = picked.outerjoin(self.step, self.step.c.saga_id == picked.c.saga_id)
        columns = [*(picked.c[name] for name in self.saga_fields), *self.step.c]
        return Statement(select(*columns).select_from(joined).order_by(picked.c.saga_id, self.step.c.step_index))

    @cached_property
    def get(self) -> Statement:
        return self._with_steps(select(*self.saga.c).where(self._this_saga))

    @lru_cache(maxsize=2)  # noqa: B019 - one Statements a placement, kept for ever
    def unresolved_sagas(self, limited: bool) -> Statement:  # noqa: FBT001 - a cache key
        """All unresolved sagas with their steps, or the first `limit_` of them."""
        sagas = select(*self.saga.c).where(_in(UNRESOLVED, self.saga.c.state)).order_by(self.saga.c.saga_id)
        return self._with_steps(sagas.limit(_bind("limit_")) if limited else sagas)

    @property
    def _recency(self) -> ColumnElement[int]:
        return func.coalesce(self.saga.c.terminal_at, self.saga.c.started_at)

    def _snapshots(self, sagas: Select[Any]) -> Statement:
        picked = sagas.subquery("picked")
        counted = (
            select(func.count())
            .select_from(self.step)
            .where(
                self.step.c.saga_id == picked.c.saga_id,
                _in((StepState.SUCCEEDED, StepState.COMPENSATED), self.step.c.state),
            )
        )
        order = [picked.c.rank_.desc()] if "rank_" in picked.c else []
        fields = [picked.c[name] for name in self.snapshot_fields]
        return Statement(select(*fields, counted.scalar_subquery()).order_by(*order, picked.c.saga_id.desc()))

    @property
    def _snapshot_columns(self) -> list[Any]:
        return [self.saga.c[name] for name in self.snapshot_fields]

    @cached_property
    def snapshot_recent(self) -> Statement:
        recent = (
            select(*self._snapshot_columns, self._recency.label("rank_"))
            .order_by(self._recency.desc(), self.saga.c.saga_id.desc())
            .limit(_bind("limit_"))
        )
        return self._snapshots(recent)

    def find(self, present: frozenset[str], state: str | None) -> Statement:
        """Sagas newest first, by the filters that are present."""
        made = self._finds.get((present, state))
        if made is None:
            made = self._finds[present, state] = self._find(present, state)
        return made

    def _find(self, present: frozenset[str], state: str | None) -> Statement:
        c = self.saga.c
        open_states = _in(UNRESOLVED, c.state)
        filters = {
            "name": c.name == _bind("name_"),
            "key": c.key == _bind("key_"),
            "since": c.started_at >= _bind("since_"),
            "until": c.started_at < _bind("until_"),
            "open_longer_than": and_(open_states, c.started_at < _bind("at_")),
            "before": c.saga_id < _bind("before_"),
        }
        found = select(*self._snapshot_columns).where(*(filters[name] for name in sorted(present)))
        if state is not None:
            found = found.where(c.state == _literal(state))
            for indexed in (UNRESOLVED, ATTENTION):
                if state in indexed:
                    found = found.where(_in(indexed, c.state))
        return self._snapshots(found.order_by(c.saga_id.desc()).limit(_bind("limit_")))

    @cached_property
    def counts(self) -> Statement:
        return Statement(
            select(self.saga.c.state, func.count()).group_by(self.saga.c.state).order_by(self.saga.c.state)
        )

    # Pruning

    @cached_property
    def first_prunable(self) -> Statement:
        """The newest saga outside the newest `skip_`."""
        return Statement(
            select(self._recency, self.saga.c.saga_id)
            .order_by(self._recency.desc(), self.saga.c.saga_id.desc())
            .offset(_bind("skip_"))
            .limit(literal_column("1"))
        )

    @cached_property
    def prunable(self) -> Statement:
        newest = select(func.max(self.saga.c.saga_id)).scalar_subquery()
        rank = tuple_(self._recency, self.saga.c.saga_id)
        return Statement(
            select(self.saga.c.saga_id)
            .where(
                self._recency <= _bind("until_"),
                rank <= tuple_(_bind("at_"), _bind("id_")),
                _in(FINAL, self.saga.c.state),
                self.saga.c.saga_id < newest,
            )
            .order_by(self._recency, self.saga.c.saga_id)
            .limit(_bind("limit_"))
            .with_for_update(skip_locked=True)
        )

    @cached_property
    def delete_saga(self) -> tuple[Statement, Statement, Statement]:
        """Its steps, its audit rows, itself."""
        of_saga = _bind("id_")
        return (
            Statement(delete(self.step).where(self.step.c.saga_id == of_saga)),
            Statement(delete(self.audit_table).where(self.audit_table.c.saga_id == of_saga)),
            Statement(delete(self.saga).where(self._this_saga)),
        )


_largest = literal_column(str(MAX_SAGA_ID), _BIGINT)


@lru_cache(maxsize=64)
def statements_at(placement: Placement) -> Statements:
    """The statements of a placement, built once: building them for each call costs seven times the call."""
    return Statements(placement)
