"""Sagas submitted in a caller's transaction and run by a worker; transactional handlers; processes that end."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import create_engine, event
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sagalog import AsyncSagaCoordinator as AsyncCoordinator
from sagalog import AsyncSagaLog, CommandBus, KeyConflict, SagaContext, SagaFailed, SagaLog, UnusableBind
from sagalog import SagaCoordinator as Coordinator
from tests.coordinating import Killed, Order, Reserve, Shop, Stage


def ordering(coordinator: Any, then: Any = None, **options: Any) -> None:
    @coordinator.saga("place_order", **options)
    def place_order(ctx: Any, order: Order) -> int:
        ctx.dispatch(Reserve(sku=order.sku))
        if then is not None:
            then(ctx)
        return order.amount


class Sessions:
    """A caller's own transaction, sync or async, on the stage's database."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._drivers = {"sqlite": ("sqlite", "sqlite+aiosqlite"), "postgresql": ("+psycopg", "+asyncpg")}

    @contextmanager
    def begin(self) -> Any:
        """The session to submit in; committed at the end, rolled back by an exception."""
        stage = self._stage
        if not stage.asynchronous:
            engine = create_engine(stage.url)
            try:
                with Session(engine) as session, session.begin():
                    yield session
            finally:
                engine.dispose()
            return
        backend = stage.url.split(":")[0].split("+")[0]
        other = create_async_engine(stage.url.replace(*self._drivers[backend], 1))
        session = AsyncSession(other)
        try:
            yield session
            stage.wait(session.commit())
        finally:
            stage.wait(session.close())
            stage.wait(other.dispose())


# Submitting


def test_a_submitted_saga_is_run_by_a_worker_and_its_result_waited_for(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()
    ordering(coordinator)
    saga_id = coordinator.submit("place_order", Order(amount=5))
    record = stage.log.get(saga_id)
    assert (record.state, record.executor_id, record.epoch) == ("submitted", None, 0)
    with coordinator.worker(poll=0.05):
        assert coordinator.wait(saga_id, timeout=30) == 5
    assert shop.calls == ["reserve"]
    assert stage.log.get(saga_id).epoch == 1


def test_a_submitted_saga_lives_and_dies_with_the_callers_transaction(stage: Stage) -> None:
    Shop(stage.bus)
    coordinator = stage.coordinator()
    ordering(coordinator)
    sessions = Sessions(stage)
    with pytest.raises(ZeroDivisionError), sessions.begin() as session:
        coordinator.submit("place_order", Order(), session=session)
        raise ZeroDivisionError
    assert stage.log.max_saga_id() == 0
    with sessions.begin() as session:
        saga_id = coordinator.submit("place_order", Order(), session=session)
    assert stage.log.get(saga_id).state == "submitted"


def test_a_submitted_key_is_taken_once(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()
    ordering(coordinator)
    first = coordinator.submit("place_order", Order(), key="order-1")
    assert coordinator.submit("place_order", Order(), key="order-1") == first
    with pytest.raises(KeyConflict):
        coordinator.submit("place_order", Order(amount=1), key="order-1")
    with coordinator.worker(poll=0.05):
        coordinator.wait(first, timeout=30)
    assert coordinator.run("place_order", Order(), key="order-1") == 7
    assert shop.calls == ["reserve"]


def test_a_saga_for_later_is_not_started_before(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()
    ordering(coordinator)
    later = coordinator.submit("place_order", Order(), run_at=datetime.now(UTC) + timedelta(hours=1))
    now = coordinator.submit("place_order", Order())
    with coordinator.worker(poll=0.05):
        coordinator.wait(now, timeout=30)
        assert stage.log.get(later).state == "submitted"
        stage.sql("UPDATE saga SET run_at = 1 WHERE saga_id = :id", id=later)
        coordinator.wait(later, timeout=30)
    assert shop.calls == ["reserve", "reserve"]


def test_a_cancelled_submission_never_runs(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()
    ordering(coordinator)
    saga_id = coordinator.submit("place_order", Order())
    stage.log.request_cancel(saga_id, "changed my mind")
    with coordinator.worker(poll=0.05):
        with pytest.raises(SagaFailed, match="changed my mind"):
            coordinator.wait(saga_id, timeout=30)
        coordinator.wait(coordinator.submit("place_order", Order()), timeout=30)
    assert shop.calls == ["reserve"]


def test_a_worker_recovers_what_another_process_left(stage: Stage) -> None:
    class Died(BaseException):
        pass

    shop = Shop(stage.bus)
    shop.fails("reserve", None, Died())
    dying = stage.coordinator()
    ordering(dying, lambda ctx: ctx.dispatch(Reserve(sku="another")))
    with pytest.raises(Died):
        dying.run("place_order", Order())
    stage.sql("UPDATE saga_step SET state = 'failed', output_json = '{}' WHERE state = 'pending'")
    coordinator = stage.coordinator()
    ordering(coordinator)
    with coordinator.worker(poll=0.05), pytest.raises(SagaFailed) as failure:
        coordinator.wait(stage.log.max_saga_id(), timeout=30)
    assert failure.value.outcome == "compensated"
    assert shop.calls == ["reserve", "reserve", "release"]


def test_a_worker_runs_no_more_sagas_at_a_time_than_it_was_told(stage: Stage) -> None:
    Shop(stage.bus)
    coordinator = stage.coordinator()
    running, most, lock = 0, 0, threading.Lock()

    def counted(ctx: Any) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        stage.log.get(ctx.saga_id)
        with lock:
            running -= 1

    ordering(coordinator, counted)
    sagas = [coordinator.submit("place_order", Order(amount=n)) for n in range(12)]
    with coordinator.worker(concurrency=2, poll=0.05):
        assert [coordinator.wait(saga_id, timeout=60) for saga_id in sagas] == list(range(12))
    assert 1 <= most <= 2


def test_shutdown_waits_for_what_is_under_way_and_gives_the_lease_up(stage: Stage) -> None:
    Shop(stage.bus)
    coordinator = stage.coordinator()
    begun, go_on = threading.Event(), threading.Event()

    def slow(ctx: Any) -> None:
        begun.set()
        assert go_on.wait(30)

    ordering(coordinator, slow)
    saga_id = coordinator.submit("place_order", Order())
    with coordinator.worker(poll=0.05):
        assert begun.wait(30)
        threading.Timer(0.05, go_on.set).start()
    assert stage.log.get(saga_id).state == "completed"
    assert stage.sql("SELECT count(*) FROM saga_executor")[0][0] == 0


def test_a_coordinator_over_a_callers_session_is_refused(stage: Stage) -> None:
    with Sessions(stage).begin() as session, pytest.raises(UnusableBind, match="caller's transaction"):
        if stage.asynchronous:
            AsyncCoordinator(AsyncSagaLog(session), stage.bus)
        else:
            Coordinator(SagaLog(session), stage.bus)


def test_a_worker_recovers_while_submitted_sagas_wait(stage: Stage) -> None:
    shop = Shop(stage.bus)
    first = stage.coordinator()
    second = stage.coordinator()
    for coordinator in (first, second):

        @coordinator.saga("order")
        def order(ctx: Any) -> None:
            ctx.dispatch(Reserve(sku="book"))
            raise Killed

    over = threading.Event()

    @second.saga("again")
    def again(ctx: Any) -> None:
        if not over.is_set():
            second.submit("again")

    with pytest.raises(Killed):
        first.run("order")
    for _ in range(3):
        second.submit("again")
    with second.worker(concurrency=1):
        try:
            with pytest.raises(SagaFailed) as failed:
                second.wait(1, timeout=30)
        finally:
            over.set()
    assert (failed.value.outcome, shop.calls) == ("compensated", ["reserve", "release"])


class Hang(BaseModel):
    """Until it is told to end."""


class LetGo(BaseModel):
    """What undoes it."""


def test_a_handler_that_hangs_holds_no_slot_once_its_saga_is_given_up(sqlite_path: Path) -> None:
    bus = CommandBus()
    begun, ends = threading.Event(), threading.Event()

    @bus.handler(timeout=0.2, settle=0.1, on_unknown="compensate")
    def charge(cmd: Hang) -> None:
        begun.set()
        ends.wait(60)

    @bus.compensation(Hang)
    def refund_of(cmd: Hang, output: None) -> LetGo:
        return LetGo()

    @bus.handler
    def refund(cmd: LetGo) -> None:
        pass

    with SagaLog.open(sqlite_path) as log, Coordinator(log, bus) as coordinator:

        @coordinator.saga("hangs")
        def hangs(ctx: SagaContext) -> None:
            ctx.dispatch(Hang())

        @coordinator.saga("quick")
        def quick(ctx: SagaContext) -> str:
            return "done"

        with coordinator.worker(concurrency=1, poll=0.05):
            first = coordinator.submit(hangs)
            assert begun.wait(20)
            assert coordinator.wait(coordinator.submit(quick), timeout=20) == "done"
            with pytest.raises(SagaFailed) as failed:
                coordinator.wait(first, timeout=30)  # the same worker recovers it
            ends.set()
    assert failed.value.outcome == "compensated"


def test_a_worker_that_several_threads_start_is_one(sqlite_path: Path) -> None:
    with SagaLog.open(sqlite_path) as log, Coordinator(log, CommandBus()) as coordinator:
        worker, together = coordinator.worker(poll=0.05), threading.Barrier(4)

        def start() -> None:
            together.wait(30)
            worker.start()

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        workers = [thread for thread in threading.enumerate() if thread.name == "sagalog-worker"]
        worker.shutdown()
        assert len(workers) == 1
        assert not workers[0].is_alive()


async def _started_twice(path: Path) -> int:
    async with await AsyncSagaLog.open(path) as log, AsyncCoordinator(log, CommandBus()) as coordinator:
        before = asyncio.all_tasks()
        worker = coordinator.worker(poll=0.05)
        await asyncio.gather(worker.start(), worker.start())
        await worker.shutdown()
        return len(asyncio.all_tasks() - before)


def test_a_worker_that_several_tasks_start_is_one(sqlite_path: Path) -> None:
    assert asyncio.run(_started_twice(sqlite_path)) == 0


@pytest.mark.parametrize("twophase", [False, True])
def test_nobody_is_notified_by_a_transaction_of_two_phases_which_could_not_be_prepared(
    postgres_url: str, twophase: bool
) -> None:
    engine, sent = create_engine(postgres_url), []
    with Coordinator(SagaLog(engine), CommandBus()) as coordinator:

        @coordinator.saga("works")
        def works(ctx: SagaContext) -> int:
            return 1

        event.listen(engine, "before_cursor_execute", lambda *heard: sent.append(heard[2]))
        with Session(engine, twophase=twophase) as session:
            coordinator.submit(works, session=session)
            session.rollback()
    assert any("pg_notify" in statement for statement in sent) is not twophase
    engine.dispose()


def test_a_handler_that_hangs_holds_no_slot_once_its_saga_is_quarantined(sqlite_path: Path) -> None:
    bus, over, begun = CommandBus(), threading.Event(), threading.Event()

    @bus.handler(read_only=True, timeout=0.5, settle=0.0)
    def hangs(cmd: Hang) -> None:
        begun.set()
        over.wait(60)

    with SagaLog.open(sqlite_path) as log, Coordinator(log, bus, lease=3) as coordinator:

        @coordinator.saga("hangs")
        def hanging(ctx: SagaContext) -> None:
            ctx.dispatch(Hang())

        @coordinator.saga("works")
        def works(ctx: SagaContext) -> int:
            return 1

        with coordinator.worker(concurrency=1, poll=0.05):
            coordinator.submit(hanging)
            assert begun.wait(30)
            assert log.quarantine(note="restored", actor="Ada") == 1
            assert coordinator.wait(coordinator.submit(works), timeout=30) == 1
            over.set()
