"""A worker: a part of the process that runs submitted sagas and recovers, beside whatever else the process does."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sagalog.coordinator.effects import adrive, drive
from sagalog.coordinator.listening import Listener, alisten
from sagalog.coordinator.taking import Job, TakingCore
from sagalog.errors import LeaseLost, LogUnavailable, SagaFailed, SagaLogError, UnusableHandler
from sagalog.log import owning
from sagalog.log.bind import is_closed
from sagalog.log.fencing import Fence
from sagalog.log.forking import tell_of_forks
from sagalog.moments import MOMENT, is_seconds, is_wait

if TYPE_CHECKING:
    from sagalog.coordinator.awaiting import AsyncSagaCoordinator
    from sagalog.coordinator.blocking import SagaCoordinator

_log = logging.getLogger("sagalog")


_ENDING = "sagalog-shutdown"
_LONGEST_WAIT = 3600.0
_HURRIES_AFTER = 0.1
"""Seconds after which an end looks whether another `shutdown` gave it less time."""
_CANCELLED_WITHIN = 5.0
"""Seconds in which a task ends that was cancelled; one that does not is given up."""
_ANSWERS_WITHIN = 5.0
"""Seconds after its grace that `shutdown` waits for a database that does not answer."""


def _check_grace(grace: float) -> None:
    if not is_wait(grace):
        raise UnusableHandler("shutdown", f"grace={grace!r}", hint="It is seconds, 0 or more.")


def _limit(grace: float, seconds: float) -> float | None:
    """How long the end of a worker may take."""
    return None if grace > _LONGEST_WAIT else grace + seconds


class _Slots:
    """What a worker is doing from one start to its shutdown, and how it looks for more."""

    def __init__(self, core: TakingCore, concurrency: int, poll: float) -> None:
        if type(concurrency) is not int or concurrency < 1 or not is_seconds(poll):
            raise UnusableHandler(
                "worker",
                f"concurrency={concurrency!r}, poll={poll!r}",
                hint="concurrency is an int above 0, poll are seconds above 0.",
            )
        self.core = core
        self.concurrency = concurrency
        self.poll = poll
        self.busy: dict[int, Job] = {}
        self.stopping = threading.Event()
        self._ends_at = math.inf
        self._trouble: tuple[str, object] | None = None

    def end(self, grace: float) -> None:
        """Take no more; of several graces the first that is over counts."""
        self._ends_at = min(self._ends_at, time.monotonic() + grace)
        self.stopping.set()

    def left(self) -> float:
        """Seconds for what is under way."""
        return min(self._ends_at - time.monotonic(), _LONGEST_WAIT)

    def anew(self) -> _Slots:
        """Those of another start: an earlier one may still be ending."""
        return _Slots(self.core, self.concurrency, self.poll)

    def is_wanted(self) -> bool:
        """Whether a claim that is under way is still wanted."""
        return not self.stopping.is_set()

    def fence_of(self, saga_id: int) -> Fence | None:
        """Under what a saga that is still under way is given up."""
        return self.core.executor.active.get(saga_id)

    def given_up(self, fence: Fence, error: LogUnavailable | None) -> None:
        """Note that a saga was given up, or could not be."""
        if error is not None:
            _log.warning("saga %s could not be given up: %s", fence.saga_id, error)
        if self.core.executor.holds(fence):
            self.core.executor.active.pop(fence.saga_id, None)

    def left_running(self) -> None:
        """The database does not answer, so nothing could be given up: the lease runs out by itself."""
        _log.warning("the worker ends, though the log does not answer; the lease runs out by itself")
        self.core.executor.abandon(self.busy.keys())

    async def more(self) -> list[Job]:
        """What to begin now."""
        self._forget_given_up()
        free = self.concurrency - len(self.busy)
        found = await self.core.find_work(free, self.busy.keys()) if free > 0 else []
        self.busy.update((job.seen.saga_id, job) for job in found)
        self._trouble = None
        return found

    def may_look_again(self, error: Exception) -> bool:
        """Note why no work could be looked for, once for each kind of trouble; False if the log is closed."""
        if is_closed(error):
            _log.warning("the worker ends: %s", error)
            return False
        if not isinstance(error, SagaLogError):
            _log.error("looking for sagas failed; the worker goes on", exc_info=error)
        elif self._trouble != (error.code, error.found):
            self._trouble = (error.code, error.found)
            _log.warning("the worker looks for sagas until the log answers: %s", error)
        return True

    def over(self, job: Job) -> None:
        """One is done; its saga may have been given up, and begun again by another job."""
        if self.busy.get(job.seen.saga_id) is job:
            del self.busy[job.seen.saga_id]

    def _forget_given_up(self) -> None:
        """A handler that hangs in its thread holds no slot, once its saga is given up."""
        given_up = self.core.executor.given_up
        for fence in list(given_up):
            job = self.busy.get(fence.saga_id)
            if job is not None and job.seen.epoch + 1 == fence.epoch:
                del self.busy[fence.saga_id]
                given_up.discard(fence)

    def told(self, job: Job, error: BaseException) -> None:
        """Note what a saga raised; the worker goes on."""
        if isinstance(error, SagaFailed | LeaseLost):
            _log.info("saga %s: %s", job.seen.saga_id, error)
        else:
            self.core.pause(job.seen.saga_id)
            _log.error("saga %s (%s) raised", job.seen.saga_id, job.seen.name, exc_info=error)


@dataclass(eq=False)
class _Running:
    """One start of a worker, and its end."""

    slots: _Slots
    looking: threading.Thread
    listener: Listener | None = None
    ending: threading.Thread | None = None
    raised: BaseException | None = None


class Worker:
    """Runs submitted sagas and recovers, in threads of this process. Made by `SagaCoordinator.worker`."""

    def __init__(self, coordinator: SagaCoordinator, concurrency: int, poll: float) -> None:
        self._coordinator = coordinator
        self._settings = _Slots(coordinator._core, concurrency, poll)
        self._told = False
        self.after_fork_in_child()
        tell_of_forks(self)

    def before_fork(self) -> None:
        """See `forking`: nothing is waited for, the child has locks of its own."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """Nothing was started here: the parent's threads are not the child's."""
        self._wake = threading.Condition()
        self._running: _Running | None = None
        self._starting = threading.RLock()
        self._shutdowns = 0

    def start(self) -> None:
        """Begin; in a process that was forked since, begin there. Calling it again does nothing.

        A shutdown that comes while the log is waited for ends it: it returns, and nothing was begun.

        Raises:
            WrongEnvironment: The log belongs to another environment.
        """
        shutdowns = self._shutdowns
        with self._starting:
            if self._running is None or self._running.slots.stopping.is_set():
                self._start(shutdowns)

    def _start(self, shutdowns: int) -> None:
        drive(self._settings.core.check_environment(), self._coordinator._perform)
        if self._shutdowns != shutdowns:
            return
        slots = self._settings.anew()
        looking = threading.Thread(target=self._look, args=(slots,), name="sagalog-worker", daemon=True)
        self._running = running = _Running(slots, looking)
        try:
            looking.start()
            running.listener = Listener.on(self._coordinator.log, self.wake)
        except BaseException:  # the process may have no more threads now
            slots.stopping.set()
            raise

    def wake(self) -> None:
        """Look for work now."""
        with self._wake:
            self._told = True
            self._wake.notify_all()

    def shutdown(self, grace: float = 10.0) -> None:
        """Take no more sagas, and wait for those under way; calling it again does nothing, or waits for the same.

        Args:
            grace: Seconds to wait. What runs longer is given up: any other process may recover it at once, and
                nothing that its thread does afterwards is written.
        """
        _check_grace(grace)
        self._shutdowns += 1
        begun = self._starting.acquire(timeout=min(grace, _LONGEST_WAIT) + _ANSWERS_WITHIN)
        try:
            running = self._running
            if running is None:
                return
            with self._wake:
                running.slots.end(grace)
                self._wake.notify_all()
            if running.ending is None:
                ending = threading.Thread(target=self._ends, args=(running,), name=_ENDING, daemon=True)
                try:
                    ending.start()
                except RuntimeError:  # the process may have no more threads now
                    self._ends(running)
                else:
                    running.ending = ending
        finally:
            if begun:
                self._starting.release()
        if running.ending is not None:
            running.ending.join(_limit(grace, _ANSWERS_WITHIN))
            if running.ending.is_alive():
                running.slots.left_running()
        if running.raised is not None:
            raise running.raised

    def _ends(self, running: _Running) -> None:
        try:
            self._end(running)
        except BaseException as error:
            running.raised = error
        finally:
            if self._running is running:
                self._running = None

    def _end(self, running: _Running) -> None:
        slots = running.slots
        if running.looking.ident is not None:
            running.looking.join()
        if running.listener is not None:
            running.listener.close()
        with self._wake:
            while slots.busy and (seconds := slots.left()) > 0:
                self._wake.wait(seconds)
        claiming = slots.core.executor.claiming
        while any(saga_id in claiming for saga_id in list(slots.busy)):
            time.sleep(MOMENT)  # a claim that is under way is decided first: it would be won without a lease
        for saga_id in list(slots.busy):
            fence = slots.fence_of(saga_id)
            if fence is not None:
                slots.given_up(fence, self._give_up(fence))
        self._coordinator.close()

    def _give_up(self, fence: Fence) -> LogUnavailable | None:
        try:
            self._coordinator.log._bind.perform(owning.give_up(fence))
        except LogUnavailable as error:
            return error
        return None

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _look(self, slots: _Slots) -> None:
        while not slots.stopping.is_set():
            found: list[Job] = []
            try:
                found = drive(slots.more(), self._coordinator._perform)
            except Exception as error:
                if not slots.may_look_again(error):
                    break
            for job in found:
                self._begin(slots, job)
            with self._wake:
                if not self._told and not slots.stopping.is_set():
                    self._wake.wait(slots.poll)
                self._told = False

    def _begin(self, slots: _Slots, job: Job) -> None:
        try:
            threading.Thread(target=self._do, args=(slots, job), name="sagalog-saga", daemon=True).start()
        except RuntimeError as error:  # the process may have no more threads now
            slots.told(job, error)
            slots.over(job)

    def _do(self, slots: _Slots, job: Job) -> None:
        try:
            drive(slots.core.do(job, slots.is_wanted), self._coordinator._perform)
        except BaseException as error:
            slots.told(job, error)
        finally:
            with self._wake:
                slots.over(job)
                self._told = True
                self._wake.notify_all()


@dataclass(eq=False)
class _RunningInTasks:
    """One start of an async worker, and its end; the tasks are of its sagas."""

    slots: _Slots
    tasks: set[asyncio.Task[Any]]
    looking: asyncio.Task[None]
    listening: asyncio.Task[None]
    ending: asyncio.Task[None] | None = None


class AsyncWorker:
    """The same in tasks of the running loop. Made by `AsyncSagaCoordinator.worker`."""

    def __init__(self, coordinator: AsyncSagaCoordinator, concurrency: int, poll: float) -> None:
        self._coordinator = coordinator
        self._settings = _Slots(coordinator._core, concurrency, poll)
        self._wake = asyncio.Event()
        self._running: _RunningInTasks | None = None
        self._starting = asyncio.Lock()
        self._shutdowns = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """See `Worker.start`; in another loop than before, begin there."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._running = loop, None
            self._wake, self._starting = asyncio.Event(), asyncio.Lock()
        shutdowns = self._shutdowns
        async with self._starting:
            running = self._running
            if running is None or running.slots.stopping.is_set() or running.looking.done():
                await self._start(shutdowns)

    async def _start(self, shutdowns: int) -> None:
        await adrive(self._settings.core.check_environment(), self._coordinator._perform)
        if self._shutdowns != shutdowns:
            return
        slots = self._settings.anew()
        tasks: set[asyncio.Task[Any]] = set()
        listening = asyncio.create_task(alisten(self._coordinator.log, self.wake))
        looking = asyncio.create_task(self._look(slots, tasks))
        self._running = _RunningInTasks(slots, tasks, looking, listening)

    def wake(self) -> None:
        """Look for work now."""
        with suppress(RuntimeError):  # the loop is closed
            self._wake.set()

    async def shutdown(self, grace: float = 10.0) -> None:
        """See `Worker.shutdown`; what runs longer is cancelled, and recovery decides.

        Where it is cancelled itself, the worker goes on to end.
        """
        _check_grace(grace)
        self._shutdowns += 1
        running = self._running
        if running is None or self._loop is not asyncio.get_running_loop():
            return
        running.slots.end(grace)
        self.wake()
        if running.ending is None:
            running.ending = asyncio.create_task(self._ends(running))
        limit = _limit(grace, _CANCELLED_WITHIN + _ANSWERS_WITHIN)
        await asyncio.wait({running.ending}, timeout=limit)
        if running.ending.done():
            running.ending.result()
        else:
            running.slots.left_running()

    async def _ends(self, running: _RunningInTasks) -> None:
        try:
            await self._end(running)
        finally:
            if self._running is running:
                self._running = None

    async def _end(self, running: _RunningInTasks) -> None:
        slots, tasks = running.slots, running.tasks
        await asyncio.wait({running.looking})  # somebody may have cancelled it
        running.listening.cancel()
        await asyncio.gather(running.listening, return_exceptions=True)
        late = set(tasks)
        while late and (seconds := slots.left()) > 0:
            _, late = await asyncio.wait(late, timeout=min(seconds, _HURRIES_AFTER))
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_CANCELLED_WITHIN)
        for saga_id in list(slots.busy):
            fence = slots.fence_of(saga_id)
            if fence is not None:
                slots.given_up(fence, await self._give_up(fence))
        await self._coordinator.close()

    async def _give_up(self, fence: Fence) -> LogUnavailable | None:
        try:
            await self._coordinator.log._bind.perform(owning.give_up(fence))
        except LogUnavailable as error:
            return error
        return None

    async def __aenter__(self) -> AsyncWorker:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    async def _look(self, slots: _Slots, tasks: set[asyncio.Task[Any]]) -> None:
        while not slots.stopping.is_set():
            self._wake.clear()
            found: list[Job] = []
            try:
                found = await adrive(slots.more(), self._coordinator._perform)
            except Exception as error:
                if not slots.may_look_again(error):
                    break
            for job in found:
                task = asyncio.create_task(self._do(slots, job))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            with suppress(TimeoutError):
                async with asyncio.timeout(slots.poll):
                    await self._wake.wait()

    async def _do(self, slots: _Slots, job: Job) -> None:
        try:
            await adrive(slots.core.do(job, slots.is_wanted), self._coordinator._perform)
        except Exception as error:
            slots.told(job, error)
        finally:
            slots.over(job)
            self.wake()
