"""Trying a step until its outcome is known, and recording it."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from sagalog.coordinator.bus import Handler
from sagalog.coordinator.commands import Compensates, Retry
from sagalog.coordinator.effects import EndedInside, Info, Invoke, OutOfTime, Sleep, Write
from sagalog.coordinator.run import Calling, Run, Step, being_called
from sagalog.errors import (
    InvalidTransition,
    LeaseLost,
    LogUnavailable,
    PayloadError,
    StepFailed,
    StepRejected,
    where,
)
from sagalog.log import owned_steps, reading
from sagalog.log.database import Operation
from sagalog.moments import now_ms
from sagalog.payload import encode, printable
from sagalog.read_back import check_had_back
from sagalog.states import StepState

ONCE: Final = Retry(attempts=1)
_A_WRITE_MS: Final = 1000


class Succeeded(NamedTuple):
    """A try succeeded; `text` is its events as the log holds them."""

    value: Any
    text: str


class Refused(NamedTuple):
    """A try did nothing."""

    reason: str
    error: BaseException | None


class Doubt(NamedTuple):
    """It is not known what became of a try."""

    reason: str
    error: BaseException | None


Outcome = Succeeded | Refused | Doubt


def reason_of(error: BaseException) -> str:
    """What an exception says, for the log."""
    try:
        text = str(error)
    except Exception:
        text = ""  # an exception of the application's that cannot be shown
    if isinstance(error, StepRejected):
        return printable(text) or "rejected"
    return printable(f"{type(error).__name__}: {text}" if text else type(error).__name__)


# Trying a step


async def tried(
    run: Run,
    handler: Handler,
    step: Step,
    cmd: Any,
    retry: Retry,
    compensates: Compensates | None = None,
    *,
    repeats: bool = False,
) -> Outcome:
    """Call a step's handler until its outcome is known, or its tries are used up.

    Args:
        run: The saga.
        handler: Of the command.
        step: Its row.
        cmd: The command.
        retry: How often, and how long.
        compensates: What it undoes, if it is an undo.
        repeats: Whether it may have been sent before, and nobody has asked for it to be sent again.
    """
    attempt, stretched, did_nothing = 1, 1, False
    key = run.key_of(step.index) if compensates is None else f"{compensates.idempotency_key}:undo"
    transactional = handler.transactional
    called_before = being_called.get()
    while True:
        if attempt > 1:
            cmd = handler.read_cmd(step.cmd_json, run.saga_id, step.index)  # whatever its handler did to the one before
        now = now_ms()
        while (left := _time_left(handler, step, now)) < handler.timeout * 500:
            # A process that slept since it wrote the step owns the saga still, or does not call its handler.
            # Where a write takes longer than the handler may, there is more time from try to try.
            await _give_time(run, step, due_of(handler, now) + stretched * _A_WRITE_MS)
            stretched *= 2
            now = now_ms()
        if (attempt > 1 or repeats) and not may_try(step, retry):  # writes take time, and a process may sleep
            too_old = step.error or "it is too old to be tried again under its key"
            return Refused(too_old, None) if did_nothing else Doubt(too_old, None)
        info = Info(run.saga_id, step.index, attempt, now + left, left / 1000, key, compensates)
        ending = _Ending(run, handler, step, undo=compensates is not None) if transactional else None
        try:
            calling = Calling(run.fence)
            being_called.set((*called_before, calling))
            try:
                value: Any = await Invoke(handler, cmd, info, run.fence, ending)
                step.tries = attempt
            except Exception:
                step.tries = attempt
                raise
            except BaseException:
                if handler.signature.is_async or not run.policy.asynchronous:  # its thread has not ended, else
                    step.note_ended(handler.settle)
                raise
            finally:
                calling.over = True
                being_called.set(called_before)
        except owned_steps.AlreadyEnded as found:
            text = found.output_json or "[]"
            return Succeeded(handler.read_output(text, run.saga_id, step.index), text)
        except EndedInside as error:
            # To try again would do it twice, whatever it is.
            await _note_doubt(run, handler, step, error, 0.0)
            return Doubt(reason_of(error), error)
        except Exception as error:
            if isinstance(error, handler.rejects) and not isinstance(error, OutOfTime):
                return Refused(reason_of(error), error)
            # What the handler itself raised may be of some other saga, and of some other log.
            of_transaction = ending is not None and error is not ending.raised
            if of_transaction and isinstance(error, LeaseLost):
                raise run.stop(error) from None
            given_up = error if of_transaction and isinstance(error, LogUnavailable) else None  # so it is tried again
            did_nothing = handler.read_only or (transactional and not (given_up is not None and given_up.unknown))
            if did_nothing and transactional and given_up is None and compensates is None:
                return Refused(reason_of(error), error)
            failed = error
        else:
            if ending is not None:
                return ending.answer
            try:
                return _answer(run, handler, step, value)
            except PayloadError as error:
                if handler.read_only:
                    return Refused(reason_of(error), error)
                # It happened, and what it returned cannot be held: to try again would not help.
                await _note_doubt(run, handler, step, error, 0.0)
                return Doubt(reason_of(error), error)
        again = attempt < retry.attempts and not run.interrupted
        wait = retry.wait_before(attempt + 1) if again else 0.0
        again = again and may_try(step, retry, wait)
        if not again and did_nothing:
            return Refused(reason_of(failed), failed)
        try:
            await _note_doubt(run, handler, step, failed, wait + handler.timeout if again else 0.0)
        except InvalidTransition as error:
            if not _was_committed(handler, error):
                raise
            return await _as_committed(run, handler, step)  # the answer of its commit was lost
        if not again:
            return Doubt(reason_of(failed), failed)
        try:
            await Sleep(wait)
        except BaseException:
            step.note_ended(handler.settle)
            raise
        if run.interrupted or not may_try(step, retry):
            return Refused(reason_of(failed), failed) if did_nothing else Doubt(reason_of(failed), failed)
        attempt += 1


def _time_left(handler: Handler, step: Step, now: int) -> int:
    """Milliseconds for a try that begins now: whatever it sends has landed when the log says that it has."""
    whole = max(1, int(handler.timeout * 1000))
    return whole if step.deadline_at is None else min(whole, step.deadline_at - int(handler.settle * 1000) - now)


def _answer(run: Run, handler: Handler, step: Step, value: Any) -> Succeeded:
    """What a handler returned, as the log holds it, and as the log will give it back on a resume.

    Raises:
        PayloadError: The log cannot hold it, or not give it back.
    """
    text = encode(handler.signature.events_of(value), handler.name, run.saga_id, step.index)
    if value is None:
        value = [] if handler.signature.returns_list else None  # the log does not tell one from the other
    elif not handler.signature.answers_plainly(value):
        back = handler.read_output(text, run.saga_id, step.index)

        def answered_again(held: Any) -> Any:
            written = encode(handler.signature.events_of(held), handler.name, run.saga_id, step.index)
            return handler.read_output(written, run.saga_id, step.index)

        asked = f"answer of {handler.name}"
        check_had_back(handler.signature.returns, value, back, answered_again, asked, run.saga_id, step.index)
        value = back
    return Succeeded(value, text)


def as_held(run: Run, handler: Handler, cmd: Any, index: int, asked: str) -> tuple[str, Any]:
    """A command's text for the log, and what is read back from it: this, and nothing else, is sent on every try.

    Raises:
        PayloadError: The log cannot hold it, or not give it back; nothing was written.
    """
    text = encode(cmd, asked, run.saga_id, index)
    if handler.signature.asks_unchangeably(cmd):
        return text, cmd
    try:
        held = handler.read_cmd(text, run.saga_id, index)
    except PayloadError:
        problem = f"a {type(cmd).__name__} cannot be read back from what the log would hold of it"
    else:

        def asked_again(held: Any) -> Any:
            return handler.read_cmd(encode(held, asked, run.saga_id, index), run.saga_id, index)

        check_had_back(handler.cmd_type, cmd, held, asked_again, asked, run.saga_id, index)
        return text, held
    raise PayloadError(
        f"{asked} of {where(run.saga_id, index)}",
        problem,
        saga_id=run.saga_id,
        step_index=index,
        found=type(cmd).__name__,
        hint="Its JSON must validate as its class: see exclude=, serialization_alias= and computed fields.",
    )


def may_try(step: Step, retry: Retry, wait: float = 0.0) -> bool:
    """Whether the outside can still know the key of the first try, after so many seconds."""
    return now_ms() - step.started_at + wait * 1000 <= retry.within.total_seconds() * 1000


async def _note_doubt(run: Run, handler: Handler, step: Step, error: BaseException, seconds: float) -> None:
    """Record what was raised, and until when something of this try may still be under way."""
    until = step.deadline_at = max(step.others_until, now_ms() + int((seconds + handler.settle) * 1000))
    step.error = reason_of(error)
    await run.written(owned_steps.doubt_step(run.fence, step.index, step.error, until, step.held_until))
    step.held_until = until


class _Ending:
    """Makes what commits with a transactional handler's writes; of its answer as it is before that commit.

    Attributes:
        answer: What the handler returned.
        raised: What came out of the handler itself.
    """

    answer: Succeeded
    raised: BaseException | None

    def __init__(self, run: Run, handler: Handler, step: Step, *, undo: bool) -> None:
        self._end = owned_steps.end_undo_once if undo else owned_steps.finish_step_once
        self._run = run
        self._handler = handler
        self._step = step
        self.raised = None

    def __call__(self, value: Any) -> Operation[None]:
        self.answer = _answer(self._run, self._handler, self._step, value)
        return self._end(self._run.fence, self._step.index, self.answer.text)


def retry_of(handler: Handler) -> Retry:
    """How often a forward step is tried; a transactional one that could not commit did nothing, and is tried again."""
    return handler.retry or (Retry() if handler.transactional else ONCE)


async def end_step(run: Run, handler: Handler, step: Step, outcome: Succeeded | Refused) -> Succeeded | Refused:
    """Record what is known of a forward step; returns what is recorded."""
    if isinstance(outcome, Refused):
        outcome = await fail(run, handler, step, outcome)
    elif not handler.transactional:
        await run.written(owned_steps.finish_step(run.fence, step.index, outcome.text))
    if isinstance(outcome, Succeeded):
        step.state, step.output_json = StepState.SUCCEEDED, outcome.text
    return outcome


async def fail(run: Run, handler: Handler, step: Step, refused: Refused) -> Succeeded | Refused:
    """Record that a step did nothing; or find that its transaction was committed when its time was up."""
    try:
        await run.written(owned_steps.fail_step(run.fence, step.index, refused.reason))
    except InvalidTransition as error:
        if not _was_committed(handler, error):
            raise
        return await _as_committed(run, handler, step)
    step.state = StepState.FAILED
    step.output_json = encode({"error": refused.reason}, "fail_step", run.saga_id, step.index)
    return refused


def _was_committed(handler: Handler, error: InvalidTransition) -> bool:
    return handler.transactional and error.found in (StepState.SUCCEEDED, StepState.COMPENSATED)


async def _as_committed(run: Run, handler: Handler, step: Step) -> Succeeded:
    """What a transactional handler's commit wrote of its step."""
    record = await Write(reading.stored(run.saga_id))
    text = next(held.output_json for held in record.steps if held.step_index == step.index) or "[]"
    return Succeeded(handler.read_output(text, run.saga_id, step.index), text)


def cut_off(run: Run, step: Step, error: BaseException | None = None) -> None:
    """A call that was left in the middle (its task was cancelled, say) is in doubt; nothing goes on after it.

    Args:
        run: The saga.
        step: What was called.
        error: What came out of the call.
    """
    if step.state is StepState.PENDING:
        step.error = step.error or "it was cut off"
        run.stop(failure_of_step(run, step, Doubt(step.error, None)))
        run.interrupted_by(error)


async def known(run: Run, handler: Handler, step: Step, cmd: Any, *, forward: bool = True) -> Outcome:
    """What became of a step that an earlier process left pending, recorded if it can be known.

    Args:
        run: The saga.
        handler: The command's handler.
        step: The pending row.
        cmd: The command.
        forward: Whether the saga goes on; a step that surely did nothing is then done, and not only called failed.
    """
    did_nothing = step.surely_did_nothing(handler)
    retry = handler.retry
    if did_nothing and not forward:
        outcome: Outcome = Refused(step.error or "its process died before it was done", None)
    elif did_nothing or (step.tries == 0 and (run.again or _may_be_tried(step, retry))):
        await begin_again(run, handler, step)
        repeats = not did_nothing and not run.again
        outcome = await tried(run, handler, step, cmd, retry_of(handler), repeats=repeats)
    else:
        return Doubt(step.error or "its process died before its outcome was known", None)
    return outcome if isinstance(outcome, Doubt) else await end_step(run, handler, step, outcome)


def _may_be_tried(step: Step, retry: Retry | None) -> bool:
    return retry is not None and not step.ended_inside and may_try(step, retry)


async def begin_again(run: Run, handler: Handler, step: Step) -> None:
    """Before a step that was begun elsewhere, in another process or thread, is tried under its key."""
    step.others_until, step.over_until = step.deadline_at or 0, None  # what was begun there may still be under way
    await _give_time(run, step, max(step.others_until, due_of(handler, now_ms())))


async def _give_time(run: Run, step: Step, until: int) -> None:
    step.deadline_at = until
    await run.written(owned_steps.try_again(run.fence, step.index, until, step.held_until))
    step.held_until = until


def due_of(handler: Handler, now: int) -> int:
    """Until when something of a try that begins now may be under way; Unix milliseconds."""
    return now + int((handler.timeout + handler.settle) * 1000)


def failure_of_step(run: Run, step: Step, outcome: Refused | Doubt) -> StepFailed:
    """What a dispatch or an undo by hand raises."""
    kind = "in_doubt" if isinstance(outcome, Doubt) else "failed"
    failure = StepFailed(kind, outcome.reason, saga_id=run.saga_id, step_index=step.index, name=step.name)
    failure.__cause__ = outcome.error
    return failure
