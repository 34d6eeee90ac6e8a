"""The writes of a coordinator to the rows of sagas that it owns.

All of them may be repeated: a row that is found in place of one's own insert,
under one's own epoch, is one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.fencing import Fence
from sagalog.log.owned_steps import note_overdue
from sagalog.log.sagas import (
    Drawn,
    MarkCompensating,
    MarkFailedCompensation,
    Move,
    NewSaga,
    TerminateCompensated,
    TerminateFailed,
    new_token,
)
from sagalog.log.statements import Statement
from sagalog.log.statements.owned import OwnedStatements
from sagalog.log.statements.sagas import SagaStatements
from sagalog.payload import printable
from sagalog.states import OWNER, SagaState


def begin_saga(
    name: str,
    input_json: str,
    *,
    key: str | None,
    version: int,
    executor_id: str | None,
    deadline_at: int | None = None,
    run_at: int | None = None,
    token: str | None = None,
    same: Callable[[str], bool] | None = None,
) -> Operation[Drawn]:
    """Create a saga that runs under an executor, or, without one, is submitted; or find the one of the key.

    Args:
        name: The definition's.
        input_json: The input, encoded.
        key: The start's idempotency key, or None.
        version: The definition's.
        executor_id: Who runs it; None submits it for any worker.
        deadline_at: After it the saga is undone; Unix milliseconds.
        run_at: A submitted saga is not started before; Unix milliseconds.
        token: Random; one is made if none is given.
        same: Whether an input that the log holds under the key, and that is another text, is this one.

    Raises:
        KeyConflict: The key was used with another input.
    """
    asked = "submit" if executor_id is None else "run"
    values = {
        "name_": name,
        "input_": input_json,
        "token_": token or new_token(),
        "key_": key,
        "state_": SagaState.SUBMITTED.value if executor_id is None else SagaState.RUNNING.value,
        "version_": version,
        "executor_": executor_id,
        "epoch_": 0 if executor_id is None else 1,
        "run_at_": run_at,
        "deadline_": deadline_at,
    }
    new = NewSaga(asked, values, _owned_statements, same)
    if executor_id is not None:
        return Call(asked, Kind.WRITE, new.drawn)

    def run(db: Database) -> Drawn:
        drawn = new.drawn(db)
        if db.may_notify and drawn.created:
            db.fetch(db.sql.executors.notify, channel_=db.sql.executors.channel)
        return drawn

    return Call(asked, Kind.SEVERAL, run)


def _owned_statements(db: Database) -> SagaStatements:
    return db.sql.owned


class _BeginUndoing(MarkCompensating):
    __slots__ = ()
    by = OWNER

    def run(self, db: Database) -> None:
        if db.write(db.sql.owned.begin_undoing, self._values) != 1:
            super().run(db)  # it is not running any more, or not its owner's


def mark_compensating(fence: Fence, reason: str) -> Operation[None]:
    """The saga is being undone, and why."""
    return _BeginUndoing(fence.saga_id, printable(reason)).owned_by(fence)


def fail_compensation(fence: Fence, reason: str) -> Operation[None]:
    """The saga needs a person."""
    return MarkFailedCompensation(fence.saga_id, printable(reason)).owned_by(fence)


def compensated(fence: Fence, reason: str) -> Operation[None]:
    """All that was done is undone; refused while a step is pending or succeeded."""
    return TerminateCompensated(fence.saga_id, printable(reason)).owned_by(fence)


def failed(fence: Fence, reason: str) -> Operation[None]:
    """Undoing did not run, or did not finish; recovery owns it."""
    return TerminateFailed(fence.saga_id, printable(reason)).owned_by(fence)


class _Complete(Move):
    # Not LOCKED, though its snapshot may be older than its lock: of a saga with an executor only that one begins
    # steps, and whatever it began has ended.
    __slots__ = ()
    asked = "complete"
    kind = Kind.WRITE
    target = SagaState.COMPLETED

    def __init__(self, saga_id: int, result_json: str) -> None:
        super().__init__(saga_id, None)
        self._values["result_"] = result_json

    def _statement(self, sql: OwnedStatements) -> Statement:
        return sql.complete(self._cancellable)


def complete(fence: Fence, result_json: str, *, cancellable: bool) -> Operation[None]:
    """Everything is done; refused while a step is pending, or, if it still can be, when a cancel was asked for.

    Raises:
        CancelAsked: A cancel was asked for.
    """
    return _Complete(fence.saga_id, result_json).owned_by(fence, cancellable=cancellable)


def release(fence: Fence, executor_id: str, *, counted: bool) -> Operation[None]:
    """Give a saga back: any executor may take it over.

    Args:
        fence: The owner.
        executor_id: The owner's process; a claim that another one won is not given back in its place.
        counted: Whether this take-over counts; not if nothing could be done for the saga.
    """

    def run(db: Database) -> None:
        values = {"id_": fence.saga_id, "epoch_": fence.epoch, "executor_": executor_id}
        db.write_unless_locked(db.sql.owned.release, {**values, "given_": 0 if counted else 1})

    return Call("release", Kind.WRITE, run, fence.saga_id)


def give_up(fence: Fence, step_index: int | None = None, error: str = "", deadline_at: int = 0) -> Operation[None]:
    """Whoever works on the saga here may not write to it any more, and it is anybody's.

    Args:
        fence: The owner.
        step_index: The step whose handler outlived its timeout, while its thread hangs; None if there is none.
        error: What is noted at it.
        deadline_at: Until when something of its try may still be under way; Unix milliseconds.
    """

    def run(db: Database) -> None:
        if step_index is not None:
            note_overdue(db, fence, step_index, error, deadline_at)
        db.write_unless_locked(db.sql.owned.give_up, {"id_": fence.saga_id, "epoch_": fence.epoch})

    return Call("give_up", Kind.SEVERAL, run, fence.saga_id, step_index)


def joined(asked: str, fence: Fence, operations: Sequence[Operation[Any]]) -> Operation[Any]:
    """Several writes, one transaction; it gives what the last one gives."""
    return _Joined(asked, fence, operations)


class _Joined(Operation[Any]):
    __slots__ = ("_operations", "asked")
    kind = Kind.SEVERAL

    def __init__(self, asked: str, fence: Fence, operations: Sequence[Operation[Any]]) -> None:
        self.saga_id = fence.saga_id
        self.step_index = None
        self.asked = asked
        self._operations = operations

    def run(self, db: Database) -> Any:
        given = None
        for operation in self._operations:
            given = operation.run(db)
        return given
