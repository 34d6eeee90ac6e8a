"""The operations that write: each rule once, for every bind and database.

Each function checks its arguments and returns an `Operation`. The first
statement acts under its guard; only when it changed nothing does a second one
look why: the same update made before is a no-op, anything else an error.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from sagalog.errors import (
    InvalidTransition,
    KeyConflict,
    LogUnavailable,
    PayloadError,
    SagaExists,
    SagaLogError,
    SagaNotFound,
    StepExists,
    StepNotFound,
    UnusableBind,
    where,
)
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.statements import Statement, Statements
from sagalog.payload import (
    MAX_SAGA_ID,
    Payload,
    check_saga_id,
    check_step,
    check_text,
    encode,
    printable,
)
from sagalog.records import SagaOutcome
from sagalog.states import (
    CANCELLABLE,
    FINAL,
    NOT_FINAL,
    OPEN_FOR_STEPS,
    OUTSTANDING,
    SagaState,
    StepState,
    saga_sources,
    step_sources,
)

_TRIES = 20
_SETTLED_BY = "An operator settles it with resolve(), or sends it again with mark_compensating()."


def _new_token() -> str:
    return secrets.token_hex(16)


class Decided(Operation[None]):
    """A guarded write that decides by itself, and what explains it when it changed nothing.

    The explaining SELECT may see a state that another process made after the
    write was refused, in which it would be allowed: then it is tried again.
    """

    __slots__ = ("_explain", "_statement", "_values")

    def __init__(
        self,
        asked: str,
        kind: Kind,
        statement: Callable[[Statements], Statement],
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

    def run(self, db: Database) -> None:
        """Act; if nothing was changed, it was made before, or is refused."""
        if self._acted(db):
            return
        for _ in range(_TRIES):
            refusal = self._explain(db)
            if refusal is None:
                return
            if not isinstance(refusal, _Changed):
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
        if self.kind is Kind.LOCKED:
            lock_saga(db, self.asked, self.saga_id)
        self._values["at_"] = db.now()
        return db.write(self._statement(db.sql), self._values) == 1


_start_step = attrgetter("start_step")
_finish_step = attrgetter("finish_step")
_fail_step = attrgetter("fail_step")
_compensate_step = attrgetter("compensate_step")
_append_recovery_step = attrgetter("append_recovery_step")
_mark_step_compensated = attrgetter("mark_step_compensated")
_mark_compensating = attrgetter("mark_compensating")
_mark_failed_compensation = attrgetter("mark_failed_compensation")
_request_cancel = attrgetter("request_cancel")


class _Changed(SagaLogError):
    """The row changed between the write and the look at it."""

    def __init__(self) -> None:
        super().__init__("", "")


def start_saga(saga_id: int, name: str, input: Payload) -> Operation[None]:
    """Record that a saga starts, under an id of the caller's.

    Durable when it returns over an engine; else with the caller's commit.

    Args:
        saga_id: 1 to 2**63-1, not taken. `create_saga` takes one from the database.
        name: What kind of saga it is.
        input: What it was started with; stored as JSON text.

    Raises:
        PayloadError: An argument cannot be stored; nothing was sent.
        SagaExists: The id is taken, also by an earlier try of this call: see `identical`.
    """
    asked = "start_saga"
    check_saga_id(saga_id, asked)
    check_text(name, "name", asked, saga_id)
    text = encode(input, asked, saga_id)
    token = _new_token()

    def run(db: Database) -> None:
        values = {"id_": saga_id, "name_": name, "input_": text, "token_": token, "at_": db.now()}
        if db.write(db.sql.start_saga, values) == 1:
            return
        rows = db.fetch(db.sql.saga_head, id_=saga_id)
        if not rows:
            raise LogUnavailable(asked, "the row that was in the way is gone", saga_id=saga_id, hint="Repeat it.")
        head = rows[0]
        raise SagaExists(saga_id, found=head[1], identical=head[0] == name and head[3] == text)

    return Call(asked, Kind.INSERT, run, saga_id)


def create_saga(name: str, input: Payload, *, key: str | None = None) -> Operation[int]:
    """Record that a saga starts, under a fresh id from the database.

    The id was never used before, whatever ids callers chose and whatever was
    pruned. With a key, the same (name, key) again returns the first saga's id
    and writes nothing.

    Args:
        name: What kind of saga it is.
        input: What it was started with; stored as JSON text.
        key: The start's idempotency key, for example an order's number.

    Returns:
        The saga's id.

    Raises:
        PayloadError: An argument cannot be stored, or 2**63-1 is taken: there is no id after it.
        KeyConflict: The key was used with another input.
    """
    asked = "create_saga"
    check_text(name, "name", asked)
    if key is not None:
        check_text(key, "key", asked)
    text = encode(input, asked)
    token = _new_token()

    def run(db: Database) -> int:
        statement = db.sql.create_saga_postgres if db.on_postgres else db.sql.create_saga_sqlite
        for _ in range(_TRIES):
            made = db.fetch(statement, name_=name, input_=text, token_=token, key_=key, at_=db.now())
            if made:
                db.writes += 1
                created: int = made[0][0]
                return created
            if key is not None:
                for saga_id, input_found, state in db.fetch(db.sql.saga_of_key, name_=name, key_=key):
                    if input_found == text:
                        found: int = saga_id
                        return found
                    raise KeyConflict(name, saga_id, state)
            if db.fetch(db.sql.highest_id)[0][0] >= MAX_SAGA_ID:
                raise PayloadError(
                    asked,
                    f"saga_id {MAX_SAGA_ID} is taken, and there is no id after it",
                    hint="Whoever chose that id chose the last one; use start_saga() with free ids.",
                )
            if db.on_postgres:
                db.fetch(db.sql.catch_up_ids)
        raise LogUnavailable(asked, "other processes took every id it drew", hint="Repeat it.")

    return Call(asked, Kind.INSERT, run)


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
        return _refused_by_saga(db, asked, saga_id, step_index, OPEN_FOR_STEPS)

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
    return _ending("finish_step", saga_id, step_index, StepState.SUCCEEDED, text, _finish_step)


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
    return _ending("fail_step", saga_id, step_index, StepState.FAILED, text, _fail_step)


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
                return _step_refused(asked, saga_id, step_index, StepState.COMPENSATED, state)
        return _refused_by_saga(db, asked, saga_id, step_index, NOT_FINAL)

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
        return _refused_by_saga(db, asked, saga_id, step_index, NOT_FINAL)

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
            return _step_refused(asked, saga_id, step_index, StepState.COMPENSATED, rows[0][1])
        refusal = _refused_by_saga(db, asked, saga_id, step_index, NOT_FINAL)
        return StepNotFound(asked, saga_id, step_index) if isinstance(refusal, _Changed) and not rows else refusal

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
            head = _head(db, asked, saga_id)
            succeeded = [i for i, s in db.fetch(db.sql.outstanding_steps, id_=saga_id) if s == StepState.SUCCEEDED]
            if succeeded and head[1] not in NOT_FINAL:
                raise _saga_refused(asked, saga_id, head[1], NOT_FINAL)
        return marked

    return Call(asked, Kind.WRITE, run, saga_id)


def mark_compensating(saga_id: int) -> Operation[None]:
    """Record that a saga is being undone, or that undoing it is tried again.

    Args:
        saga_id: The saga: running, failed, or failed_compensation (an operator's retry).

    Raises:
        SagaNotFound: No such saga.
        InvalidTransition: The saga has ended.
    """
    asked = "mark_compensating"
    check_saga_id(saga_id, asked)
    return _moving(asked, saga_id, SagaState.COMPENSATING, Kind.WRITE, _mark_compensating, None)


def mark_failed_compensation(saga_id: int, reason: str) -> Operation[None]:
    """Record that a saga could not be undone and needs a person.

    Args:
        saga_id: The saga: running, compensating or failed.
        reason: Why. What a database cannot hold becomes U+FFFD.

    Raises:
        SagaNotFound: No such saga.
        InvalidTransition: The saga has ended, or has another reason already.
    """
    asked = "mark_failed_compensation"
    check_saga_id(saga_id, asked)
    target = SagaState.FAILED_COMPENSATION
    text = printable(reason)
    return _moving(asked, saga_id, target, Kind.WRITE, _mark_failed_compensation, text)


def terminate(saga_id: int, outcome: SagaOutcome) -> Operation[None]:
    """Record how a saga ended.

    `completed` is refused while a step is pending, `compensated` while one is
    pending or still succeeded: the log does not call done what is in doubt.

    Args:
        saga_id: The saga.
        outcome: `SagaOutcome.completed()`, `.failed(reason)` or `.compensated(reason)`.

    Raises:
        SagaNotFound: No such saga.
        InvalidTransition: It ended otherwise, or a step stands in the way; the message names it.
    """
    asked = f"terminate({getattr(outcome, 'state', '?')})"
    check_saga_id(saga_id, asked)
    if not isinstance(outcome, SagaOutcome):
        raise PayloadError(
            f"terminate of saga {saga_id}",
            f"the outcome is a {type(outcome).__name__}",
            saga_id=saga_id,
            found=type(outcome).__name__,
            hint="Use SagaOutcome.completed(), .failed(reason) or .compensated(reason).",
        )
    target = SagaState(outcome.state)
    reason = None if outcome.reason is None else printable(outcome.reason)
    kind = Kind.LOCKED if target in OUTSTANDING else Kind.WRITE
    return _moving(asked, saga_id, target, kind, lambda sql: sql.terminate(target), reason)


def request_cancel(saga_id: int, reason: str) -> Operation[None]:
    """Ask that a saga be undone. One that has not run yet ends at once, as `compensated`.

    Args:
        saga_id: The saga: submitted, running, compensating or failed.
        reason: Why. What a database cannot hold becomes U+FFFD.

    Raises:
        SagaNotFound: No such saga.
        InvalidTransition: It has ended, or was asked to cancel for another reason.
    """
    asked = "request_cancel"
    check_saga_id(saga_id, asked)
    text = printable(reason)

    values = {"id_": saga_id, "reason_": text}

    def explain(db: Database) -> SagaLogError | None:
        head = _head(db, asked, saga_id)
        if head[5] == text:
            return None
        if head[5] is not None and head[1] in CANCELLABLE:
            problem = "it was asked to cancel already, for another reason"
            return InvalidTransition(asked, problem, saga_id=saga_id, found=head[1], hint="Nothing more is needed.")
        return _refused_by_saga(db, asked, saga_id, None, CANCELLABLE)

    return Decided(asked, Kind.WRITE, _request_cancel, values, explain, saga_id)


# What the operations share


def _checked_output(asked: str, saga_id: int, step_index: int, output: Payload) -> str:
    check_step(saga_id, step_index, asked)
    return encode(output, asked, saga_id, step_index)


def _ending(
    asked: str,
    saga_id: int,
    step_index: int,
    target: StepState,
    output: str,
    statement: Callable[[Statements], Statement],
) -> Operation[None]:
    def explain(db: Database) -> SagaLogError | None:
        for _name, state, _cmd, output_found, _deadline in db.fetch(db.sql.step_row, id_=saga_id, index_=step_index):
            if state == target and output_found == output:
                return None
            if state in step_sources(target):
                return _Changed()
            return _step_refused(asked, saga_id, step_index, target, state)
        _head(db, asked, saga_id)
        return StepNotFound(asked, saga_id, step_index)

    values = {"id_": saga_id, "index_": step_index, "output_": output}
    return Decided(asked, Kind.WRITE, statement, values, explain, saga_id, step_index)


def _moving(
    asked: str,
    saga_id: int,
    target: SagaState,
    kind: Kind,
    statement: Callable[[Statements], Statement],
    reason: str | None,
) -> Operation[None]:
    def explain(db: Database) -> SagaLogError | None:
        head = _head(db, asked, saga_id)
        if head[1] == target and (reason is None or head[4] == reason):
            return None
        if head[1] not in saga_sources(target):
            return _saga_refused(asked, saga_id, head[1], saga_sources(target))
        return steps_in_the_way(db, asked, saga_id, target, head[1]) or _Changed()

    return Decided(asked, kind, statement, {"id_": saga_id, "reason_": reason}, explain, saga_id)


def lock_saga(db: Database, asked: str, saga_id: int) -> None:
    """Before a guard that looks at other rows than it writes: keep concurrent `start_step`s out, on Postgres.

    In a statement of its own, so that the guard's snapshot is younger than the wait for the lock. On SQLite the
    write lock does it.

    Raises:
        UnusableBind: The caller's transaction reads from one old snapshot, in which a step that was started since
            does not exist: it would be called done while it is in doubt.
    """
    if not db.on_postgres:
        return
    for (level,) in db.fetch(db.sql.lock_saga, id_=saga_id):
        if level != "read committed":
            raise UnusableBind(
                f"{asked} of saga {saga_id}",
                f"the caller's transaction is at {level.upper()} and cannot see a step started since it began",
                saga_id=saga_id,
                found=level,
                hint="Use a transaction at READ COMMITTED, or give SagaLog the Engine.",
            )


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
        hint="End each first: finish_step(), fail_step(), compensate_step() or mark_step_compensated().",
    )


def _head(db: Database, asked: str, saga_id: int, step_index: int | None = None) -> tuple[str | int | None, ...]:
    for row in db.fetch(db.sql.saga_head, id_=saga_id):
        return tuple(row)
    raise SagaNotFound(asked, saga_id, step_index)


def _refused_by_saga(
    db: Database, asked: str, saga_id: int, step_index: int | None, allowed: tuple[SagaState, ...]
) -> SagaLogError:
    state = str(_head(db, asked, saga_id, step_index)[1])
    return _Changed() if state in allowed else _saga_refused(asked, saga_id, state, allowed, step_index)


def _saga_refused(
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


def _step_refused(asked: str, saga_id: int, step_index: int, target: StepState, found: str) -> InvalidTransition:
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
