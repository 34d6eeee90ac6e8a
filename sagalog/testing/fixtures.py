"""What the fixtures are made of: a database in memory, and a user's own database made empty."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import uuid
from collections.abc import Callable
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from sqlalchemy import Connection, Engine, QueuePool, create_engine, delete, event, func, insert, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError

from sagalog import migrations
from sagalog.errors import UnusableBind
from sagalog.log.bind import name_of, verify_once
from sagalog.log.database import Call, Kind, Operation
from sagalog.log.faults import driver_error, translate
from sagalog.log.memory import fill_migrated
from sagalog.log.statements import statements_at
from sagalog.models import Models, models_at
from sagalog.placement import Placement
from sagalog.schema import HEAD, Found

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

FOR_TESTS: Final = "for_tests"
"""The fact that marks a database as one that tests may empty."""
_KEPT_FACTS: Final = ("log_id", "oldest_revision", FOR_TESTS)
_LOCK_SECONDS: Final = 10
_empty_already: WeakSet[Engine] = WeakSet()


class MemoryDatabase:
    """A migrated, empty SQLite database in memory, which lives until it is closed.

    The migrations run once in a process; each database is a copy. All engines
    of one MemoryDatabase, sync and async, see the same tables, and close it with
    their connections.
    """

    def __init__(self) -> None:
        # VFS memdb: a database with a name, which many connections use at once as they would a file. It is there while
        # one connection is open.
        name = f"file:/sagalog-{uuid.uuid4().hex}?vfs=memdb"
        self._location = f"{name}&uri=true"
        self._engines: list[Engine] = []
        self._held = sqlite3.connect(name, uri=True, check_same_thread=False)
        try:
            fill_migrated(self._held)
        except BaseException:
            self._held.close()
            raise

    def engine(self) -> Engine:
        """A new Engine on it, with foreign keys enforced."""
        engine = create_engine(f"sqlite:///{self._location}")
        self._own(engine)
        return engine

    def async_engine(self) -> AsyncEngine:
        """A new AsyncEngine on it, with foreign keys enforced; one event loop after another may use it.

        Raises:
            ImportError: The extra `asyncio` is not installed.
        """
        for needed in ("greenlet", "aiosqlite"):
            try:
                import_module(needed)
            except ImportError as error:
                raise ImportError(f"an async engine needs {needed}: pip install 'sagalog[asyncio]'") from error
        from sqlalchemy.ext.asyncio import create_async_engine

        engine = create_async_engine(f"sqlite+aiosqlite:///{self._location}")
        self._own(engine.sync_engine)
        return engine

    def _own(self, engine: Engine) -> None:
        event.listen(engine, "connect", _enforce_foreign_keys)
        # It was migrated just now: looking again, through a new engine's first connection, would double a test's cost.
        verify_once(engine.dialect, statements_at(Placement()), name_of(engine), lambda: Found(HEAD))
        _empty_already.add(engine)
        self._engines.append(engine)

    def close(self) -> None:
        """Close the engines' connections, and with the last one the database goes. Calling it again does nothing."""
        while self._engines:
            engine = self._engines.pop()
            if engine.dialect.is_async:
                if not _holds_nothing(engine):
                    _in_a_loop_of_its_own(engine.dispose)
            else:
                engine.dispose()
        self._held.close()

    def __enter__(self) -> MemoryDatabase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _holds_nothing(engine: Engine) -> bool:
    pool = engine.pool
    return isinstance(pool, QueuePool) and pool.checkedin() == 0


def _enforce_foreign_keys(connection: Any, record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _in_a_loop_of_its_own(work: Callable[[], None]) -> None:
    """Do what awaits an async driver, from sync code, whatever event loops the caller has."""
    from sqlalchemy.util import greenlet_spawn

    errors: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(greenlet_spawn(work))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="sagalog-testing")
    thread.start()
    thread.join()
    if errors:
        raise errors.pop()


def start_empty(engine: Engine | AsyncEngine, *, schema: str | None = None, prefix: str = "") -> None:
    """Bring a test database's saga log to head, and empty it; ids begin at 1 again.

    It deletes every saga. So it marks a database whose log is empty, or not
    there yet, as one for tests, and refuses one that holds sagas without that
    mark. Rows of your own that refer to sagas are yours to delete first. It
    blocks, also on an AsyncEngine.

    Args:
        engine: On the database; nobody else may use it meanwhile. Each worker of pytest-xdist needs one of its own.
        schema: The schema of the tables (Postgres), if not the default one.
        prefix: What the tables' names begin with.

    Raises:
        UnusableBind: The database holds sagas and was never one for tests; nothing was changed.
        SchemaTooNew: A newer library upgraded it.
        NotASagaLog: Tables of these names are somebody else's.
        LogUnavailable: A row of yours refers to a saga, another connection holds a lock, or the database is not there.
    """
    placement = Placement(schema, prefix)
    counterpart = getattr(engine, "sync_engine", engine)
    assert isinstance(counterpart, Engine)
    if placement == Placement() and counterpart in _empty_already:
        return
    if counterpart.dialect.is_async:
        _in_a_loop_of_its_own(lambda: _start_empty_apart(counterpart, placement))
    else:
        _start_empty(counterpart, placement)


def _start_empty_apart(engine: Engine, placement: Placement) -> None:
    if engine.dialect.name == "sqlite":
        _start_empty(engine, placement)
        return
    # A connection to a server belongs to one event loop: none of these may go into the engine's own pool.
    apart = Engine(engine.pool.recreate(), engine.dialect, engine.url)
    try:
        _start_empty(apart, placement)
    finally:
        apart.dispose()


def _start_empty(engine: Engine, placement: Placement) -> None:
    models = models_at(placement)
    try:
        with engine.connect() as connection:
            _refuse_if_in_use(connection, models, placement)
        if migrations.current(engine, schema=placement.schema, prefix=placement.prefix) != HEAD:
            migrations.upgrade(engine, schema=placement.schema, prefix=placement.prefix)
        with engine.begin() as connection:
            _empty(connection, models, placement)
    except SQLAlchemyError as error:
        asked: Operation[None] = Call("start_empty", Kind.SEVERAL, lambda database: None)
        raise translate(error, asked, name_of(engine), committing=False) from driver_error(error)


def _refuse_if_in_use(connection: Connection, models: Models, placement: Placement) -> None:
    looking = inspect(connection)
    meta, saga = models.SagalogMeta.__table__, models.Saga.__table__
    if not looking.has_table(saga.name, schema=placement.schema):
        return
    if looking.has_table(meta.name, schema=placement.schema):
        mark = select(meta.c.value).where(meta.c.name == FOR_TESTS)
        if connection.execute(mark).first() is not None:
            return
    count = connection.execute(select(func.count()).select_from(saga)).scalar_one()
    if count:
        raise UnusableBind(
            "start_empty",
            f"{name_of(connection.engine)} holds {count} sagas and was never used for tests",
            found=str(count),
            hint="Tests delete every saga: give them a database of their own, or empty this one yourself once.",
        )


def _empty(connection: Connection, models: Models, placement: Placement) -> None:
    on_postgres = connection.dialect.name == "postgresql"
    if on_postgres:
        # A transaction that an earlier test left open is told, instead of being waited for without end.
        connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'"))
    meta = models.SagalogMeta.__table__
    for table in reversed(models.metadata.sorted_tables):
        if table is not meta:
            connection.execute(delete(table))
    connection.execute(delete(meta).where(meta.c.name.not_in(_KEPT_FACTS)))
    if not connection.execute(select(meta.c.value).where(meta.c.name == FOR_TESTS)).first():
        connection.execute(insert(meta).values(name=FOR_TESTS, value="true"))
    if on_postgres:
        connection.execute(select(func.setval(statements_at(placement).id_sequence, 1, False)))  # noqa: FBT003
