"""The async faces of the binds: the same operations and transactions, awaited.

An AsyncEngine's, AsyncSession's or AsyncConnection's sync counterpart runs in a
greenlet, as SQLAlchemy's own async API does. The file road runs in one worker
thread, which commits for all tasks that wait. A cancelled task waits until its
write is decided, for a write cut off in the middle would be an unknown one.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from sqlalchemy.util import await_only, greenlet_spawn

from sagalog.errors import UnusableBind
from sagalog.log.bind import Bind
from sagalog.log.database import Operation
from sagalog.log.file import FileBind, HeldFile
from sagalog.log.turns import Ticket

R = TypeVar("R")


class AsyncBind(Protocol):
    """Runs operations in transactions, awaited."""

    async def perform(self, operation: Operation[R]) -> R:
        """Run one operation, in a transaction of its own or in the caller's."""
        ...

    def unit_of_work(self) -> AbstractAsyncContextManager[AsyncBind]:
        """One transaction for several operations."""
        ...

    async def close(self) -> None:
        """Give back what the bind itself opened."""
        ...


def sleep_in_greenlet(seconds: float) -> None:
    """Let the event loop go on while an operation waits for a lock."""
    await_only(asyncio.sleep(seconds))


async def decided(work: Awaitable[R]) -> R:
    """Await `work` to its end, and only then let a cancellation through."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                continue
        if not task.cancelled():
            task.exception()
        raise


async def entered(entering: Awaitable[R], leave: Callable[[R], Awaitable[object]]) -> R:
    """Await what is entered; if that is cancelled meanwhile, leave again what was entered all the same."""
    task = asyncio.ensure_future(entering)
    try:
        return await decided(task)
    except asyncio.CancelledError:
        if task.done() and not task.cancelled() and task.exception() is None:
            with suppress(Exception):
                await decided(leave(task.result()))
        raise


class GreenletBind:
    """A sync bind over the sync counterpart of something async."""

    def __init__(self, bind: Bind) -> None:
        self._bind = bind

    @property
    def bind(self) -> Bind:
        """The sync bind."""
        return self._bind

    async def perform(self, operation: Operation[R]) -> R:
        """See `AsyncBind`."""
        return await decided(greenlet_spawn(self._bind.perform, operation))

    @asynccontextmanager
    async def unit_of_work(self) -> AsyncIterator[GreenletBind]:
        """See `AsyncBind`."""
        unit = self._bind.unit_of_work()
        held = await entered(
            greenlet_spawn(unit.__enter__),
            lambda _: greenlet_spawn(unit.__exit__, asyncio.CancelledError, asyncio.CancelledError(), None),
        )
        try:
            yield GreenletBind(held)
        except BaseException as error:
            if not await decided(greenlet_spawn(unit.__exit__, type(error), error, error.__traceback__)):
                raise
        else:
            await decided(greenlet_spawn(unit.__exit__, None, None, None))

    async def close(self) -> None:
        """See `AsyncBind`."""
        await greenlet_spawn(self._bind.close)


class Waiting:
    """A task's write that somebody else carries.

    Attributes:
        ticket: The operation, and its outcome.
        loop: The task's.
        decided: Whether the task was told.
    """

    __slots__ = ("_future", "decided", "loop", "ticket")

    def __init__(self, operation: Operation[Any], loop: asyncio.AbstractEventLoop) -> None:
        self.ticket: Ticket[Any] = Ticket(operation)
        self.loop = loop
        self._future = loop.create_future()
        self.decided = False

    async def decision(self) -> None:
        """Wait until the task is told; a cancellation is let through only then."""
        try:
            await self._future
        except asyncio.CancelledError:
            while not self.decided:
                self._future = self.loop.create_future()
                with suppress(asyncio.CancelledError):
                    await self._future
            raise

    def tell(self) -> None:
        """Wake the task, in its loop."""
        self.decided = True
        if not self._future.done():
            self._future.set_result(None)


class ThreadBind:
    """The file road for tasks: writes go to one worker thread, which commits once for all that wait.

    In memory and at durability "normal" a commit waits for no disk, and the way to a thread and back costs more than
    four times as much: what nothing stands in the way of is written in the loop.
    """

    def __init__(self, file: FileBind) -> None:
        self._file = file
        self._waits_for_no_disk = file.path is None or file.durability == "normal"
        self._waiting: deque[Waiting] = deque()
        self._calls: SimpleQueue[str] = SimpleQueue()
        self._called = False
        self._worker: threading.Thread | None = None
        self._lock = threading.Lock()
        self._unit_task: asyncio.Task[Any] | None = None
        # Units take turns in the loop and run in a thread of their own: were they to wait in the loop's default
        # executor, they could fill it, and the one that holds the log would find no thread to go on.
        self._unit_turn = asyncio.Lock()
        self._unit_thread = ThreadPoolExecutor(1, thread_name_prefix="sagalog-unit")

    @property
    def file(self) -> FileBind:
        """The file road."""
        return self._file

    async def perform(self, operation: Operation[R]) -> R:
        """See `AsyncBind`."""
        if operation.kind.apart:
            return await decided(asyncio.to_thread(self._file.perform, operation))
        if self._unit_task is not None:
            self._refuse_nested(operation.asked)
        if self._waits_for_no_disk:
            await asyncio.sleep(0)  # for a task that writes and writes would let no other one run
            written = self._file.try_now(operation)
            if written is not None:
                return written.outcome()  # type: ignore[no-any-return]
        waiting = Waiting(operation, asyncio.get_running_loop())
        try:
            with self._lock:
                self._waiting.append(waiting)
                call, self._called = not self._called, True
                if self._worker is None or not self._worker.is_alive():
                    self._worker = threading.Thread(target=self._work, name="sagalog-writer", daemon=True)
                    self._worker.start()
                    call = True
            if call:
                self._calls.put("write")
        except BaseException:  # a signal's: nobody else would call, and one call more does no harm
            self._calls.put("write")
            raise
        await waiting.decision()
        value: R = waiting.ticket.outcome()
        return value

    def _refuse_nested(self, asked: str) -> None:
        if self._unit_task is not None and self._unit_task is asyncio.current_task():
            raise UnusableBind(
                asked,
                "this task has a unit of work open on the same log, which would wait for itself",
                hint="Use the object that `async with log.unit_of_work() as work` gave.",
            )

    def _work(self) -> None:
        last = False
        while not last:
            last = not self._calls.get()
            with self._lock:
                batch = list(self._waiting)
                self._waiting.clear()
                self._called = False
                if last:
                    self._worker = None  # who comes now does not wait for this one
            if not batch:
                continue
            try:
                self._file.perform_all([waiting.ticket for waiting in batch])
            except BaseException as error:
                for waiting in batch:
                    waiting.ticket.error = waiting.ticket.error or error
            for loop in {waiting.loop for waiting in batch}:
                # A loop that is closed has nobody who waits.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(_wake, [waiting for waiting in batch if waiting.loop is loop])

    @asynccontextmanager
    async def unit_of_work(self) -> AsyncIterator[_AsyncHeldFile]:
        """See `AsyncBind`."""
        self._refuse_nested("unit_of_work")
        async with self._unit_turn:
            held = await entered(
                self._in_unit_thread(lambda: self._file.enter_unit(None)),
                lambda held: self._in_unit_thread(lambda: held.end(commit=False)),
            )
            self._unit_task = asyncio.current_task()
            try:
                yield _AsyncHeldFile(held, self._in_unit_thread)
            except BaseException:
                self._unit_task = None
                await self._in_unit_thread(lambda: held.end(commit=False))
                raise
            self._unit_task = None
            await self._in_unit_thread(lambda: held.end(commit=True))

    async def _in_unit_thread(self, work: Callable[[], R]) -> R:
        return await decided(asyncio.get_running_loop().run_in_executor(self._unit_thread, work))

    async def close(self) -> None:
        """See `AsyncBind`; it waits for the writes under way."""
        worker = self._worker
        if worker is not None:
            self._calls.put("")
            await asyncio.to_thread(worker.join)
        await asyncio.to_thread(self._file.close)
        self._unit_thread.shutdown(wait=False)


def _wake(batch: list[Waiting]) -> None:
    try:
        for waiting in batch:
            waiting.tell()
    except BaseException:  # a signal's, which is no matter of the others
        for waiting in batch:
            waiting.tell()
        raise


class _AsyncHeldFile:
    def __init__(self, held: HeldFile, in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]) -> None:
        self._held = held
        self._in_thread = in_thread

    async def perform(self, operation: Operation[R]) -> R:
        value: R = await self._in_thread(lambda: self._held.perform(operation))
        return value

    @asynccontextmanager
    async def unit_of_work(self) -> AsyncIterator[_AsyncHeldFile]:
        yield self

    async def close(self) -> None:
        """Nothing: the unit's block ends it."""
