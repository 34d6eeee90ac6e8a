"""What the coordinator's flows ask for, and who answers.

A flow is an ``async def`` without any I/O: it awaits effects. `drive` runs it
from a synchronous shell, `adrive` from an asynchronous one; both hand each
effect to ``perform`` and send its answer, or what it raised, back into the
flow. So each rule of the coordinator stands once.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from sagalog.coordinator.commands import Compensates, StepInfo
from sagalog.moments import from_ms

if TYPE_CHECKING:
    from sagalog.coordinator.bus import Handler
    from sagalog.log.database import Operation
    from sagalog.log.fencing import Fence

R = TypeVar("R")


class Effect(Generic[R]):
    """Something that only a shell can do."""

    __slots__ = ()

    def __await__(self) -> Generator[Effect[R], R, R]:
        return (yield self)


class Write(Effect[R]):
    """Run an operation in the log, in a transaction of its own; a read is one too."""

    __slots__ = ("operation",)

    def __init__(self, operation: Operation[R]) -> None:
        self.operation = operation


class Call(Effect[R]):
    """Call the saga's own function, which dispatches through flows of its own; or a function for `ctx.record`."""

    __slots__ = ("args", "function")

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function = function
        self.args = args


class Info(NamedTuple):
    """What a `StepInfo` is made of, if the handler wants one."""

    saga_id: int
    step_index: int
    attempt: int
    due: int
    seconds: float
    idempotency_key: str
    compensates: Compensates | None

    def made(self) -> StepInfo:
        """The record."""
        return StepInfo(
            self.saga_id, self.step_index, self.attempt, from_ms(self.due), self.idempotency_key, self.compensates
        )


class Ending(Protocol):
    """Makes, of what a transactional handler returned, the operation that commits with its writes.

    Attributes:
        raised: What came out of the handler itself; anything else is of its transaction.
    """

    raised: BaseException | None

    def __call__(self, value: Any) -> Operation[None]: ...


class Invoke(Effect[R]):
    """Call a handler for one try of a step.

    Args:
        handler: The handler.
        cmd: The command.
        info: What it is told.
        fence: The saga's owner, for whom a handler that hangs is given up.
        ended: For a transactional handler.
    """

    __slots__ = ("cmd", "ended", "fence", "handler", "info")

    def __init__(
        self,
        handler: Handler,
        cmd: Any,
        info: Info,
        fence: Fence,
        ended: Ending | None = None,
    ) -> None:
        self.handler = handler
        self.cmd = cmd
        self.info = info
        self.fence = fence
        self.ended = ended

    def arguments(self, session: Any) -> list[Any]:
        """What the handler is called with, in its own order."""
        wants = self.handler.signature.wants
        if len(wants) == 1:  # as most do; the command is what none goes without
            return [self.cmd]
        return [self.cmd if word == "cmd" else session if word == "session" else self.info.made() for word in wants]


class OutOfTime(Exception):
    """A handler was stopped at its timeout: never a rejection, whatever types its `rejects=` names."""


class EndedInside(Exception):
    """A transactional handler ended its transaction by SQL of its own: neither done with its step, nor surely not."""


class Cancelled(Exception):
    """A handler raised CancelledError, and nobody cancelled its task."""


class Sleep(Effect[None]):
    """Wait so many seconds, with nothing held."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class Settled(Generic[R]):
    """How one of several flows ended."""

    value: R | None
    error: BaseException | None


class Together(Effect[Sequence[Settled[R]]]):
    """Run flows side by side, to the end of each.

    Args:
        flows: The flows.
        fence: The saga's owner.
        interrupted: Is called when whoever waits for them is interrupted, while they go on.
    """

    __slots__ = ("fence", "flows", "interrupted")

    def __init__(self, flows: Sequence[Flow[R]], fence: Fence, interrupted: Callable[[], None]) -> None:
        self.flows = flows
        self.fence = fence
        self.interrupted = interrupted

    def close_unbegun(self) -> None:
        """Close what was never begun."""
        for flow in self.flows:
            if inspect.getcoroutinestate(flow) == inspect.CORO_CREATED:
                flow.close()


Flow = Coroutine[Effect[Any], Any, R]


class Perform(Protocol):
    """A synchronous shell's answer to effects."""

    def __call__(self, effect: Effect[Any]) -> Any: ...


def drive(flow: Flow[R], perform: Perform) -> R:
    """Run a flow to its end, in this thread."""
    try:
        effect = flow.send(None)
        while True:
            try:
                answer = perform(effect)
            except BaseException as error:
                effect = flow.throw(error)
            else:
                effect = flow.send(answer)
    except StopIteration as stop:
        result: R = stop.value
        return result
    finally:
        flow.close()


async def adrive(flow: Flow[R], perform: Callable[[Effect[Any]], Awaitable[Any]]) -> R:
    """Run a flow to its end, in this task."""
    try:
        effect = flow.send(None)
        while True:
            try:
                answer = await perform(effect)
            except GeneratorExit:  # the loop is gone, and the flow perhaps before it
                raise
            except BaseException as error:
                effect = flow.throw(error)
            else:
                effect = flow.send(answer)
    except StopIteration as stop:
        result: R = stop.value
        return result
    finally:
        flow.close()
