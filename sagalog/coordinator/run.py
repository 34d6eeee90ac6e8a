"""One saga in one process: what is known of its steps, and how a command is dispatched and its end recorded.

The flows here and in `unwind` and `recover` do no I/O: they await effects.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeVar

from sagalog.coordinator.bus import RESERVED, CommandBus, Handler, OnUnknown
from sagalog.coordinator.commands import Compensates, Retry
from sagalog.coordinator.definition import Definition
from sagalog.coordinator.effects import Call, Info, Invoke, OutOfTime, Sleep, Together, Write
from sagalog.coordinator.signature import events_of, takes_none
from sagalog.errors import (
    LeaseLost,
    LogUnavailable,
    PayloadError,
    SagaLogError,
    StepFailed,
    StepRejected,
    UnusableHandler,
)
from sagalog.log import owning
from sagalog.log.database import Operation
from sagalog.log.owning import Fence
from sagalog.moments import from_ms, now_ms, to_ms
from sagalog.payload import check_text, decode, encode, printable
from sagalog.records import StepRecord
from sagalog.states import SagaState, StepState

R = TypeVar("R")
ONCE: Final = Retry(attempts=1)
_WAITS_FOR_THE_LOG: Final = (0.05, 0.2, 0.5, 1.0, 2.0)
NOW: Final = f"{RESERVED}now"
RECORD: Final = f"{RESERVED}record:"


class Stopped(SagaLogError):
    """The saga may not go on: it was asked to cancel, its time is up, or it differs from what the log holds."""

    code = "saga_stopped"


@dataclass(slots=True)
class Step:
    """A row of the log, as this process knows it."""

    index: int
    name: str
    cmd_json: str
    state: StepState
    started_at: int
    deadline_at: int | None = None
    output_json: str | None = None
    compensated_by: int | None = None
    error: str | None = None
    cmd: Any = None
    tries: int = 0

    @classmethod
    def of(cls, record: StepRecord) -> Step:
        """From the log."""
        deadline = None if record.deadline_at is None else to_ms(record.deadline_at)
        return cls(
            index=record.step_index,
            name=record.name,
            cmd_json=record.cmd_json,
            state=StepState(record.state),
            started_at=to_ms(record.started_at),
            deadline_at=deadline,
            output_json=record.output_json,
            compensated_by=record.compensated_by,
            error=record.error,
        )

    @property
    def own(self) -> bool:
        """Whether the coordinator itself wrote it: a recorded moment or value, with nothing to undo."""
        return self.name.startswith(RESERVED)

    @property
    def open(self) -> bool:
        """Whether it may have happened and is not undone."""
        return self.state in (StepState.PENDING, StepState.SUCCEEDED)


@dataclass(frozen=True, slots=True)
class Policy:
    """A coordinator's settings that its flows read."""

    bus: CommandBus
    on_unknown: OnUnknown
    asynchronous: bool


class Run:
    """A saga that this process owns.

    Attributes:
        steps: Its rows, forward steps and undos, by index.
        stopped: Why it may not go on; every further call of its context raises it, whatever the function catches.
        state: The saga's state, as this process knows it.
        patient: Whether to wait until nothing of a step in doubt can be under way; recovery leaves the saga instead.
        again: Whether an operator wants what is in doubt to be sent again, once, under its key.
        reached_pivot: Whether it only goes forward.
    """

    def __init__(
        self,
        policy: Policy,
        definition: Definition | None,
        fence: Fence,
        token: str,
        *,
        name: str,
        state: SagaState = SagaState.RUNNING,
        deadline_at: int | None = None,
        steps: Sequence[Step] = (),
        patient: bool = True,
        again: bool = False,
    ) -> None:
        self.policy = policy
        self.definition = definition
        self.fence = fence
        self.token = token
        self.name = name
        self.state = state
        self.deadline_at = deadline_at
        self.patient = patient
        self.again = again
        self.steps: dict[int, Step] = {step.index: step for step in steps}
        self.stopped: BaseException | None = None
        self.over = False
        self._pid = os.getpid()
        self._index = 0
        self.uuids = 0
        self.replay: dict[int, Step] = {}

    @property
    def saga_id(self) -> int:
        """The saga's id."""
        return self.fence.saga_id

    # What the steps say

    @property
    def undos(self) -> set[int]:
        """The indexes of rows that undo others."""
        return {step.compensated_by for step in self.steps.values() if step.compensated_by is not None}

    def forward(self) -> list[Step]:
        """The steps that went forward, newest first."""
        undos = self.undos
        return [self.steps[index] for index in sorted(self.steps, reverse=True) if index not in undos]

    def handler_named(self, name: str) -> Handler | None:
        """The handler of a row's command; None if no handler of this process has that name."""
        return self.policy.bus.named(name)

    def is_pivot(self, step: Step) -> bool:
        """Whether the saga only goes forward after it."""
        handler = self.handler_named(step.name)
        return handler is not None and handler.pivot and step.open

    @property
    def reached_pivot(self) -> bool:
        """Whether a step that cannot be undone succeeded, or is in doubt."""
        return self.policy.bus.has_pivots and any(self.is_pivot(step) for step in self.steps.values())

    def unknown_policy(self, handler: Handler) -> OnUnknown:
        """What becomes of a step of this handler that stays in doubt."""
        if handler.pivot:
            return "stop"
        return handler.on_unknown or self.policy.on_unknown

    def key_of(self, index: int) -> str:
        """The idempotency key of a forward step."""
        return f"{self.token}:{index}"

    # Indexes, and going on

    def take_index(self) -> int:
        """The next step's index."""
        index, self._index = self._index, self._index + 1
        return index

    def take_undo_index(self) -> int:
        """An index that no row has, after all of them."""
        index = max([self._index - 1, *self.steps]) + 1
        self._index = index + 1
        return index

    def begin_replay(self) -> None:
        """Before the function runs again: what the log holds is answered from it."""
        self.replay = dict(self.steps)
        self._index = 0
        self.uuids = 0

    def stop(self, error: BaseException) -> BaseException:
        """Let nothing of this saga go on; the first reason stays, unless the saga, or the log, is lost as well."""
        lost = (LeaseLost, LogUnavailable)
        if self.stopped is None or (isinstance(error, lost) and not isinstance(self.stopped, lost)):
            self.stopped = error
        return self.stopped

    def refuse_stopped(self, *, undoing: bool = False) -> None:
        """Raise why the saga may not go on, if it may not; that its time is up never stops an undo."""
        if self.stopped is not None:
            raise self.stopped
        if self.over:
            raise UnusableHandler(
                f"the context of saga {self.saga_id}",
                "its function has returned",
                hint="Dispatch inside the saga's function only.",
            )
        if undoing or self.deadline_at is None or now_ms() < self.deadline_at:
            return
        if not self.reached_pivot:
            asked = f"{self.name} of saga {self.saga_id}"
            raise self.stop(Stopped(asked, "its time is up", saga_id=self.saga_id, found="deadline", outcome=""))

    async def written(self, operation: Operation[R]) -> R:
        """Write as the owner; a log that is out of reach for a moment is waited for, for every write may be repeated.

        Raises:
            LeaseLost: Another executor owns the saga now.
            LogUnavailable: The log stayed out of reach; recovery decides.
        """
        if os.getpid() != self._pid:
            # A forked child knows the parent's epoch, and is not the parent.
            raise self.stop(LeaseLost(operation.asked, self.saga_id, epoch=self.fence.epoch, found=self.fence.epoch))
        try:
            try:
                return await Write(operation)  # type: ignore[no-any-return]
            except LogUnavailable:
                return await again(operation)
        except (LeaseLost, LogUnavailable) as error:
            raise self.stop(error) from error.__cause__
        except owning.CancelAsked as asked:
            name = f"{self.name} of saga {self.saga_id}"
            problem = f"it was asked to cancel: {asked.reason}"
            raise self.stop(Stopped(name, problem, saga_id=self.saga_id, found="cancel", outcome="")) from None


async def again(operation: Operation[R]) -> R:
    """Write once more what may be repeated, after a log that is out of reach for a moment was waited for."""
    last = len(_WAITS_FOR_THE_LOG) - 1
    for number, wait in enumerate(_WAITS_FOR_THE_LOG):
        await Sleep(wait)
        try:
            return await Write(operation)  # type: ignore[no-any-return]
        except LogUnavailable:
            if number == last:
                raise
    raise AssertionError("the last try returns or raises")


@dataclass(frozen=True, slots=True)
class Succeeded:
    """A try succeeded; `text` is its events as the log holds them."""

    value: Any
    text: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A try did nothing."""

    reason: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class Doubt:
    """It is not known what became of a try."""

    reason: str
    error: BaseException | None


Outcome = Succeeded | Refused | Doubt


def reason_of(error: BaseException) -> str:
    """What an exception says, for the log."""
    text = str(error)
    if isinstance(error, StepRejected):
        return printable(text) or "rejected"
    return printable(f"{type(error).__name__}: {text}" if text else type(error).__name__)


# Trying a step


async def tried(
    run: Run, handler: Handler, step: Step, cmd: Any, retry: Retry, compensates: Compensates | None = None
) -> Outcome:
    """Call a step's handler until its outcome is known, or its tries are used up."""
    attempt = 1
    key = run.key_of(step.index) if compensates is None else f"{compensates.idempotency_key}:undo"
    transactional = handler.transactional
    while True:
        due = now_ms() + int(handler.timeout * 1000)
        info = Info(run.saga_id, step.index, attempt, due, key, compensates)
        ending = _Ending(run, step, undo=compensates is not None) if transactional else None
        await _keep_up(run, handler, step)
        try:
            value: Any = await Invoke(handler, cmd, info, run.fence, ending)
        except owning.AlreadyEnded as found:
            text = found.output_json or "[]"
            return Succeeded(handler.read_output(text, run.saga_id, step.index), text)
        except Exception as error:
            if isinstance(error, handler.rejects) and not isinstance(error, OutOfTime):
                return Refused(reason_of(error), error)
            if isinstance(error, LeaseLost) and error.saga_id == run.saga_id:
                raise run.stop(error) from None
            if transactional and not isinstance(error, LogUnavailable):
                return Refused(reason_of(error), error)
            failed = error
        else:
            if ending is not None:
                return Succeeded(value, ending.text)
            try:
                return Succeeded(value, encode(events_of(value), handler.name, run.saga_id, step.index))
            except PayloadError as error:
                # It happened, and what it returned cannot be held: to try again would not help.
                await _note_doubt(run, handler, step, error, 0.0)
                return Doubt(reason_of(error), error)
        step.tries = attempt
        again = attempt < retry.attempts and may_try(step, retry)
        if not again and handler.read_only:
            return Refused(reason_of(failed), failed)
        wait = retry.wait_before(attempt + 1) if again else 0.0
        await _note_doubt(run, handler, step, failed, wait + handler.timeout if again else 0.0)
        if not again:
            return Doubt(reason_of(failed), failed)
        await Sleep(wait)
        attempt += 1


async def _keep_up(run: Run, handler: Handler, step: Step) -> None:
    """A process that slept, or waited, since it wrote the step owns the saga still, or does not call its handler."""
    while step.deadline_at is not None and now_ms() >= step.deadline_at:
        step.deadline_at = _due(handler)
        await run.written(owning.try_again(run.fence, step.index, step.deadline_at))


def may_try(step: Step, retry: Retry) -> bool:
    """Whether the outside can still know the key of the first try."""
    return now_ms() - step.started_at <= retry.within.total_seconds() * 1000


async def _note_doubt(run: Run, handler: Handler, step: Step, error: BaseException, seconds: float) -> None:
    """Record what was raised, and until when something of this try may still be under way."""
    step.deadline_at = now_ms() + int((seconds + handler.settle) * 1000)
    step.error = reason_of(error)
    await run.written(owning.doubt_step(run.fence, step.index, step.error, step.deadline_at))


class _Ending:
    """Makes what commits with a transactional handler's writes; of its answer as it is before that commit."""

    def __init__(self, run: Run, step: Step, *, undo: bool) -> None:
        self._end = owning.end_undo_once if undo else owning.finish_step_once
        self._run = run
        self._step = step
        self.text = "[]"

    def __call__(self, value: Any) -> Operation[None]:
        fence, step = self._run.fence, self._step
        self.text = encode(events_of(value), step.name, fence.saga_id, step.index)
        return self._end(fence, step.index, self.text)


def retry_of(handler: Handler) -> Retry:
    """How often a forward step is tried; a transactional one that could not commit did nothing, and is tried again."""
    return handler.retry or (Retry() if handler.transactional else ONCE)


# Dispatching


def admitted(run: Run, cmd: Any) -> Handler:
    """The handler of a forward command.

    Raises:
        UnusableHandler: None takes it, or nothing says how it is undone, or the shell cannot call it.
    """
    bus = run.policy.bus
    handler = bus.handler_of(cmd)
    bus.check_undoable(handler)
    check_callable(run.policy, handler)
    compensation = bus.compensation_of(handler)
    if compensation is not None and run.unknown_policy(handler) == "compensate" and not takes_none(compensation.output):
        raise UnusableHandler(
            f"dispatch of {handler.name}",
            'the coordinator says on_unknown="compensate", and its compensation does not admit an output of None',
            hint="Annotate the output as X | None, or say on_unknown='stop' at the handler.",
        )
    return handler


def check_callable(policy: Policy, handler: Handler) -> None:
    """A synchronous coordinator cannot call an async handler."""
    if handler.signature.is_async and not policy.asynchronous:
        raise UnusableHandler(
            f"dispatch of {handler.name}", "its handler is async", hint="Use an AsyncSagaCoordinator."
        )


async def dispatch(run: Run, cmd: Any) -> Any:
    """Do a command: write it, call its handler, write how it ended."""
    run.refuse_stopped()
    handler = admitted(run, cmd)
    index = run.take_index()
    text = encode(cmd, f"dispatch of {handler.name}", run.saga_id, index)
    recorded = _recorded(run, index, handler.name, text)
    if recorded is not None:
        recorded.cmd = cmd
        return await _answered(run, handler, recorded, cmd)
    step, operation = _beginning(run, handler, index, cmd, text)
    await run.written(operation)
    run.steps[index] = step
    return await settled(run, handler, step, cmd)


async def dispatch_all(run: Run, commands: Sequence[Any]) -> list[Any]:
    """Do commands side by side; all are awaited, and then the failure of the first that failed is raised."""
    run.refuse_stopped()
    handlers = [admitted(run, cmd) for cmd in commands]
    flows: list[Any] = []
    operations: list[Operation[None]] = []
    for handler, cmd in zip(handlers, commands, strict=True):
        index = run.take_index()
        text = encode(cmd, f"dispatch of {handler.name}", run.saga_id, index)
        recorded = _recorded(run, index, handler.name, text)
        if recorded is not None:
            recorded.cmd = cmd
            flows.append((_answered, handler, recorded, cmd))
            continue
        step, operation = _beginning(run, handler, index, cmd, text)
        operations.append(operation)
        flows.append((settled, handler, step, cmd))
    if operations:
        await run.written(owning.joined("dispatch_all", run.fence, operations))
    run.steps.update((step.index, step) for _, _, step, _ in flows)
    ends = await Together([flow(run, handler, step, cmd) for flow, handler, step, cmd in flows])
    for end in ends:
        if end.error is not None and not isinstance(end.error, Exception):
            raise end.error
    for end in ends:
        if end.error is not None:
            raise end.error
    return [end.value for end in ends]


def _beginning(run: Run, handler: Handler, index: int, cmd: Any, text: str) -> tuple[Step, Operation[None]]:
    now = now_ms()
    due = now + int((handler.timeout + handler.settle) * 1000)
    step = Step(index, handler.name, text, StepState.PENDING, now, due, cmd=cmd)
    operation = owning.begin_step(run.fence, index, handler.name, text, due, cancellable=not run.reached_pivot)
    return step, operation


async def settled(run: Run, handler: Handler, step: Step, cmd: Any) -> Any:
    """Try a pending step and record how it ended; a doubt stays in the log, and stops the saga."""
    outcome = await tried(run, handler, step, cmd, retry_of(handler))
    if isinstance(outcome, Doubt):
        failure = StepFailed("in_doubt", outcome.reason, saga_id=run.saga_id, step_index=step.index, name=step.name)
        raise run.stop(failure) from outcome.error
    await end_step(run, handler, step, outcome)
    if isinstance(outcome, Refused):
        raise _failure(run, step, outcome.reason) from outcome.error
    return outcome.value


async def end_step(run: Run, handler: Handler, step: Step, outcome: Succeeded | Refused) -> None:
    """Record what is known of a forward step."""
    if isinstance(outcome, Succeeded):
        if not handler.transactional:
            await run.written(owning.finish_step(run.fence, step.index, outcome.text))
        step.state, step.output_json = StepState.SUCCEEDED, outcome.text
    else:
        await fail(run, step, outcome.reason)


async def fail(run: Run, step: Step, reason: str) -> None:
    """Record that a step did nothing."""
    await run.written(owning.fail_step(run.fence, step.index, reason))
    step.state = StepState.FAILED
    step.output_json = encode({"error": reason}, "fail_step", run.saga_id, step.index)


def _failure(run: Run, step: Step, reason: str) -> StepFailed:
    return StepFailed("failed", reason, saga_id=run.saga_id, step_index=step.index, name=step.name)


# Going on where another process stopped


def _recorded(run: Run, index: int, name: str, text: str) -> Step | None:
    """The row that the log holds at an index, or None.

    Raises:
        Stopped: It is another command than the function dispatches now.
    """
    step = run.replay.pop(index, None)
    if step is None:
        return None
    same = step.name == name and decode(step.cmd_json, "cmd_json", run.saga_id, index) == decode(
        text, "cmd_json", run.saga_id, index
    )
    if same and step.state is not StepState.COMPENSATED:
        return step
    found = "is undone" if step.state is StepState.COMPENSATED else "holds another command"
    raise run.stop(differs(run, index, f"the log {found} there ({step.name}), and the function dispatches {name}"))


def differs(run: Run, index: int | None, problem: str) -> Stopped:
    """The error of a function that does not do again what the log holds."""
    return Stopped(
        f"resume of saga {run.saga_id}", problem, saga_id=run.saga_id, step_index=index, found="differs", outcome=""
    )


async def _answered(run: Run, handler: Handler, step: Step, cmd: Any) -> Any:
    """What the log holds of a step; one in doubt is tried again if that does no harm."""
    if step.state is StepState.SUCCEEDED:
        return handler.read_output(step.output_json, run.saga_id, step.index)
    if step.state is StepState.FAILED:
        raise _failure(run, step, recorded_reason(run, step))
    outcome = await known(run, handler, step, cmd)
    if isinstance(outcome, Doubt):
        failure = StepFailed("in_doubt", outcome.reason, saga_id=run.saga_id, step_index=step.index, name=step.name)
        raise run.stop(failure)
    if isinstance(outcome, Refused):
        raise _failure(run, step, outcome.reason) from outcome.error
    return outcome.value


async def known(run: Run, handler: Handler, step: Step, cmd: Any, *, forward: bool = True) -> Outcome:
    """What became of a step that an earlier process left pending, recorded if it can be known.

    Args:
        run: The saga.
        handler: The command's handler.
        step: The pending row.
        cmd: The command.
        forward: Whether the saga goes on; a step that surely did nothing is then done, and not only called failed.
    """
    did_nothing = handler.transactional or handler.read_only
    retry = handler.retry
    if did_nothing and not forward:
        outcome: Outcome = Refused("its process died before it was done", Stopped("", ""))
    elif did_nothing or run.again or (retry is not None and step.tries == 0 and may_try(step, retry)):
        step.deadline_at = _due(handler)
        await run.written(owning.try_again(run.fence, step.index, step.deadline_at))
        outcome = await tried(run, handler, step, cmd, retry_of(handler))
    else:
        return Doubt(step.error or "its process died before its outcome was known", None)
    if not isinstance(outcome, Doubt):
        await end_step(run, handler, step, outcome)
    return outcome


def _due(handler: Handler) -> int:
    return now_ms() + int((handler.timeout + handler.settle) * 1000)


def recorded_reason(run: Run, step: Step) -> str:
    """Why a failed step failed, as the log holds it."""
    held = decode(step.output_json, "output_json", run.saga_id, step.index)
    return str(held.get("error", "")) if isinstance(held, dict) else ""


# What is the same on a resume


async def now(run: Run) -> datetime:
    """The moment at which the function first asked."""
    return from_ms(await _kept(run, NOW, now_ms))


def new_uuid(run: Run) -> uuid.UUID:
    """The n-th UUID that the function asks for, from the saga's random token: no row is needed to have it again."""
    run.refuse_stopped()
    run.uuids += 1
    digest = hashlib.sha256(f"{run.token}:uuid:{run.uuids}".encode()).digest()
    return uuid.UUID(bytes=digest[:16], version=4)


async def record(run: Run, name: str, function: Callable[[], Any]) -> Any:
    """What a function returned when it was first called here, as a JSON value."""
    check_text(name, "name", f"record in saga {run.saga_id}", run.saga_id)
    return await _kept(run, f"{RECORD}{name}", function)


async def _kept(run: Run, name: str, function: Callable[[], Any]) -> Any:
    run.refuse_stopped()
    index = run.take_index()
    recorded = _recorded(run, index, name, "null")
    if recorded is not None:
        return decode(recorded.output_json, "output_json", run.saga_id, index)
    text = encode(await Call(function), name, run.saga_id, index)
    await run.written(owning.record_step(run.fence, index, name, text, cancellable=not run.reached_pivot))
    run.steps[index] = Step(index, name, "null", StepState.SUCCEEDED, now_ms(), output_json=text)
    return decode(text, "output_json", run.saga_id, index)
