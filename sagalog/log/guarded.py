"""What the operations that write share: a guarded write that decides by itself, and why one is refused.

The first statement acts under its guard; only when it changed nothing does a
second one look why: the same update made before is a no-op, anything else an
error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sagalog.errors import InvalidTransition, LogUnavailable, SagaLogError, SagaNotFound, where
from sagalog.log.database import Database, Kind, Operation
from sagalog.log.statements import Statement
from sagalog.states import FINAL, OUTSTANDING, SagaState, StepState, step_sources

TRIES = 20
"""So often what other processes changed meanwhile is tried again."""

_SETTLED_BY = "An operator settles it with resolve(), or sends it again with mark_compensating()."


class Changed(SagaLogError):
    """The row changed between the write and the look at it."""

    def __init__(self) -> None:
        super().__init__("", "")


class Decided(Operation[None]):
    """A guarded write that decides by itself, and what explains it when it changed nothing.

    The explaining SELECT may see a state that another process made after the
    write was refused, in which it would be allowed: then it is tried again.
    """

    __slots__ = ("_explain", "_owned", "_statement", "_values")

    def __init__(
        self,
        asked: str,
        kind: Kind,
        statement: Callable[[Any], Statement],
        values: dict[str, Any],
        explain: Callable[[Database], SagaLogError | None],
        saga_id: int,
        step_index: int | None = None,
    ) -> None:
        self.asked = asked
        self.kind = kind
        self.saga_id: int = saga_id
        self.step_index = step_index
        self._statement = statement
        self._values = values
        self._explain = explain
        self._owned = False

    def run(self, db: Database) -> None:
        """Act; if nothing was changed, it was made before, or is refused."""
        if self._acted(db):
            return
        for _ in range(TRIES):
            refusal = self._explain(db)
            if refusal is None:
                return
            if not isinstance(refusal, Changed):
                raise refusal
            if self._acted(db):
                return
        raise LogUnavailable(
            f"{self.asked} of {where(self.saga_id, self.step_index)}",
            "the row kept changing under it",
            saga_id=self.saga_id,
            step_index=self.step_index,
            hint="Other processes work on the same saga; repeat it.",
        )

    def _acted(self, db: Database) -> bool:
        values = self._values
        values["at_"] = db.now()
        statement = self._statement(db.sql.owned if self._owned else db.sql)
        if self.kind is Kind.LOCKED:
            return db.write_locked(statement, values, self.asked) == 1
        return db.write(statement, values) == 1


def steps_in_the_way(db: Database, asked: str, saga_id: int, target: SagaState, found: str) -> InvalidTransition | None:
    """The refusal of an ending for which a step is still pending or not undone; None if there is none."""
    open_states = OUTSTANDING.get(target, ())
    rows = [(index, state) for index, state in db.fetch(db.sql.outstanding_steps, id_=saga_id) if state in open_states]
    if not rows:
        return None
    named = ", ".join(f"{index} ({state})" for index, state in rows[:5])
    more = "" if len(rows) <= 5 else f" and {len(rows) - 5} more"
    return InvalidTransition(
        asked,
        f"its steps {named}{more} stand in the way",
        saga_id=saga_id,
        step_index=rows[0][0],
        found=found,
        hint="Settle each first: resolve_step(), or `sagalog resolve-step`."
        if asked == "resolve"
        else "End each first: finish_step(), fail_step(), compensate_step() or mark_step_compensated().",
    )


def head_of(db: Database, asked: str, saga_id: int, step_index: int | None = None) -> tuple[str | int | None, ...]:
    for row in db.fetch(db.sql.saga_head, id_=saga_id):
        return tuple(row)
    raise SagaNotFound(asked, saga_id, step_index)


def refused_by_saga(
    db: Database, asked: str, saga_id: int, step_index: int | None, allowed: tuple[SagaState, ...]
) -> SagaLogError:
    state = str(head_of(db, asked, saga_id, step_index)[1])
    return Changed() if state in allowed else saga_refused(asked, saga_id, state, allowed, step_index)


def saga_refused(
    asked: str, saga_id: int, found: str | int | None, allowed: tuple[SagaState, ...], step_index: int | None = None
) -> InvalidTransition:
    state = str(found)
    if state in FINAL:
        hint = "It has ended, and nothing changes it any more."
    elif state == SagaState.FAILED_COMPENSATION:
        hint = _SETTLED_BY
    elif state == SagaState.FAILED:
        hint = "Recovery owns it: mark_compensating() comes first."
    else:
        hint = "get() shows it."
    return InvalidTransition(
        asked,
        f"the saga is {state!r}, and this needs one of {', '.join(allowed)}",
        saga_id=saga_id,
        step_index=step_index,
        found=state,
        hint=hint,
    )


def step_refused(asked: str, saga_id: int, step_index: int, target: StepState, found: str) -> InvalidTransition:
    if found == target:
        problem = f"the step is {found!r} already, with another output"
    else:
        problem = f"the step is {found!r}, and only {' or '.join(step_sources(target))} can become {target}"
    return InvalidTransition(
        asked,
        problem,
        saga_id=saga_id,
        step_index=step_index,
        found=found,
        hint="What is recorded stays; get() shows it.",
    )
