"""One saga in one process: what is known of its steps, and whether it may go on.

The flows of this package do no I/O: they await effects.
"""

from __future__ import annotations

import threading
from asyncio import CancelledError
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from sagalog.coordinator.bus import RESERVED, CommandBus, Handler, OnUnknown
from sagalog.coordinator.definition import Definition
from sagalog.coordinator.effects import EndedInside, Flow, Sleep, Write
from sagalog.errors import (
    LeaseLost,
    LogUnavailable,
    PayloadError,
    SagaLogError,
    UnusableHandler,
    where,
)
from sagalog.log import fencing, owning
from sagalog.log.database import Operation
from sagalog.log.fencing import Fence
from sagalog.log.forking import Generation
from sagalog.log.reading import StoredStep
from sagalog.moments import MOMENT, now_ms
from sagalog.payload import printable
from sagalog.states import OUTSTANDING, SagaState, StepState

R = TypeVar("R")
S = TypeVar("S", SagaState, StepState)
_OPEN: Final = OUTSTANDING[SagaState.COMPENSATED]
_WAITS_FOR_THE_LOG: Final = (0.05, 0.2, 0.5, 1.0, 2.0)


class Calling:
    """The call of a handler; whatever was begun in it knows it for longer than it lasts."""

    __slots__ = ("fence", "over")

    def __init__(self, fence: Fence) -> None:
        self.fence = fence
        self.over = False


being_called: Final[ContextVar[tuple[Calling, ...]]] = ContextVar("sagalog_being_called", default=())
"""The handlers that are being called here."""


_KNOWN: Final[dict[type[Any], dict[str, Any]]] = {
    kind: {state.value: state for state in kind} for kind in (SagaState, StepState)
}


class Stopped(SagaLogError):
    """The saga may not go on: it was asked to cancel, its time is up, or it differs from what the log holds."""

    code = "saga_stopped"


def known_state(kind: type[S], found: str, saga_id: int, step_index: int | None = None) -> S:
    """A state as the log holds it.

    Raises:
        PayloadError: This library knows none of that name.
    """
    try:
        known: S = _KNOWN[kind][found]
        return known
    except KeyError:
        raise PayloadError(
            f"working on {where(saga_id, step_index)}",
            f"the stored state {printable(found)!r} is none that this library knows",
            saga_id=saga_id,
            step_index=step_index,
            found=found,
            hint="A later library may have written it: use that one. Otherwise a person ends the saga: resolve().",
        ) from None


@dataclass(slots=True)
class Step:
    """A row of the log, as this process knows it.

    Attributes:
        given: The command that the saga's function dispatched; what is sent is what the log holds of it.
        tries: How often its handler was called here, to an end.
        others_until: Until when a try that was begun elsewhere, in another process or thread, may be under way.
        held_until: The `deadline_at` that the log holds.
        over_until: Until when what this process sent may still land, if the log says a later moment.
        unsent: Whether its handler was surely never called.
    """

    index: int
    name: str
    cmd_json: str
    state: StepState
    started_at: int
    deadline_at: int | None = None
    output_json: str | None = None
    compensated_by: int | None = None
    error: str | None = None
    given: Any = None
    tries: int = 0
    others_until: int = 0
    over_until: int | None = None
    unsent: bool = False
    held_until: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.held_until = self.deadline_at

    @classmethod
    def of(cls, saga_id: int, stored: StoredStep) -> Step:
        """From the log.

        Raises:
            PayloadError: Its state is none that this library knows.
        """
        index, name, cmd_json, found, started_at, deadline_at, output_json, compensated_by, error = stored
        state = known_state(StepState, found, saga_id, index)
        return cls(index, name, cmd_json, state, started_at, deadline_at, output_json, compensated_by, error)

    def note_ended(self, settle: float) -> None:
        """A call that was cut off has ended; what it sent may land for so many seconds."""
        self.deadline_at = self.over_until = max(self.others_until, now_ms() + int(settle * 1000))

    @property
    def own(self) -> bool:
        """Whether the coordinator itself wrote it: a recorded moment or value, with nothing to undo."""
        return self.name.startswith(RESERVED)

    @property
    def open(self) -> bool:
        """Whether it may have happened and is not undone."""
        return self.state in _OPEN

    @property
    def ended_inside(self) -> bool:
        """Whether its handler ended its transaction itself: to try again would do it twice."""
        return self.error is not None and self.error.startswith(EndedInside.__name__)

    def surely_did_nothing(self, handler: Handler) -> bool:
        """Whether it changed nothing, if it is pending: the log would hold its end."""
        return self.unsent or (handler.does_nothing_unless_it_ends and not self.ended_inside)


@dataclass(frozen=True, slots=True)
class Policy:
    """A coordinator's settings that its flows read.

    Attributes:
        is_held: Whether this process still works on a saga under a fence, and has not given it up.
        admitted: The handlers that were found to be fit for a forward command, at a revision of the bus.
    """

    bus: CommandBus
    on_unknown: OnUnknown
    asynchronous: bool
    is_held: Callable[[Fence], bool]
    admitted: dict[tuple[type[Any], int], Handler] = field(default_factory=dict)

    def can_call(self, handler: Handler) -> bool:
        """Whether the shell can: a synchronous one cannot call an async handler."""
        return self.asynchronous or not handler.signature.is_async


class Run:
    """A saga that this process owns.

    Attributes:
        steps: Its rows, forward steps and undos, by index.
        stopped: Why it may not go on; every further call of its context raises it, whatever the function catches.
        state: The saga's state, as this process knows it.
        patient: Whether to wait until nothing of a step in doubt can be under way; recovery leaves the saga instead.
        again: Whether an operator wants what is in doubt to be sent again, once, under its key.
        reached_pivot: Whether it only goes forward.
        unsure: Whether the log may hold what this process does not know of: a write was cut off.
        cut_off: Whether a write was cut off ever: it may come to be in the log later.
        interrupted: Whether its process is about to stop working on it: nothing is tried again.
        interrupt: What interrupted a call of its context: the whole process is meant, and not only the saga.
        over: Whether its function has ended: nothing is begun any more.
        calls: The calls of its context that are under way.
        reserving: Held while a step's index, or what an undo by hand undoes, is chosen.
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
        self.saga_id = fence.saga_id
        self.token = token
        self.name = name
        self.state = state
        self.deadline_at = deadline_at
        self.patient = patient
        self.again = again
        self.steps: dict[int, Step] = {step.index: step for step in steps}
        self.stopped: BaseException | None = None
        self.unsure = False
        self.cut_off = False
        self.interrupted = False
        self.interrupt: BaseException | None = None
        self.over = False
        self.calls: set[object] = set()
        self.reserving = threading.RLock()
        self._generation = Generation.number
        self._held: list[Operation[None]] = []
        self._index = 0
        self.uuids = 0
        self.replay: dict[int, Step] = {}

    # What the steps say

    @property
    def undos(self) -> set[int]:
        """The indexes of rows that undo others."""
        steps = list(self.steps.values())  # other threads of the function may add to them
        return {step.compensated_by for step in steps if step.compensated_by is not None}

    @property
    def unsettled(self) -> bool:
        """Whether a step is pending, as far as this process knows."""
        return StepState.PENDING in [step.state for step in self.steps.values()]

    def forward(self) -> list[Step]:
        """The steps that went forward, newest first."""
        undos = self.undos
        return [self.steps[index] for index in sorted(self.steps, reverse=True) if index not in undos]

    def handler_named(self, name: str) -> Handler | None:
        """The handler of a row's command; None if no handler of this process has that name."""
        return self.policy.bus.named(name)

    def pivots(self) -> list[Step]:
        """The forward steps that cannot be undone, and succeeded or are in doubt: after them it only goes forward."""
        return [step for step in self.forward() if step.open and self._is_pivot(step)]

    def _is_pivot(self, step: Step) -> bool:
        handler = self.handler_named(step.name)
        if handler is None or not handler.pivot:
            return False
        return step.state is StepState.SUCCEEDED or not step.surely_did_nothing(handler)

    @property
    def reached_pivot(self) -> bool:
        """Whether a step that cannot be undone succeeded, or is in doubt."""
        return self.policy.bus.has_pivots and bool(self.pivots())

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
        with self.reserving:
            index, self._index = self._index, self._index + 1
        return index

    def take_undo_index(self) -> int:
        """An index that no row has, after all of them."""
        with self.reserving:
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

    def interrupted_by(self, error: BaseException | None) -> None:
        """Note what came out of a call, if it means the whole process; of a cancelled task its shell knows."""
        if not isinstance(error, Exception | GeneratorExit | CancelledError | None):
            self.interrupt = self.interrupt or error

    def begin_call(self, *, undoing: bool = False) -> object:
        """A call of the context begins, unless the saga may not go on; see `refuse_stopped`.

        Returns:
            What `end_call` wants, once it is over.
        """
        call = object()
        self.calls.add(call)  # before the look at `over`: whoever sets that looks at the calls afterwards
        try:
            self.refuse_stopped(undoing=undoing)
        except BaseException:
            self.end_call(call)
            raise
        return call

    def end_call(self, call: object) -> None:
        """A call of the context is over."""
        self.calls.discard(call)

    async def let_calls_end(self) -> None:
        """Wait for the calls of the context that outlive its function: what is under way is not undone meanwhile."""
        while self.calls and self.policy.is_held(self.fence):
            await Sleep(MOMENT)

    def refuse_stopped(self, *, undoing: bool = False) -> None:
        """Raise why the saga may not go on, if it may not; that its time is up never stops an undo."""
        called = being_called.get()
        if called and any(calling.fence is self.fence and not calling.over for calling in called):
            raise UnusableHandler(
                f"the context of saga {self.saga_id}",
                "a handler of the saga calls it, whose own step has not ended",
                hint="Return from the handler, and dispatch in the saga's function.",
            )
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

    def hold(self, operation: Operation[None]) -> None:
        """Write it in one transaction with the next write; until then nothing may be called, waited for or told."""
        self._held.append(operation)

    async def flush(self) -> None:
        """Write what is held."""
        if self._held:
            *held, last = self._held
            self._held = held
            await self.written(last)

    def written(self, operation: Operation[R]) -> Flow[R]:
        """Write as the owner; a log that is out of reach for a moment is waited for, for every write may be repeated.

        Raises:
            LeaseLost: Another executor owns the saga now.
            LogUnavailable: The log stayed out of reach; recovery decides.
        """
        return self._write_with_held(operation) if self._held else self._write(operation)

    async def _write_with_held(self, operation: Operation[R]) -> R:
        held, self._held = self._held, []
        try:
            return await self._write(owning.joined(operation.asked, self.fence, [*held, operation]))
        except (LeaseLost, LogUnavailable, Stopped):
            raise
        except SagaLogError:
            # The refusal of the one undoes nothing of what is true already.
            await self._write(owning.joined(operation.asked, self.fence, held))
            return await self._write(operation)

    async def _write(self, operation: Operation[R]) -> R:
        if self._generation != Generation.number:
            # A forked child knows the parent's epoch, and is not the parent.
            raise self.stop(LeaseLost(operation.asked, self.saga_id, epoch=self.fence.epoch, found=self.fence.epoch))
        try:
            try:
                return await Write(operation)  # type: ignore[no-any-return]
            except LogUnavailable as error:
                return await again(operation, error)
        except (LeaseLost, LogUnavailable) as error:
            raise self.stop(error) from error.__cause__
        except fencing.CancelAsked as asked:
            name = f"{self.name} of saga {self.saga_id}"
            problem = f"it was asked to cancel: {asked.reason}"
            raise self.stop(Stopped(name, problem, saga_id=self.saga_id, found="cancel", outcome="")) from None
        except SagaLogError:
            raise
        except BaseException as error:
            self.unsure = self.cut_off = True
            self.interrupted_by(error)
            problem = f"{operation.asked} was cut off, and may be in the log"
            self.stop(Stopped(f"{self.name} of saga {self.saga_id}", problem, saga_id=self.saga_id, outcome=""))
            raise


async def again(operation: Operation[R], error: LogUnavailable) -> R:
    """Write once more what may be repeated, after a log that is out of reach for a moment was waited for.

    Args:
        operation: The write.
        error: Of its first try.

    Raises:
        LogUnavailable: Of the try, if there is one, that may have been written; else of the last.
    """
    for wait in _WAITS_FOR_THE_LOG:
        await Sleep(wait)
        try:
            return await Write(operation)  # type: ignore[no-any-return]
        except LogUnavailable as another:
            error = error if error.unknown else another
    raise error
