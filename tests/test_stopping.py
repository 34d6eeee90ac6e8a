"""What stands still, stops or is interrupted beside a coordinator's work: each was once a defect."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from sagalog import (
    AsyncSagaCoordinator,
    AsyncSagaLog,
    Command,
    CommandBus,
    SagaCoordinator,
    SagaLog,
    StepInfo,
    UnusableHandler,
    migrations,
)
from sagalog.coordinator.effects import Write
from tests.troubled import Done, Killed, Reserve, Shop, beginning_elsewhere, reserving


@pytest.fixture
def log(migrated_url: str) -> Iterator[SagaLog]:
    with SagaLog.open(migrated_url) as opened:
        yield opened


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


def until_one_ends(coordinator: SagaCoordinator) -> int:
    """Recover until there was something to recover."""
    report = coordinator.recover()
    while not report.resolved:
        report = coordinator.recover()
    return report.resolved


# Workers


def test_a_claim_that_is_under_way_while_a_worker_shuts_down_is_not_won_without_a_lease(sqlite_path: Path) -> None:
    with SagaLog.open(sqlite_path) as log, closing(sqlite3.connect(sqlite_path, isolation_level=None)) as other:
        leases: list[Any] = []

        def look(step: StepInfo) -> Done:
            leases.append(log.executors())
            return Done()

        coordinator = SagaCoordinator(log, Shop(reserve=look).bus)
        submitted = coordinator.submit(reserving(coordinator), 1)
        claims, locked = threading.Event(), threading.Event()

        def claiming(effect: Any, answer: Callable[[Any], Any]) -> Any:
            if isinstance(effect, Write) and effect.operation.asked == "claim":
                claims.set()
                locked.wait()
            return answer(effect)

        coordinator.interpose = claiming
        worker = coordinator.worker(poll=0.05)
        worker.start()
        assert claims.wait(30)
        other.execute("BEGIN IMMEDIATE")
        ending = threading.Thread(target=worker.shutdown, args=(0.0,))
        ending.start()
        ending.join(timeout=0.5)
        locked.set()
        other.execute("ROLLBACK")
        ending.join()
        for thread in threading.enumerate():
            if thread.name == "sagalog-saga":
                thread.join()
        assert all(leases), "its handler was called without a lease"
        assert log.executors() == []
        with SagaCoordinator(log, Shop().bus) as another:
            reserving(another)
            if log.get(submitted).state == "submitted":
                with another.worker():
                    assert another.wait(submitted, timeout=30) == 1
            elif log.get(submitted).state != "completed":
                assert until_one_ends(another) == 1


def test_a_lease_is_not_given_up_while_a_saga_is_being_begun_under_it(sqlite_path: Path) -> None:
    with SagaLog.open(sqlite_path) as log:
        taken: list[int] = []

        def look(step: StepInfo) -> Done:
            with SagaCoordinator(log, Shop().bus) as another:
                reserving(another)
                taken.append(another.recover().resolved)
            return Done()

        coordinator = SagaCoordinator(log, Shop(reserve=look).bus)
        saga = reserving(coordinator)

        def closing_then(effect: Any, answer: Callable[[Any], Any]) -> Any:
            if isinstance(effect, Write) and effect.operation.asked == "run":
                coordinator.close()
            return answer(effect)

        coordinator.interpose = closing_then
        assert coordinator.run(saga, 1) == 1
        assert taken == [0]
        coordinator.close()
        assert log.executors() == []


@pytest.mark.parametrize("driver", ["sync", "async"])
def test_a_shutdown_ends_though_the_database_does_not_answer(
    sqlite_path: Path, driver: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sagalog.coordinator.worker._ANSWERS_WITHIN", 0.1)
    monkeypatch.setattr("sagalog.coordinator.worker._CANCELLED_WITHIN", 0.0)
    monkeypatch.setattr(logging.getLogger("sagalog"), "disabled", False)
    asked, answers = threading.Event(), threading.Event()

    def silent(effect: Any, answer: Callable[[Any], Any]) -> Any:
        if isinstance(effect, Write) and effect.operation.asked == "submitted":
            asked.set()
            answers.wait()
        return answer(effect)

    async def asilent(effect: Any, answer: Callable[[Any], Any]) -> Any:
        if isinstance(effect, Write) and effect.operation.asked == "submitted":
            asked.set()
            await asyncio.to_thread(answers.wait)
        return await answer(effect)

    async def main() -> None:
        async with await AsyncSagaLog.open(sqlite_path) as log:
            coordinator = AsyncSagaCoordinator(log, CommandBus())
            coordinator.interpose = asilent
            worker = coordinator.worker()
            await worker.start()
            await asyncio.to_thread(asked.wait)
            await asyncio.wait_for(worker.shutdown(grace=0.0), timeout=30)
            answers.set()

    if driver == "async":
        asyncio.run(main())
    else:
        with SagaLog.open(sqlite_path) as log:
            coordinator = SagaCoordinator(log, CommandBus())
            coordinator.interpose = silent
            worker = coordinator.worker()
            worker.start()
            assert asked.wait(30)
            ending = threading.Thread(target=worker.shutdown, args=(0.0,))
            ending.start()
            ending.join(timeout=30)
            ended = not ending.is_alive()
            answers.set()
            ending.join()
            assert ended
    assert "the lease runs out by itself" in caplog.text


def test_a_worker_goes_on_when_a_thread_cannot_be_started(log: SagaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = iter([True, True])
    start = threading.Thread.start

    def starting(thread: threading.Thread) -> None:
        if thread.name == "sagalog-saga" and next(refusals, False):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    coordinator = SagaCoordinator(log, Shop().bus)
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
    log: SagaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    without_thread(monkeypatch, "sagalog-dispatch-1")

    def wait(cmd: Wait, step: StepInfo) -> None:
        done.append(step.step_index)

    with SagaCoordinator(log, waiting_bus(wait)) as coordinator:

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
            await AsyncSagaLog.open(sqlite_path) as log,
            registered(AsyncSagaCoordinator(log, waiting_bus(wait))) as coordinator,
        ):
            return await coordinator.run("waits")

    assert asyncio.run(main()) == "done"
    assert called == [0]


@pytest.mark.parametrize("arguments", [{"poll": float("inf")}, {"poll": float("nan")}, {"concurrency": "8"}], ids=str)
def test_a_worker_that_could_not_wait_is_refused(log: SagaLog, arguments: Any) -> None:
    with pytest.raises(UnusableHandler, match="worker"):
        SagaCoordinator(log, Shop().bus).worker(**arguments)


def test_a_grace_without_end_is_one_and_what_is_no_time_is_refused(log: SagaLog) -> None:
    worker = SagaCoordinator(log, Shop().bus).worker()
    worker.start()
    with pytest.raises(UnusableHandler, match="grace"):
        worker.shutdown(grace=float("nan"))
    worker.shutdown(grace=float("inf"))
    assert log.executors() == []


# Handlers that hang in an async coordinator


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
    with SagaLog.open(sqlite_path) as log:
        assert (log.get(1).state, log.get(1).executor_id) == ("running", None)


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


# Recovery, retry, quarantine


def test_a_recovery_that_is_cancelled_while_it_claims_leaves_the_saga_to_others(sqlite_path: Path) -> None:
    async def main() -> None:
        log = await AsyncSagaLog.open(sqlite_path)
        coordinator = AsyncSagaCoordinator(log, CommandBus())

        @coordinator.saga("reserving")
        async def empty(ctx: Any, order: int) -> int:
            return order

        async def cancelled(effect: Any, answer: Callable[[Any], Any]) -> Any:
            given = await answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "claim":
                raise asyncio.CancelledError
            return given

        coordinator.interpose = cancelled
        with pytest.raises(asyncio.CancelledError):
            await coordinator.recover()
        with SagaLog.open(sqlite_path) as others, SagaCoordinator(others, Shop().bus) as another:
            reserving(another)
            assert await asyncio.wait_for(asyncio.to_thread(until_one_ends, another), timeout=30) == 1
        await coordinator.close()
        await log.close()

    with SagaLog.open(sqlite_path) as log:
        beginning_elsewhere(log, "reserving")
    asyncio.run(main())


def left_with_a_step(log: SagaLog, shop: Shop) -> int:
    with SagaCoordinator(log, shop.bus) as elsewhere:

        @elsewhere.saga("reserving")
        def dies(ctx: Any, order: int) -> None:
            ctx.dispatch(Reserve())
            raise Killed

        with pytest.raises(Killed):
            elsewhere.run(dies, 1)
    return log.max_saga_id()


def test_a_saga_that_waits_does_not_use_up_the_limit_of_a_recovery(log: SagaLog) -> None:
    knows_less = Shop(releases=False)
    waits = left_with_a_step(log, Shop())
    ends = beginning_elsewhere(log, "reserving")
    with SagaCoordinator(log, knows_less.bus) as coordinator:
        reserving(coordinator)
        report = coordinator.recover(limit=1)
    assert ([left.saga_id for left in report.left], report.compensated) == ([waits], [ends])


def test_a_retry_by_a_coordinator_that_cannot_undo_the_saga_changes_nothing(log: SagaLog) -> None:
    saga_id = left_with_a_step(log, Shop())
    log.quarantine(note="a copy", actor="ann")
    with SagaCoordinator(log, CommandBus()) as knows_nothing:
        reserving(knows_nothing)
        with pytest.raises(UnusableHandler, match="Reserve"):
            knows_nothing.retry(saga_id, note="again", actor="ann")
    assert log.get(saga_id).state == "failed_compensation"
    with SagaCoordinator(log, Shop().bus) as knows_all:
        reserving(knows_all)
        assert knows_all.retry(saga_id, note="again", actor="ann").state == "compensated"


def test_a_quarantine_does_not_miss_a_saga_that_is_being_claimed(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    with SagaLog.open(postgres_url) as log, engine.connect() as claiming:
        saga_id = beginning_elsewhere(log, "reserving")
        claiming.execute(text("UPDATE saga SET epoch = epoch + 1, executor_id = 'another'"))
        moved: list[int] = []
        acting = threading.Thread(target=lambda: moved.append(log.quarantine(note="a copy", actor="ann")))
        acting.start()
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as looking:
            until = time.monotonic() + 30
            while not looking.execute(text(waits)).scalar_one() and time.monotonic() < until:
                """Until it waits for the row."""
        claiming.commit()
        acting.join()
        assert (moved, log.get(saga_id).state) == ([1], "failed_compensation")
    engine.dispose()


# Placement


@pytest.mark.parametrize("schema", ["s" * 60, 'of "quotes"'])
def test_a_worker_is_told_of_sagas_in_a_schema_of_any_name(postgres_url: str, schema: str) -> None:
    engine = create_engine(postgres_url)
    quoted = schema.replace('"', '""')
    with engine.begin() as connection:
        connection.execute(text(f'CREATE SCHEMA "{quoted}"'))
    migrations.upgrade(engine, schema=schema)
    coordinator = SagaCoordinator(SagaLog(engine, schema=schema), Shop().bus)
    saga = reserving(coordinator)
    with coordinator.worker(poll=3600):
        assert coordinator.run(saga, 1) == 1
        assert coordinator.wait(coordinator.submit(saga, 2), timeout=60) == 2
    engine.dispose()
