"""The operations on steps: each rule once, for every bind and database.

Each function checks its arguments and returns an `Operation`; see `guarded`.
"""

from __future__ import annotations

from typing import ClassVar, Self

from sagalog.errors import InvalidTransition, SagaLogError, StepExists, StepNotFound
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.fencing import head_of
from sagalog.log.guarded import Changed, Decided, refused_by_saga, saga_refused, step_refused
from sagalog.log.statements import Statement, Statements
from sagalog.payload import Payload, check_saga_id, check_step, check_text, encode, printable
from sagalog.states import NOT_FINAL, OPEN_FOR_STEPS, StepState, step_sources


class _StartStep(Decided):
    __slots__ = ()
    asked = "start_step"
    kind = Kind.WRITE

    def _statement(self, sql: Statements) -> Statement:
        return sql.start_step

    def _explain(self, db: Database) -> SagaLogError | None:
        saga_id, index, mine = self.saga_id, self.step_index, self._values
        for name, state, cmd, *_ in db.fetch(db.sql.step_row, id_=saga_id, index_=index):
            same = name == mine["name_"] and cmd == mine["cmd_"]
            return StepExists(self.asked, saga_id, mine["index_"], found=state, identical=same)
        refusal = refused_by_saga(db, self.asked, saga_id, index, OPEN_FOR_STEPS)
        executor_id = head_of(db, self.asked, saga_id, index)[7]
        if executor_id is None or not isinstance(refusal, Changed):
            return refusal
        return InvalidTransition(
            self.asked,
            f"the coordinator {executor_id} works on the saga, and begins its steps itself",
            saga_id=saga_id,
            step_index=index,
            found=executor_id,
            hint="Dispatch it in the saga's function; after a crash recovery takes the saga over.",
        )


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
        InvalidTransition: The saga is neither running nor compensating, or a coordinator works on it.
    """
    asked = "start_step"
    check_step(saga_id, step_index, asked)
    check_text(name, "name", asked, saga_id, step_index)
    text = encode(cmd, asked, saga_id, step_index)

    return _StartStep(saga_id, step_index, {"id_": saga_id, "index_": step_index, "name_": name, "cmd_": text})


class _Ending(Decided):
    """The end of a step, with its output as JSON text."""

    __slots__ = ()
    kind = Kind.WRITE
    target: ClassVar[StepState]

    @classmethod
    def with_output(cls, saga_id: int, step_index: int, output: str) -> Self:
        """This end of a step."""
        return cls(saga_id, step_index, {"id_": saga_id, "index_": step_index, "output_": output})

    def _explain(self, db: Database) -> SagaLogError | None:
        saga_id, index, target = self.saga_id, self._values["index_"], self.target
        for _name, state, _cmd, output, _deadline in db.fetch(db.sql.step_row, id_=saga_id, index_=index):
            if state == target and output == self._values["output_"]:
                return None
            if state in step_sources(target):
                return Changed()
            return step_refused(self.asked, saga_id, index, target, state)
        head_of(db, self.asked, saga_id)
        return StepNotFound(self.asked, saga_id, index)


class FinishStep(_Ending):
    """A step succeeded."""

    __slots__ = ()
    asked = "finish_step"
    target = StepState.SUCCEEDED

    def _statement(self, sql: Statements) -> Statement:
        return sql.finish_step


class FailStep(_Ending):
    """A step did nothing."""

    __slots__ = ()
    asked = "fail_step"
    target = StepState.FAILED

    def _statement(self, sql: Statements) -> Statement:
        return sql.fail_step


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
    return FinishStep.with_output(saga_id, step_index, text)


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
    return FailStep.with_output(saga_id, step_index, text)


class _CompensateStep(Decided):
    __slots__ = ()
    asked = "compensate_step"
    kind = Kind.WRITE

    def _statement(self, sql: Statements) -> Statement:
        return sql.compensate_step

    def _explain(self, db: Database) -> SagaLogError | None:
        saga_id, index = self.saga_id, self._values["index_"]
        for _name, state, _cmd, output, _deadline in db.fetch(db.sql.step_row, id_=saga_id, index_=index):
            if state == StepState.COMPENSATED and output == self._values["output_"]:
                return None
            if state not in step_sources(StepState.COMPENSATED):
                return step_refused(self.asked, saga_id, index, StepState.COMPENSATED, state)
        return refused_by_saga(db, self.asked, saga_id, index, NOT_FINAL)


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
    text = _checked_output("compensate_step", saga_id, step_index, output_events)
    return _CompensateStep(saga_id, step_index, {"id_": saga_id, "index_": step_index, "output_": text})


class _AppendRecoveryStep(Decided):
    __slots__ = ()
    asked = "append_recovery_step"
    kind = Kind.WRITE

    def _statement(self, sql: Statements) -> Statement:
        return sql.append_recovery_step

    def _explain(self, db: Database) -> SagaLogError | None:
        saga_id, index, mine = self.saga_id, self._values["index_"], self._values
        for name, state, cmd, output, _ in db.fetch(db.sql.step_row, id_=saga_id, index_=index):
            same = (name, state, cmd, output) == (mine["name_"], mine["state_"], mine["cmd_"], mine["output_"])
            return StepExists(self.asked, saga_id, index, found=state, identical=same)
        return refused_by_saga(db, self.asked, saga_id, index, NOT_FINAL)


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
    values = {
        "id_": saga_id,
        "index_": step_index,
        "name_": name,
        "state_": state.value,
        "cmd_": cmd_text,
        "output_": output,
    }
    return _AppendRecoveryStep(saga_id, step_index, values)


class MarkStepCompensated(Decided):
    """A step is undone, or there was nothing to undo in it."""

    __slots__ = ()
    asked = "mark_step_compensated"
    kind = Kind.WRITE

    def __init__(self, saga_id: int, step_index: int) -> None:
        super().__init__(saga_id, step_index, {"id_": saga_id, "index_": step_index})

    def _statement(self, sql: Statements) -> Statement:
        return sql.mark_step_compensated

    def _explain(self, db: Database) -> SagaLogError | None:
        saga_id, index = self.saga_id, self._values["index_"]
        rows = db.fetch(db.sql.step_row, id_=saga_id, index_=index)
        if rows and rows[0][1] == StepState.COMPENSATED:
            return None
        if rows and rows[0][1] not in step_sources(StepState.COMPENSATED):
            return step_refused(self.asked, saga_id, index, StepState.COMPENSATED, rows[0][1])
        refusal = refused_by_saga(db, self.asked, saga_id, index, NOT_FINAL)
        return StepNotFound(self.asked, saga_id, index) if isinstance(refusal, Changed) and not rows else refusal


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
    check_step(saga_id, step_index, "mark_step_compensated")
    return MarkStepCompensated(saga_id, step_index)


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
