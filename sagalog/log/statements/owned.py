"""The statements of the executor that owns a saga: the same ones, each comparing the saga's epoch.

Under a lock on the saga's row, in the same statement: on Postgres a comparison
without it loses the race against a take-over, at every isolation level.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Any

from sqlalchemy import ColumnElement, and_, case, exists, func, literal_column, null, or_, select, true, update

from sagalog.log.statements.clause import Greater, Statement, bind, literal, one_of
from sagalog.log.statements.sagas import SagaStatements
from sagalog.log.statements.steps import StepStatements
from sagalog.states import CANCELLABLE, OPEN_FOR_STEPS, OWNER, UNRESOLVED, Actor, SagaState, StepState, step_sources


class OwnedStatements(SagaStatements, StepStatements):
    """Those of one placement."""

    @property
    def _this_saga(self) -> ColumnElement[bool]:
        return and_(self.saga.c.saga_id == bind("id_"), self.saga.c.epoch == bind("epoch_"))

    def _saga_is(self, states: Iterable[str]) -> ColumnElement[bool]:
        held: Any = (
            select(literal_column("1")).select_from(self.saga).where(self._this_saga, one_of(states, self.saga.c.state))
        )
        return exists(held.with_for_update(key_share=True))

    @property
    def _not_cancelled(self) -> ColumnElement[bool]:
        return self.saga.c.cancel_reason.is_(None)  # type: ignore[no-any-return]

    # Sagas

    @property
    def _new_saga(self) -> dict[str, Any]:
        return {
            **super()._new_saga,
            "state": bind("state_"),
            "version": bind("version_"),
            "executor_id": bind("executor_"),
            "epoch": bind("epoch_"),
            "run_at": bind("run_at_"),
            "deadline_at": bind("deadline_"),
        }

    @cached_property
    def mark_compensating(self) -> Statement:
        """With the reason, which recovery would not know."""
        moved = self._move_saga(SagaState.COMPENSATING, *OWNER, failure_reason=bind("reason_"), terminal_at=null())
        return Statement(moved)

    @cached_property
    def mark_failed_compensation(self) -> Statement:
        return Statement(self._fail_compensation())

    @cached_property
    def begin_undoing(self) -> Statement:
        """The same of a saga that is running: it has no `terminal_at`, and no index of that needs to be written."""
        return Statement(self._move_saga(SagaState.COMPENSATING, Actor.SAGA, failure_reason=bind("reason_")))

    @lru_cache(maxsize=1024)  # noqa: B019 - one Statements a placement, kept for ever
    def complete(self, cancellable: bool) -> Statement:  # noqa: FBT001 - a cache key
        """`completed`, with the result; refused while a step is pending, or if a cancel was asked for."""
        moved = self._move_saga(
            SagaState.COMPLETED,
            also=self._not_cancelled if cancellable else true(),
            result_json=bind("result_"),
            terminal_at=bind("at_"),
            failure_reason=null(),
        )
        return Statement(moved)

    @cached_property
    def release(self) -> Statement:
        """Nobody's; `given_` take-overs are not counted."""
        return Statement(
            update(self.saga)
            .where(self._this_saga, self.saga.c.executor_id == bind("executor_"), one_of(UNRESOLVED, self.saga.c.state))
            .values(executor_id=null(), recoveries=self.saga.c.recoveries - bind("given_"))
        )

    @cached_property
    def give_up(self) -> Statement:
        """Nobody's, and whoever ran it may not write any more."""
        return Statement(
            update(self.saga)
            .where(self._this_saga, one_of(OPEN_FOR_STEPS, self.saga.c.state))
            .values(executor_id=null(), epoch=self.saga.c.epoch + literal_column("1"))
        )

    # Steps

    @lru_cache(maxsize=1024)  # noqa: B019 - one Statements a placement, kept for ever
    def begin_step(self, cancellable: bool) -> Statement:  # noqa: FBT001 - a cache key
        """A pending row with the deadline of its first try."""
        pending = {**self._pending_step, "deadline_at": bind("deadline_")}
        also = self._not_cancelled if cancellable else true()
        return Statement(self._insert_step(OPEN_FOR_STEPS, pending, also).on_conflict_do_nothing())

    @lru_cache(maxsize=1024)  # noqa: B019 - one Statements a placement, kept for ever
    def record_step(self, cancellable: bool) -> Statement:  # noqa: FBT001 - a cache key
        """A row that was succeeded from the beginning: there is no effect that it could leave in doubt."""
        ended = {
            **self._pending_step,
            "state": literal(StepState.SUCCEEDED),
            "output_json": bind("output_"),
            "ended_at": bind("at_"),
        }
        also = self._not_cancelled if cancellable else true()
        return Statement(self._insert_step(OPEN_FOR_STEPS, ended, also).on_conflict_do_nothing())

    @property
    def _may_write(self) -> ColumnElement[bool]:
        return self._saga_is(OPEN_FOR_STEPS)

    @cached_property
    def note_doubt(self) -> Statement:
        """What was raised last, if something was, and until when a try may still be under way."""
        return self._note(bind("deadline_"), self.step.c.deadline_at.is_not_distinct_from(bind("seen_")))

    @cached_property
    def note_overdue(self) -> Statement:
        """The same; what was begun elsewhere before may be under way for longer."""
        until = Greater(func.coalesce(self.step.c.deadline_at, literal_column("0")), bind("deadline_"))
        return self._note(until, true())

    def _note(self, until: ColumnElement[int], also: ColumnElement[bool]) -> Statement:
        return Statement(
            update(self.step)
            .where(self._this_step, self.step.c.state == literal(StepState.PENDING), also, self._may_write)
            .values(error=func.coalesce(bind("error_"), self.step.c.error), deadline_at=until)
        )

    @cached_property
    def end_undo(self) -> Statement:
        """The row of an undo is done, and what it undid is undone; nothing of it if the row had ended otherwise.

        The saga's row is locked before the undo's, as everywhere: the other way round two writes would wait for each
        other. Postgres evaluates the two conditions in the order in which they stand here.
        """
        c, sources = self.step.c, step_sources(StepState.COMPENSATED)
        undo = self.step.alias("undo")
        unended: Any = select(literal_column("1")).where(
            undo.c.saga_id == bind("id_"), undo.c.step_index == bind("index_"), one_of(sources, undo.c.state)
        )
        own = c.step_index == bind("index_")
        return Statement(
            update(self.step)
            .where(
                c.saga_id == bind("id_"),
                or_(own, c.compensated_by == bind("index_")),
                one_of(sources, c.state),
                self._may_write,
                exists(unended.with_for_update(key_share=True)),
            )
            .values(
                state=literal(StepState.COMPENSATED),
                output_json=case((own, bind("output_")), else_=c.output_json),
                ended_at=func.coalesce(c.ended_at, bind("at_")),
            )
        )

    @cached_property
    def link_undo(self) -> Statement:
        """A forward step is undone by a row."""
        return Statement(
            update(self.step)
            .where(
                self._this_step,
                one_of((StepState.PENDING, StepState.SUCCEEDED), self.step.c.state),
                self._may_write,
            )
            .values(compensated_by=bind("undo_"))
        )

    @lru_cache(maxsize=1024)  # noqa: B019 - one Statements a placement, kept for ever
    def reopen(self, target: SagaState) -> Statement:
        """A saga that needs a person is taken over; that is the first take-over, however many there were."""
        moved = self._move_saga(
            target,
            Actor.RETRY,
            executor_id=bind("executor_"),
            epoch=self.saga.c.epoch + literal_column("1"),
            recoveries=literal_column("1"),
            token=func.coalesce(self.saga.c.token, bind("token_")),
            terminal_at=null(),
        )
        return Statement(moved)

    @cached_property
    def to_quarantine(self) -> Statement:
        """An open saga is given to a person."""
        return Statement(
            update(self.saga)
            .where(self._this_saga, one_of(CANCELLABLE, self.saga.c.state))
            .values(
                state=literal(SagaState.FAILED_COMPENSATION),
                executor_id=null(),
                epoch=self.saga.c.epoch + literal_column("1"),
                failure_reason=bind("reason_"),
                terminal_at=bind("at_"),
            )
        )
