"""What both coordinators do, as flows: start a saga, submit one, wait for one, recover those that were left."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from sagalog.coordinator.definition import Definition
from sagalog.coordinator.effects import Sleep, Write
from sagalog.coordinator.lease import Executor
from sagalog.coordinator.recover import OnCrash
from sagalog.coordinator.run import Policy, Run, again
from sagalog.coordinator.saga import execute
from sagalog.errors import (
    LogUnavailable,
    PayloadError,
    SagaFailed,
    SagaInProgress,
    UnusableHandler,
    WrongEnvironment,
)
from sagalog.log import claiming, owning, reading
from sagalog.log.database import Operation
from sagalog.log.fencing import Fence
from sagalog.log.sagas import Drawn, new_token
from sagalog.moments import is_wait, now_ms, to_ms
from sagalog.payload import check_text, encode
from sagalog.states import SagaState

T = TypeVar("T")
_log = logging.getLogger("sagalog")
_FIRST_LOOK, _LONGEST_LOOK = 0.01, 0.5
_ENDED = (SagaState.COMPENSATED, SagaState.FAILED_COMPENSATION, SagaState.ABANDONED)


def always() -> bool:
    """What is wanted until its end."""
    return True


@dataclass(eq=False)
class Core:
    """A coordinator's settings and flows."""

    policy: Policy
    executor: Executor
    on_crash: OnCrash
    max_recoveries: int
    environment: str | None
    definitions: dict[str, Definition] = field(default_factory=dict)
    _of_function: dict[Any, list[Definition]] = field(default_factory=dict)

    # Definitions

    def add(self, definition: Definition) -> None:
        """Register a saga.

        Raises:
            UnusableHandler: The name is taken.
        """
        if definition.name in self.definitions:
            raise UnusableHandler(
                f"saga {definition.name!r}", "a saga of that name is registered already", hint="Give another name."
            )
        self.definitions[definition.name] = definition
        self._of_function.setdefault(definition.function, []).append(definition)

    def definition_of(self, saga: Callable[..., Any] | str) -> Definition:
        """The definition of a saga's function, or of a name.

        Raises:
            UnusableHandler: It is not registered here.
        """
        if isinstance(saga, str):
            found = [self.definitions[saga]] if saga in self.definitions else []
        else:
            found = self._of_function.get(saga, []) if isinstance(saga, Hashable) else []
        if len(found) > 1:
            names = " and ".join(repr(definition.name) for definition in found)
            raise UnusableHandler(
                f"saga {found[0].function.__qualname__!r}",
                f"it is registered as {names}",
                hint="Give one of the names.",
            )
        if not found:
            shown = saga if isinstance(saga, str) else getattr(saga, "__qualname__", repr(saga))
            raise UnusableHandler(
                f"saga {shown!r}", "it is not registered with this coordinator", hint='Use @coordinator.saga("name").'
            )
        return found[0]

    # Starting

    async def registered(self) -> None:
        """Hold the lease before anything is owned under it."""
        executor = self.executor
        if executor.is_due():
            executor_id = executor.executor_id
            if self.environment is not None and not executor.is_registered:
                await Write(claiming.environment(self.environment))  # a copy of this log will know it by that
            await Write(executor.begin_renewal(executor_id))
            executor.renewed(executor_id)

    async def run(self, definition: Definition, input: Any, key: str | None) -> Any:
        """Start a saga and bring it to its end."""
        text = _input_text(definition, input, key)
        input = definition.as_held(input, text, "run")
        token = new_token()
        deadline = deadline_of(definition)

        async def beginning(executor_id: str) -> Drawn:
            begin = owning.begin_saga(
                definition.name,
                text,
                key=key,
                version=definition.version,
                executor_id=executor_id,
                deadline_at=deadline,
                token=token,
                same=definition.same_input(input),
            )
            return await _written(begin)

        mine: list[Fence] = []

        def fence_of(drawn: Drawn) -> Fence | None:
            if not drawn.created:
                return None
            mine.append(Fence(drawn.saga_id, 1))
            return mine[0]

        try:
            begun = await self._taking(beginning, fence_of)
            if not begun.created:
                return await self.outcome(definition, begun.saga_id)
            run = Run(self.policy, definition, mine[0], token, name=definition.name, deadline_at=deadline)
            return await self.owning(mine[0], execute, run, definition, input)
        except BaseException as error:
            if not isinstance(error, Exception):
                for fence in mine:
                    self.let_go(fence)
            raise

    async def _taking(self, writing: Callable[[str], Awaitable[T]], fence_of: Callable[[T], Fence | None]) -> T:
        """Make a saga this process's; until the answer is here, no other thread takes it for one that was left.

        Args:
            writing: Writes it, under the identity that it is given.
            fence_of: What the answer gives.
        """
        executor, ticket = self.executor, object()
        coming, active = executor.coming, executor.active
        try:
            executor.come(ticket)
            await self.registered()
            answer: T = await writing(executor.executor_id)
            fence = fence_of(answer)
            if fence is not None:
                active[fence.saga_id] = fence
            coming.discard(ticket)
        except BaseException as error:  # and not finally: a signal's exception may come in the last line
            coming.discard(ticket)
            if isinstance(error, LogUnavailable) or not isinstance(error, Exception):
                executor.look_for_orphans()  # it may be this process's all the same
            raise
        return answer

    async def claimed(
        self, claim: Callable[[str], Operation[bool]], fence: Fence, wanted: Callable[[], bool] = always
    ) -> bool:
        """Whether a claim of this process won; no two of its threads claim a saga at once, for a claim names no thread.

        Args:
            claim: The claim of an executor.
            fence: What it gives.
            wanted: Asked once more, when whoever gives the lease up waits for the claim's end already.
        """

        async def claiming(executor_id: str) -> bool:
            return wanted() and await Write(claim(executor_id))

        saga_id, claims = fence.saga_id, self.executor.claiming
        try:
            if claims.setdefault(saga_id, fence) is not fence:
                return False
            return await self._taking(claiming, lambda won: fence if won else None)
        finally:  # without a call, at which a signal could be heard; a forked child has none
            if saga_id in claims and claims[saga_id] is fence:
                del claims[saga_id]

    async def owning(self, fence: Fence, flow: Callable[..., Any], *args: Any) -> Any:
        """Work on a saga that this process owns; what it stops working on is given back for recovery."""
        self.executor.active[fence.saga_id] = fence
        is_left = False
        try:
            return await flow(*args)
        except (LogUnavailable, GeneratorExit):
            is_left = True  # a loop that is gone writes nothing
            raise
        except BaseException as error:
            if not (isinstance(error, SagaFailed) and error.outcome in _ENDED):
                is_left = True  # also if what comes next is interrupted
                is_left = not await self._gave_back(fence)
            raise
        finally:
            self._works_no_more(fence)
            self.executor.given_up.discard(fence)
            if is_left:
                self.executor.look_for_orphans()

    def _works_no_more(self, fence: Fence) -> None:
        if self.executor.holds(fence):
            self.executor.active.pop(fence.saga_id, None)  # the lease's thread may have given it up in between

    def let_go(self, fence: Fence) -> None:
        """Of what was interrupted between two lines: nobody works on it here, or the end of that work is not noted."""
        self._works_no_more(fence)
        self.executor.look_for_orphans()

    async def _gave_back(self, fence: Fence) -> bool:
        try:
            # In a forked child this changes nothing: the saga names the parent.
            await Write(owning.release(fence, self.executor.executor_id, counted=True))
        except Exception:
            return False
        return True

    async def submit(self, definition: Definition, input: Any, key: str | None, run_at: datetime | None) -> int:
        """Submit a saga in a transaction of its own."""
        drawn = await _written(self.submission(definition, input, key, run_at))
        return drawn.saga_id

    def submission(
        self, definition: Definition, input: Any, key: str | None, run_at: datetime | None
    ) -> Operation[Drawn]:
        """What submits a saga, in whichever transaction."""
        text = _input_text(definition, input, key)
        input = definition.as_held(input, text, "submit")
        return owning.begin_saga(
            definition.name,
            text,
            key=key,
            version=definition.version,
            executor_id=None,
            run_at=None if run_at is None else _moment(run_at, definition),
            same=definition.same_input(input),
        )

    # Results

    async def outcome(self, definition: Definition | None, saga_id: int) -> Any:
        """A recorded result.

        Raises:
            SagaFailed: It did not complete.
            SagaInProgress: It has not ended.
        """
        record = await Write(reading.get(saga_id))
        if record.state == SagaState.COMPLETED:
            return record.result if definition is None else definition.read_result(record.result_json, saga_id)
        if record.state in _ENDED:
            raise SagaFailed(saga_id, record.name, SagaState(record.state), record.failure_reason)
        raise SagaInProgress(saga_id, record.name, record.state)

    async def wait(self, saga_id: int, seconds: float | None) -> Any:
        """The result of a saga, whoever runs it."""
        if seconds is not None and not is_wait(seconds):
            raise UnusableHandler(
                f"wait for saga {saga_id}", f"timeout={seconds!r}", hint="It is seconds, 0 or more, or None for no end."
            )
        until = None if seconds is None else time.monotonic() + seconds
        pause = _FIRST_LOOK
        name = (await Write(reading.get(saga_id))).name
        while True:
            try:
                return await self.outcome(self.definitions.get(name), saga_id)
            except SagaInProgress as running:
                left = pause if until is None else until - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"saga {saga_id} ({name}) is {running.found!r} after {seconds} s") from running
            await Sleep(min(pause, left))
            pause = min(_LONGEST_LOOK, pause * 1.5)

    async def check_environment(self) -> None:
        """A copy of production must not act on the world.

        Raises:
            WrongEnvironment: The log remembers another one.
        """
        remembered = await _written(claiming.environment(self.environment))
        if remembered != self.environment:
            raise WrongEnvironment(self.environment, str(remembered))


async def _written(operation: Operation[T]) -> T:
    """What may be repeated: a start finds its own saga again by its token."""
    try:
        return await Write(operation)  # type: ignore[no-any-return]
    except LogUnavailable as error:
        return await again(operation, error)


def _input_text(definition: Definition, input: Any, key: str | None) -> str:
    if key is not None:
        check_text(key, "key", f"run of {definition.name}")
    return encode(input, f"the input of {definition.name}")


def deadline_of(definition: Definition) -> int | None:
    """When a saga that starts now runs out of time; Unix milliseconds."""
    return None if definition.timeout is None else now_ms() + int(definition.timeout * 1000)


def _moment(moment: datetime, definition: Definition) -> int:
    try:
        return to_ms(moment)
    except (ValueError, AttributeError, TypeError):
        raise PayloadError(
            f"submit of {definition.name}", "run_at is no aware datetime", hint="Give one with tzinfo=UTC."
        ) from None
