"""The statements of operators and of pruning."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

from sqlalchemy import Select, and_, delete, exists, func, insert, literal_column, or_, select, tuple_, update

from sagalog.log.statements.clause import Statement, bind, literal, one_of
from sagalog.log.statements.tables import Tables
from sagalog.states import FINAL, OPEN_FOR_STEPS, Actor, SagaState, StepState, step_sources


class SettlingStatements(Tables):
    """Those of one placement."""

    # An operator's settling

    @lru_cache(maxsize=1024)  # noqa: B019 - one Statements a placement, kept for ever
    def resolve(self, target: SagaState) -> Statement:
        """An operator's settling of a saga that needs a person; it raises the epoch."""
        epoch = self.saga.c.epoch + literal_column("1")
        return Statement(self._move_saga(target, Actor.OPERATOR, terminal_at=bind("at_"), epoch=epoch))

    @lru_cache(maxsize=1024)  # noqa: B019 - one Statements a placement, kept for ever
    def resolve_step(self, target: StepState) -> Statement:
        """An operator's settling of a step; not before nothing of its last try can still be under way."""
        unowned = and_(
            self._this_saga,
            or_(
                one_of((SagaState.FAILED, SagaState.FAILED_COMPENSATION), self.saga.c.state),
                and_(one_of(OPEN_FOR_STEPS, self.saga.c.state), self.saga.c.executor_id.is_(None)),
            ),
        )
        ended = self.step.c.state != literal(StepState.PENDING)
        settled = or_(ended, self.step.c.deadline_at.is_(None), self.step.c.deadline_at <= bind("at_"))
        return Statement(
            update(self.step)
            .where(self._this_step, one_of(step_sources(target), self.step.c.state), settled)
            .where(exists(select(literal_column("1")).select_from(self.saga).where(unowned)))
            .values(
                state=literal(target),
                output_json=func.coalesce(bind("output_"), self.step.c.output_json),
                ended_at=func.coalesce(self.step.c.ended_at, bind("at_")),
            )
        )

    @cached_property
    def raise_epoch(self) -> Statement:
        """Who worked on a saga of a coordinator has lost it, and anybody may take it."""
        c = self.saga.c
        one: Any = literal_column("1")
        return Statement(
            update(self.saga)
            .where(self._this_saga, c.epoch >= one)
            .values(epoch=c.epoch + one, executor_id=literal_column("NULL"))
        )

    @cached_property
    def write_audit(self) -> Statement:
        names = ("saga_id", "step_index", "action", "actor", "note", "at", "state_before", "state_after")
        binds = ("id_", "index_", "action_", "actor_", "note_", "at_", "state_before_", "state_after_")
        return Statement(insert(self.audit_table).values(dict(zip(names, map(bind, binds), strict=True))).inline())

    @cached_property
    def audit(self) -> Statement:
        return Statement(
            select(*self.audit_table.c)
            .where(self.audit_table.c.saga_id == bind("id_"))
            .order_by(self.audit_table.c.audit_id)
        )

    # Pruning

    @cached_property
    def first_prunable(self) -> Statement:
        """The newest saga outside the newest `skip_`."""
        return Statement(
            select(self._recency, self.saga.c.saga_id)
            .order_by(self._recency.desc(), self.saga.c.saga_id.desc())
            .offset(bind("skip_"))
            .limit(literal_column("1"))
        )

    def _prunable(self, *what: Any) -> Select[Any]:
        newest = select(func.max(self.saga.c.saga_id)).scalar_subquery()
        rank = tuple_(self._recency, self.saga.c.saga_id)
        return (
            select(*what)
            .select_from(self.saga)
            .where(
                self._recency <= bind("until_"),
                rank <= tuple_(bind("at_"), bind("id_")),
                one_of(FINAL, self.saga.c.state),
                self.saga.c.saga_id < newest,
            )
        )

    @cached_property
    def prunable(self) -> Statement:
        return Statement(
            self._prunable(self.saga.c.saga_id)
            .order_by(self._recency, self.saga.c.saga_id)
            .limit(bind("limit_"))
            .with_for_update(skip_locked=True)
        )

    @cached_property
    def count_prunable(self) -> Statement:
        return Statement(self._prunable(func.count()))

    @cached_property
    def delete_saga(self) -> tuple[Statement, Statement, Statement]:
        """Its steps, its audit rows, itself."""
        of_saga = bind("id_")
        return (
            Statement(delete(self.step).where(self.step.c.saga_id == of_saga)),
            Statement(delete(self.audit_table).where(self.audit_table.c.saga_id == of_saga)),
            Statement(delete(self.saga).where(self._this_saga)),
        )
