"""What the operations that write share: a guarded write that decides by itself, and why one is refused.

The first statement acts under its guard; only when it changed nothing does a
second one look why: the same update made before is a no-op, anything else an
error.
"""

from __future__ import annotations

from typing import Any, Self

from sagalog.errors import InvalidTransition, LogUnavailable, SagaLogError, where
from sagalog.log.database import Database, Operation
from sagalog.log.fencing import CancelAsked, Fence, check_owner, head_of
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

    Each of them is a class: its statement, and its explanation. The explaining
    SELECT may see a state that another process made after the write was
    refused, in which it would be allowed (`Changed`): then it is tried again.

    Args:
        saga_id: The saga.
        step_index: The step, or None.
        values: The statement's parameters, but for `at_`, the moment of the write.
    """

    __slots__ = ("_cancellable", "_owned", "_values")

    saga_id: int

    def __init__(self, saga_id: int, step_index: int | None, values: dict[str, Any]) -> None:
        self.saga_id = saga_id
        self.step_index = step_index
        self._values = values
        self._owned = False
        self._cancellable = False

    def owned_by(self, fence: Fence, *, cancellable: bool = False) -> Self:
        """Make it a write of the saga's owner only.

        Args:
            fence: The owner.
            cancellable: Whether it is refused once a cancel was asked for; `CancelAsked` tells.

        Returns:
            The operation itself.
        """
        self._values["epoch_"] = fence.epoch
        self._owned = True
        self._cancellable = cancellable
        return self

    def _statement(self, sql: Any) -> Statement:
        """What it is in SQL, of anybody's statements or of an owner's."""
        raise NotImplementedError

    def _explain(self, db: Database) -> SagaLogError | None:
        """Why it changed nothing; None if the same was written before."""
        raise NotImplementedError

    def run(self, db: Database) -> None:
        """Act; if nothing was changed, it was made before, or is refused."""
        values = self._values
        statement = self._statement(db.sql.owned if self._owned else db.sql)
        for _ in range(TRIES):
            values["at_"] = db.now()
            if self.kind.locked:
                changed = db.write_locked(statement, values, self.asked)
            else:
                changed = db.write(statement, values)
            if changed == 1:
                return
            refusal = self._refusal(db)
            if refusal is None:
                return
            if not isinstance(refusal, Changed):
                raise refusal
        raise LogUnavailable(
            f"{self.asked} of {where(self.saga_id, self.step_index)}",
            "the row kept changing under it",
            saga_id=self.saga_id,
            step_index=self.step_index,
            hint="Other processes work on the same saga; repeat it.",
        )

    def _refusal(self, db: Database) -> SagaLogError | None:
        if not self._owned:
            return self._explain(db)
        head = check_owner(db, self.asked, Fence(self.saga_id, self._values["epoch_"]), self.step_index)
        refusal = self._explain(db)
        if refusal is not None and self._cancellable and head[5] is not None:
            return CancelAsked(self.asked, self.saga_id, head[5])
        return refusal


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
    elif not step_sources(target):
        problem = f"the step is {found!r}, and no longer {target}"
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
