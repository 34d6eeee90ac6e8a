"""Whose a saga is, what stands in its way, how it starts and ends: each was once a defect."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
    SagaFailed,
    SagaLog,
    StepInfo,
)
from sagalog.coordinator.effects import Write
from sagalog.errors import LogUnavailable, PayloadError
from tests.troubled import Done, Killed, Release, Shop, beginning_elsewhere, reserving


@pytest.fixture
def log(migrated_url: str) -> Iterator[SagaLog]:
    with SagaLog.open(migrated_url) as opened:
        yield opened


# Whose a saga is


def test_a_saga_that_has_just_begun_is_not_recovered_by_its_own_process(log: SagaLog) -> None:
    shop = Shop()
    with SagaCoordinator(log, shop.bus) as coordinator:
        saga = reserving(coordinator)

        def recovering(effect: Any, answer: Callable[[Any], Any]) -> Any:
            given = answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "run":
                coordinator.interpose = None
                beside = threading.Thread(target=coordinator.recover)
                beside.start()
                beside.join()
            return given

        coordinator.interpose = recovering
        assert coordinator.run(saga, 5) == 5
    assert shop.verbs == ["reserve"]


def test_a_saga_that_its_process_could_not_undo_is_recovered_by_another_one(log: SagaLog) -> None:
    knows_less, knows_all = Shop(releases=False), Shop()
    with SagaCoordinator(log, knows_less.bus) as here, SagaCoordinator(log, knows_all.bus) as there:
        with pytest.raises(SagaFailed) as failed:
            here.run(reserving(here, fails=True), 1)
        assert failed.value.outcome == "failed"
        reserving(there)
        assert there.recover().compensated == [1]
    assert knows_all.verbs == ["release"]


def test_a_child_that_exits_inside_a_handler_does_not_give_its_parents_saga_away(log: SagaLog) -> None:
    owners: list[str | None] = []

    def forking(step: StepInfo) -> Done:
        child = os.fork()
        if child == 0:
            sys.exit(0)
        os.waitpid(child, 0)
        owners.append(log.get(step.saga_id).executor_id)
        return Done()

    shop = Shop(reserve=forking)
    with SagaCoordinator(log, shop.bus) as coordinator:
        saga = reserving(coordinator)
        here = os.getpid()
        try:
            assert coordinator.run(saga, 5) == 5
        finally:
            if os.getpid() != here:
                os._exit(0)
        assert owners == [coordinator.executor_id]


def test_a_saga_whose_handler_hangs_is_recovered_by_its_own_process(log: SagaLog) -> None:
    hangs, woken = threading.Event(), threading.Event()

    def hanging(step: StepInfo) -> Done:
        hangs.set()
        woken.wait()
        return Done()

    shop = Shop(reserve=hanging, timeout=0.1, settle=0.0, on_unknown="compensate")
    with SagaCoordinator(log, shop.bus) as coordinator:
        saga = reserving(coordinator)
        raised: list[BaseException] = []

        def run() -> None:
            try:
                coordinator.run(saga, 1)
            except BaseException as error:
                raised.append(error)

        hung = threading.Thread(target=run)
        hung.start()
        hangs.wait()
        compensated: list[int] = []
        while not compensated:
            compensated = coordinator.recover().compensated
        woken.set()
        hung.join()
    assert compensated == [1]
    assert type(raised[0]).__name__ == "LeaseLost"
    assert shop.verbs == ["reserve", "release"]


# Sagas that stand in the way of others


def test_recovery_passes_a_thousand_unknown_sagas(sqlite_path: Any) -> None:
    with SagaLog.open(sqlite_path, durability="normal") as log:
        elsewhere = SagaCoordinator(log, CommandBus())

        @elsewhere.saga("unknown")
        def unknown(ctx: Any, order: int) -> None:
            raise Killed

        for number in range(1000):
            with pytest.raises(Killed):
                elsewhere.run(unknown, number)
        elsewhere.close()
        last = beginning_elsewhere(log, "reserving")
        with SagaCoordinator(log, Shop().bus) as coordinator:
            reserving(coordinator)
            report = coordinator.recover()
        assert report.compensated == [last]
        assert len(report.left) == 1000


@pytest.mark.parametrize("submitted", [True, False])
def test_a_worker_passes_unknown_sagas(log: SagaLog, submitted: bool) -> None:
    for _ in range(9):
        beginning_elsewhere(log, "unknown", submitted=submitted)
    known = beginning_elsewhere(log, "reserving", submitted=submitted)
    coordinator = SagaCoordinator(log, Shop().bus)
    reserving(coordinator)
    with coordinator.worker(concurrency=1):
        if submitted:
            assert coordinator.wait(known, timeout=30) == 1
        else:
            with pytest.raises(SagaFailed):
                coordinator.wait(known, timeout=30)


@pytest.mark.parametrize("ends", ["refused", "raising"])
def test_a_worker_does_not_take_a_saga_again_and_again_that_it_cannot_undo(log: SagaLog, ends: str) -> None:
    shop = Shop(releases=False)
    if ends == "raising":

        @shop.bus.handler(idempotent=True)
        def do_release(cmd: Release) -> None:
            raise Killed

    with SagaCoordinator(log, shop.bus) as here, pytest.raises((SagaFailed, Killed)):
        here.run(reserving(here, fails=True), 1)
    before = log.get(1).epoch
    coordinator = SagaCoordinator(log, shop.bus)
    reserving(coordinator)
    looks: list[str] = []
    enough = threading.Event()

    def counting(effect: Any, answer: Callable[[Any], Any]) -> Any:
        if isinstance(effect, Write) and effect.operation.asked == "recover":
            looks.append("recover")
            if len(looks) == 20:
                enough.set()
        return answer(effect)

    coordinator.interpose = counting
    with coordinator.worker(poll=0.01):
        assert enough.wait(30)
    assert log.get(1).epoch == before + 1


# What cannot be undone here


def test_an_undo_that_cannot_be_stored_leaves_its_saga_to_a_person(log: SagaLog) -> None:
    shop = Shop(derive=lambda: Release(amount=float("nan")))
    with SagaCoordinator(log, shop.bus) as coordinator, pytest.raises(SagaFailed) as failed:
        coordinator.run(reserving(coordinator, fails=True), 1)
    assert failed.value.outcome == "failed_compensation"
    assert "0 (Reserve, succeeded)" in str(failed.value)


def test_a_saga_whose_undo_is_async_is_left_to_an_async_coordinator(log: SagaLog) -> None:
    shop = Shop(releases=False)

    @shop.bus.handler
    async def do_release(cmd: Release, step: StepInfo) -> None:
        """Not called here."""

    with SagaCoordinator(log, shop.bus) as coordinator:
        with pytest.raises(SagaFailed) as failed:
            coordinator.run(reserving(coordinator, fails=True), 1)
        assert failed.value.outcome == "failed"
        report = coordinator.recover()
    assert [left.saga_id for left in report.left] == [1]
    assert "async" in report.left[0].reason
    assert log.get(1).recoveries == 0


# Submitting


def test_an_input_that_no_worker_could_read_is_not_submitted(log: SagaLog) -> None:
    coordinator = SagaCoordinator(log, Shop().bus)
    saga = reserving(coordinator)
    with pytest.raises(PayloadError, match="a str is no input of it"):
        coordinator.submit(saga, "a lamp")
    with pytest.raises(PayloadError, match="a NoneType is no input of it"):
        coordinator.submit(saga)
    assert log.max_saga_id() == 0


def test_a_copy_of_a_log_whose_process_never_recovered_knows_its_environment(log: SagaLog) -> None:
    from sagalog.errors import WrongEnvironment

    with SagaCoordinator(log, Shop().bus, environment="production") as production:
        production.run(reserving(production), 1)
    with SagaCoordinator(log, Shop().bus, environment="staging") as staging, pytest.raises(WrongEnvironment):
        staging.recover()


# Starts and ends


def test_a_start_whose_answer_was_lost_is_recognised(log: SagaLog) -> None:
    shop = Shop()
    with SagaCoordinator(log, shop.bus) as coordinator:
        saga = reserving(coordinator)
        lost: list[int] = []

        def losing(effect: Any, answer: Callable[[Any], Any]) -> Any:
            given = answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "run" and not lost:
                lost.append(1)
                raise LogUnavailable("run", "the connection ended before the answer")
            return given

        coordinator.interpose = losing
        assert coordinator.run(saga, 5, key="order-5") == 5
    assert lost == [1]
    assert shop.verbs == ["reserve"]
    assert log.max_saga_id() == 1


def test_a_start_that_is_cancelled_is_recovered_by_another_process(sqlite_path: Any) -> None:
    bus = CommandBus()

    async def main() -> list[int]:
        async with (
            await AsyncSagaLog.open(sqlite_path) as log,
            AsyncSagaCoordinator(log, bus) as here,
            AsyncSagaCoordinator(log, bus) as there,
        ):

            async def empty(ctx: Any, order: int) -> None:
                """Never begun."""

            here.saga("empty")(empty)
            there.saga("empty")(empty)

            async def cancelling(effect: Any, answer: Callable[[Any], Any]) -> Any:
                given = await answer(effect)
                if isinstance(effect, Write) and effect.operation.asked == "run":
                    raise asyncio.CancelledError
                return given

            here.interpose = cancelling
            with pytest.raises(asyncio.CancelledError):
                await here.run(empty, 1)
            return (await there.recover()).compensated

    assert asyncio.run(main()) == [1]


def test_a_worker_that_is_shut_down_while_a_handler_hangs_gives_up_its_lease(log: SagaLog) -> None:
    hangs, woken = threading.Event(), threading.Event()
    others = threading.enumerate()

    def hanging(step: StepInfo) -> Done:
        hangs.set()
        woken.wait()
        return Done()

    shop = Shop(reserve=hanging)
    coordinator = SagaCoordinator(log, shop.bus)
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
    assert log.get(submitted).executor_id is None


def test_a_worker_says_once_that_the_log_does_not_answer_and_goes_on_when_it_does(
    migrated_url: str, log: SagaLog, told: pytest.LogCaptureFixture
) -> None:
    coordinator = SagaCoordinator(log, Shop().bus)
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


def test_a_process_without_threads_to_spare_runs_sagas_and_keeps_its_lease_later(
    sqlite_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, refused = threading.Thread.start, iter([True])

    def starting(thread: threading.Thread) -> None:
        if thread.name == "sagalog-lease" and next(refused, False):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    with SagaLog.open(sqlite_path) as log, SagaCoordinator(log, CommandBus()) as coordinator:

        @coordinator.saga("works")
        def works(ctx: Any) -> int:
            return 1

        for keeping in (False, True):
            assert coordinator.run(works) == 1
            assert any(thread.name == "sagalog-lease" for thread in threading.enumerate()) is keeping


# Claims


def claiming(coordinator: SagaCoordinator, claim: Callable[[Callable[[], Any]], Any]) -> None:
    """Put something around each claim."""

    def around(effect: Any, answer: Callable[[Any], Any]) -> Any:
        if isinstance(effect, Write) and effect.operation.asked == "claim":
            return claim(lambda: answer(effect))
        return answer(effect)

    coordinator.interpose = around


def test_a_claim_whose_answer_was_lost_knows_itself_when_it_is_made_again(log: SagaLog) -> None:
    """As a log over an Engine does once its connection is gone."""
    shop = Shop()
    with SagaCoordinator(log, shop.bus) as coordinator:
        saga_id = coordinator.submit(reserving(coordinator), 7)
        claiming(coordinator, lambda claim: (claim(), claim())[1])
        with coordinator.worker(poll=0.05):
            assert coordinator.wait(saga_id, timeout=30) == 7
    assert shop.verbs == ["reserve"]


def test_a_claim_that_fails_is_not_made_again_at_once(log: SagaLog) -> None:
    shop, moments, enough = Shop(), list[float](), threading.Event()

    def failing(claim: Callable[[], Any]) -> Any:
        moments.append(time.monotonic())
        if len(moments) > 1:
            enough.set()
        raise LogUnavailable("claim", "the disk is full")

    with SagaCoordinator(log, shop.bus) as coordinator:
        coordinator.submit(reserving(coordinator), 1)
        claiming(coordinator, failing)
        with coordinator.worker(poll=0.01):
            assert enough.wait(30)
    assert moments[1] - moments[0] > 0.4


def test_sagas_that_a_worker_does_not_know_are_passed_over_in_few_looks(log: SagaLog) -> None:
    elsewhere, looks = SagaCoordinator(log, CommandBus()), list[str]()

    @elsewhere.saga("elsewhere")
    def left(ctx: Any) -> None:
        raise Killed

    for _ in range(300):
        with pytest.raises(Killed):
            elsewhere.run(left)
    elsewhere.close()
    shop = Shop()
    with SagaCoordinator(log, shop.bus) as coordinator:
        saga_id = coordinator.submit(reserving(coordinator), 1)

        def counting(effect: Any, answer: Callable[[Any], Any]) -> Any:
            if isinstance(effect, Write) and effect.operation.asked == "recover":
                looks.append("recover")
            return answer(effect)

        coordinator.interpose = counting
        with coordinator.worker(concurrency=1, poll=60):
            assert coordinator.wait(saga_id, timeout=30) == 1
        assert len(looks) < 30
