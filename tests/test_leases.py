"""A process's identity and lease while it stops, begins again, or is out of reach of the log."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text

from sagalog import AsyncSagaCoordinator, AsyncSagaLog, SagaCoordinator, SagaLog, StepInfo
from sagalog.coordinator.effects import Write
from sagalog.errors import LogUnavailable
from tests.processes import LONGEST, until
from tests.troubled import Done, Reserve, Shop, reserving


@pytest.fixture
def log(migrated_url: str) -> Iterator[SagaLog]:
    with SagaLog.open(migrated_url) as opened:
        yield opened


class Slow:
    """A handler that a test lets end."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.shop = Shop(reserve=self._reserve)

    def _reserve(self, step: StepInfo) -> Done:
        self.begun.set()
        self.may_end.wait(LONGEST)
        return Done()


def test_a_saga_that_begins_while_its_coordinator_is_closed_stays_its_own(log: SagaLog, migrated_url: str) -> None:
    slow, closing = Slow(), threading.current_thread()
    running: list[Future[int]] = []
    engine = create_engine(migrated_url)
    with ThreadPoolExecutor(1) as pool, SagaLog(engine) as bound:
        coordinator = SagaCoordinator(bound, slow.shop.bus)
        saga = reserving(coordinator)
        coordinator.recover()

        def begin_another(*_: Any) -> None:
            if threading.current_thread() is closing and not running:
                running.append(pool.submit(coordinator.run, saga, 5))
                assert slow.begun.wait(LONGEST)

        event.listen(engine, "checkout", begin_another)
        coordinator.close()
        with SagaCoordinator(log, Shop().bus) as another:
            reserving(another)
            report = another.recover()
        slow.may_end.set()
        assert running[0].result(LONGEST) == 5
        assert report.resolved == 0
        coordinator.close()
    assert log.executors() == []
    engine.dispose()


def test_a_start_that_was_lost_is_given_back_once_the_log_answers(log: SagaLog) -> None:
    shop = Shop()
    with SagaCoordinator(log, shop.bus) as coordinator, SagaCoordinator(log, shop.bus) as another:
        reserving(another)
        saga = reserving(coordinator)

        def losing(effect: Any, answer: Callable[[Any], Any]) -> Any:
            if isinstance(effect, Write) and effect.operation.asked == "release":
                raise LogUnavailable("release", "the connection is gone")
            given = answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "run":
                raise LogUnavailable("run", "the connection ended before the answer")
            return given

        coordinator.interpose = losing
        with pytest.raises(LogUnavailable):
            coordinator.run(saga, 5)
        assert until(lambda: another.recover().compensated) == [1]
    assert shop.verbs == []


@pytest.mark.parametrize("by", ["recover", "worker"])
def test_a_process_that_is_gone_for_days_is_forgotten_unless_a_saga_names_it(
    log: SagaLog, migrated_url: str, by: str
) -> None:
    log.start_saga(1, "unknown here", None)
    engine = create_engine(migrated_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE saga SET executor_id = 'named', epoch = 1"))
        for gone in ("named", "gone"):
            values = {"id": gone}
            connection.execute(text("INSERT INTO saga_executor VALUES (:id, :id, 1, 1)"), values)
    engine.dispose()
    with SagaCoordinator(log, Shop().bus) as coordinator:
        if by == "recover":
            coordinator.recover()
        else:
            with coordinator.worker():
                until(lambda: "gone" not in [executor.executor_id for executor in log.executors()])
    assert [executor.executor_id for executor in log.executors()] == ["named"]


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
                await AsyncSagaLog.open(sqlite_path) as log,
                AsyncSagaCoordinator(log, slow.shop.bus) as coordinator,
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
        with SagaLog.open(sqlite_path) as log, SagaCoordinator(log, slow.shop.bus) as coordinator:
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


def areserving(coordinator: AsyncSagaCoordinator) -> Any:
    """Register the same saga as an async function."""

    @coordinator.saga("reserving")
    async def reserving(ctx: Any, order: int) -> int:
        await ctx.dispatch(Reserve())
        return order

    return reserving
