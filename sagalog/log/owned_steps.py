"""The writes of a coordinator to the steps of sagas that it owns; see `owning`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from sagalog.errors import InvalidTransition, SagaLogError, StepNotFound
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.fencing import Fence, check_owner
from sagalog.log.guarded import Decided, refused_by_saga, step_refused
from sagalog.log.statements import Statement
from sagalog.log.statements.owned import OwnedStatements
from sagalog.log.steps import FailStep, FinishStep, MarkStepCompensated
from sagalog.payload import encode, printable
from sagalog.states import OPEN_FOR_STEPS, StepState

_ASKED: Mapping[StepState, str] = {
    StepState.SUCCEEDED: "finish_step", StepState.FAILED: "fail_step", StepState.COMPENSATED: "end_undo",
}  # fmt: skip
"""What an ending is called in messages."""


class AlreadyEnded(SagaLogError):
    """The step was ended by an earlier try whose answer was lost; this try's transaction must be rolled back."""

    def __init__(self, asked: str, saga_id: int, step_index: int, output_json: str | None) -> None:
        self.output_json = output_json
        super().__init__(asked, "the step ended before", saga_id=saga_id, step_index=step_index)


class _Inserting(Decided):
    """A new row; one that is found in its place and holds the same is this process's own."""

    __slots__ = ()
    kind = Kind.WRITE
    state: ClassVar[StepState]

    def _explain(self, db: Database) -> SagaLogError | None:
        saga_id, mine = self.saga_id, self._values
        index = mine["index_"]
        wanted = (mine["name_"], self.state, mine["cmd_"], mine.get("output_"))
        for name, state, cmd, output, _ in db.fetch(db.sql.step_row, id_=saga_id, index_=index):
            if (name, state, cmd, output) == wanted:
                return None
            problem = f"row {index} holds {name!r}, {state!r}, which this process did not write"
            return InvalidTransition(self.asked, problem, saga_id=saga_id, step_index=index, found=state)
        return refused_by_saga(db, self.asked, saga_id, index, OPEN_FOR_STEPS)


class _BeginStep(_Inserting):
    __slots__ = ()
    asked = "dispatch"
    state = StepState.PENDING

    def _statement(self, sql: OwnedStatements) -> Statement:
        return sql.begin_step(self._cancellable)


class _RecordStep(_Inserting):
    __slots__ = ()
    asked = "record"
    state = StepState.SUCCEEDED

    def _statement(self, sql: OwnedStatements) -> Statement:
        return sql.record_step(self._cancellable)


def begin_step(
    fence: Fence, step_index: int, name: str, cmd_json: str, deadline_at: int, *, cancellable: bool
) -> Operation[None]:
    """A pending row, before the command's handler is called.

    Raises:
        CancelAsked: A cancel was asked for, and the saga is `cancellable`.
        LeaseLost: Another executor owns the saga.
    """
    values = {
        "id_": fence.saga_id,
        "index_": step_index,
        "name_": name,
        "cmd_": cmd_json,
        "deadline_": deadline_at,
    }
    return _BeginStep(fence.saga_id, step_index, values).owned_by(fence, cancellable=cancellable)


def record_step(fence: Fence, step_index: int, name: str, output_json: str, *, cancellable: bool) -> Operation[None]:
    """A row that was succeeded from the beginning: a moment or value that the function computed once."""
    values = {"id_": fence.saga_id, "index_": step_index, "name_": name, "cmd_": "null", "output_": output_json}
    return _RecordStep(fence.saga_id, step_index, values).owned_by(fence, cancellable=cancellable)


def finish_step(fence: Fence, step_index: int, output_json: str) -> Operation[None]:
    """The step succeeded, and this is what it returned."""
    return FinishStep.with_output(fence.saga_id, step_index, output_json).owned_by(fence)


def fail_step(fence: Fence, step_index: int, reason: str) -> Operation[None]:
    """The step did nothing."""
    text = encode({"error": printable(reason)}, "fail_step", fence.saga_id, step_index)
    return FailStep.with_output(fence.saga_id, step_index, text).owned_by(fence)


def mark_step_compensated(fence: Fence, step_index: int) -> Operation[None]:
    """There was nothing to undo in the step."""
    return MarkStepCompensated(fence.saga_id, step_index).owned_by(fence)


def note_overdue(db: Database, fence: Fence, step_index: int, error: str, deadline_at: int) -> None:
    """Write at a pending step that its handler hangs; a later moment stays, and no lock is waited for.

    Args:
        db: The database.
        fence: The owner.
        step_index: The step.
        error: What is the matter.
        deadline_at: Until when a try of it may be under way; Unix milliseconds.
    """
    values = {
        "id_": fence.saga_id,
        "index_": step_index,
        "epoch_": fence.epoch,
        "error_": error,
        "deadline_": deadline_at,
    }
    if db.write_unless_locked(db.sql.owned.note_overdue, values) != 1:
        raise_refused(db, "doubt_step", fence, step_index, StepState.PENDING)


def raise_refused(db: Database, asked: str, fence: Fence, step_index: int, target: StepState) -> None:
    """Why a write to a step changed nothing; it always raises."""
    check_owner(db, asked, fence, step_index)
    for _name, state, *_ in db.fetch(db.sql.step_row, id_=fence.saga_id, index_=step_index):
        raise step_refused(asked, fence.saga_id, step_index, target, state)
    raise StepNotFound(asked, fence.saga_id, step_index)


def doubt_step(fence: Fence, step_index: int, error: str | None, deadline_at: int, seen: int | None) -> Operation[None]:
    """What a try raised, and until when something of it, or of the next try, may still be under way.

    Args:
        fence: The owner.
        step_index: The step, pending.
        error: What was raised; None leaves what is there.
        deadline_at: Unix milliseconds.
        seen: What the log holds until now: this write may be sent again, and land after a later one.
    """
    values = {
        "id_": fence.saga_id,
        "index_": step_index,
        "epoch_": fence.epoch,
        "error_": None if error is None else printable(error),
        "deadline_": deadline_at,
        "seen_": seen,
    }

    def run(db: Database) -> None:
        if db.write(db.sql.owned.note_doubt, values) == 1:
            return
        check_owner(db, "doubt_step", fence, step_index)
        for _name, state, _cmd, _output, held in db.fetch(db.sql.step_row, id_=fence.saga_id, index_=step_index):
            if state == StepState.PENDING and held == deadline_at:
                return  # written before
            if db.write(db.sql.owned.note_doubt, {**values, "seen_": held}) == 1:
                return  # somebody has changed it by hand
        raise_refused(db, "doubt_step", fence, step_index, StepState.PENDING)

    return Call("doubt_step", Kind.WRITE, run, fence.saga_id, step_index)


def try_again(fence: Fence, step_index: int, deadline_at: int, seen: int | None) -> Operation[None]:
    """A step in doubt is about to be tried again, under the same key."""
    return doubt_step(fence, step_index, None, deadline_at, seen)


# Undos


def begin_undo(
    fence: Fence, step_index: int, name: str, cmd_json: str, deadline_at: int, undoes: Sequence[int]
) -> Operation[None]:
    """A pending row of its own, and the link of what it undoes to it."""
    begin = begin_step(fence, step_index, name, cmd_json, deadline_at, cancellable=False)
    return _BeginUndo(begin, fence, step_index, undoes)


class _BeginUndo(Operation[None]):
    __slots__ = ("_begin", "_fence", "_index", "_undoes")
    asked = "begin_undo"
    kind = Kind.SEVERAL

    def __init__(self, begin: Operation[None], fence: Fence, step_index: int, undoes: Sequence[int]) -> None:
        self.saga_id = fence.saga_id
        self.step_index = self._index = step_index
        self._begin = begin
        self._fence = fence
        self._undoes = undoes

    def run(self, db: Database) -> None:
        self._begin.run(db)
        fence = self._fence
        for index in self._undoes:
            values = {"id_": fence.saga_id, "index_": index, "epoch_": fence.epoch, "undo_": self._index}
            if db.write(db.sql.owned.link_undo, values) != 1:
                raise_refused(db, self.asked, fence, index, StepState.COMPENSATED)


def end_undo(fence: Fence, step_index: int, output_json: str) -> Operation[None]:
    """An undo is done: its row and what it undid, in one statement."""
    return _EndUndo(fence, step_index, output_json)


class _EndUndo(Operation[None]):
    __slots__ = ("_fence", "_index", "_output")
    asked = "end_undo"
    kind = Kind.SEVERAL

    def __init__(self, fence: Fence, step_index: int, output_json: str) -> None:
        self.saga_id = fence.saga_id
        self.step_index = self._index = step_index
        self._fence = fence
        self._output = output_json

    def run(self, db: Database) -> None:
        fence, index, output = self._fence, self._index, self._output
        if not _end_undo(db, fence, index, output):
            check_owner(db, self.asked, fence, index)
            rows = db.fetch(db.sql.step_row, id_=fence.saga_id, index_=index)
            if [(row[1], row[3]) for row in rows] != [(StepState.COMPENSATED, output)]:
                raise_refused(db, self.asked, fence, index, StepState.COMPENSATED)


def _end_undo(db: Database, fence: Fence, step_index: int, output_json: str) -> bool:
    return db.write(db.sql.owned.end_undo, _end_of(db, fence, step_index, output_json)) > 0


def _end_of(db: Database, fence: Fence, step_index: int, output_json: str) -> dict[str, Any]:
    return {
        "id_": fence.saga_id,
        "index_": step_index,
        "epoch_": fence.epoch,
        "output_": output_json,
        "at_": db.now(),
    }


# What commits with a transactional handler's own writes: once, or the handler's writes must not commit either


def finish_step_once(fence: Fence, step_index: int, output_json: str) -> Operation[None]:
    """The step succeeded now.

    Raises:
        AlreadyEnded: It had succeeded before.
        LeaseLost: Another executor owns the saga.
    """
    return _once(fence, step_index, output_json, StepState.SUCCEEDED, _finish)


def end_undo_once(fence: Fence, step_index: int, output_json: str) -> Operation[None]:
    """The undo is done now; see `finish_step_once`."""
    return _once(fence, step_index, output_json, StepState.COMPENSATED, _end_undo)


def _finish(db: Database, fence: Fence, step_index: int, output_json: str) -> bool:
    return db.write(db.sql.owned.finish_step, _end_of(db, fence, step_index, output_json)) == 1


def _once(
    fence: Fence,
    step_index: int,
    output_json: str,
    target: StepState,
    end: Callable[[Database, Fence, int, str], bool],
) -> Operation[None]:
    asked = _ASKED[target]

    def run(db: Database) -> None:
        if end(db, fence, step_index, output_json):
            return
        check_owner(db, asked, fence, step_index)
        for _name, state, _cmd, output, _deadline in db.fetch(db.sql.step_row, id_=fence.saga_id, index_=step_index):
            if state == target:
                raise AlreadyEnded(asked, fence.saga_id, step_index, output)
            raise step_refused(asked, fence.saga_id, step_index, target, state)
        raise StepNotFound(asked, fence.saga_id, step_index)

    return Call(asked, Kind.SEVERAL, run, fence.saga_id, step_index)
