"""`SagaCoordinator` and `AsyncSagaCoordinator`: the shells that answer the core's effects, one of them awaited."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

from sagalog.coordinator.bus import CommandBus, OnUnknown
from sagalog.coordinator.context import AsyncSagaContext, SagaContext
from sagalog.coordinator.core import Core
from sagalog.coordinator.definition import define
from sagalog.coordinator.effects import (
    Call,
    Effect,
    Invoke,
    OutOfTime,
    Settled,
    Sleep,
    Together,
    Write,
    adrive,
    drive,
)
from sagalog.coordinator.lease import Executor
from sagalog.coordinator.recover import OnCrash, RecoveryReport
from sagalog.coordinator.run import Policy
from sagalog.coordinator.saga import CallSaga
from sagalog.coordinator.transacting import Transactions
from sagalog.coordinator.worker import AsyncWorker, Worker
from sagalog.errors import SagaLogError, UnusableBind, UnusableHandler
from sagalog.log.apart import apart_of, inner_bind
from sagalog.log.caller import CallerBind
from sagalog.log.facade import AsyncSagaLog, SagaLog
from sagalog.records import SagaRecord

if TYPE_CHECKING:
    from sagalog.log.facade import AsyncTarget, SyncTarget

_log = logging.getLogger("sagalog")
Input = TypeVar("Input")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
_HANDLER_THREADS = 64


Interpose: TypeAlias = Callable[[Effect[Any], Callable[[Effect[Any]], Any]], Any]
"""What `sagalog.testing.crash_points` puts around every log transaction and every handler call."""


class _Shell:
    """What the two coordinators share: settings, and registering sagas."""

    _asynchronous: bool

    def __init__(
        self,
        log: SagaLog | AsyncSagaLog,
        bus: CommandBus,
        *,
        lease: float,
        on_crash: OnCrash,
        on_unknown: OnUnknown,
        max_recoveries: int,
        environment: str | None,
        label: str | None,
    ) -> None:
        self._check(log, lease, on_crash, on_unknown, max_recoveries)
        self.log = log
        self.bus = bus
        bind = log._bind
        self._transactions = Transactions(bind)
        executor = Executor(lease, label, lambda: apart_of(bind))
        self._core = Core(
            Policy(bus, on_unknown, self._asynchronous),
            executor,
            on_crash=on_crash,
            max_recoveries=max_recoveries,
            environment=environment,
        )
        self.interpose: Interpose | None = None

    def _check(self, log: Any, lease: float, on_crash: str, on_unknown: str, max_recoveries: int) -> None:
        asked = type(self).__name__
        wanted = AsyncSagaLog if self._asynchronous else SagaLog
        if not isinstance(log, wanted):
            raise UnusableBind(asked, f"the log is a {type(log).__name__}", hint=f"Give it a {wanted.__name__}.")
        if isinstance(inner_bind(log._bind), CallerBind):
            raise UnusableBind(
                asked,
                "the log is bound to a caller's transaction, with which its writes would be lost",
                hint="Give SagaLog the Engine. To start a saga inside a transaction: submit(..., session=session).",
            )
        for name, value, allowed in (
            ("on_crash", on_crash, ("compensate", "resume")),
            ("on_unknown", on_unknown, ("stop", "compensate")),
        ):
            if value not in allowed:
                raise UnusableHandler(asked, f"{name}={value!r}", hint=f"Use one of {', '.join(allowed)}.")
        if lease <= 0 or max_recoveries < 0:
            raise UnusableHandler(asked, f"lease={lease}, max_recoveries={max_recoveries}", hint="Both are positive.")

    @property
    def _placement(self) -> dict[str, Any]:
        """Where the log's tables are, for another bind to them."""
        return self._transactions.placement._asdict()

    @property
    def executor_id(self) -> str:
        """This process's identity in the log; another one after a fork."""
        return self._core.executor.executor_id

    def saga(
        self, name: str, *, version: int = 1, timeout: float | None = None, resumes: tuple[int, ...] = ()
    ) -> Callable[[F], F]:
        """Register a saga's function, ``(ctx, input) -> result``.

        Args:
            name: The saga's name in the log.
            version: Recorded with each saga; raise it when the function dispatches otherwise than before.
            timeout: Seconds after which a saga is undone, unless it passed a pivot.
            resumes: Earlier versions whose sagas this function may go on with.

        Returns:
            A decorator that returns the function unchanged.

        Raises:
            UnusableHandler: The function does not fit, or the name is taken.
        """
        names = sys._getframe(1).f_locals

        def register(function: F) -> F:
            self._core.add(
                define(
                    function,
                    names,
                    name=name,
                    version=version,
                    timeout=timeout,
                    resumes=resumes,
                    asynchronous=self._asynchronous,
                )
            )
            return function

        return register


def _lease_stays(error: SagaLogError) -> None:
    """A log that is closed, or out of reach, keeps the lease until it runs out by itself."""
    _log.info("the lease was not given up, and runs out: %s", error)


class SagaCoordinator(_Shell):
    """Runs sagas over a bus and a log, undoes them on failure, and recovers what a crash left.

    Args:
        log: A `SagaLog` of its own or of an Engine.
        bus: The handlers and compensations.
        lease: Seconds after which the sagas of a process that died may be taken over.
        on_crash: "compensate" undoes what a dead process left; "resume" runs its function again, each step that the
            log holds answered from it.
        on_unknown: What becomes of a step that stays in doubt, where its handler does not say: "stop" leaves the saga
            to a person, "compensate" undoes the step as if it had happened.
        max_recoveries: A saga taken over more often goes to a person.
        environment: Remembered in the log; a coordinator of another one refuses to recover.
        label: What people see of this process; host and process id if none is given.

    Raises:
        UnusableBind: The log is bound to a caller's Session or Connection.
    """

    _asynchronous = False
    log: SagaLog

    def __init__(
        self,
        log: SagaLog,
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
    def run(self, saga: Callable[[SagaContext, Input], R], input: Input, /, *, key: str | None = None) -> R: ...

    @overload
    def run(self, saga: Callable[[SagaContext], R], /, *, key: str | None = None) -> R: ...

    @overload
    def run(self, saga: str, /, *input: Any, key: str | None = None) -> Any: ...

    def run(self, saga: Callable[..., Any] | str, /, *input: Any, key: str | None = None) -> Any:
        """Run a saga to its end.

        Args:
            saga: The registered function, or its name.
            input: Its input, if it takes one.
            key: The start's idempotency key: the same (name, key) never runs twice.

        Returns:
            What the function returned; with a key that completed before, the recorded result.

        Raises:
            SagaFailed: It did not complete; with the outcome, from the cause.
            SagaInProgress: A saga of that key has not ended.
            KeyConflict: The key was used with another input.
            LeaseLost: Another process took it over meanwhile.
            LogUnavailable: The log is out of reach; what was begun is left to recovery.
        """
        definition = self._core.definition_of(saga)
        return drive(self._core.run(definition, definition.input_of(input), key), self._perform)

    def submit(
        self,
        saga: Callable[..., Any] | str,
        input: Any = None,
        *,
        key: str | None = None,
        session: SyncTarget | None = None,
        run_at: datetime | None = None,
    ) -> int:
        """Start a saga that a worker will run, inside the caller's own transaction.

        Args:
            saga: The registered function, or its name.
            input: Its input.
            key: The start's idempotency key.
            session: The Session or Connection whose transaction it joins: rolled back with it, and run once it is
                committed. Without one it is durable when this returns.
            run_at: An aware datetime before which it is not started.

        Returns:
            The saga's id; with a key that was used before, that saga's.

        Raises:
            KeyConflict: The key was used with another input.
        """
        operation = self._core.submission(self._core.definition_of(saga), input, key, run_at)
        bind = self.log._bind if session is None else SagaLog(session, **self._placement)._bind
        return bind.perform(operation).saga_id

    def wait(self, saga_id: int, *, timeout: float | None = None) -> Any:
        """Wait for the result of a saga, whoever runs it.

        Args:
            saga_id: The saga.
            timeout: Seconds; None waits for ever.

        Raises:
            SagaFailed: It did not complete.
            TimeoutError: It has not ended in time.
        """
        return drive(self._core.wait(saga_id, timeout), self._perform)

    def recover(self, *, limit: int | None = None, adopt: bool = False) -> RecoveryReport:
        """Take over the sagas whose process is gone, and bring each to an end.

        Args:
            limit: At most so many; None for all.
            adopt: Take also sagas that never belonged to a coordinator.

        Returns:
            What became of each, and what those that were left wait for.

        Raises:
            WrongEnvironment: The log belongs to another environment.
        """
        return drive(self._core.recover(limit, adopt=adopt), self._perform)

    def retry(self, saga_id: int, *, note: str, actor: str, again: bool = False) -> SagaRecord:
        """Give a saga that needs a person back, and bring it to an end here; audited.

        After a step that cannot be undone it goes forward, otherwise it is undone.

        Args:
            saga_id: The saga, in failed_compensation.
            note: Why.
            actor: Who says so.
            again: Send a step in doubt again, once, under its key; without, a step in doubt is refused.

        Returns:
            The saga as it is now.

        Raises:
            InvalidTransition: It is in another state, or a step is in doubt.
        """
        record: SagaRecord = drive(self._core.retry(saga_id, note=note, actor=actor, again=again), self._perform)
        return record

    def worker(self, *, concurrency: int = 8, poll: float = 1.0) -> Worker:
        """A worker that runs submitted sagas, recovers, and keeps the lease, until it is shut down.

        ``with coordinator.worker():`` or its `start()` and `shutdown(grace=10.0)`.

        Args:
            concurrency: At most so many sagas at a time.
            poll: Seconds between looks for work where nothing tells of it.
        """
        return Worker(self, concurrency, poll)

    def close(self) -> None:
        """Give up the lease; the log stays open. Calling it again does nothing."""
        retirement = self._core.executor.retirement()
        if retirement is not None:
            try:
                self.log._bind.perform(retirement)
            except SagaLogError as error:
                _lease_stays(error)

    def __enter__(self) -> SagaCoordinator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Effects

    def _perform(self, effect: Effect[Any]) -> Any:
        interpose = self.interpose
        if interpose is None or not isinstance(effect, Write | Invoke):
            return self._answer(effect)
        return interpose(effect, self._answer)

    def _answer(self, effect: Effect[Any]) -> Any:
        if isinstance(effect, Write):
            return self.log._bind.perform(effect.operation)
        if isinstance(effect, Invoke):
            return self._invoke(effect)
        if isinstance(effect, CallSaga):
            return effect.call(SagaContext(effect.run, self._perform))
        if isinstance(effect, Sleep):
            return time.sleep(effect.seconds)
        if isinstance(effect, Call):
            return effect.function(*effect.args)
        assert isinstance(effect, Together)
        return self._together(effect)

    def _invoke(self, effect: Invoke[Any]) -> Any:
        handler, executor = effect.handler, self._core.executor
        ticket = executor.watch(effect.fence, effect.info.step_index, handler.timeout, handler.settle)
        try:
            if handler.transactional:
                return self._transactions.perform(effect, effect.arguments)
            return handler.function(*effect.arguments(None))
        finally:
            executor.unwatch(ticket)

    def _together(self, effect: Together[Any]) -> list[Settled[Any]]:
        ends: list[Settled[Any]] = [Settled(None, None)] * len(effect.flows)

        def run(place: int, flow: Any) -> None:
            try:
                ends[place] = Settled(drive(flow, self._perform), None)
            except BaseException as error:
                ends[place] = Settled(None, error)

        threads = [
            threading.Thread(target=copy_context().run, args=(run, place, flow), name=f"sagalog-dispatch-{place}")
            for place, flow in enumerate(effect.flows)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ends


class AsyncSagaCoordinator(_Shell):
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
        self._threads: ThreadPoolExecutor | None = None

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
        operation = self._core.submission(self._core.definition_of(saga), input, key, run_at)
        bind = self.log._bind if session is None else AsyncSagaLog(session, **self._placement)._bind
        return (await bind.perform(operation)).saga_id

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
        retirement = await asyncio.to_thread(self._core.executor.retirement)
        if retirement is not None:
            try:
                await self.log._bind.perform(retirement)
            except SagaLogError as error:
                _lease_stays(error)
        if self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None

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
            return await effect.call(AsyncSagaContext(effect.run, self._perform))
        if isinstance(effect, Sleep):
            return await asyncio.sleep(effect.seconds)
        if isinstance(effect, Call):
            value = effect.function(*effect.args)
            return await value if inspect.isawaitable(value) else value
        assert isinstance(effect, Together)
        return await asyncio.gather(*(self._settled(flow) for flow in effect.flows))

    async def _settled(self, flow: Any) -> Settled[Any]:
        try:
            return Settled(await adrive(flow, self._perform), None)
        except Exception as error:
            return Settled(None, error)

    async def _invoke(self, effect: Invoke[Any]) -> Any:
        limit = asyncio.timeout(effect.handler.timeout)
        try:
            async with limit:
                return await self._called(effect)
        except TimeoutError as error:
            if limit.expired():
                raise OutOfTime(f"its handler outlived its timeout of {effect.handler.timeout} s") from error
            raise

    async def _called(self, effect: Invoke[Any]) -> Any:
        handler = effect.handler
        if handler.transactional:
            return await self._transactions.aperform(effect, effect.arguments)
        if handler.signature.is_async:
            return await handler.function(*effect.arguments(None))
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_HANDLER_THREADS, thread_name_prefix="sagalog-handler")
        work = copy_context().run
        loop = asyncio.get_running_loop()
        value = await loop.run_in_executor(self._threads, work, handler.function, *effect.arguments(None))
        return await value if inspect.isawaitable(value) else value
