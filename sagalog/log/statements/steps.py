"""The statements that start, end and explain steps."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from sqlalchemy import ColumnElement, func, select, true, update

from sagalog.log.statements.clause import Statement, bind, literal, one_of
from sagalog.log.statements.tables import Tables
from sagalog.states import NOT_FINAL, OPEN_FOR_STEPS, StepState, step_sources


class StepStatements(Tables):
    """Those of one placement."""

    @property
    def _pending_step(self) -> dict[str, Any]:
        return {
            "step_index": bind("index_"),
            "name": bind("name_"),
            "state": literal(StepState.PENDING),
            "cmd_json": bind("cmd_"),
            "started_at": bind("at_"),
        }

    @cached_property
    def start_step(self) -> Statement:
        """A pending row; not in a saga that a coordinator works on, which would not know of it."""
        nobodys = self.saga.c.executor_id.is_(None)
        return Statement(self._insert_step(OPEN_FOR_STEPS, self._pending_step, nobodys).on_conflict_do_nothing())

    @cached_property
    def append_recovery_step(self) -> Statement:
        ended = {
            "step_index": bind("index_"),
            "name": bind("name_"),
            "state": bind("state_"),
            "cmd_json": bind("cmd_"),
            "output_json": bind("output_"),
            "started_at": bind("at_"),
            "ended_at": bind("at_"),
        }
        return Statement(self._insert_step(NOT_FINAL, ended).on_conflict_do_nothing())

    @property
    def _may_write(self) -> ColumnElement[bool]:
        """What more a write to a step asks for: of anybody nothing."""
        return true()

    def _end_step(self, target: StepState) -> Statement:
        return Statement(
            update(self.step)
            .where(self._this_step, one_of(step_sources(target), self.step.c.state), self._may_write)
            .values(state=literal(target), output_json=bind("output_"), ended_at=bind("at_"))
        )

    @cached_property
    def finish_step(self) -> Statement:
        return self._end_step(StepState.SUCCEEDED)

    @cached_property
    def fail_step(self) -> Statement:
        return self._end_step(StepState.FAILED)

    @cached_property
    def compensate_step(self) -> Statement:
        ended = {
            "step_index": bind("index_"),
            "name": literal("compensate"),
            "state": literal(StepState.COMPENSATED),
            "cmd_json": literal("null"),
            "output_json": bind("output_"),
            "started_at": bind("at_"),
            "ended_at": bind("at_"),
        }
        new = self._insert_step(NOT_FINAL, ended)
        return Statement(
            new.on_conflict_do_update(
                index_elements=["saga_id", "step_index"],
                set_={name: new.excluded[name] for name in ("state", "output_json", "ended_at")},
                where=one_of(step_sources(StepState.COMPENSATED), self.step.c.state),
            )
        )

    def _mark_compensated(self, which: ColumnElement[bool], sources: Iterable[str]) -> Statement:
        return Statement(
            update(self.step)
            .where(which, one_of(sources, self.step.c.state), self._saga_is(NOT_FINAL))
            .values(state=literal(StepState.COMPENSATED), ended_at=func.coalesce(self.step.c.ended_at, bind("at_")))
        )

    @cached_property
    def mark_step_compensated(self) -> Statement:
        return self._mark_compensated(self._this_step, step_sources(StepState.COMPENSATED))

    @cached_property
    def mark_all_succeeded_steps_compensated(self) -> Statement:
        return self._mark_compensated(self.step.c.saga_id == bind("id_"), (StepState.SUCCEEDED,))

    # Explaining

    @cached_property
    def step_row(self) -> Statement:
        c = self.step.c
        return Statement(select(c.name, c.state, c.cmd_json, c.output_json, c.deadline_at).where(self._this_step))

    @cached_property
    def outstanding_steps(self) -> Statement:
        c = self.step.c
        return Statement(
            select(c.step_index, c.state)
            .where(c.saga_id == bind("id_"), one_of((StepState.PENDING, StepState.SUCCEEDED), c.state))
            .order_by(c.step_index)
        )
