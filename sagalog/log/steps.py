"""The operations on steps: each rule once, for every bind and database.

Each function checks its arguments and returns an `Operation`; see `guarded`.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from sagalog.errors import SagaLogError, StepExists, StepNotFound
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.guarded import Changed, Decided, head_of, refused_by_saga, saga_refused, step_refused
from sagalog.log.statements import Statement, Statements
from sagalog.payload import Payload, check_saga_id, check_step, check_text, encode, printable
from sagalog.states import NOT_FINAL, OPEN_FOR_STEPS, StepState, step_sources

_start_step = attrgetter("start_step")
_finish_step = attrgetter("finish_step")
_fail_step = attrgetter("fail_step")
_compensate_step = attrgetter("compensate_step")
_append_recovery_step = attrgetter("append_recovery_step")
_mark_step_compensated = attrgetter("mark_step_compensated")


def start_step(saga_id: int, step_index: int, name: str, cmd: Payload) -> Operation[None]:
    """Record that a step is about to be tried, before its command is dispatched.

    Args:
        saga_id: The saga, running or compensating.
        step_index: The step's place in it, from 0, not taken.
        name: The command's name.
        cmd: The command; stored as JSON text.

    Raises:
        PayloadError: An argument cannot be stored; nothing was sent.
        SagaNotFound: `start_saga` comes first.
        StepExists: The index is taken, also by an earlier try of this call: see `identical`.
        InvalidTransition: The saga is neither running nor compensating.
    """
    asked = "start_step"
    check_step(saga_id, step_index, asked)
    check_text(name, "name", asked, saga_id, step_index)
    text = encode(cmd, asked, saga_id, step_index)

    values = {"id_": saga_id, "index_": step_index, "name_": name, "cmd_": text}

    def explain(db: Database) -> SagaLogError | None:
        for name_found, state, cmd_found, *_ in db.fetch(db.sql.step_row, id_=saga_id, index_=step_index):
            same = name_found == name and cmd_found == text
            return StepExists(asked, saga_id, step_index, found=state, identical=same)
        return refused_by_saga(db, asked, saga_id, step_index, OPEN_FOR_STEPS)

    return Decided(asked, Kind.INSERT, _start_step, values, explain, saga_id, step_index)


def finish_step(saga_id: int, step_index: int, output_events: Payload) -> Operation[None]:
    """Record that a pending step succeeded, and what it returned.

    Durable when it returns over an engine; else with the caller's commit.
    Repeating it with equal events changes nothing.

    Args:
        saga_id: The saga that the step belongs to.
        step_index: The step's place in it, from 0.
        output_events: What the handler returned; stored as JSON text.

    Raises:
        PayloadError: JSON cannot hold the events; nothing was written.
        SagaNotFound: No such saga.
        StepNotFound: No such step; `start_step` comes first.
        InvalidTransition: It failed, was compensated, or has other events.
    """
    text = _checked_output("finish_step", saga_id, step_index, output_events)
    return ending("finish_step", saga_id, step_index, StepState.SUCCEEDED, text, _finish_step)


def fail_step(saga_id: int, step_index: int, reason: str) -> Operation[None]:
    """Record that a pending step failed: it did nothing.

    Args:
        saga_id: The saga that the step belongs to.
        step_index: The step's place in it, from 0.
        reason: Why; stored as {"error": reason}. What a database cannot hold becomes U+FFFD.

    Raises:
        SagaNotFound: No such saga.
        StepNotFound: No such step; `start_step` comes first.
        InvalidTransition: It succeeded, was compensated, or failed for another reason.
    """
    text = _checked_output("fail_step", saga_id, step_index, {"error": printable(reason)})
    return ending("fail_step", saga_id, step_index, StepState.FAILED, text, _fail_step)


def compensate_step(saga_id: int, step_index: int, output_events: Payload) -> Operation[None]:
    """Record that a step is undone, with the events of its undo; without the row, insert it as "compensate".

    The events replace an output that the step had; `mark_step_compensated` keeps it.

    Args:
        saga_id: The saga that the step belongs to, in no final state.
        step_index: The step's place in it, from 0.
        output_events: What the undo returned; stored as JSON text.

    Raises:
        PayloadError: JSON cannot hold the events; nothing was written.
        SagaNotFound: No such saga.
        InvalidTransition: The step failed or was compensated with other events, or the saga has ended.
    """
    asked = "compensate_step"
    text = _checked_output(asked, saga_id, step_index, output_events)

    values = {"id_": saga_id, "index_": step_index, "output_": text}

    def explain(db: Database) -> SagaLogError | None:
        for _name, state, _cmd, output, _deadline in db.fetch(db.sql.step_row, id_=saga_id, index_=step_index):
            if state == StepState.COMPENSATED and output == text:
                return None
            if state not in step_sources(StepState.COMPENSATED):
                return step_refused(asked, saga_id, step_index, StepState.COMPENSATED, state)
        return refused_by_saga(db, asked, saga_id, step_index, NOT_FINAL)

    return Decided(asked, Kind.WRITE, _compensate_step, values, explain, saga_id, step_index)


def append_recovery_step(
    saga_id: int, step_index: int, name: str, cmd: Payload, events: Payload, error: str | None = None
) -> Operation[None]:
    """Record an undo that recovery already made: a new row, `compensated`, or `failed` with the error.

    Args:
        saga_id: The saga, in no final state.
        step_index: A free index; `next_step_index` gives one.
        name: The compensating command's name.
        cmd: The compensating command; stored as JSON text.
        events: What it returned; stored as JSON text, unless there is an error.
        error: Why it failed, if it did; stored as {"error": error}.

    Raises:
        PayloadError: An argument cannot be stored; nothing was sent.
        SagaNotFound: No such saga.
        StepExists: The index is taken, also by an earlier try of this call: see `identical`.
        InvalidTransition: The saga has ended.
    """
    asked = "append_recovery_step"
    check_step(saga_id, step_index, asked)
    check_text(name, "name", asked, saga_id, step_index)
    cmd_text = encode(cmd, asked, saga_id, step_index)
    output = encode(events if error is None else {"error": printable(error)}, asked, saga_id, step_index)
    state = StepState.COMPENSATED if error is None else StepState.FAILED
    values = {"id_": saga_id, "index_": step_index, "name_": name, "state_": state.value, "cmd_": cmd_text}

    values["output_"] = output

    def explain(db: Database) -> SagaLogError | None:
        for name_found, found, cmd_found, output_found, _ in db.fetch(db.sql.step_row, id_=saga_id, index_=step_index):
            same = (name_found, found, cmd_found, output_found) == (name, state, cmd_text, output)
            return StepExists(asked, saga_id, step_index, found=found, identical=same)
        return refused_by_saga(db, asked, saga_id, step_index, NOT_FINAL)

    return Decided(asked, Kind.INSERT, _append_recovery_step, values, explain, saga_id, step_index)


def mark_step_compensated(saga_id: int, step_index: int) -> Operation[None]:
    """Record that a step is undone; its output stays.

    Args:
        saga_id: The saga that the step belongs to, in no final state.
        step_index: The step's place in it, from 0; pending or succeeded.

    Raises:
        SagaNotFound: No such saga.
        StepNotFound: No such step.
        InvalidTransition: The step failed, or the saga has ended.
    """
    asked = "mark_step_compensated"
    check_step(saga_id, step_index, asked)

    values = {"id_": saga_id, "index_": step_index}

    def explain(db: Database) -> SagaLogError | None:
        rows = db.fetch(db.sql.step_row, id_=saga_id, index_=step_index)
        if rows and rows[0][1] == StepState.COMPENSATED:
            return None
        if rows and rows[0][1] not in step_sources(StepState.COMPENSATED):
            return step_refused(asked, saga_id, step_index, StepState.COMPENSATED, rows[0][1])
        refusal = refused_by_saga(db, asked, saga_id, step_index, NOT_FINAL)
        return StepNotFound(asked, saga_id, step_index) if isinstance(refusal, Changed) and not rows else refusal

    return Decided(asked, Kind.WRITE, _mark_step_compensated, values, explain, saga_id, step_index)


def mark_all_succeeded_steps_compensated(saga_id: int) -> Operation[int]:
    """Record that every succeeded step of a saga is undone.

    Args:
        saga_id: The saga, in no final state.

    Returns:
        How many steps it marked: 0 when all were marked before.

    Raises:
        SagaNotFound: No such saga.
        InvalidTransition: The saga has ended and has succeeded steps.
    """
    asked = "mark_all_succeeded_steps_compensated"
    check_saga_id(saga_id, asked)

    def run(db: Database) -> int:
        marked = db.write(db.sql.mark_all_succeeded_steps_compensated, {"id_": saga_id, "at_": db.now()})
        if marked == 0:
            head = head_of(db, asked, saga_id)
            succeeded = [i for i, s in db.fetch(db.sql.outstanding_steps, id_=saga_id) if s == StepState.SUCCEEDED]
            if succeeded and head[1] not in NOT_FINAL:
                raise saga_refused(asked, saga_id, head[1], NOT_FINAL)
        return marked

    return Call(asked, Kind.WRITE, run, saga_id)


def _checked_output(asked: str, saga_id: int, step_index: int, output: Payload) -> str:
    check_step(saga_id, step_index, asked)
    return encode(output, asked, saga_id, step_index)


def ending(
    asked: str,
    saga_id: int,
    step_index: int,
    target: StepState,
    output: str,
    statement: Callable[[Statements], Statement],
) -> Decided:
    """The end of a step, with its output as JSON text."""

    def explain(db: Database) -> SagaLogError | None:
        for _name, state, _cmd, output_found, _deadline in db.fetch(db.sql.step_row, id_=saga_id, index_=step_index):
            if state == target and output_found == output:
                return None
            if state in step_sources(target):
                return Changed()
            return step_refused(asked, saga_id, step_index, target, state)
        head_of(db, asked, saga_id)
        return StepNotFound(asked, saga_id, step_index)

    values = {"id_": saga_id, "index_": step_index, "output_": output}
    return Decided(asked, Kind.WRITE, statement, values, explain, saga_id, step_index)
