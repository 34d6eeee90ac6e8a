"""Who opens a `Database` for an operation, and what happens to its transaction."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, column, inspect, select, table
from sqlalchemy.engine import Dialect

from sagalog.earlier import found_tables, strange_in
from sagalog.errors import UnusableBind
from sagalog.log.database import Operation
from sagalog.log.faults import SQLITE_BUSY, sqlite_code
from sagalog.log.statements import Statements
from sagalog.placement import Placement
from sagalog.schema import VERSION_TABLE, Found, verify
from sagalog.urls import shown_url

R = TypeVar("R")


class Bind(Protocol):
    """Runs operations in transactions."""

    def perform(self, operation: Operation[R]) -> R:
        """Run one operation, in a transaction of its own or in the caller's."""
        ...

    def unit_of_work(self) -> AbstractContextManager[Bind]:
        """One transaction for several operations."""
        ...

    def close(self) -> None:
        """Give back what the bind itself opened."""
        ...


def read_found(connection: Connection, placement: Placement) -> Found:
    """What a database says of its saga log; it writes nothing and fails on no missing table."""
    looking = inspect(connection)
    schema, prefix = placement
    if not looking.has_table(prefix + VERSION_TABLE, schema=schema):
        tables = found_tables(connection, placement)
        if not {"saga", "saga_step"}.intersection(tables):
            return Found(None)
        return Found(None, unversioned_tables=True, strange=tuple(strange_in(connection, placement, tables)))

    version = table(prefix + VERSION_TABLE, column("version_num"), schema=schema)
    revisions = connection.execute(select(version.c.version_num)).scalars().all()
    oldest = None
    if looking.has_table(prefix + "sagalog_meta", schema=schema):
        meta = table(prefix + "sagalog_meta", column("name"), column("value"), schema=schema)
        oldest = connection.execute(select(meta.c.value).where(meta.c.name == "oldest_revision")).scalar()
    return Found(", ".join(sorted(revisions)) or None, oldest)


_verified: WeakKeyDictionary[Dialect, set[Placement]] = WeakKeyDictionary()


def verified_on(dialect: Dialect) -> set[Placement]:
    """The placements on which `verify_once` has nothing more to do; a migration empties it."""
    return _verified.setdefault(dialect, set())


def verify_once(dialect: Dialect, sql: Statements, database: str, look: Callable[[], Found]) -> None:
    """Before an engine's first statement: is the schema one that this library can work on?"""
    verified = verified_on(dialect)
    if sql.placement not in verified:
        verify(look(), database)
        verified.add(sql.placement)


def forget_verified(dialect: Dialect) -> None:
    """A migration changes what was verified."""
    verified_on(dialect).clear()


def name_of(engine: Engine) -> str:
    """A database's name for messages, the password hidden."""
    return shown_url(engine.url)


def in_driver_transaction(dbapi_connection: Any) -> bool:
    """Whether SQLite itself is in a transaction, whatever SQLAlchemy thinks."""
    return bool(dbapi_connection.driver_connection.in_transaction)


def refuse_finished(asked: str) -> UnusableBind:
    """The error of a log that is used after its end."""
    return UnusableBind(asked, "the log or unit of work is closed", found=_CLOSED, hint="Use it inside its with block.")


def is_closed(error: BaseException) -> bool:
    """Whether a log gave that error because it is closed: it gives no other any more."""
    return isinstance(error, UnusableBind) and error.found == _CLOSED


_CLOSED = "closed"


def begin_immediate(execute: Callable[[str], Any], seconds: float, sleep: Callable[[float], Any]) -> None:
    """Take SQLite's write lock, trying again at random moments until the deadline.

    SQLite's own busy handler starves: with 8 writers one may wait for ever.
    Sleeps below a millisecond would let the write-ahead log grow without bound.

    Args:
        execute: Runs SQL on a connection whose own busy timeout is 0.
        seconds: How long to try.
        sleep: Waits so many seconds.
    """
    retry_while_busy(partial(execute, "BEGIN IMMEDIATE"), seconds, sleep)


def retry_while_busy(attempt: Callable[[], R], seconds: float, sleep: Callable[[float], Any]) -> R:
    """Do what takes SQLite's write lock, again while another connection holds it, until the deadline."""
    deadline = 0.0
    while True:
        try:
            return attempt()
        except Exception as error:
            if sqlite_code(error) != SQLITE_BUSY:
                raise
            now = time.monotonic()
            deadline = deadline or now + seconds
            if now >= deadline:
                raise
            sleep(random.uniform(0.001, 0.010))


def take_write_lock(connection: Any, cursor: Any, sleep: Callable[[float], Any]) -> None:
    """Begin a writing transaction on a host's SQLite connection, within the host's own busy timeout.

    Args:
        connection: SQLAlchemy's proxy of the driver's.
        cursor: Of that connection; its busy timeout is put back.
        sleep: Waits so many seconds.
    """
    execute, info = cursor.execute, connection.info
    kept = info.get(_TIMEOUT)
    if kept is None:
        execute("PRAGMA busy_timeout")
        timeout = cursor.fetchall()[0][0]
        kept = info[_TIMEOUT] = timeout / 1000, f"PRAGMA busy_timeout = {timeout}"
    seconds, put_back = kept
    execute("PRAGMA busy_timeout = 0")
    try:
        begin_immediate(execute, seconds, sleep)
    finally:
        execute(put_back)


_TIMEOUT = "sagalog_busy_timeout"
