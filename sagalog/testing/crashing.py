"""`crash_points`: a saga stopped at every point at which it writes to the log or calls a handler, and recovered.

A stopped coordinator does nothing any more, as a killed process would; its
lease is made to have run out, and the time of what was under way to be over.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sagalog.coordinator.awaiting import AsyncSagaCoordinator
from sagalog.coordinator.blocking import SagaCoordinator
from sagalog.coordinator.recover import RecoveryReport
from sagalog.errors import UnusableBind, UnusableHandler
from sagalog.log.facade import AsyncSagaLog, SagaLog
from sagalog.records import SagaRecord
from sagalog.testing.lives import Life, Stopped, all_ids, time_passes

Coordinator: TypeAlias = SagaCoordinator | AsyncSagaCoordinator
_RECOVERIES = 2


@dataclass
class Crash:
    """One run of a saga, stopped at one point, and what recovery made of it.

    Attributes:
        points: Where it was stopped: in its first life, and in its recovery. Empty for the run that was not stopped.
        stops: The same as numbers, to stop there again: ``crash_points(..., only=crash.stops)``.
        log: The log, to look into.
        coordinator: The one that recovered it.
        reports: What each recovery reported.
        sagas: The sagas in the log at the end.
        result: What `start` returned, or the exception that it raised; None if it was stopped.
    """

    points: tuple[str, ...]
    stops: tuple[int, ...]
    log: Any
    coordinator: Any = None
    reports: list[RecoveryReport] = field(default_factory=list)
    sagas: list[SagaRecord] = field(default_factory=list)
    result: object = None

    @property
    def saga(self) -> SagaRecord | None:
        """The saga, if the process lived long enough to write it."""
        return self.sagas[0] if self.sagas else None

    def __str__(self) -> str:
        return f"stopped at {' and then at '.join(self.points)}" if self.points else "not stopped"


def crash_points(
    build: Callable[[Any], Coordinator],
    start: Callable[[Any], Any],
    *,
    open_log: Callable[[], Any] | None = None,
    repeat: bool = False,
    zombie: bool = False,
    again: bool = False,
    only: tuple[int, ...] | None = None,
) -> CrashPoints:
    """Run a saga once for every point at which it could be stopped, stop it there, recover it, and hand it over.

    ::

        for crash in crash_points(build, lambda coordinator: coordinator.run(place_order, order)):
            assert crash.saga is None or crash.saga.state in ("completed", "compensated"), crash
        assert crash.result == "shipped"  # of the last, which was not stopped

    With an AsyncSagaCoordinator it is ``async for``.

    Args:
        build: Makes a coordinator over the log that it is given, as a new process would; the second one of a run
            recovers. The outside that the handlers work on outlives both: make it anew in `open_log`.
        start: Starts the saga on a coordinator: `run`, or whatever leads to it.
        open_log: Opens an empty log for each run; one in memory, if none is given, in which no handler can be
            transactional.
        repeat: Every handler and every undo is called twice, as a request that is delivered twice.
        zombie: The process is not killed but falls asleep; it wakes up after the recovery.
        again: The recovery is stopped as well, at each of its points, and recovered again.
        only: Only the run with these stops; see `Crash.stops`.

    Returns:
        An iterable, sync or async, of `Crash`; the last is the run that was not stopped.

    Raises:
        UnusableHandler: `build` returned no coordinator, or `only` names a stop that the run does not come to.
        UnusableBind: A handler is transactional, and the log cannot carry its Session.
    """
    return CrashPoints(build, start, open_log, repeat=repeat, zombie=zombie, again=again, only=only)


class CrashPoints:
    """See `crash_points`."""

    def __init__(
        self,
        build: Callable[[Any], Coordinator],
        start: Callable[[Any], Any],
        open_log: Callable[[], Any] | None,
        *,
        repeat: bool,
        zombie: bool,
        again: bool,
        only: tuple[int, ...] | None,
    ) -> None:
        self._build = build
        self._start = start
        self._open_log = open_log
        self._repeat = repeat
        self._zombie = zombie
        self._again = again
        self._only = only
        self._refused: list[UnusableBind] = []

    def _life(self, stop_at: int | None, *, sleeps: bool = False) -> Life:
        return Life(stop_at, repeat=self._repeat, sleeps=sleeps, refused=self._refused)

    def __iter__(self) -> Iterator[Crash]:
        plans = _plans(self._again, self._only)
        stops = next(plans)
        while stops is not None:
            crash = self._lived(stops)
            try:
                if isinstance(crash.result, BaseException) and not isinstance(crash.result, Exception):
                    raise crash.result
                yield self._check(crash)
            finally:
                crash.log.close()
            stops = plans.send(crash)

    async def __aiter__(self) -> AsyncIterator[Crash]:
        plans = _plans(self._again, self._only)
        stops = next(plans)
        while stops is not None:
            crash = await self._alived(stops)
            try:
                yield self._check(crash)
            finally:
                await crash.log.close()
            stops = plans.send(crash)

    def _built(self, log: Any, kind: type[Coordinator]) -> Any:
        made = self._build(log)
        if not isinstance(made, kind):
            raise UnusableHandler(
                "crash_points",
                f"build returned a {type(made).__name__}, and not the {kind.__name__} that it made",
                hint="Return the coordinator; with an AsyncSagaCoordinator it is `async for`.",
            )
        return made

    def _check(self, crash: Crash) -> Crash:
        """What makes a run worthless is raised, and not handed over."""
        if self._refused:
            raise UnusableBind(
                "crash_points",
                "a handler is transactional, and the log in memory, of one connection, cannot carry its Session",
                hint="Give open_log=: a log in a file, or over an Engine, empty for each run (see start_empty).",
            ) from self._refused[0]
        if self._only is not None and len(crash.points) < len(self._only):
            problem = f"the run came to {len(crash.points)} of the stops {self._only}"
            raise UnusableHandler("crash_points", problem, hint="Take only= from Crash.stops of the same saga.")
        return crash

    # Synchronous

    def _lived(self, stops: tuple[int, ...]) -> Crash:
        log = (self._open_log or SagaLog.open_in_memory)()
        first = self._life(stops[0] if stops else None, sleeps=self._zombie)
        coordinator = self._built(log, SagaCoordinator)
        result: list[object] = []
        process = threading.Thread(target=self._live, args=(coordinator, first, result), daemon=True)
        process.start()
        first.asleep.wait()
        if not self._zombie:
            process.join()
        points = [first.point]
        reports: list[RecoveryReport] = []
        last: Any = coordinator
        for stop_at in (*stops[1:], *[None] * _RECOVERIES):
            self._die(log, last)
            if first.point is None:
                break
            last = self._built(log, SagaCoordinator)
            life = last.interpose = self._life(stop_at)
            try:
                reports.append(last.recover())
            except Stopped:
                points.append(life.point)
        first.awake.set()
        process.join()
        last.close()
        sagas = [log.get(saga_id) for saga_id in log._bind.perform(all_ids())]
        return _crash(log, last, points, stops, reports, sagas, result)

    def _live(self, coordinator: Any, life: Life, result: list[object]) -> None:
        coordinator.interpose = life
        try:
            result.append(self._start(coordinator))
        except Stopped:
            pass
        except BaseException as error:  # what ends a test is raised by whoever runs it, in `__iter__`
            if not life.is_dead:
                result.append(error)
        finally:
            life.asleep.set()

    def _die(self, log: Any, coordinator: Any) -> None:
        coordinator._core.executor.stop()
        log._bind.perform(time_passes())

    # Asynchronous

    async def _alived(self, stops: tuple[int, ...]) -> Crash:
        log = self._open_log() if self._open_log is not None else AsyncSagaLog.open_in_memory()
        log = await log if inspect.isawaitable(log) else log
        first = self._life(stops[0] if stops else None, sleeps=self._zombie)
        coordinator = self._built(log, AsyncSagaCoordinator)
        result: list[object] = []
        process = asyncio.ensure_future(self._alive(coordinator, first, result))
        await first.asleep_in_loop.wait()
        if not self._zombie:
            await process
        points = [first.point]
        reports: list[RecoveryReport] = []
        last: Any = coordinator
        for stop_at in (*stops[1:], *[None] * _RECOVERIES):
            await self._adie(log, last)
            if first.point is None:
                break
            last = self._built(log, AsyncSagaCoordinator)
            life = self._life(stop_at)
            last.interpose = life.in_loop
            try:
                reports.append(await last.recover())
            except Stopped:
                points.append(life.point)
        first.awake_in_loop.set()
        await process
        await last.close()
        sagas = [await log.get(saga_id) for saga_id in await log._bind.perform(all_ids())]
        return _crash(log, last, points, stops, reports, sagas, result)

    async def _alive(self, coordinator: Any, life: Life, result: list[object]) -> None:
        coordinator.interpose = life.in_loop
        try:
            result.append(await self._start(coordinator))
        except Stopped:
            pass
        except Exception as error:
            if not life.is_dead:
                result.append(error)
        finally:
            life.asleep_in_loop.set()

    async def _adie(self, log: Any, coordinator: Any) -> None:
        await asyncio.to_thread(coordinator._core.executor.stop)
        await log._bind.perform(time_passes())


def _plans(again: bool, only: tuple[int, ...] | None) -> Any:  # noqa: FBT001 - private
    """Which stops to try next, told of how the last run went; None when there is nothing more."""
    if only is not None:
        yield only
        yield None
        return
    first = 0
    while True:
        crash = yield (first,)
        stopped = bool(crash.points)
        second = 0
        while again and stopped:
            crash = yield (first, second)
            if len(crash.points) < 2:
                break
            second += 1
        if not stopped:
            yield None
            return
        first += 1


def _crash(
    log: Any,
    coordinator: Any,
    points: list[str | None],
    stops: tuple[int, ...],
    reports: list[RecoveryReport],
    sagas: list[SagaRecord],
    result: list[object],
) -> Crash:
    named = tuple(point for point in points if point is not None)
    return Crash(named, stops[: len(named)], log, coordinator, reports, sagas, result[0] if result else None)
