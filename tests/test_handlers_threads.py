"""The threads in which handlers are called: some hang, and some cannot be started."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sagalog import (
    AsyncSagaCoordinator,
    AsyncSagaLog,
    Command,
    CommandBus,
    SagaCoordinator,
    SagaLog,
    StepInfo,
)
from tests.troubled import (
    Shop,
    reserving,
)


class Wait(Command[None]):
    """Its handler waits."""


def waiting_bus(handler: Any, **arguments: Any) -> CommandBus:
    bus = CommandBus()
    bus.handler(pivot=True, **arguments)(handler)
    return bus


def registered(coordinator: AsyncSagaCoordinator) -> AsyncSagaCoordinator:
    @coordinator.saga("waits")
    async def waits(ctx: Any) -> str:
        await ctx.dispatch(Wait())
        return "done"

    return coordinator


def test_an_async_handler_that_does_not_end_is_given_up(sqlite_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagalog.coordinator.awaiting._STUBBORN", 0.1)
    monkeypatch.setattr("sagalog.coordinator.worker._CANCELLED_WITHIN", 0.1)

    async def main() -> None:
        ends = asyncio.Event()

        async def wait(cmd: Wait) -> None:
            while not ends.is_set():
                try:
                    await ends.wait()
                except asyncio.CancelledError:
                    """It swallows whatever comes."""

        log = await AsyncSagaLog.open(sqlite_path)
        coordinator = registered(AsyncSagaCoordinator(log, waiting_bus(wait, timeout=0.1, settle=0.0)))
        worker = coordinator.worker(poll=0.01)
        try:
            await worker.start()
            submitted = await coordinator.submit("waits")
            record = await log.get(submitted)
            while record.state != "failed_compensation":
                record = await log.get(submitted)
                await asyncio.sleep(0)
            async with asyncio.timeout(30):
                await worker.shutdown(grace=0.0)
        finally:
            ends.set()
        assert "step 0 (Wait) is in doubt" in (record.failure_reason or "")
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
        await log.close()

    asyncio.run(main())


_HANGS = """
import asyncio, sys, threading
from sagalog import AsyncSagaCoordinator, AsyncSagaLog, Command, CommandBus

class Wait(Command[None]):
    pass

async def main():
    bus, called = CommandBus(), threading.Event()

    @bus.handler(pivot=True)
    def wait(cmd: Wait) -> None:
        called.set()
        threading.Event().wait()

    log = await AsyncSagaLog.open(sys.argv[1])
    coordinator = AsyncSagaCoordinator(log, bus)

    @coordinator.saga("waits")
    async def waits(ctx) -> None:
        await ctx.dispatch(Wait())

    worker = coordinator.worker(poll=0.01)
    await worker.start()
    await coordinator.submit(waits)
    await asyncio.to_thread(called.wait)
    await worker.shutdown(grace=0.0)
    await log.close()

asyncio.run(main())
"""


def test_a_sync_handler_that_hangs_does_not_keep_an_async_process_from_ending(sqlite_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", _HANGS, str(sqlite_path)], timeout=60, check=False)
    assert ended.returncode == 0
    with SagaLog.open(sqlite_path) as own_log:
        assert (own_log.get(1).state, own_log.get(1).executor_id) == ("running", None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_of_an_async_coordinator_calls_its_sync_handlers(sqlite_path: Path) -> None:
    def wait(cmd: Wait) -> None:
        """Nothing to wait for."""

    log = asyncio.run(AsyncSagaLog.open(sqlite_path))
    coordinator = registered(AsyncSagaCoordinator(log, waiting_bus(wait, timeout=20)))
    assert asyncio.run(coordinator.run("waits")) == "done"
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if asyncio.run(coordinator.run("waits")) == "done" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    asyncio.run(coordinator.close())
    asyncio.run(log.close())


# No more threads


def test_a_worker_goes_on_when_a_thread_cannot_be_started(own_log: SagaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = iter([True, True])
    start = threading.Thread.start

    def starting(thread: threading.Thread) -> None:
        if thread.name == "sagalog-saga" and next(refusals, False):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    coordinator = SagaCoordinator(own_log, Shop().bus)
    submitted = coordinator.submit(reserving(coordinator), 1)
    with coordinator.worker(poll=0.01, concurrency=1):
        assert coordinator.wait(submitted, timeout=30) == 1


def without_thread(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The process has no more threads for those of this name."""
    start = threading.Thread.start

    def starting(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)


def test_steps_side_by_side_are_all_done_when_a_thread_cannot_be_started(
    own_log: SagaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    without_thread(monkeypatch, "sagalog-dispatch-1")

    def wait(cmd: Wait, step: StepInfo) -> None:
        done.append(step.step_index)

    with SagaCoordinator(own_log, waiting_bus(wait)) as coordinator:

        @coordinator.saga("together")
        def together(ctx: Any) -> int:
            return len(ctx.dispatch_all([Wait(), Wait(), Wait()]))

        assert coordinator.run(together) == 3
    assert sorted(done) == [0, 1, 2]


def test_a_sync_handler_of_an_async_coordinator_is_called_when_a_thread_cannot_be_started(
    sqlite_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    without_thread(monkeypatch, "sagalog-handler")

    def wait(cmd: Wait, step: StepInfo) -> None:
        called.append(step.step_index)

    async def main() -> Any:
        async with (
            await AsyncSagaLog.open(sqlite_path) as own_log,
            registered(AsyncSagaCoordinator(own_log, waiting_bus(wait))) as coordinator,
        ):
            return await coordinator.run("waits")

    assert asyncio.run(main()) == "done"
    assert called == [0]
