"""What operators do to open sagas: give one back to recovery, or all of them to a person. Each action is audited."""

from __future__ import annotations

from typing import NamedTuple

from sagalog.errors import InvalidTransition
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.fencing import Fence, head_of
from sagalog.log.operating import check_signed, write_audit
from sagalog.log.sagas import new_token
from sagalog.payload import printable
from sagalog.states import SagaState, StepState

BATCH = 200


def reopen(fence: Fence, target: SagaState, executor_id: str, *, note: str, actor: str, again: bool) -> Operation[bool]:
    """Take a saga that needs a person over, to bring it to an end.

    Args:
        fence: The saga, in failed_compensation, and the epoch that it gets: one more than it has.
        target: running, to go forward, or compensating, to be undone.
        executor_id: Who takes it: in the same statement, for any other process would recover it as it does others.
        note: Why; it stays in the audit.
        actor: Who says so.
        again: Whether a step in doubt may be sent again under its key.

    Returns:
        True.

    Raises:
        SagaNotFound: No such saga.
        InvalidTransition: It is in another state, or a step is in doubt.
    """
    asked, saga_id, token = "retry", fence.saga_id, new_token()
    check_signed(note, actor, asked, saga_id)

    def run(db: Database) -> bool:
        found = str(head_of(db, asked, saga_id)[1])
        pending = [i for i, s in db.fetch(db.sql.outstanding_steps, id_=saga_id) if s == StepState.PENDING]
        if found == SagaState.FAILED_COMPENSATION and pending and not again:
            raise InvalidTransition(
                asked,
                f"step {pending[0]} is in doubt",
                saga_id=saga_id,
                step_index=pending[0],
                found=found,
                hint=f"Find out what became of it, and say so: sagalog resolve-step {saga_id} {pending[0]}. "
                "Or send it again under its key: --again.",
            )
        values = {"id_": saga_id, "epoch_": fence.epoch - 1, "executor_": executor_id, "token_": token}
        if db.write(db.sql.owned.reopen(target), values) != 1:
            problem = f"the saga is {found!r}, and only one in 'failed_compensation' is tried again"
            if found == SagaState.FAILED_COMPENSATION:  # as read, before the write waited for somebody else's
                found = str(head_of(db, asked, saga_id)[1])
                problem = f"somebody else moved the saga meanwhile; it is {found!r}"
            raise InvalidTransition(
                asked,
                problem,
                saga_id=saga_id,
                found=found,
                hint="recover() owns what is failed; what has ended stays.",
            )
        write_audit(db, asked, saga_id, None, note, actor, found, target)
        return True

    return Call(asked, Kind.SEVERAL, run, saga_id)


class Moved(NamedTuple):
    """What a batch did.

    Attributes:
        moved: How many sagas it moved.
        more: Whether there may be more: it saw some, which another process may have claimed meanwhile.
    """

    moved: int
    more: bool


def quarantine_batch(*, note: str, actor: str) -> Operation[Moved]:
    """Give open sagas to a person, some hundred in one transaction.

    Args:
        note: Why; it becomes the reason of each, and stays in the audit.
        actor: Who says so.
    """
    asked = "quarantine"
    check_signed(note, actor, asked, None)
    reason = f"quarantine: {printable(note)}"

    def run(db: Database) -> Moved:
        moved = 0
        seen = db.fetch(db.sql.executors.open_sagas, limit_=BATCH)
        for saga_id, epoch, state in seen:
            values = {"id_": saga_id, "epoch_": epoch, "reason_": reason, "at_": db.now()}
            if db.write(db.sql.owned.to_quarantine, values) == 1:
                write_audit(db, asked, saga_id, None, note, actor, state, SagaState.FAILED_COMPENSATION)
                moved += 1
        return Moved(moved, more=bool(seen))

    return Call(asked, Kind.SEVERAL, run)
