"""The writes of a coordinator to a saga that it owns: each compares the saga's epoch, in the transaction that writes.

All of them may be repeated: a row that is found in place of one's own insert,
under one's own epoch, is one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from sagalog.errors import InvalidTransition, LeaseLost, SagaLogError, StepNotFound
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.guarded import Decided, head_of, refused_by_saga, step_refused
from sagalog.log.sagas import Drawn, NewSaga, moving, new_token
from sagalog.log.statements import Statement, Statements
from sagalog.log.statements.sagas import SagaStatements
from sagalog.log.steps import ending
from sagalog.log.steps import mark_step_compensated as _mark_any_step_compensated
from sagalog.payload import encode, printable
from sagalog.states import OPEN_FOR_STEPS, SagaState, StepState


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


class Owned(Decided):
    """A guarded write of the saga's owner.

    Args:
        fence: The owner.
        decided: The same write of anybody.
    """

    __slots__ = ("_epoch", "_unowned")

    def __init__(self, fence: Fence, decided: Decided) -> None:
        values = decided._values
        values["epoch_"] = self._epoch = fence.epoch
        self._unowned = decided._explain
        super().__init__(
            decided.asked, decided.kind, decided._statement, values, self._why, fence.saga_id, decided.step_index
        )

    def _chosen(self, db: Database) -> Statement:
        return self._statement(db.sql.owned)  # type: ignore[arg-type]

    def _why(self, db: Database) -> SagaLogError | None:
        check_owner(db, self.asked, Fence(self.saga_id, self._epoch), self.step_index)
        return self._unowned(db)


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


# Sagas


def begin_saga(
    name: str,
    input_json: str,
    *,
    key: str | None,
    version: int,
    executor_id: str | None,
    deadline_at: int | None = None,
    run_at: int | None = None,
    trace_context: str | None = None,
    token: str | None = None,
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
        trace_context: Where it was started, for telemetry.
        token: Random; one is made if none is given.

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
        "trace_": trace_context,
    }
    new = NewSaga(asked, values, _owned_statements)
    if executor_id is not None:
        return Call(asked, Kind.INSERT, new.drawn)

    def run(db: Database) -> Drawn:
        drawn = new.drawn(db)
        if db.on_postgres and drawn.created:
            db.fetch(db.sql.executors.notify, channel_=db.sql.executors.channel)
        return drawn

    return Call(asked, Kind.SEVERAL, run)


def _owned_statements(db: Database) -> SagaStatements:
    return db.sql.owned


def mark_compensating(fence: Fence, reason: str) -> Operation[None]:
    """The saga is being undone, and why."""
    return _moved(fence, SagaState.COMPENSATING, _mark_compensating, reason)


def fail_compensation(fence: Fence, reason: str) -> Operation[None]:
    """The saga needs a person."""
    return _moved(fence, SagaState.FAILED_COMPENSATION, _mark_failed_compensation, reason)


def compensated(fence: Fence, reason: str) -> Operation[None]:
    """All that was done is undone; refused while a step is pending or succeeded."""
    return _moved(fence, SagaState.COMPENSATED, lambda sql: sql.terminate(SagaState.COMPENSATED), reason, Kind.LOCKED)


def failed(fence: Fence, reason: str) -> Operation[None]:
    """Undoing did not run, or did not finish; recovery owns it."""
    return _moved(fence, SagaState.FAILED, lambda sql: sql.terminate(SagaState.FAILED), reason)


_mark_compensating = attrgetter("mark_compensating")
_mark_failed_compensation = attrgetter("mark_failed_compensation")


def _moved(
    fence: Fence,
    target: SagaState,
    statement: Callable[[Statements], Statement],
    reason: str | None,
    kind: Kind = Kind.WRITE,
) -> Operation[None]:
    text = None if reason is None else printable(reason)
    return Owned(fence, moving(target.value, fence.saga_id, target, kind, statement, text))


def complete(fence: Fence, result_json: str, *, cancellable: bool) -> Operation[None]:
    """Everything is done; refused while a step is pending, or, if it still can be, when a cancel was asked for.

    Raises:
        CancelAsked: A cancel was asked for.
    """
    asked = "complete"
    target = SagaState.COMPLETED

    def statement(sql: Any) -> Statement:
        chosen: Statement = sql.complete(cancellable)
        return chosen

    decided = moving(asked, fence.saga_id, target, Kind.LOCKED, statement, None)
    unrefused = decided._explain

    def explain(db: Database) -> SagaLogError | None:
        head = head_of(db, asked, fence.saga_id)
        _refuse_cancelled(asked, fence, head, cancellable=cancellable and head[1] != target)
        return unrefused(db)

    decided._explain = explain
    decided._values["result_"] = result_json
    return Owned(fence, decided)


def _refuse_cancelled(asked: str, fence: Fence, head: tuple[Any, ...], *, cancellable: bool) -> None:
    if cancellable and head[5] is not None:
        raise CancelAsked(asked, fence.saga_id, head[5])


def release(fence: Fence, executor_id: str, *, counted: bool) -> Operation[None]:
    """Give a saga back: any executor may take it over.

    Args:
        fence: The owner.
        executor_id: The owner's process; a claim that another one won is not given back in its place.
        counted: Whether this take-over counts; not if nothing could be done for the saga.
    """

    def run(db: Database) -> None:
        values = {"id_": fence.saga_id, "epoch_": fence.epoch, "executor_": executor_id}
        db.write(db.sql.owned.release, {**values, "given_": 0 if counted else 1})

    return Call("release", Kind.WRITE, run, fence.saga_id)


def release_begun(token: str, executor_id: str) -> Operation[None]:
    """Give back a saga that may have been begun under this token, when its start was stopped before its answer."""

    def run(db: Database) -> None:
        for saga_id, _state in db.fetch(db.sql.saga_of_token, token_=token):
            release(Fence(saga_id, 1), executor_id, counted=True).run(db)

    return Call("release", Kind.SEVERAL, run)


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
            _note(db, fence, step_index, error, deadline_at)
        db.write(db.sql.owned.give_up, {"id_": fence.saga_id, "epoch_": fence.epoch})

    return Call("give_up", Kind.SEVERAL, run, fence.saga_id, step_index)


# Steps


def begin_step(
    fence: Fence, step_index: int, name: str, cmd_json: str, deadline_at: int, *, cancellable: bool
) -> Operation[None]:
    """A pending row, before the command's handler is called.

    Raises:
        CancelAsked: A cancel was asked for, and the saga is `cancellable`.
        LeaseLost: Another executor owns the saga.
    """
    values = {"index_": step_index, "name_": name, "cmd_": cmd_json, "deadline_": deadline_at}
    wanted = (name, StepState.PENDING.value, cmd_json, None)
    return _inserting(
        fence, "dispatch", lambda sql: sql.begin_step(cancellable), values, wanted, cancellable=cancellable
    )


def record_step(fence: Fence, step_index: int, name: str, output_json: str, *, cancellable: bool) -> Operation[None]:
    """A row that was succeeded from the beginning: a moment or value that the function computed once."""
    values = {"index_": step_index, "name_": name, "cmd_": "null", "output_": output_json}
    wanted = (name, StepState.SUCCEEDED.value, "null", output_json)
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
) -> Owned:
    index = values["index_"]

    def explain(db: Database) -> SagaLogError | None:
        for name, state, cmd, output, _ in db.fetch(db.sql.step_row, id_=fence.saga_id, index_=index):
            if (name, state, cmd, output) == wanted:
                return None
            problem = f"row {index} holds {name!r}, {state!r}, which this process did not write"
            return InvalidTransition(asked, problem, saga_id=fence.saga_id, step_index=index, found=state)
        head = head_of(db, asked, fence.saga_id, index)
        _refuse_cancelled(asked, fence, head, cancellable=cancellable)
        return refused_by_saga(db, asked, fence.saga_id, index, OPEN_FOR_STEPS)

    values["id_"] = fence.saga_id
    return Owned(fence, Decided(asked, Kind.WRITE, statement, values, explain, fence.saga_id, index))


def finish_step(fence: Fence, step_index: int, output_json: str) -> Operation[None]:
    """The step succeeded, and this is what it returned."""
    return _ended(fence, step_index, StepState.SUCCEEDED, output_json, attrgetter("finish_step"))


def fail_step(fence: Fence, step_index: int, reason: str) -> Operation[None]:
    """The step did nothing."""
    text = encode({"error": printable(reason)}, "fail_step", fence.saga_id, step_index)
    return _ended(fence, step_index, StepState.FAILED, text, attrgetter("fail_step"))


def _ended(
    fence: Fence, step_index: int, target: StepState, text: str, statement: Callable[[Statements], Statement]
) -> Owned:
    return Owned(fence, ending(statement_name(target), fence.saga_id, step_index, target, text, statement))


def statement_name(target: StepState) -> str:
    """What an ending is called in messages."""
    return {StepState.SUCCEEDED: "finish_step", StepState.FAILED: "fail_step"}.get(target, "end_undo")


def mark_step_compensated(fence: Fence, step_index: int) -> Operation[None]:
    """There was nothing to undo in the step."""
    decided = _mark_any_step_compensated(fence.saga_id, step_index)
    assert isinstance(decided, Decided)
    return Owned(fence, decided)


def doubt_step(fence: Fence, step_index: int, error: str | None, deadline_at: int) -> Operation[None]:
    """What a try raised, and until when something of it, or of the next try, may still be under way."""
    text = None if error is None else printable(error)

    def run(db: Database) -> None:
        _note(db, fence, step_index, text, deadline_at)

    return Call("doubt_step", Kind.WRITE, run, fence.saga_id, step_index)


def try_again(fence: Fence, step_index: int, deadline_at: int) -> Operation[None]:
    """A step in doubt is about to be tried again, under the same key."""
    return doubt_step(fence, step_index, None, deadline_at)


def _note(db: Database, fence: Fence, step_index: int, error: str | None, deadline_at: int) -> None:
    values = {
        "id_": fence.saga_id,
        "index_": step_index,
        "epoch_": fence.epoch,
        "error_": error,
        "deadline_": deadline_at,
    }
    if db.write(db.sql.owned.note_doubt, values) != 1:
        _raise_refused(db, "doubt_step", fence, step_index, StepState.PENDING)


def _raise_refused(db: Database, asked: str, fence: Fence, step_index: int, target: StepState) -> None:
    check_owner(db, asked, fence, step_index)
    for _name, state, *_ in db.fetch(db.sql.step_row, id_=fence.saga_id, index_=step_index):
        raise step_refused(asked, fence.saga_id, step_index, target, state)
    raise StepNotFound(asked, fence.saga_id, step_index)


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
                _raise_refused(db, "begin_undo", fence, index, StepState.COMPENSATED)

    return Call("begin_undo", Kind.SEVERAL, run, fence.saga_id, step_index)


def end_undo(fence: Fence, step_index: int, output_json: str) -> Operation[None]:
    """An undo is done: its row and what it undid, in one transaction."""

    def run(db: Database) -> None:
        if _end_undo(db, fence, step_index, output_json) != 1:
            check_owner(db, "end_undo", fence, step_index)
            rows = db.fetch(db.sql.step_row, id_=fence.saga_id, index_=step_index)
            if [(row[1], row[3]) for row in rows] != [(StepState.COMPENSATED, output_json)]:
                _raise_refused(db, "end_undo", fence, step_index, StepState.COMPENSATED)

    return Call("end_undo", Kind.SEVERAL, run, fence.saga_id, step_index)


def _end_undo(db: Database, fence: Fence, step_index: int, output_json: str) -> int:
    values = {"id_": fence.saga_id, "index_": step_index, "epoch_": fence.epoch, "at_": db.now()}
    ended = db.write(db.sql.owned.end_undo, {**values, "output_": output_json})
    if ended == 1:
        db.write(db.sql.owned.mark_undone, values)
    return ended


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


def _finish(db: Database, fence: Fence, step_index: int, output_json: str) -> int:
    values = {
        "id_": fence.saga_id,
        "index_": step_index,
        "epoch_": fence.epoch,
        "output_": output_json,
        "at_": db.now(),
    }
    return db.write(db.sql.owned.finish_step, values)


def _once(
    fence: Fence,
    step_index: int,
    output_json: str,
    target: StepState,
    end: Callable[[Database, Fence, int, str], int],
) -> Operation[None]:
    asked = statement_name(target)

    def run(db: Database) -> None:
        if end(db, fence, step_index, output_json) == 1:
            return
        check_owner(db, asked, fence, step_index)
        for _name, state, _cmd, output, _deadline in db.fetch(db.sql.step_row, id_=fence.saga_id, index_=step_index):
            if state == target:
                raise AlreadyEnded(asked, fence.saga_id, step_index, output)
            raise step_refused(asked, fence.saga_id, step_index, target, state)
        raise StepNotFound(asked, fence.saga_id, step_index)

    return Call(asked, Kind.SEVERAL, run, fence.saga_id, step_index)


def joined(asked: str, fence: Fence, operations: Sequence[Operation[None]]) -> Operation[None]:
    """Several writes, one transaction."""

    def run(db: Database) -> None:
        for operation in operations:
            operation.run(db)

    return Call(asked, Kind.SEVERAL, run, fence.saga_id)
