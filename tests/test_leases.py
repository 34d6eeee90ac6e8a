"""How long a lease is kept, and when it is given up."""

from __future__ import annotations

import gc
import sqlite3
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text

from sagalog import (
    CommandBus,
    SagaCoordinator,
    SagaLog,
    StepInfo,
)
from sagalog.coordinator.effects import Write
from tests.processes import LONGEST, until
from tests.troubled import (
    Done,
    Shop,
    Slow,
    reserving,
    until_one_ends,
)


def test_a_saga_that_begins_while_its_coordinator_is_closed_stays_its_own(own_log: SagaLog, migrated_url: str) -> None:
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
        with SagaCoordinator(own_log, Shop().bus) as another:
            reserving(another)
            report = another.recover()
        slow.may_end.set()
        assert running[0].result(LONGEST) == 5
        assert report.resolved == 0
        coordinator.close()
    assert own_log.executors() == []
    engine.dispose()


def test_a_lease_is_not_given_up_while_a_saga_is_being_begun_under_it(sqlite_path: Path) -> None:
    with SagaLog.open(sqlite_path) as own_log:
        taken: list[int] = []

        def look(step: StepInfo) -> Done:
            with SagaCoordinator(own_log, Shop().bus) as another:
                reserving(another)
                taken.append(another.recover().resolved)
            return Done()

        coordinator = SagaCoordinator(own_log, Shop(reserve=look).bus)
        saga = reserving(coordinator)

        def closing_then(effect: Any, answer: Callable[[Any], Any]) -> Any:
            if isinstance(effect, Write) and effect.operation.asked == "run":
                coordinator.close()
            return answer(effect)

        coordinator.interpose = closing_then
        assert coordinator.run(saga, 1) == 1
        assert taken == [0]
        coordinator.close()
        assert own_log.executors() == []


def test_a_claim_that_is_under_way_while_a_worker_shuts_down_is_not_won_without_a_lease(sqlite_path: Path) -> None:
    with SagaLog.open(sqlite_path) as own_log, closing(sqlite3.connect(sqlite_path, isolation_level=None)) as other:
        leases: list[Any] = []

        def look(step: StepInfo) -> Done:
            leases.append(own_log.executors())
            return Done()

        coordinator = SagaCoordinator(own_log, Shop(reserve=look).bus)
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
        assert own_log.executors() == []
        with SagaCoordinator(own_log, Shop().bus) as another:
            reserving(another)
            if own_log.get(submitted).state == "submitted":
                with another.worker():
                    assert another.wait(submitted, timeout=30) == 1
            elif own_log.get(submitted).state != "completed":
                assert until_one_ends(another) == 1


def test_a_lease_is_kept_for_others_though_a_shutdown_is_held_up(
    own_log: SagaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagalog.coordinator.worker._ANSWERS_WITHIN", 0.1)
    slow, asked, answers = Slow(), threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool, SagaCoordinator(own_log, slow.shop.bus, lease=0.6) as coordinator:

        def silent(effect: Any, answer: Callable[[Any], Any]) -> Any:
            if isinstance(effect, Write) and effect.operation.asked == "submitted":
                asked.set()
                answers.wait(LONGEST)
            return answer(effect)

        saga = reserving(coordinator)
        coordinator.interpose = silent
        worker = coordinator.worker()
        worker.start()
        running = pool.submit(coordinator.run, saga, 5)
        assert slow.begun.wait(LONGEST)
        assert asked.wait(LONGEST)
        worker.shutdown(grace=0.0)
        [lease] = own_log.executors()
        until(lambda: [later for later in own_log.executors() if later.lease_until > lease.lease_until])
        answers.set()
        slow.may_end.set()
        assert running.result(LONGEST) == 5


def test_a_lease_is_renewed_by_starts_where_its_thread_finds_no_connection(postgres_url: str) -> None:
    role = f"few_{uuid.uuid4().hex}"
    server = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    SagaLog.open(postgres_url).close()
    with server.connect() as connection:
        connection.execute(text(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 2"))
        for those in ("TABLES", "SEQUENCES"):
            connection.execute(text(f"GRANT ALL ON ALL {those} IN SCHEMA public TO {role}"))
    engine = create_engine(server.url.set(username=role), pool_size=2, max_overflow=0)
    with engine.connect(), engine.connect():
        """The pool is warm: these are all that the role may have."""
    slow, slower = Slow(), SagaLog(server)
    coordinator = SagaCoordinator(SagaLog(engine), slow.shop.bus, lease=0.6)
    saga = reserving(coordinator)
    coordinator.recover()
    until(lambda: [lease for lease in slower.executors() if lease.lease_until < lease.read_at])
    with ThreadPoolExecutor(1) as pool, SagaCoordinator(slower, Shop().bus) as another:
        reserving(another)
        running = pool.submit(coordinator.run, saga, 5)
        assert slow.begun.wait(LONGEST)
        [lease] = [lease for lease in slower.executors() if lease.open_sagas]
        slow.may_end.set()
        assert running.result(LONGEST) == 5
    assert lease.lease_until > lease.started_at + timedelta(seconds=0.6)
    coordinator.close()
    engine.dispose()
    with server.connect() as connection:
        connection.execute(text(f"DROP OWNED BY {role}"))
        connection.execute(text(f"DROP ROLE {role}"))
    server.dispose()


def test_a_process_without_threads_to_spare_runs_sagas_and_keeps_its_lease_later(
    sqlite_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, refused = threading.Thread.start, iter([True])

    def starting(thread: threading.Thread) -> None:
        if thread.name == "sagalog-lease" and next(refused, False):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    with SagaLog.open(sqlite_path) as own_log, SagaCoordinator(own_log, CommandBus()) as coordinator:

        @coordinator.saga("works")
        def works(ctx: Any) -> int:
            return 1

        before = threading.enumerate()
        for keeping in (False, True):
            assert coordinator.run(works) == 1
            new = [thread.name for thread in threading.enumerate() if thread not in before]
            assert ("sagalog-lease" in new) is keeping


# Its end


def test_the_lease_of_a_coordinator_that_nobody_closed_is_kept_no_longer(own_log: SagaLog) -> None:
    def leases() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "sagalog-lease"]

    before = leases()
    SagaCoordinator(own_log, Shop().bus).recover()
    gc.collect()
    assert until(lambda: set(leases()) <= set(before))


def test_a_close_that_was_interrupted_is_made_good_by_the_next(own_log: SagaLog, migrated_url: str) -> None:
    engine = create_engine(migrated_url)
    coordinator = SagaCoordinator(SagaLog(engine), Shop().bus)
    coordinator.recover()
    assert len(own_log.executors()) == 1
    closing, interrupts = threading.current_thread(), [KeyboardInterrupt()]

    def interrupt(*_: Any) -> None:
        if threading.current_thread() is closing and interrupts:
            raise interrupts.pop()

    event.listen(engine, "checkout", interrupt)
    with pytest.raises(KeyboardInterrupt):
        coordinator.close()
    coordinator.close()
    assert own_log.executors() == []
    engine.dispose()


def test_a_lease_is_given_up_though_the_connections_ended_meanwhile(postgres_url: str) -> None:
    SagaLog.open(postgres_url).close()
    engine, server = create_engine(postgres_url), create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    coordinator = SagaCoordinator(SagaLog(engine), Shop().bus)
    coordinator.recover()
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    with server.connect() as connection:
        connection.execute(text(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE {others}"))
    coordinator.close()
    assert SagaLog(server).executors() == []
    for each in (engine, server):
        each.dispose()


@pytest.mark.parametrize("by", ["recover", "worker"])
def test_a_process_that_is_gone_for_days_is_forgotten_unless_a_saga_names_it(
    own_log: SagaLog, migrated_url: str, by: str
) -> None:
    own_log.start_saga(1, "unknown here", None)
    engine = create_engine(migrated_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE saga SET executor_id = 'named', epoch = 1"))
        for gone in ("named", "gone"):
            values = {"id": gone}
            connection.execute(text("INSERT INTO saga_executor VALUES (:id, :id, 1, 1)"), values)
    engine.dispose()
    with SagaCoordinator(own_log, Shop().bus) as coordinator:
        if by == "recover":
            coordinator.recover()
        else:
            with coordinator.worker():
                until(lambda: "gone" not in [executor.executor_id for executor in own_log.executors()])
    assert [executor.executor_id for executor in own_log.executors()] == ["named"]
