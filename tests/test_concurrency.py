"""Threads, tasks, processes: every acknowledged write is there, ids are never given twice, nothing hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from sagalog import AsyncSagaLog, InvalidTransition, LogUnavailable, SagaLog, SagaLogError, SagaOutcome
from sagalog.log.connections import Durability
from tests.many_processes import together

SHARED = ("sqlite-file", "sqlite-memory", "sqlite-engine", "postgres-engine")


@pytest.fixture(params=SHARED)
def shared(request: pytest.FixtureRequest, sqlite_path: Path) -> Iterator[SagaLog]:
    """A log that threads may share."""
    if request.param == "sqlite-file":
        log = SagaLog.open(sqlite_path)
    elif request.param == "sqlite-memory":
        log = SagaLog.open_in_memory()
    else:
        on_sqlite = request.param == "sqlite-engine"
        url = f"sqlite:///{sqlite_path}" if on_sqlite else request.getfixturevalue("postgres_url")
        arguments = {"connect_args": {"timeout": 60}} if on_sqlite else {}
        engine = create_engine(url, pool_size=16, **arguments)
        yield SagaLog(engine)
        engine.dispose()
        return
    yield log
    log.close()


def run_saga(log: SagaLog, number: int) -> int:
    saga = log.create_saga("s", {"n": number})
    for index in range(3):
        log.start_step(saga, index, "c", {"i": index})
        log.finish_step(saga, index, [index])
    log.terminate(saga, SagaOutcome.completed())
    return saga


def test_threads_share_a_log_and_every_saga_is_whole(shared: SagaLog) -> None:
    with ThreadPoolExecutor(16) as pool:
        sagas = list(pool.map(lambda n: (run_saga(shared, n), n), range(200)))
    assert len({saga for saga, _ in sagas}) == 200
    assert shared.counts() == {"completed": 200}
    for saga, number in sagas[::20]:
        record = shared.get(saga)
        assert record.input == {"n": number}
        assert [s.output for s in record.steps] == [[0], [1], [2]]


def test_one_key_started_by_many_threads_is_one_saga(shared: SagaLog) -> None:
    with ThreadPoolExecutor(16) as pool:
        ids = list(pool.map(lambda n: shared.create_saga("s", {"a": 1}, key=f"k{n % 5}"), range(100)))
    assert len(set(ids)) == 5
    assert shared.counts() == {"running": 5}


def test_one_step_started_by_many_threads_is_started_once(shared: SagaLog) -> None:
    shared.start_saga(1, "s", None)

    def start(number: int) -> bool:
        try:
            shared.start_step(1, 0, "c", number)
        except SagaLogError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(start, range(50))) == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda log: log.max_saga_id(),
        lambda log: log.next_step_index(1),
        lambda log: len(log.get(1).steps),
        lambda log: log.counts()["running"],
    ],
    ids=["max_saga_id", "next_step_index", "get", "counts"],
)
def test_a_read_sees_what_is_committed_and_waits_for_no_unit_of_work(
    read: Callable[[SagaLog], int], sqlite_path: Path
) -> None:
    with SagaLog.open(sqlite_path) as log, ThreadPoolExecutor(1) as pool:
        log.start_saga(1, "s", None)
        before = read(log)
        with log.unit_of_work() as work:
            work.start_saga(2, "s", None)
            work.start_step(1, 0, "c", None)
            assert pool.submit(read, log).result(timeout=4) == read(log) == before
        assert pool.submit(read, log).result() == read(log) == before + 1


def test_no_saga_completes_beside_a_step_that_is_starting(shared: SagaLog) -> None:
    for saga in range(1, 41):
        shared.start_saga(saga, "s", None)
        barrier = threading.Barrier(2)

        def start(saga: int = saga, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                shared.start_step(saga, 0, "c", None)
            except InvalidTransition:
                return

        def end(saga: int = saga, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                shared.terminate(saga, SagaOutcome.completed())
            except InvalidTransition:
                return

        threads = [threading.Thread(target=start), threading.Thread(target=end)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        record = shared.get(saga)
        assert not (record.state == "completed" and record.steps), record


Ending = Callable[[str, SagaOutcome], None]


def end_on_an_engine(url: str, outcome: SagaOutcome) -> None:
    engine = create_engine(url)
    try:
        SagaLog(engine).terminate(1, outcome)
    finally:
        engine.dispose()


def end_in_a_callers_transaction(url: str, outcome: SagaOutcome) -> None:
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            SagaLog(connection).terminate(1, outcome)
    finally:
        engine.dispose()


def end_in_a_unit_of_work(url: str, outcome: SagaOutcome) -> None:
    engine = create_engine(url)
    try:
        with SagaLog(engine).unit_of_work() as work:
            work.terminate(1, outcome)
    finally:
        engine.dispose()


def end_awaited(driver: str) -> Ending:
    async def end(url: str, outcome: SagaOutcome) -> None:
        target = make_url(url).set(drivername=f"postgresql+{driver}")
        if driver == "asyncpg" and "host" in target.query:
            target = target.set(query={"host": target.query["host"]})
        engine = create_async_engine(target)
        try:
            await AsyncSagaLog(engine).terminate(1, outcome)
        finally:
            await engine.dispose()

    return lambda url, outcome: asyncio.run(end(url, outcome))


ENDINGS: dict[str, Ending] = {
    "engine": end_on_an_engine,
    "connection": end_in_a_callers_transaction,
    "unit": end_in_a_unit_of_work,
    "asyncpg": end_awaited("asyncpg"),
    "async-psycopg": end_awaited("psycopg"),
}


@pytest.mark.parametrize("outcome", [SagaOutcome.completed(), SagaOutcome.compensated("r")], ids=lambda o: o.state)
@pytest.mark.parametrize("road", ENDINGS)
def test_an_ending_that_waits_for_a_starting_step_is_refused(
    postgres_url: str, road: str, outcome: SagaOutcome
) -> None:
    engine = create_engine(postgres_url)
    log = SagaLog(engine)
    log.start_saga(1, "s", None)
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection, engine.connect() as watcher:
        SagaLog(connection).start_step(1, 0, "c", None)
        ended = pool.submit(ENDINGS[road], postgres_url, outcome)
        _wait_for_lock(watcher)
        connection.commit()
        with pytest.raises(InvalidTransition, match="0 \\(pending\\) stand in the way") as refused:
            ended.result(30)
    assert (refused.value.saga_id, refused.value.step_index) == (1, 0)
    assert log.get(1).state == "running"
    engine.dispose()


@pytest.mark.parametrize("road", ENDINGS)
def test_an_ending_that_waits_for_a_step_that_is_rolled_back_ends_the_saga(postgres_url: str, road: str) -> None:
    engine = create_engine(postgres_url)
    log = SagaLog(engine)
    log.start_saga(1, "s", None)
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection, engine.connect() as watcher:
        SagaLog(connection).start_step(1, 0, "c", None)
        ended = pool.submit(ENDINGS[road], postgres_url, SagaOutcome.completed())
        _wait_for_lock(watcher)
        connection.rollback()
        ended.result(30)
    assert (log.get(1).state, log.get(1).steps) == ("completed", ())
    engine.dispose()


def test_an_operator_who_settles_a_step_waits_for_the_sagas_row_first(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    log = SagaLog(engine)
    log.start_saga(1, "s", None)
    log.start_step(1, 0, "c", None)
    log.finish_step(1, 0, None)
    log.terminate(1, SagaOutcome.failed("no stock"))
    with engine.begin() as connection:
        connection.execute(text("UPDATE saga SET epoch = 1"))
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection, engine.connect() as watcher:
        undoing = SagaLog(connection)
        undoing.mark_compensating(1)
        settled = pool.submit(log.resolve_step, 1, 0, "compensated", note="by hand", actor="ann")
        _wait_for_lock(watcher)
        undoing.mark_step_compensated(1, 0)
        connection.commit()
        with pytest.raises(InvalidTransition):
            settled.result(30)
    assert [step.state for step in log.get(1).steps] == ["compensated"]
    engine.dispose()


def test_a_step_that_waits_for_an_ending_is_not_started(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    log = SagaLog(engine)
    log.start_saga(1, "s", None)
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection, engine.connect() as watcher:
        SagaLog(connection).terminate(1, SagaOutcome.completed())
        started = pool.submit(log.start_step, 1, 0, "c", None)
        _wait_for_lock(watcher)
        connection.commit()
        with pytest.raises(InvalidTransition):
            started.result(30)
    assert (log.get(1).state, log.get(1).steps) == ("completed", ())
    engine.dispose()


def test_an_ending_that_gives_up_waiting_changes_nothing_and_leaves_the_pool_clean(postgres_url: str) -> None:
    engine = create_engine(postgres_url, pool_size=1, max_overflow=0)
    holder = create_engine(postgres_url)

    @event.listens_for(engine, "connect")
    def wait_briefly(connection: Any, record: object) -> None:
        connection.execute("SET lock_timeout = 50")
        connection.commit()

    log = SagaLog(engine)
    log.start_saga(1, "s", None)
    with holder.connect() as connection:
        SagaLog(connection).start_step(1, 0, "c", None)
        with pytest.raises(LogUnavailable) as locked:
            log.terminate(1, SagaOutcome.completed())
    assert (locked.value.found, locked.value.unknown) == ("55P03", False)
    assert log.get(1).state == "running"
    log.terminate(1, SagaOutcome.completed())
    with engine.connect() as connection:
        assert SagaLog(connection).get(1).state == "completed"
    engine.dispose()
    holder.dispose()


def _wait_for_lock(watcher: Any) -> None:
    from sqlalchemy import text

    while not watcher.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted")).scalar_one():
        watcher.rollback()


DURABILITIES = pytest.mark.parametrize("durability", ["full", "normal"])


@DURABILITIES
def test_tasks_share_a_log(sqlite_path: Path, durability: Durability) -> None:
    async def main() -> None:
        async with await AsyncSagaLog.open(sqlite_path, durability=durability) as log:

            async def one(number: int) -> None:
                saga = await log.create_saga("s", number)
                await log.start_step(saga, 0, "c", None)
                await log.finish_step(saga, 0, [number])
                await log.terminate(saga, SagaOutcome.completed())

            await asyncio.gather(*(one(n) for n in range(200)))
            assert await log.counts() == {"completed": 200}

            async def unit(number: int) -> None:
                async with log.unit_of_work() as work:
                    saga = await work.create_saga("u", number)
                    await asyncio.sleep(0)
                    await work.start_step(saga, 0, "c", None)

            await asyncio.gather(*(unit(n) for n in range(20)), *(one(n) for n in range(20)))
            assert await log.counts() == {"completed": 220, "running": 20}

    asyncio.run(main())


@DURABILITIES
def test_a_write_that_waits_for_another_process_lets_the_loop_go_on(sqlite_path: Path, durability: Durability) -> None:
    async def main() -> None:
        async with await AsyncSagaLog.open(sqlite_path, durability=durability) as log:
            await log.start_saga(1, "s", None)
            with closing(sqlite3.connect(sqlite_path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                write = asyncio.create_task(log.start_step(1, 0, "c", None))
                for _ in range(3):
                    await asyncio.to_thread(lambda: None)
                assert not write.done()
                other.execute("COMMIT")
            await write
            assert [step.state for step in (await log.get(1)).steps] == ["pending"]

    asyncio.run(main())


@DURABILITIES
def test_a_task_that_writes_and_writes_lets_others_run(sqlite_path: Path, durability: Durability) -> None:
    async def main() -> None:
        turns: list[str] = []

        async def writer(log: AsyncSagaLog, saga_id: int) -> None:
            await log.start_saga(saga_id, "s", None)
            for index in range(5):
                await log.start_step(saga_id, index, "c", None)
                turns.append(f"{saga_id}")

        async with await AsyncSagaLog.open(sqlite_path, durability=durability) as log:
            await asyncio.gather(writer(log, 1), writer(log, 2))
        assert turns.index("2") < 5

    asyncio.run(main())


@pytest.mark.parametrize("target", ["full", "normal", "postgres"])
def test_a_cancelled_task_leaves_a_decided_write(target: str, request: pytest.FixtureRequest) -> None:
    async def main(open_log: Callable[[], Any]) -> None:
        log = await open_log()
        await log.start_saga(1, "s", None)
        raised: set[int] = set()

        async def write(index: int) -> None:
            try:
                await log.start_step(1, index, "c", None)
            except asyncio.CancelledError:
                raised.add(index)
                # Decided by now: it is there, or it never will be.
                seen = {s.step_index for s in (await log.get(1)).steps}
                states.append((index, index in seen))
                raise

        states: list[tuple[int, bool]] = []
        for index in range(60):
            task = asyncio.create_task(write(index))
            for _ in range(index % 7):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        final = {s.step_index for s in (await log.get(1)).steps}
        assert all((index in final) == seen for index, seen in states)
        await log.close()

    async def opened() -> Any:
        if target == "postgres":
            return await AsyncSagaLog.open(request.getfixturevalue("postgres_url"))
        return await AsyncSagaLog.open(request.getfixturevalue("sqlite_path"), durability=target)

    asyncio.run(main(opened))


CHILD = """
import sys
from sagalog import SagaLog, SagaOutcome
log = SagaLog.open(sys.argv[1], durability="normal") if "://" not in sys.argv[1] else SagaLog.open(sys.argv[1])
while True:
    saga = log.create_saga("s", None)
    print("created", saga, flush=True)
    for index in range(3):
        log.start_step(saga, index, "c", index)
        print("started", saga, index, flush=True)
        log.finish_step(saga, index, [index])
        print("finished", saga, index, flush=True)
    log.terminate(saga, SagaOutcome.completed())
    print("completed", saga, flush=True)
"""


def test_what_was_acknowledged_before_a_kill_is_there(migrated_url: str) -> None:
    target = migrated_url.removeprefix("sqlite:///")
    log = SagaLog.open(target)
    for lines in range(1, 41, 3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, target], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        seen = [child.stdout.readline().split() for _ in range(lines)]
        os.kill(child.pid, signal.SIGKILL)
        # The kill may cut the last line.
        seen += [line.split() for line in child.stdout.read().split("\n")[:-1]]
        child.wait(30)
        child.stdout.close()
        for verb, saga, *index in seen:
            record = log.get(int(saga))
            if verb == "completed":
                assert record.state == "completed"
            elif index:
                step = record.steps[int(index[0])]
                assert step.state == "succeeded" or verb == "started"
        # At most what the last line acknowledged plus the one write under way.
        assert len(log.unresolved_sagas()) <= lines
    log.close()


def test_many_processes_write_one_file(sqlite_path: Path) -> None:
    code = (
        "import sys\nfrom sagalog import SagaLog, SagaOutcome\nlog = SagaLog.open(sys.argv[1])\n"
        "for n in range(50):\n    saga = log.create_saga('s', n)\n    log.terminate(saga, SagaOutcome.completed())\n"
        "log.close()\n"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(sqlite_path)], stderr=subprocess.PIPE) for _ in range(4)
    ]
    assert [(w.communicate(timeout=120)[1], w.returncode) for w in workers] == [(b"", 0)] * 4
    with SagaLog.open(sqlite_path) as log:
        assert log.counts() == {"completed": 200}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "of a host's"])
def test_processes_that_start_together_all_open_the_file(existing: bool, tmp_path: Path) -> None:
    SagaLog.open(tmp_path / "warm.db").close()
    for number in range(8):
        path, barrier = tmp_path / f"{number}.db", get_context("fork").Barrier(6)
        if existing:
            with closing(sqlite3.connect(path)) as host:
                host.execute("CREATE TABLE theirs (x)")

        def ready(path: Path = path, barrier: Any = barrier) -> Callable[[], int]:
            def start() -> int:
                barrier.wait()
                with SagaLog.open(path) as log:
                    return log.create_saga("s", None)

            return start

        assert sorted(together([ready] * 6)) == [1, 2, 3, 4, 5, 6]


def test_a_child_of_a_fork_goes_on_with_the_log(sqlite_path: Path) -> None:
    log = SagaLog.open(sqlite_path)
    log.start_saga(1, "s", None)
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            log.next_step_index(1)
            log.create_saga("busy", None)

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    children = []
    for number in range(8):
        child = os.fork()
        if child == 0:
            try:
                log.start_step(1, number, "c", None)
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(child)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert len(log.get(1).steps) == 8
    log.start_step(1, 99, "c", None)
    log.close()
