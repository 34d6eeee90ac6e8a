"""Undoing a saga: its steps newest first, each undo a row of its own before its handler is called."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sagalog.coordinator.bus import Handler
from sagalog.coordinator.commands import Compensates, Retry
from sagalog.coordinator.effects import Sleep, Write
from sagalog.coordinator.run import Run, Step
from sagalog.coordinator.trying import (
    Doubt,
    Refused,
    Succeeded,
    as_held,
    begin_again,
    cut_off,
    due_of,
    fail,
    failure_of_step,
    known,
    may_try,
    reason_of,
    tried,
)
from sagalog.errors import InvalidTransition, PayloadError, SagaLogError, StepFailed, UnusableHandler
from sagalog.log import owned_steps, owning, reading
from sagalog.moments import now_ms
from sagalog.payload import printable
from sagalog.states import SagaState, StepState

DEFAULT_RETRY = Retry()
NOT_UNDONE = ". Not undone: "


@dataclass(frozen=True, slots=True)
class End:
    """How a saga ended in this process.

    Attributes:
        state: Its state.
        reason: Why, as recorded.
        waits: For a saga that is left as it is: what it waits for.
        until: The moment (Unix milliseconds) before which nothing can be done for it, or None.
    """

    state: SagaState
    reason: str
    waits: str | None = None
    until: int | None = None


class Unknown(Exception):
    """A command that this process has no handler for: the saga is left to one that has."""


class _Blocked(Exception):
    """An undo that cannot be done: a person is needed."""


class _Early(Exception):
    """Something of a try may still be under way until a moment."""

    def __init__(self, step: Step, until: int) -> None:
        self.until = until
        super().__init__(f"step {step.index} ({step.name}) may still be under way")


async def unwind(run: Run, reason: str) -> End:
    """Undo what was done, and record how that ended.

    Args:
        run: The saga.
        reason: Why it is undone.

    Raises:
        LeaseLost, LogUnavailable: The saga is not, or cannot be, written any more.
    """
    try:
        if run.unsure or run.unsettled:
            await _reload(run)
            if run.state is SagaState.COMPLETED:
                return End(run.state, "")
        require_handlers(run)
        begun = run.state is SagaState.COMPENSATING
        if run.state is SagaState.FAILED:
            _begin(run, reason)  # of a failed saga no step can be ended
            await run.flush()
        if run.unsettled:
            await _settle_doubts(run, begun=begun)
        if run.reached_pivot:
            return await to_person(run, _also(reason, "a step that cannot be undone succeeded, or is in doubt"))
        if any(step.open for step in run.steps.values()):
            _begin(run, reason)
        for step in run.forward():
            if step.open:
                await _undo(run, step)
        for index in sorted(run.undos):
            undo = run.steps.get(index)
            if undo is not None and undo.open:
                _mark(run, undo)  # a person said of what it undoes how that ended
    except Unknown as unknown:
        await run.flush()
        return End(run.state, reason, waits=str(unknown))
    except _Early as early:
        await run.flush()
        return End(run.state, reason, waits=str(early), until=early.until)
    except PayloadError as unreadable:
        return await to_person(run, _also(reason, str(unreadable)))
    except _Blocked as blocked:
        return await to_person(run, _also(reason, str(blocked)))
    try:
        await run.written(owning.compensated(run.fence, reason))
    except InvalidTransition:
        if not run.cut_off:
            raise
        run.unsure, run.cut_off = True, False  # what was cut off is in the log only now
        return await unwind(run, reason)
    run.state = SagaState.COMPENSATED
    return End(run.state, reason)


def _also(reason: str, more: str) -> str:
    """A reason with another; one that it holds already, of an earlier try, is not said again."""
    return reason if more in reason else f"{reason}; {more}"


def _begin(run: Run, reason: str) -> None:
    if run.state is not SagaState.COMPENSATING:
        run.hold(owning.mark_compensating(run.fence, reason))
        run.state = SagaState.COMPENSATING


async def to_person(run: Run, reason: str) -> End:
    """Leave a saga to a person, naming what is not undone."""
    undos = run.undos
    left = [step for step in run.steps.values() if step.open and not step.own and step.index not in undos]
    named = ", ".join(f"{step.index} ({step.name}, {step.state})" for step in left)
    told = f"{reason}{NOT_UNDONE}{named}" if named else reason
    await run.written(owning.fail_compensation(run.fence, told))
    run.state = SagaState.FAILED_COMPENSATION
    return End(run.state, told)


async def _reload(run: Run) -> None:
    """A write whose answer was lost may have ended a step that is pending here, or the whole saga."""
    record = await Write(reading.stored(run.saga_id))
    if record.state == SagaState.COMPLETED:
        run.state = SagaState.COMPLETED
    for stored in record.steps:
        step = Step.of(run.saga_id, stored)
        before = run.steps.get(step.index)
        if before is not None:
            step.given, step.tries = before.given, before.tries
            if before.over_until is not None and step.state is StepState.PENDING:
                step.deadline_at = step.over_until = before.over_until
            step.error = step.error or before.error
        elif run.unsure and step.state is StepState.PENDING:
            step.unsent, step.error = True, "it was cut off before it was sent"
        run.steps[step.index] = step
    run.unsure = False


def _handler(run: Run, step: Step) -> Handler:
    handler = run.handler_named(step.name)
    if handler is None:
        raise Unknown(f"no handler here takes the command {step.name!r} of step {step.index}")
    _check_callable(run, handler)
    return handler


def _check_callable(run: Run, handler: Handler) -> None:
    if not run.policy.can_call(handler):
        raise Unknown(f"this coordinator is not async, and the handler of {handler.name!r} is")


def require_handlers(run: Run) -> None:
    """Nothing is begun for a saga that this process could not undo to its end."""
    seen = set()
    for step in run.steps.values():
        if step.open and step.name not in seen and not step.own:
            seen.add(step.name)
            _handler(run, step)


async def _settle_doubts(run: Run, *, begun: bool) -> None:
    """What became of steps that are pending: known by trying again, or left in doubt as their policy says.

    Args:
        run: The saga.
        begun: Whether an earlier process began to undo: what was tried in vain then is not tried again, for each try
            puts off the undo.
    """
    for step in run.forward():
        if step.state is not StepState.PENDING or _undo_of(run, step) is not None:
            continue
        handler = _handler(run, step)
        undone_in_doubt = run.unknown_policy(handler) == "compensate" and not step.surely_did_nothing(handler)
        if begun and undone_in_doubt and step.error is not None and not run.again:
            continue
        cmd = handler.read_cmd(step.cmd_json, run.saga_id, step.index)
        outcome = await known(run, handler, step, cmd, forward=False)
        if isinstance(outcome, Doubt) and not undone_in_doubt:
            raise _Blocked(f"step {step.index} ({step.name}) is in doubt: {outcome.reason}")


def _undo_of(run: Run, step: Step) -> Step | None:
    """The row that undoes a step, unless that did nothing."""
    undo = None if step.compensated_by is None else run.steps.get(step.compensated_by)
    return None if undo is None or undo.state is StepState.FAILED else undo


async def _undo(run: Run, step: Step) -> None:
    """Undo one step.

    Raises:
        _Blocked: It cannot be done.
        _Early: Something of its last try may still be under way.
        Unknown: No handler here takes its command, or the one that undoes it.
    """
    if step.own:
        _mark(run, step)
        return
    begun = _undo_of(run, step)
    if begun is not None and begun.state is not StepState.PENDING:
        _take_as_done(run, begun)
        return
    handler = _handler(run, begun or step)
    undone: Sequence[Step]
    if begun is not None:
        undo, undone = begun, _undone_by(run, begun)
        cmd = handler.read_cmd(undo.cmd_json, run.saga_id, undo.index)
        await _begin_again(run, handler, undo)
    elif handler.read_only:
        _mark(run, step)
        return
    else:
        if step.state is StepState.PENDING:
            await _wait_out(run, step)
        undone = (step,)
        derived = _derived(run, handler, step)
        handler = _undo_handler(run, derived, step)
        undo, cmd = await begin_undo(run, handler, derived, reserve(run, undone))
    try:
        await undo_until_known(run, handler, undo, cmd, undone, joins_next=True, repeats=begun is not None)
    except StepFailed as failure:
        raise _Blocked(f"the undo in row {undo.index} ({undo.name}) {_told(failure)}") from failure


def _mark(run: Run, step: Step) -> None:
    """There is nothing to undo in it."""
    run.hold(owned_steps.mark_step_compensated(run.fence, step.index))
    step.state = StepState.COMPENSATED


def _take_as_done(run: Run, undo: Step) -> None:
    """Somebody, an operator perhaps, said that an undo is done: so is what it undid."""
    undone = [step for step in _undone_by(run, undo) if step.open]
    if undo.state is StepState.SUCCEEDED:
        run.hold(owned_steps.end_undo(run.fence, undo.index, undo.output_json or "[]"))
        undo.state = StepState.COMPENSATED
        for step in undone:
            step.state = StepState.COMPENSATED
    else:
        for step in undone:
            _mark(run, step)


async def _wait_out(run: Run, step: Step) -> None:
    left = (step.deadline_at or 0) - now_ms()
    if left <= 0:
        return
    if not run.patient:
        raise _Early(step, step.deadline_at or 0)
    await run.flush()
    await Sleep(left / 1000)


def _derived(run: Run, handler: Handler, step: Step) -> Any:
    """The command that undoes a step, derived from what the log holds of it."""
    compensation = run.policy.bus.compensation_of(handler)
    if compensation is None:
        raise Unknown(f"nothing here says how step {step.index} ({step.name}) is undone")
    what = f"what undoes step {step.index} ({step.name}) cannot be derived"
    try:
        cmd = handler.read_cmd(step.cmd_json, run.saga_id, step.index)
        happened = step.state is StepState.SUCCEEDED
        output = handler.read_output(step.output_json, run.saga_id, step.index) if happened else None
        derived = compensation.function(cmd, output)
    except Exception as error:
        raise _Blocked(f"{what}: {reason_of(error)}") from error
    if not run.policy.bus.takes(derived) and (
        type(derived).__module__ == "builtins" or isinstance(derived, type) or inspect.isawaitable(derived)
    ):
        shown = "None" if derived is None else f"no command, but {derived!r:.80}"
        raise _Blocked(f"{what}: its compensation returned {printable(shown)}")
    return derived


def _undo_handler(run: Run, cmd: Any, step: Step) -> Handler:
    """The handler of what undoes a step."""
    try:
        handler = run.policy.bus.handler_of(cmd)
    except UnusableHandler as error:
        raise Unknown(f"no handler here takes {type(cmd).__name__}, which undoes step {step.index}") from error
    _check_callable(run, handler)
    return handler


def is_being_undone(run: Run, step: Step) -> bool:
    """Whether an undo of a step is about to begin, or has begun and did not end without effect."""
    return step.compensated_by is not None and (step.compensated_by not in run.steps or _undo_of(run, step) is not None)


class Reserved(NamedTuple):
    """An undo's index, and the steps that nobody else undoes meanwhile, each with the row that undid it in vain."""

    row: int
    undone: list[tuple[Step, int | None]]


def reserve(run: Run, undone: Sequence[Step]) -> Reserved:
    """Take the steps for an undo that is about to begin."""
    reserved = Reserved(run.take_undo_index(), [(step, step.compensated_by) for step in undone])
    for step in undone:
        step.compensated_by = reserved.row
    return reserved


async def begin_undo(run: Run, handler: Handler, cmd: Any, reserved: Reserved) -> tuple[Step, Any]:
    """Write the row of an undo, and link the steps that it undoes to it.

    Args:
        run: The saga.
        handler: Of the command that undoes.
        cmd: That command.
        reserved: From `reserve`.

    Returns:
        The row, and the command as the log holds it.
    """
    index = reserved.row
    try:
        text, held = as_held(run, handler, cmd, index, f"compensate with {handler.name}")
        began = now_ms()
        due = due_of(handler, began)
        indexes = [step.index for step, _ in reserved.undone]
        await run.written(owned_steps.begin_undo(run.fence, index, handler.name, text, due, indexes))
    except BaseException:
        for step, before in reserved.undone:
            step.compensated_by = before
        raise
    undo = run.steps[index] = Step(index, handler.name, text, StepState.PENDING, began, due)
    return undo, held


def _undone_by(run: Run, undo: Step) -> list[Step]:
    return [step for step in run.steps.values() if step.compensated_by == undo.index]


async def _begin_again(run: Run, handler: Handler, undo: Step) -> None:
    """Before an undo that an earlier process began is tried under its key.

    Raises:
        _Blocked: It cannot be.
    """
    if undo.tries:
        raise _Blocked(f"the undo in row {undo.index} ({undo.name}) is in doubt")
    if not (run.again or may_try(undo, handler.retry or DEFAULT_RETRY)):
        raise _Blocked(f"the undo in row {undo.index} ({undo.name}) is too old to be tried again under its key")
    await begin_again(run, handler, undo)


def _told(failure: StepFailed) -> str:
    return f"was refused: {failure.reason}" if failure.kind == "failed" else f"is in doubt: {failure.reason}"


async def undo_until_known(
    run: Run,
    handler: Handler,
    undo: Step,
    cmd: Any,
    undone: Sequence[Step],
    *,
    joins_next: bool = False,
    repeats: bool = False,
) -> Any:
    """Call an undo's handler; what it undid is marked with its end, which may join the next write.

    Raises:
        StepFailed: It was refused, or stays in doubt; the steps are not undone.
    """
    newest = max([step.index for step in undone])
    compensates = Compensates(newest, run.key_of(newest))
    try:
        retry = handler.retry or DEFAULT_RETRY
        outcome = await tried(run, handler, undo, cmd, retry, compensates, repeats=repeats and not run.again)
        if isinstance(outcome, Refused):
            outcome = await fail(run, handler, undo, outcome)
    except BaseException as error:
        cut_off(run, undo, error)
        raise
    if not isinstance(outcome, Succeeded):
        raise failure_of_step(run, undo, outcome)
    if not handler.transactional:
        end = owned_steps.end_undo(run.fence, undo.index, outcome.text)
        if joins_next:
            run.hold(end)
        else:
            await run.written(end)
    for step in (undo, *undone):
        step.state = StepState.COMPENSATED
    return outcome.value


def why(error: BaseException) -> str:
    """The reason of an unwinding, as it is recorded."""
    if isinstance(error, StepFailed):
        told = "failed" if error.kind == "failed" else "is in doubt"
        return f"step {error.step_index} ({error.name}) {told}: {error.reason}"
    if isinstance(error, SagaLogError) and error.code == "saga_stopped":
        return str(error).rstrip(".")
    return reason_of(error)
