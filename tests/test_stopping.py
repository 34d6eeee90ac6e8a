"""How a worker is shut down, begins again, and ends with its log."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from sagalog import (
    AsyncSagaCoordinator,
    AsyncSagaLog,
    CommandBus,
    SagaCoordinator,
    SagaLog,
    StepInfo,
    UnusableHandler,
    migrations,
)
from sagalog.coordinator.effects import Write
from tests.processes import LONGEST
from tests.troubled import (
    Done,
    Reserve,
    Shop,
    Slow,
    reserving,
)


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
        async with await AsyncSagaLog.open(sqlite_path) as own_log:
            coordinator = AsyncSagaCoordinator(own_log, CommandBus())
            coordinator.interpose = asilent
            worker = coordinator.worker()
            await worker.start()
            await asyncio.to_thread(asked.wait)
            await asyncio.wait_for(worker.shutdown(grace=0.0), timeout=30)
            answers.set()

    if driver == "async":
        asyncio.run(main())
    else:
        with SagaLog.open(sqlite_path) as own_log:
            coordinator = SagaCoordinator(own_log, CommandBus())
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


@pytest.mark.parametrize("driver", ["sync", "async"])
def test_a_worker_that_was_shut_down_while_it_waited_for_the_log_does_not_start(
    sqlite_path: Path, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagalog.coordinator.worker._ANSWERS_WITHIN", 0.1)
    asked, answers = threading.Event(), threading.Event()

    def silent(effect: Any, answer: Callable[[Any], Any]) -> Any:
        asked.set()
        answers.wait(LONGEST)
        return answer(effect)

    async def asilent(effect: Any, answer: Callable[[Any], Any]) -> Any:
        asked.set()
        await asyncio.to_thread(answers.wait, LONGEST)
        return await answer(effect)

    async def main() -> None:
        async with await AsyncSagaLog.open(sqlite_path) as log:
            coordinator = AsyncSagaCoordinator(log, CommandBus())
            coordinator.interpose = asilent
            worker = coordinator.worker()
            starting = [asyncio.create_task(worker.start()) for _ in range(2)]
            await asyncio.to_thread(asked.wait, LONGEST)
            await worker.shutdown(grace=0.0)
            before = asyncio.all_tasks() - set(starting)
            answers.set()
            await asyncio.gather(*starting)
            assert asyncio.all_tasks() <= before

    if driver == "async":
        asyncio.run(main())
        return
    with SagaLog.open(sqlite_path) as log:
        coordinator = SagaCoordinator(log, CommandBus())
        coordinator.interpose = silent
        worker = coordinator.worker()
        others = threading.enumerate()
        starting = threading.Thread(target=worker.start)
        starting.start()
        assert asked.wait(LONGEST)
        worker.shutdown(grace=0.0)
        answers.set()
        starting.join(LONGEST)
        assert [thread.name for thread in threading.enumerate() if thread not in others] == []


def test_a_worker_that_is_shut_down_while_a_handler_hangs_gives_up_its_lease(own_log: SagaLog) -> None:
    hangs, woken = threading.Event(), threading.Event()
    others = threading.enumerate()

    def hanging(step: StepInfo) -> Done:
        hangs.set()
        woken.wait()
        return Done()

    shop = Shop(reserve=hanging)
    coordinator = SagaCoordinator(own_log, shop.bus)
    submitted = coordinator.submit(reserving(coordinator), 1)
    worker = coordinator.worker()
    worker.start()
    assert hangs.wait(30)
    worker.shutdown(grace=0.0)
    threads = [thread for thread in threading.enumerate() if thread not in others]
    woken.set()
    for thread in threads:
        if thread.name == "sagalog-saga":
            thread.join()
    assert [thread.name for thread in threads if thread.name == "sagalog-lease"] == []
    assert own_log.get(submitted).executor_id is None


def test_a_second_shutdown_waits_for_what_the_first_waits_for(own_log: SagaLog) -> None:
    slow, ended = Slow(), list[str]()
    with SagaCoordinator(own_log, slow.shop.bus) as coordinator:
        saga_id = coordinator.submit(reserving(coordinator), 5)
        worker = coordinator.worker(poll=0.05)
        worker.start()
        assert slow.begun.wait(LONGEST)

        def shut_down() -> None:
            worker.shutdown(grace=LONGEST)
            ended.append(own_log.get(saga_id).state)

        both = [threading.Thread(target=shut_down) for _ in range(2)]
        for thread in both:
            thread.start()
        both[1].join(0.2)
        slow.may_end.set()
        for thread in both:
            thread.join(LONGEST)
    assert ended == ["completed", "completed"]


def test_a_shutdown_that_was_cancelled_is_ended_by_the_next(sqlite_path: Path) -> None:
    begun = asyncio.Event()

    async def hangs(ctx: Any, order: int) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def main() -> tuple[Any, list[Any]]:
        async with await AsyncSagaLog.open(sqlite_path) as own_log:
            coordinator = AsyncSagaCoordinator(own_log, Shop().bus)
            saga_id = await coordinator.submit(coordinator.saga("hangs")(hangs), 1)
            worker = coordinator.worker(poll=0.05)
            await worker.start()
            await begun.wait()
            first = asyncio.create_task(worker.shutdown(grace=LONGEST))
            await asyncio.sleep(0)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            await worker.shutdown(grace=0.0)
            return (await own_log.get(saga_id)).executor_id, await own_log.executors()

    assert asyncio.run(main()) == (None, [])


def areserving(coordinator: AsyncSagaCoordinator) -> Any:
    """Register the same saga as an async function."""

    @coordinator.saga("reserving")
    async def reserving(ctx: Any, order: int) -> int:
        await ctx.dispatch(Reserve())
        return order

    return reserving


@pytest.mark.parametrize("driver", ["sync", "async"])
def test_a_worker_that_was_started_again_is_not_ended_by_its_earlier_shutdown(
    sqlite_path: Path, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagalog.coordinator.worker._ANSWERS_WITHIN", 0.1)
    monkeypatch.setattr("sagalog.coordinator.worker._CANCELLED_WITHIN", 0.0)
    asked, answers = threading.Event(), threading.Event()
    slow = Slow()

    def is_first_look(effect: Any) -> bool:
        first = isinstance(effect, Write) and effect.operation.asked == "submitted" and not asked.is_set()
        if first:
            asked.set()
        return first

    def silent(effect: Any, answer: Callable[[Any], Any]) -> Any:
        if is_first_look(effect):
            answers.wait(LONGEST)
        return answer(effect)

    async def asilent(effect: Any, answer: Callable[[Any], Any]) -> Any:
        if is_first_look(effect):
            await asyncio.to_thread(answers.wait, LONGEST)
        return await answer(effect)

    def in_tasks() -> int:
        async def main() -> Any:
            async with (
                await AsyncSagaLog.open(sqlite_path) as own_log,
                AsyncSagaCoordinator(own_log, slow.shop.bus) as coordinator,
            ):
                coordinator.interpose = asilent
                saga = areserving(coordinator)
                worker = coordinator.worker(poll=0.05)
                await worker.start()
                await asyncio.to_thread(asked.wait, LONGEST)
                earlier = asyncio.all_tasks()
                await worker.shutdown(grace=0.0)
                ending = asyncio.all_tasks() - earlier
                saga_id = await coordinator.submit(saga, 5)
                await worker.start()
                await asyncio.to_thread(slow.begun.wait, LONGEST)
                answers.set()
                assert ending
                await asyncio.wait(ending)
                slow.may_end.set()
                result = await coordinator.wait(saga_id, timeout=LONGEST)
                await worker.shutdown()
                return result

        return asyncio.run(main())

    def in_threads() -> int:
        with SagaLog.open(sqlite_path) as own_log, SagaCoordinator(own_log, slow.shop.bus) as coordinator:
            coordinator.interpose = silent
            saga = reserving(coordinator)
            worker = coordinator.worker(poll=0.05)
            worker.start()
            assert asked.wait(LONGEST)
            worker.shutdown(grace=0.0)
            [ending] = [thread for thread in threading.enumerate() if thread.name == "sagalog-shutdown"]
            saga_id = coordinator.submit(saga, 5)
            worker.start()
            assert slow.begun.wait(LONGEST)
            answers.set()
            ending.join(LONGEST)
            slow.may_end.set()
            result = coordinator.wait(saga_id, timeout=LONGEST)
            worker.shutdown()
            return result

    assert (in_threads() if driver == "sync" else in_tasks()) == 5
    assert slow.shop.verbs == ["reserve"]


def test_a_worker_is_started_in_the_loop_after_the_one_in_which_it_was_left(sqlite_path: Path) -> None:
    made: list[Any] = []

    async def first() -> None:
        coordinator = AsyncSagaCoordinator(await AsyncSagaLog.open(sqlite_path), Shop().bus)
        made.extend((coordinator, coordinator.worker(poll=0.05), areserving(coordinator)))
        await made[1].start()

    async def second() -> Any:
        coordinator, worker, saga = made
        async with worker:
            result = await coordinator.wait(await coordinator.submit(saga, 5), timeout=LONGEST)
        await coordinator.log.close()
        return result

    asyncio.run(first())
    assert asyncio.run(second()) == 5


@pytest.mark.parametrize("arguments", [{"poll": float("inf")}, {"poll": float("nan")}, {"concurrency": "8"}], ids=str)
def test_a_worker_that_could_not_wait_is_refused(own_log: SagaLog, arguments: Any) -> None:
    with pytest.raises(UnusableHandler, match="worker"):
        SagaCoordinator(own_log, Shop().bus).worker(**arguments)


def test_a_grace_without_end_is_one_and_what_is_no_time_is_refused(own_log: SagaLog) -> None:
    worker = SagaCoordinator(own_log, Shop().bus).worker()
    worker.start()
    with pytest.raises(UnusableHandler, match="grace"):
        worker.shutdown(grace=float("nan"))
    worker.shutdown(grace=float("inf"))
    assert own_log.executors() == []


# Its log


def test_a_worker_says_once_that_the_log_does_not_answer_and_goes_on_when_it_does(
    migrated_url: str, own_log: SagaLog, told: pytest.LogCaptureFixture
) -> None:
    coordinator = SagaCoordinator(own_log, Shop().bus)
    submitted = coordinator.submit(reserving(coordinator), 1)
    looks, looked_often = itertools.count(1), threading.Event()

    def counting(effect: Any, answer: Callable[[Any], Any]) -> Any:
        if isinstance(effect, Write) and effect.operation.asked == "submitted" and next(looks) == 5:
            looked_often.set()
        return answer(effect)

    coordinator.interpose = counting
    outside = create_engine(migrated_url)
    with outside.begin() as connection:
        connection.execute(text("ALTER TABLE saga RENAME TO away"))
    with coordinator.worker(poll=0.01):
        assert looked_often.wait(30)
        with outside.begin() as connection:
            connection.execute(text("ALTER TABLE away RENAME TO saga"))
        assert coordinator.wait(submitted, timeout=30) == 1
    outside.dispose()
    assert [record.levelname for record in told.records if "until the log answers" in record.message] == ["WARNING"]


def test_nothing_of_a_worker_is_left_once_its_log_is_closed(told: pytest.LogCaptureFixture) -> None:
    before = set(threading.enumerate())
    log = SagaLog.open_in_memory()
    coordinator = SagaCoordinator(log, Shop().bus, lease=0.3)
    coordinator.run(reserving(coordinator), 1)
    coordinator.worker(poll=0.01).start()
    log.close()
    left = set(threading.enumerate()) - before
    assert {thread.name for thread in left} >= {"sagalog-lease", "sagalog-worker"}
    for thread in left:
        thread.join(timeout=30)
    assert set(threading.enumerate()) - before == set()
    assert [record.message.partition(":")[0] for record in told.records] == ["the worker ends"]


def test_an_async_worker_ends_once_its_log_is_closed(told: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        log = await AsyncSagaLog.open_in_memory()
        coordinator = AsyncSagaCoordinator(log, CommandBus(), lease=0.3)
        before = asyncio.all_tasks()
        await coordinator.worker(poll=0.01).start()
        tasks = asyncio.all_tasks() - before
        await log.close()
        await asyncio.wait_for(asyncio.gather(*tasks), timeout=30)

    asyncio.run(main())
    assert [record.message.partition(":")[0] for record in told.records] == ["the worker ends"]


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_an_async_worker_closes_the_connection_on_which_it_listened(
    postgres_url: str, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = make_url(postgres_url).set(drivername=f"postgresql+{driver}")
    if driver == "asyncpg" and "host" in url.query:
        url = url.set(query={"host": url.query["host"]})

    async def main() -> None:
        engine = create_async_engine(url)
        coordinator = AsyncSagaCoordinator(AsyncSagaLog(engine), CommandBus())

        @coordinator.saga("empty")
        async def empty(ctx: Any, order: int) -> int:
            return order

        async with coordinator.worker():
            assert await coordinator.wait(await coordinator.submit(empty, 1), timeout=30) == 1
        await engine.dispose()

    asyncio.run(main())
    assert [record.message for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []
    watching = create_engine(postgres_url)
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    until = time.monotonic() + 10
    with watching.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while connection.execute(text(others)).scalar_one() and time.monotonic() < until:
            """The server takes a moment to see that a client is gone."""
        assert connection.execute(text(others)).scalar_one() == 0
    watching.dispose()


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
