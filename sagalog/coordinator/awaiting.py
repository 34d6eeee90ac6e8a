"""`AsyncSagaCoordinator`: the shell that answers the core's effects in the caller's task."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from sagalog.coordinator.bus import CommandBus, OnUnknown
from sagalog.coordinator.context import AsyncSagaContext
from sagalog.coordinator.effects import (
    Call,
    Cancelled,
    Effect,
    Invoke,
    OutOfTime,
    Settled,
    Sleep,
    Together,
    Write,
    adrive,
)
from sagalog.coordinator.recover import OnCrash, RecoveryReport
from sagalog.coordinator.saga import CallSaga
from sagalog.coordinator.shell import Shell, lease_stays
from sagalog.coordinator.threads import in_thread
from sagalog.coordinator.worker import AsyncWorker
from sagalog.errors import SagaLogError
from sagalog.log import claiming
from sagalog.log.facade import AsyncSagaLog
from sagalog.records import SagaRecord

if TYPE_CHECKING:
    from sagalog.log.facade import AsyncTarget

Input = TypeVar("Input")
R = TypeVar("R")
_STUBBORN = 5.0
"""Seconds after its timeout in which a handler ends that is cancelled; one that does not is given up."""


class AsyncSagaCoordinator(Shell):
    """The same for async functions and handlers; sync handlers run in threads. See `SagaCoordinator`."""

    _asynchronous = True
    log: AsyncSagaLog

    def __init__(
        self,
        log: AsyncSagaLog,
        bus: CommandBus,
        *,
        lease: float = 30.0,
        on_crash: OnCrash = "compensate",
        on_unknown: OnUnknown = "stop",
        max_recoveries: int = 10,
        environment: str | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(
            log,
            bus,
            lease=lease,
            on_crash=on_crash,
            on_unknown=on_unknown,
            max_recoveries=max_recoveries,
            environment=environment,
            label=label,
        )

    @overload
    async def run(
        self, saga: Callable[[AsyncSagaContext, Input], Awaitable[R]], input: Input, /, *, key: str | None = None
    ) -> R: ...

    @overload
    async def run(self, saga: Callable[[AsyncSagaContext], Awaitable[R]], /, *, key: str | None = None) -> R: ...

    @overload
    async def run(self, saga: str, /, *input: Any, key: str | None = None) -> Any: ...

    async def run(self, saga: Callable[..., Any] | str, /, *input: Any, key: str | None = None) -> Any:
        """See `SagaCoordinator.run`."""
        definition = self._core.definition_of(saga)
        return await adrive(self._core.run(definition, definition.input_of(input), key), self._perform)

    async def submit(
        self,
        saga: Callable[..., Any] | str,
        input: Any = None,
        *,
        key: str | None = None,
        session: AsyncTarget | None = None,
        run_at: datetime | None = None,
    ) -> int:
        """See `SagaCoordinator.submit`; `session` is an AsyncSession or AsyncConnection."""
        definition = self._core.definition_of(saga)
        if session is None:
            return await adrive(self._core.submit(definition, input, key, run_at), self._perform)
        log = AsyncSagaLog(session, **self._placement)
        return (await log._bind.perform(self._core.submission(definition, input, key, run_at))).saga_id

    async def wait(self, saga_id: int, *, timeout: float | None = None) -> Any:  # noqa: ASYNC109 - as concurrent.futures
        """See `SagaCoordinator.wait`."""
        return await adrive(self._core.wait(saga_id, timeout), self._perform)

    async def recover(self, *, limit: int | None = None, adopt: bool = False) -> RecoveryReport:
        """See `SagaCoordinator.recover`."""
        return await adrive(self._core.recover(limit, adopt=adopt), self._perform)

    async def retry(self, saga_id: int, *, note: str, actor: str, again: bool = False) -> SagaRecord:
        """See `SagaCoordinator.retry`."""
        record: SagaRecord = await adrive(self._core.retry(saga_id, note=note, actor=actor, again=again), self._perform)
        return record

    def worker(self, *, concurrency: int = 8, poll: float = 1.0) -> AsyncWorker:
        """See `SagaCoordinator.worker`; ``async with``, made for a FastAPI lifespan."""
        return AsyncWorker(self, concurrency, poll)

    async def close(self) -> None:
        """See `SagaCoordinator.close`."""
        executor = self._core.executor
        for retired in await asyncio.to_thread(executor.retirement):
            try:
                await self.log._bind.perform(claiming.retire(retired))
                executor.is_gone(retired)
            except SagaLogError as error:
                lease_stays(error)

    async def __aenter__(self) -> AsyncSagaCoordinator:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Effects

    async def _perform(self, effect: Effect[Any]) -> Any:
        interpose = self.interpose
        if interpose is None or not isinstance(effect, Write | Invoke):
            return await self._answer(effect)
        return await interpose(effect, self._answer)

    async def _answer(self, effect: Effect[Any]) -> Any:
        if isinstance(effect, Write):
            return await self.log._bind.perform(effect.operation)
        if isinstance(effect, Invoke):
            return await self._invoke(effect)
        if isinstance(effect, CallSaga):
            return await self._call_saga(effect)
        if isinstance(effect, Sleep):
            return await asyncio.sleep(effect.seconds)
        if isinstance(effect, Call):
            value = effect.function(*effect.args)
            return await value if inspect.isawaitable(value) else value
        assert isinstance(effect, Together)
        try:
            return await asyncio.gather(*(self._settled(flow) for flow in effect.flows))
        finally:
            effect.close_unbegun()

    async def _call_saga(self, effect: CallSaga) -> Any:
        task = asyncio.current_task()
        before = 0 if task is None else task.cancelling()
        try:
            return await effect.call(AsyncSagaContext(effect.run, self._perform))
        except Exception as error:
            # A function that calls its context while it is cancelled has that refused, and is cancelled all the same.
            # Until Python 3.13 a TaskGroup that failed leaves its task counted as one that somebody cancels.
            cancelled = task is not None and task.cancelling() > before and _came_of_cancelling(error)
            if cancelled and error is effect.run.stopped:
                raise asyncio.CancelledError from error
            raise

    async def _settled(self, flow: Any) -> Settled[Any]:
        try:
            return Settled(await adrive(flow, self._perform), None)
        except Exception as error:
            return Settled(None, error)

    async def _invoke(self, effect: Invoke[Any]) -> Any:
        handler, owed = effect.handler, self._core.executor.owed  # a forked child has another one
        limit = asyncio.timeout(effect.info.seconds)
        ticket = owed.watch(effect.fence, effect.info.step_index, effect.info.seconds + _STUBBORN, handler.settle)
        try:
            async with limit:
                return await self._called(effect)
        except TimeoutError as error:
            if limit.expired():
                raise OutOfTime(f"its handler outlived its timeout of {effect.info.seconds:g} s") from error
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise Cancelled("its handler let the cancellation of something else out") from error
        finally:
            owed.unwatch(ticket)

    async def _called(self, effect: Invoke[Any]) -> Any:
        handler = effect.handler
        if handler.transactional:
            return await self._transactions.aperform(effect)
        if handler.signature.is_async:
            return await handler.function(*effect.arguments(None))
        value = await in_thread(handler.function, *effect.arguments(None))
        return await value if inspect.isawaitable(value) else value


def _came_of_cancelling(error: BaseException) -> bool:
    """Whether an exception was raised while a cancellation was on its way out."""
    seen: set[int] = set()
    before = error.__context__
    while before is not None and id(before) not in seen:
        if isinstance(before, asyncio.CancelledError):
            return True
        seen.add(id(before))
        before = before.__context__
    return False
