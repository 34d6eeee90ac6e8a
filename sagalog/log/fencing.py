"""Who may write to a saga: its epoch, compared in the transaction that writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sagalog.errors import LeaseLost, SagaLogError, StepNotFound
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.guarded import Decided, head_of, step_refused
from sagalog.states import StepState


class Fence(NamedTuple):
    """Who may write to a saga: whoever knows its epoch."""

    saga_id: int
    epoch: int


class CancelAsked(SagaLogError):
    """The saga was asked to cancel: nothing new is begun."""

    def __init__(self, asked: str, saga_id: int, reason: str) -> None:
        self.reason = reason
        super().__init__(asked, f"it was asked to cancel: {reason}", saga_id=saga_id)


class AlreadyEnded(SagaLogError):
    """The step was ended by an earlier try whose answer was lost; this try's transaction must be rolled back."""

    def __init__(self, asked: str, saga_id: int, step_index: int, output_json: str | None) -> None:
        self.output_json = output_json
        super().__init__(asked, "the step ended before", saga_id=saga_id, step_index=step_index)


def owned(fence: Fence, decided: Decided, *, cancellable: bool = False) -> Decided:
    """Make a guarded write of anybody one of the saga's owner.

    Args:
        fence: The owner.
        decided: The write.
        cancellable: Whether it is refused once a cancel was asked for; `CancelAsked` tells.

    Returns:
        The same object.
    """
    asked, step_index, explain = decided.asked, decided.step_index, decided._explain

    def explain_to_owner(db: Database) -> SagaLogError | None:
        head = check_owner(db, asked, fence, step_index)
        refusal = explain(db)
        if refusal is not None and cancellable and head[5] is not None:
            return CancelAsked(asked, fence.saga_id, head[5])
        return refusal

    decided._values["epoch_"] = fence.epoch
    decided._explain = explain_to_owner
    decided._owned = True
    return decided


def check_owner(db: Database, asked: str, fence: Fence, step_index: int | None = None) -> tuple[Any, ...]:
    """The saga's head, if its epoch is the owner's.

    Raises:
        LeaseLost: Somebody took it over.
        SagaNotFound: It is gone.
    """
    head = head_of(db, asked, fence.saga_id, step_index)
    if head[2] != fence.epoch:
        raise LeaseLost(asked, fence.saga_id, epoch=fence.epoch, found=int(head[2] or 0), step_index=step_index)
    return head


def note_doubt(db: Database, fence: Fence, step_index: int, error: str | None, deadline_at: int) -> None:
    """Write at a pending step what was raised, and until when a try of it may be under way."""
    values = {
        "id_": fence.saga_id,
        "index_": step_index,
        "epoch_": fence.epoch,
        "error_": error,
        "deadline_": deadline_at,
    }
    if db.write(db.sql.owned.note_doubt, values) != 1:
        raise_refused(db, "doubt_step", fence, step_index, StepState.PENDING)


def raise_refused(db: Database, asked: str, fence: Fence, step_index: int, target: StepState) -> None:
    """Why a write to a step changed nothing; it always raises."""
    check_owner(db, asked, fence, step_index)
    for _name, state, *_ in db.fetch(db.sql.step_row, id_=fence.saga_id, index_=step_index):
        raise step_refused(asked, fence.saga_id, step_index, target, state)
    raise StepNotFound(asked, fence.saga_id, step_index)


def joined(asked: str, fence: Fence, operations: Sequence[Operation[Any]]) -> Operation[Any]:
    """Several writes, one transaction; it gives what the last one gives."""

    def run(db: Database) -> Any:
        given = None
        for operation in operations:
            given = operation.run(db)
        return given

    return Call(asked, Kind.SEVERAL, run, fence.saga_id)
