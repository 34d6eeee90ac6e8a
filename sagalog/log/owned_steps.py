"""The writes of a coordinator to the steps of sagas that it owns; see `owning`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from sagalog.errors import InvalidTransition, SagaLogError, StepNotFound
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.fencing import AlreadyEnded, Fence, check_owner, note_doubt, owned, raise_refused
from sagalog.log.guarded import Decided, refused_by_saga, step_refused
from sagalog.log.statements import Statement, Statements
from sagalog.log.steps import ending
from sagalog.log.steps import mark_step_compensated as _mark_any_step_compensated
from sagalog.payload import encode, printable
from sagalog.states import OPEN_FOR_STEPS, StepState

_ASKED: Mapping[StepState, str] = {
    StepState.SUCCEEDED: "finish_step", StepState.FAILED: "fail_step", StepState.COMPENSATED: "end_undo",
}  # fmt: skip
"""What an ending is called in messages."""

_finish_step = attrgetter("finish_step")
_fail_step = attrgetter("fail_step")


def begin_step(
    fence: Fence, step_index: int, name: str, cmd_json: str, deadline_at: int, *, cancellable: bool
) -> Operation[None]:
    """A pending row, before the command's handler is called.

    Raises:
        CancelAsked: A cancel was asked for, and the saga is `cancellable`.
        LeaseLost: Another executor owns the saga.
    """
    values = {"index_": step_index, "name_": name, "cmd_": cmd_json, "deadline_": deadline_at}
    wanted = (name, StepState.PENDING, cmd_json, None)
    return _inserting(
        fence, "dispatch", lambda sql: sql.begin_step(cancellable), values, wanted, cancellable=cancellable
    )


def record_step(fence: Fence, step_index: int, name: str, output_json: str, *, cancellable: bool) -> Operation[None]:
    """A row that was succeeded from the beginning: a moment or value that the function computed once."""
    values = {"index_": step_index, "name_": name, "cmd_": "null", "output_": output_json}
    wanted = (name, StepState.SUCCEEDED, "null", output_json)
    return _inserting(
        fence, "record", lambda sql: sql.record_step(cancellable), values, wanted, cancellable=cancellable
    )


def _inserting(
    fence: Fence,
    asked: str,
    statement: Callable[[Any], Statement],
    values: dict[str, Any],
    wanted: tuple[str | None, ...],
    *,
    cancellable: bool,
) -> Operation[None]:
    index = values["index_"]

    def explain(db: Database) -> SagaLogError | None:
        for name, state, cmd, output, _ in db.fetch(db.sql.step_row, id_=fence.saga_id, index_=index):
            if (name, state, cmd, output) == wanted:
                return None
            problem = f"row {index} holds {name!r}, {state!r}, which this process did not write"
            return InvalidTransition(asked, problem, saga_id=fence.saga_id, step_index=index, found=state)
        return refused_by_saga(db, asked, fence.saga_id, index, OPEN_FOR_STEPS)

    values["id_"] = fence.saga_id
    decided = Decided(asked, Kind.WRITE, statement, values, explain, fence.saga_id, index)
    return owned(fence, decided, cancellable=cancellable)


def finish_step(fence: Fence, step_index: int, output_json: str) -> Operation[None]:
    """The step succeeded, and this is what it returned."""
    return _ended(fence, step_index, StepState.SUCCEEDED, output_json, _finish_step)


def fail_step(fence: Fence, step_index: int, reason: str) -> Operation[None]:
    """The step did nothing."""
    text = encode({"error": printable(reason)}, "fail_step", fence.saga_id, step_index)
    return _ended(fence, step_index, StepState.FAILED, text, _fail_step)


def _ended(
    fence: Fence, step_index: int, target: StepState, text: str, statement: Callable[[Statements], Statement]
) -> Operation[None]:
    return owned(fence, ending(_ASKED[target], fence.saga_id, step_index, target, text, statement))


def mark_step_compensated(fence: Fence, step_index: int) -> Operation[None]:
    """There was nothing to undo in the step."""
    decided = _mark_any_step_compensated(fence.saga_id, step_index)
    assert isinstance(decided, Decided)
    return owned(fence, decided)


def doubt_step(fence: Fence, step_index: int, error: str | None, deadline_at: int) -> Operation[None]:
    """What a try raised, and until when something of it, or of the next try, may still be under way."""
    text = None if error is None else printable(error)

    def run(db: Database) -> None:
        note_doubt(db, fence, step_index, text, deadline_at)

    return Call("doubt_step", Kind.WRITE, run, fence.saga_id, step_index)


def try_again(fence: Fence, step_index: int, deadline_at: int) -> Operation[None]:
    """A step in doubt is about to be tried again, under the same key."""
    return doubt_step(fence, step_index, None, deadline_at)


# Undos


def begin_undo(
    fence: Fence, step_index: int, name: str, cmd_json: str, deadline_at: int, undoes: Sequence[int]
) -> Operation[None]:
    """A pending row of its own, and the link of what it undoes to it."""
    begin = begin_step(fence, step_index, name, cmd_json, deadline_at, cancellable=False)

    def run(db: Database) -> None:
        begin.run(db)
        for index in undoes:
            values = {"id_": fence.saga_id, "index_": index, "epoch_": fence.epoch, "undo_": step_index}
            if db.write(db.sql.owned.link_undo, values) != 1:
                raise_refused(db, "begin_undo", fence, index, StepState.COMPENSATED)

    return Call("begin_undo", Kind.SEVERAL, run, fence.saga_id, step_index)


def end_undo(fence: Fence, step_index: int, output_json: str) -> Operation[None]:
    """An undo is done: its row and what it undid, in one statement."""

    def run(db: Database) -> None:
        if not _end_undo(db, fence, step_index, output_json):
            check_owner(db, "end_undo", fence, step_index)
            rows = db.fetch(db.sql.step_row, id_=fence.saga_id, index_=step_index)
            if [(row[1], row[3]) for row in rows] != [(StepState.COMPENSATED, output_json)]:
                raise_refused(db, "end_undo", fence, step_index, StepState.COMPENSATED)

    return Call("end_undo", Kind.SEVERAL, run, fence.saga_id, step_index)


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
