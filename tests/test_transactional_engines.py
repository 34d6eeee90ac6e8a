"""Transactional handlers over the host's engine: its threads and loops, its options, its one connection."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, event, insert, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from sagalog import (
    AsyncSagaCoordinator,
    AsyncSagaLog,
    CommandBus,
    SagaCoordinator,
    SagaFailed,
    SagaLog,
    UnusableBind,
    migrations,
)
from tests.coordinating import Keep
from tests.troubled import Done, Reserve, reserving

# Threads and loops


def test_a_sync_transactional_handler_does_not_hold_up_its_event_loop(migrated_url: str) -> None:
    other = migrated_url.replace("sqlite:", "sqlite+aiosqlite:").replace("+psycopg", "+asyncpg")

    async def main() -> None:
        bus, engine = CommandBus(), create_async_engine(other)
        loop, begun, others = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

        @bus.handler(transactional=True, read_only=True)
        def keep(cmd: Keep, session: Session) -> int:
            loop.call_soon_threadsafe(begun.set)
            assert others.wait(30), "nothing else went on in the loop"
            return int(session.execute(text("SELECT 7")).scalar_one())

        async with AsyncSagaCoordinator(AsyncSagaLog(engine), bus) as coordinator:

            @coordinator.saga("keeps")
            async def keeps(ctx: Any) -> int:
                return int(await ctx.dispatch(Keep()))

            run = asyncio.create_task(coordinator.run(keeps))
            await begun.wait()
            others.set()
            assert await run == 7
        await engine.dispose()

    asyncio.run(main())


def test_transactions_on_an_engine_of_one_connection_wait_for_each_other() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    migrations.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE stock (amount INTEGER)"))
    bus, both = CommandBus(), threading.Barrier(4)

    @bus.handler(transactional=True, pivot=True)
    def do_reserve(cmd: Reserve, session: Session) -> Done:
        session.execute(text("INSERT INTO stock VALUES (1)"))
        time.sleep(0.001)
        return Done()

    results: list[Any] = []
    with SagaCoordinator(SagaLog(engine), bus) as coordinator:
        saga = reserving(coordinator)

        def run() -> None:
            both.wait()
            results.extend(coordinator.run(saga, 1) for _ in range(10))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM stock")).scalar_one() == 40
    assert results == [1] * 40
    engine.dispose()


def test_tasks_on_an_async_engine_of_one_connection_wait_for_each_other() -> None:
    async def main() -> None:
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
        await migrations.upgrade(engine)
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE stock (amount INTEGER)"))
        bus = CommandBus()

        @bus.handler(transactional=True, pivot=True)
        async def do_reserve(cmd: Reserve, session: AsyncSession) -> Done:
            await session.execute(text("INSERT INTO stock VALUES (1)"))
            await asyncio.sleep(0.001)
            return Done()

        async with AsyncSagaCoordinator(AsyncSagaLog(engine), bus) as coordinator:

            @coordinator.saga("reserving")
            async def reserving(ctx: Any, order: int) -> int:
                await ctx.dispatch(Reserve())
                return order

            assert await asyncio.gather(*(coordinator.run(reserving, n) for n in range(20))) == list(range(20))
        async with engine.connect() as connection:
            assert (await connection.execute(text("SELECT count(*) FROM stock"))).scalar_one() == 20
        await engine.dispose()

    asyncio.run(main())


# What a host's engine has of its own


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_sync_handler_on_an_async_engine_has_its_options_and_is_heard_by_its_listeners(
    postgres_url: str, driver: str
) -> None:
    heard: list[str] = []
    kept = Table("kept", MetaData(), Column("place", Integer))

    async def main() -> list[int]:
        engine = create_async_engine(
            postgres_url.replace("+psycopg", f"+{driver}"),
            execution_options={"schema_translate_map": {None: "tenant"}},
        )
        event.listen(engine.sync_engine, "begin", lambda connection: heard.append("begin"))
        async with engine.begin() as connection:
            await connection.execute(text("CREATE SCHEMA tenant"))
            await connection.run_sync(kept.create)
        bus, log = CommandBus(), AsyncSagaLog(engine)
        await log.max_saga_id()
        heard.clear()

        @bus.handler(transactional=True, read_only=True)
        def keep(cmd: Keep, session: Session) -> int:
            session.execute(insert(kept).values(place=7))
            return len(heard)

        async with AsyncSagaCoordinator(log, bus) as coordinator:

            @coordinator.saga("keeps")
            async def keeps(ctx: Any) -> None:
                assert await ctx.dispatch(Keep()) == 1

            await coordinator.run(keeps)
        async with engine.connect() as connection:
            found = (await connection.execute(text("SELECT place FROM tenant.kept"))).scalars().all()
        await engine.dispose()
        return list(found)

    assert asyncio.run(main()) == [7]


def test_a_handler_that_would_wait_for_its_own_connection_is_told_at_once() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    migrations.upgrade(engine)
    log, bus, found = SagaLog(engine), CommandBus(), []

    @bus.handler(transactional=True, pivot=True)
    def do_reserve(cmd: Reserve, session: Session) -> Done:
        found.append(SagaLog(session).max_saga_id())
        with pytest.raises(UnusableBind, match="SagaLog\\(session\\)"):
            log.max_saga_id()
        return Done()

    with SagaCoordinator(log, bus) as coordinator:
        assert coordinator.run(reserving(coordinator), 1) == 1
        assert log.max_saga_id() == 1
    assert found == [1]
    engine.dispose()


@pytest.mark.parametrize("bind", ["engine", "file"])
def test_a_handler_that_runs_out_of_time_in_a_statement_leaves_no_lock(sqlite_path: Path, bind: str) -> None:
    endless = text("WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c")

    async def main() -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{sqlite_path}")
        log = AsyncSagaLog(engine) if bind == "engine" else await AsyncSagaLog.open(sqlite_path)
        bus = CommandBus()

        @bus.handler(transactional=True, pivot=True, timeout=0.1, settle=0.0)
        async def keep(cmd: Keep, session: AsyncSession) -> int:
            await session.execute(text("CREATE TABLE kept (place INTEGER)"))
            await session.execute(endless)
            return 1

        async with AsyncSagaCoordinator(log, bus) as coordinator:

            @coordinator.saga("keeps")
            async def keeps(ctx: Any) -> None:
                await ctx.dispatch(Keep())

            with pytest.raises(SagaFailed, match="outlived its timeout") as failure:
                await coordinator.run(keeps)
            assert failure.value.outcome == "compensated"
        await log.close()
        await engine.dispose()

    asyncio.run(main())


# How SQLite's transactions begin


def test_a_transactional_handler_writes_though_its_hosts_transactions_begin_by_reading(sqlite_path: Path) -> None:
    """As SQLAlchemy's documentation says it, for savepoints: BEGIN is the engine's own, and takes no lock."""
    engine = create_engine(f"sqlite:///{sqlite_path}", connect_args={"isolation_level": None})
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    migrations.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE stock (amount INTEGER)"))
    bus, stranger = CommandBus(), sqlite3.connect(sqlite_path, isolation_level=None, timeout=0)

    @bus.handler(transactional=True, pivot=True)
    def do_reserve(cmd: Reserve, session: Session) -> Done:
        assert session.execute(text("SELECT count(*) FROM stock")).scalar_one() == 0
        with suppress(sqlite3.OperationalError):
            stranger.execute("INSERT INTO stock VALUES (2)")
        session.execute(text("INSERT INTO stock VALUES (1)"))
        return Done()

    with SagaCoordinator(SagaLog(engine), bus) as coordinator:
        coordinator.run(reserving(coordinator), 1)
    assert stranger.execute("SELECT amount FROM stock").fetchall() == [(1,)]
    stranger.close()
    engine.dispose()


def test_transactional_handlers_leave_nothing_behind_at_an_engine(sqlite_path: Path) -> None:
    async def main() -> None:
        bus, engine = CommandBus(), create_async_engine(f"sqlite+aiosqlite:///{sqlite_path}")
        await migrations.upgrade(engine)

        @bus.handler(transactional=True, read_only=True)
        def keep(cmd: Keep, session: Session) -> int:
            return 1

        async with AsyncSagaCoordinator(AsyncSagaLog(engine), bus) as coordinator:

            @coordinator.saga("keeps")
            async def keeps(ctx: Any) -> int:
                return sum([await ctx.dispatch(Keep()) for _ in range(5)])

            assert await coordinator.run(keeps) == 5
        assert len(list(engine.dialect.dispatch.handle_error)) == 1  # type: ignore[attr-defined]
        await engine.dispose()

    asyncio.run(main())
