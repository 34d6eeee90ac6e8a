"""A process's identity and lease while it stops, begins again, or is out of reach of the log."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text

from sagalog import AsyncSagaCoordinator, AsyncSagaLog, SagaCoordinator, SagaLog, StepInfo
from sagalog.coordinator.effects import Write
from sagalog.errors import LogUnavailable
from tests.processes import LONGEST, until
from tests.troubled import Done, Reserve, Shop, beginning_elsewhere, reserving


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


def test_a_lease_is_kept_for_others_though_a_shutdown_is_held_up(log: SagaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagalog.coordinator.worker._ANSWERS_WITHIN", 0.1)
    slow, asked, answers = Slow(), threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool, SagaCoordinator(log, slow.shop.bus, lease=0.6) as coordinator:

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
        [lease] = log.executors()
        until(lambda: [later for later in log.executors() if later.lease_until > lease.lease_until])
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


def test_a_saga_whose_loop_is_gone_is_given_back(sqlite_path: Path) -> None:
    begun = threading.Event()
    bus, loop = Shop().bus, asyncio.new_event_loop()

    async def hangs(ctx: Any, order: int) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def begin() -> AsyncSagaCoordinator:
        coordinator = AsyncSagaCoordinator(await AsyncSagaLog.open(sqlite_path), bus)
        worker = coordinator.worker()
        await worker.start()
        await coordinator.submit(coordinator.saga("reserving")(hangs), 1)
        await asyncio.to_thread(begun.wait, LONGEST)
        return coordinator

    here = loop.run_until_complete(begin())
    loop.close()
    with SagaLog.open(sqlite_path) as log, SagaCoordinator(log, bus) as another:
        reserving(another)
        del loop
        gc.collect()
        assert until(lambda: another.recover().compensated) == [1]
    assert here.executor_id


def test_the_lease_of_a_coordinator_that_nobody_closed_is_kept_no_longer(log: SagaLog) -> None:
    def leases() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "sagalog-lease"]

    before = leases()
    SagaCoordinator(log, Shop().bus).recover()
    gc.collect()
    assert until(lambda: set(leases()) <= set(before))


def test_a_close_that_was_interrupted_is_made_good_by_the_next(log: SagaLog, migrated_url: str) -> None:
    engine = create_engine(migrated_url)
    coordinator = SagaCoordinator(SagaLog(engine), Shop().bus)
    coordinator.recover()
    assert len(log.executors()) == 1
    closing, interrupts = threading.current_thread(), [KeyboardInterrupt()]

    def interrupt(*_: Any) -> None:
        if threading.current_thread() is closing and interrupts:
            raise interrupts.pop()

    event.listen(engine, "checkout", interrupt)
    with pytest.raises(KeyboardInterrupt):
        coordinator.close()
    coordinator.close()
    assert log.executors() == []
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


def test_a_second_shutdown_waits_for_what_the_first_waits_for(log: SagaLog) -> None:
    slow, ended = Slow(), list[str]()
    with SagaCoordinator(log, slow.shop.bus) as coordinator:
        saga_id = coordinator.submit(reserving(coordinator), 5)
        worker = coordinator.worker(poll=0.05)
        worker.start()
        assert slow.begun.wait(LONGEST)

        def shut_down() -> None:
            worker.shutdown(grace=LONGEST)
            ended.append(log.get(saga_id).state)

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
        async with await AsyncSagaLog.open(sqlite_path) as log:
            coordinator = AsyncSagaCoordinator(log, Shop().bus)
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
            return (await log.get(saga_id)).executor_id, await log.executors()

    assert asyncio.run(main()) == (None, [])


INTERRUPTED = ("core.py", "taking.py", "run.py")


def interrupting(number: int) -> Callable[..., Any]:
    """A trace function that raises at the n-th line of what makes a saga this process's."""
    left = [number]

    def line(frame: Any, kind: str, _: Any) -> Any:
        if kind == "line":
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return line

    return lambda frame, kind, _: line if Path(frame.f_code.co_filename).name in INTERRUPTED else None


@pytest.mark.parametrize("what", ["run", "recover"])
def test_a_process_interrupted_at_any_line_keeps_no_saga(sqlite_path: Path, what: str) -> None:
    """In a notebook the process lives on, and so does its lease."""
    shop, number = Shop(), 0
    with SagaLog.open(sqlite_path, durability="normal") as log:
        while True:
            number += 1
            coordinator = SagaCoordinator(log, shop.bus)
            saga, here = reserving(coordinator), coordinator.executor_id
            if what == "recover":
                beginning_elsewhere(log, "reserving")
            tracing = sys.gettrace()
            sys.settrace(interrupting(number))
            try:
                coordinator.run(saga, 1) if what == "run" else coordinator.recover()
                break
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(tracing)
            until(lambda: here not in [log.get(left.saga_id).executor_id for left in log.unresolved_sagas()])  # noqa: B023
            coordinator.close()
            assert log.executors() == []
            with SagaCoordinator(log, shop.bus) as another:
                reserving(another)
                another.recover()
    assert number > 50
