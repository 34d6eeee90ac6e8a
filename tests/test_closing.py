"""The end of a log: what is refused afterwards, and what becomes of writes that are under way."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from sagalog import AsyncSagaLog, SagaLog, UnusableBind


def test_a_closed_log_refuses(sqlite_path: Path) -> None:
    log = SagaLog.open(sqlite_path)
    log.close()
    log.close()
    for call in (lambda: log.start_saga(1, "s", None), log.counts, lambda: log.unit_of_work().__enter__()):
        with pytest.raises(UnusableBind, match="closed"):
            call()


def test_what_waits_while_a_log_is_closed_is_refused_and_does_not_open_the_file_again(sqlite_path: Path) -> None:
    log = SagaLog.open(sqlite_path)
    refused: list[str] = []

    def start(saga_id: int) -> None:
        try:
            log.start_saga(saga_id, "s", None)
        except UnusableBind as error:
            refused.append(str(error).partition(":")[0])

    coming = [threading.Thread(target=log.close), *(threading.Thread(target=start, args=(n,)) for n in (1, 2))]
    with log.unit_of_work():
        for number, thread in enumerate(coming, start=1):
            thread.start()
            while len(log._bind._turns.waiting) < number:  # type: ignore[attr-defined]
                """Each waits behind the one before it."""
    for thread in coming:
        thread.join()
    assert refused == ["start_saga", "start_saga"]
    assert not sqlite_path.with_name(f"{sqlite_path.name}-wal").exists()
    with SagaLog.open(sqlite_path) as again:
        assert again.max_saga_id() == 0


class Locking:
    """Holds the row of saga 1, and looks at the server's other connections."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        self._holding = self._engine.connect()
        self._holding.execute(text("SELECT 1 FROM saga WHERE saga_id = 1 FOR UPDATE"))
        self._looking = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def _become(self, count: int, which: str) -> bool:
        those = f"SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND {which}"
        until = time.monotonic() + 10
        while self._looking.execute(text(those)).scalar_one() != count:
            if time.monotonic() > until:
                return False
        return True

    def is_waited_for(self) -> bool:
        """Whether a statement comes to wait for the row."""
        return self._become(1, "wait_event_type = 'Lock'")

    def release(self) -> None:
        """Let it go on."""
        self._holding.rollback()

    def is_alone(self) -> bool:
        """Whether every other connection comes to be closed."""
        return self._become(2, "backend_type = 'client backend'")

    def close(self) -> None:
        """Give back both connections."""
        self._looking.close()
        self._holding.close()
        self._engine.dispose()


@pytest.fixture
def locking(postgres_url: str) -> Iterator[Locking]:
    """Nothing is closed by the garbage collector meanwhile."""
    with SagaLog.open(postgres_url) as log:
        log.start_saga(1, "s", None)
    gc.disable()
    locking = Locking(postgres_url)
    try:
        yield locking
    finally:
        locking.close()
        gc.enable()


def test_a_log_that_is_closed_while_a_thread_writes_leaves_no_connection_open(
    postgres_url: str, locking: Locking
) -> None:
    log = SagaLog.open(postgres_url)
    writing = threading.Thread(target=log.start_step, args=(1, 0, "Reserve", None))
    writing.start()
    assert locking.is_waited_for()
    log.close()
    locking.release()
    writing.join()
    assert locking.is_alone()
    with SagaLog.open(postgres_url) as again:
        assert again.next_step_index(1) == 1


def test_an_async_log_that_is_closed_while_a_task_writes_leaves_no_connection_open(
    postgres_url: str, locking: Locking
) -> None:
    async def main() -> None:
        log = await AsyncSagaLog.open(postgres_url)
        writing = asyncio.create_task(log.start_step(1, 0, "Reserve", None))
        assert await asyncio.to_thread(locking.is_waited_for)
        await log.close()
        locking.release()
        await writing
        assert await asyncio.to_thread(locking.is_alone)

    asyncio.run(main())


def taken(log: AsyncSagaLog) -> None:
    """Wait until the thread that writes has taken what waits."""
    bind: Any = log._bind
    while bind._called or bind._waiting or bind._worker is None:
        """It takes it at once."""


def test_a_write_that_comes_while_a_file_is_closed_is_done_or_refused(sqlite_path: Path) -> None:
    async def main() -> list[object]:
        log = await AsyncSagaLog.open(sqlite_path)
        await log.create_saga("s", None)
        with closing(sqlite3.connect(sqlite_path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            under_way = asyncio.create_task(log.create_saga("s", None))
            await asyncio.to_thread(taken, log)
            closes = asyncio.create_task(log.close())
            await asyncio.sleep(0)
            late = asyncio.create_task(log.create_saga("s", None))
            await asyncio.sleep(0)
            other.execute("ROLLBACK")
        return await asyncio.wait_for(asyncio.gather(under_way, closes, late, return_exceptions=True), timeout=30)

    under_way, closed, late = asyncio.run(main())
    assert (under_way, closed) == (2, None)
    assert late == 3 or isinstance(late, UnusableBind)


def test_a_unit_of_work_that_is_cancelled_while_it_begins_holds_nothing(sqlite_path: Path) -> None:
    async def main() -> None:
        log = await AsyncSagaLog.open(sqlite_path)
        held: list[object] = []

        async def enters() -> None:
            unit = log.unit_of_work()
            held.append(unit)  # whoever holds it does not wait for its collection
            async with unit:
                await asyncio.Event().wait()

        for turns in range(1, 9):
            task = asyncio.create_task(enters())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert await asyncio.wait_for(log.create_saga("s", None), timeout=30) == turns
        await log.close()

    asyncio.run(main())
