"""A log on a caller's Session or Connection: joined, never ended, never poisoned, nothing stale."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, selectinload, sessionmaker

from sagalog import (
    AsyncSagaLog,
    InvalidTransition,
    LogUnavailable,
    PayloadError,
    Saga,
    SagaExists,
    SagaLog,
    SagaNotFound,
    SagaOutcome,
    SagaStep,
    StepExists,
    UnusableBind,
)
from tests.conftest import hooked


@pytest.fixture
def engine(migrated_url: str) -> Iterator[Engine]:
    engine = create_engine(migrated_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE shop_order (id INTEGER PRIMARY KEY, total INTEGER)"))
    yield engine
    engine.dispose()


def orders(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM shop_order")).scalar_one())


def test_business_rows_and_saga_commit_together(engine: Engine) -> None:
    with Session(engine) as session:
        session.execute(text("INSERT INTO shop_order VALUES (1, 10)"))
        saga = SagaLog(session).create_saga("place_order", {"order": 1})
        session.commit()
    assert orders(engine) == 1
    assert SagaLog(engine).get(saga).state == "running"


def test_business_rows_and_saga_roll_back_together(engine: Engine) -> None:
    with Session(engine) as session:
        session.execute(text("INSERT INTO shop_order VALUES (1, 10)"))
        SagaLog(session).create_saga("place_order", {"order": 1})
        session.rollback()
    assert orders(engine) == 0
    assert SagaLog(engine).counts() == {}


def test_a_saga_written_first_rolls_back_too(engine: Engine) -> None:
    with Session(engine) as session:
        SagaLog(session).create_saga("place_order", {"order": 1})
        session.execute(text("INSERT INTO shop_order VALUES (1, 10)"))
        session.rollback()
    assert (orders(engine), SagaLog(engine).counts()) == (0, {})


def test_every_refusal_leaves_the_callers_transaction_as_it_was(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("INSERT INTO shop_order VALUES (1, 10)"))
        log = SagaLog(connection)
        log.start_saga(1, "s", None)
        log.start_step(1, 0, "c", None)
        for call, refusal in (
            (lambda: log.start_saga(1, "s", None), SagaExists),
            (lambda: log.start_step(1, 0, "c", None), StepExists),
            (lambda: log.start_step(9, 0, "c", None), SagaNotFound),
            (lambda: log.terminate(1, SagaOutcome.completed()), InvalidTransition),
            (lambda: log.start_saga(2**63, "s", None), PayloadError),
            (lambda: log.finish_step(1, 0, "\ud800"), PayloadError),
        ):
            with pytest.raises(refusal):
                call()
            connection.execute(text("UPDATE shop_order SET total = total + 1"))
        connection.commit()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT total FROM shop_order")).scalar_one() == 16
    assert [s.state for s in SagaLog(engine).get(1).steps] == ["pending"]


def test_a_savepoint_takes_the_logs_rows_back_with_it(engine: Engine) -> None:
    with Session(engine) as session:
        log = SagaLog(session)
        log.start_saga(1, "s", None)
        nested = session.begin_nested()
        log.start_step(1, 0, "c", None)
        log.start_saga(2, "s", None)
        nested.rollback()
        session.commit()
    record = SagaLog(engine).get(1)
    assert record.steps == ()
    assert SagaLog(engine).counts() == {"running": 1}


def test_loaded_objects_are_not_stale(engine: Engine) -> None:
    with Session(engine, expire_on_commit=False) as session:
        log = SagaLog(session)
        log.start_saga(1, "s", {"n": 1})
        saga = session.get_one(Saga, 1)
        assert saga.steps == []
        log.start_step(1, 0, "c", None)
        (step,) = saga.steps
        assert (step.state, saga.input) == ("pending", {"n": 1})
        log.finish_step(1, 0, ["done"])
        assert (step.state, step.output) == ("succeeded", ["done"])
        log.terminate(1, SagaOutcome.completed())
        assert saga.state == "completed"
        assert saga.terminal_at is not None
        session.commit()


def test_what_the_caller_changed_on_an_object_stays_theirs(engine: Engine) -> None:
    with Session(engine, autoflush=False) as session:
        log = SagaLog(session)
        log.start_saga(1, "s", None)
        saga = session.get_one(Saga, 1)
        saga.trace_context = "mine"
        log.terminate(1, SagaOutcome.failed("f"))
        assert (saga.state, saga.trace_context) == ("failed", "mine")
        session.commit()
    with Session(engine) as session:
        assert session.get_one(Saga, 1).trace_context == "mine"


def test_pending_objects_of_the_callers_are_flushed_first(engine: Engine) -> None:
    from datetime import UTC, datetime

    with Session(engine) as session:
        session.add(Saga(saga_id=5, name="s", state="running", started_at=datetime.now(UTC), input=None))
        SagaLog(session).start_step(5, 0, "c", None)
        session.commit()
    assert len(SagaLog(engine).get(5).steps) == 1


def test_models_can_be_queried_with_python_values(engine: Engine) -> None:
    SagaLog(engine).start_saga(1, "s", {"a": [1, None]})
    SagaLog(engine).start_step(1, 0, "c", {"b": 2})
    with Session(engine) as session:
        saga = session.scalars(select(Saga).options(selectinload(Saga.steps)).where(Saga.state == "running")).one()
        assert (saga.input, saga.steps[0].cmd, saga.steps[0].saga) == ({"a": [1, None]}, {"b": 2}, saga)
        assert saga.started_at.utcoffset() is not None
        assert session.get(SagaStep, (1, 0)) is saga.steps[0]


def test_a_scoped_session_is_joined(engine: Engine) -> None:
    session = scoped_session(sessionmaker(engine))
    SagaLog(session).start_saga(1, "s", None)
    session.rollback()
    session.remove()
    assert SagaLog(engine).counts() == {}


def test_an_async_sessions_objects_are_not_stale(migrated_url: str) -> None:
    url = migrated_url.replace("sqlite:", "sqlite+aiosqlite:")

    async def main() -> None:
        engine = create_async_engine(url)
        async with AsyncSession(engine) as session:
            log = AsyncSagaLog(session)
            await log.start_saga(1, "s", None)
            saga = (await session.scalars(select(Saga).options(selectinload(Saga.steps)))).one()
            await log.start_step(1, 0, "c", None)
            assert [step.state for step in saga.steps] == ["pending"]
            await log.finish_step(1, 0, [1])
            assert [step.state for step in saga.steps] == ["succeeded"]
            await session.rollback()
        assert await AsyncSagaLog(engine).counts() == {}
        await engine.dispose()

    asyncio.run(main())


def test_an_autocommit_connection_is_refused(migrated_url: str) -> None:
    engine = create_engine(migrated_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, pytest.raises(UnusableBind):
        SagaLog(connection).start_saga(1, "s", None)
    plain = create_engine(migrated_url)
    with plain.connect() as connection, pytest.raises(UnusableBind):
        SagaLog(connection.execution_options(isolation_level="AUTOCOMMIT")).start_saga(1, "s", None)
    log = SagaLog(engine)
    log.start_saga(2, "s", None)
    assert log.counts() == {"running": 1}
    engine.dispose()
    plain.dispose()


def test_on_a_hooked_engine_a_rollback_takes_everything(sqlite_path: Path) -> None:
    engine = hooked(f"sqlite:///{sqlite_path}")
    with Session(engine) as session:
        log = SagaLog(session)
        log.start_saga(1, "s", None)
        session.rollback()
    with Session(engine) as session:
        SagaLog(session).start_saga(2, "s", None)
        session.commit()
    assert SagaLog(engine).find()[0].saga_id == 2
    assert SagaLog(engine).counts() == {"running": 1}
    engine.dispose()


@pytest.mark.parametrize(
    "bind", [None, "sqlite://", object(), sessionmaker()], ids=["None", "str", "object", "factory"]
)
def test_something_else_is_no_bind(bind: Any) -> None:
    with pytest.raises(UnusableBind):
        SagaLog(bind)
    with pytest.raises(UnusableBind):
        AsyncSagaLog(bind)


def test_an_async_bind_is_told_to_use_the_async_face() -> None:
    engine: Any = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(UnusableBind, match="AsyncSagaLog"):
        SagaLog(engine)


def test_a_url_of_an_async_driver_is_told_to_use_the_async_face() -> None:
    with pytest.raises(UnusableBind, match=r"postgresql\+asyncpg is an async driver.*AsyncSagaLog"):
        SagaLog.open("postgresql+asyncpg://nobody@localhost:1/shop")


def test_a_transaction_that_sqlite_rolled_back_by_itself_cannot_be_half_committed(sqlite_path: Path) -> None:
    engine = create_engine(f"sqlite:///{sqlite_path}")

    @event.listens_for(engine, "connect")
    def _small(connection: Any, record: Any) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 4}")

    SagaLog(engine).start_saga(1, "s", None)
    with engine.connect() as connection:
        log = SagaLog(connection)
        log.start_step(1, 0, "c", None)
        with pytest.raises(LogUnavailable, match="full"):
            log.finish_step(1, 0, "x" * 200_000)
        full = connection.connection.driver_connection if not connection.invalidated else None
        if full is not None and full.in_transaction:
            connection.commit()  # the statement alone was undone: what came before may be kept
            expected = 1
        else:
            with pytest.raises(Exception, match="invalid"):
                connection.execute(text("SELECT 1"))
            expected = 0
    assert len(SagaLog(engine).get(1).steps) == expected
    engine.dispose()


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_snapshot_older_than_a_started_step_cannot_end_the_saga(postgres_url: str, level: Any) -> None:
    engine = create_engine(postgres_url)
    log = SagaLog(engine)
    log.start_saga(1, "s", None)
    with engine.connect().execution_options(isolation_level=level) as connection:
        mine = SagaLog(connection)
        assert mine.get(1).steps == ()
        log.start_step(1, 0, "c", None)
        with pytest.raises(UnusableBind, match=level):
            mine.terminate(1, SagaOutcome.completed())
        mine.terminate(1, SagaOutcome.failed("f"))
        connection.commit()
    assert log.get(1).state == "failed"
    strict = create_engine(postgres_url, isolation_level=level)
    SagaLog(strict).fail_step(1, 0, "r")
    SagaLog(strict).terminate(1, SagaOutcome.compensated("r"))
    engine.dispose()
    strict.dispose()
