"""Running the scripts inside a transaction that is right for each database.

Used by `sagalog.migrations` and by the project's own `alembic/env.py`. The
scripts run with a MigrationContext and without an env.py, so that a host's own
Alembic environment is never entered. One process migrates at a time: Postgres
by an advisory lock, SQLite by its write lock, both taken before the revision
is read.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import alembic.op
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from sagalog.earlier import found_tables
from sagalog.errors import UnusableBind
from sagalog.log.bind import forget_verified, in_driver_transaction, name_of, read_found, take_write_lock
from sagalog.log.database import Call, Kind, Operation
from sagalog.log.faults import driver_error, translate
from sagalog.migrations.adopt import check_shape, complete_indexes
from sagalog.placement import Placement
from sagalog.schema import BASE, VERSION_TABLE, Found

HERE = Path(__file__).parent
_one_at_a_time = threading.RLock()


def options(placement: Placement) -> dict[str, Any]:
    """What a MigrationContext of sagalog's scripts is configured with."""
    return {
        "version_table": placement.prefix + VERSION_TABLE,
        "version_table_schema": placement.schema,
        # Alembic's default for SQLite commits after each statement.
        "transactional_ddl": True,
        "sagalog_placement": placement,
    }


def scripts() -> ScriptDirectory:
    """The scripts that ship in the package."""
    return ScriptDirectory(str(HERE), version_locations=[str(HERE / "versions")])


@contextmanager
def transaction(bind: Engine | Connection, placement: Placement) -> Iterator[Connection]:
    """A transaction that nobody else migrates in; the tables of the earlier program are adopted at its start.

    Args:
        bind: On an Engine the transaction is committed at the end, or rolled
            back whole; a Connection's is joined and stays the caller's.
        placement: Where the tables are.
    """
    if isinstance(bind, Connection):
        if not bind.in_transaction():
            bind.begin()
        _refuse_autocommit(bind)
        with joined(bind, placement):
            adopt(bind, placement)
            yield bind
        return
    level = {} if bind.dialect.name == "sqlite" else {"isolation_level": "READ COMMITTED"}
    with bind.connect().execution_options(**level) as connection, connection.begin():
        _refuse_autocommit(connection)
        _take_lock(connection, placement, own=True)
        adopt(connection, placement)
        yield connection
    forget_verified(bind.dialect)


@contextmanager
def told(engine: Engine) -> Iterator[None]:
    """What a driver raises while migrating is told as sagalog's own error."""
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        asked: Operation[None] = Call("migrating", Kind.SEVERAL, lambda database: None)
        raise translate(error, asked, name_of(engine), committing=False) from driver_error(error)


@contextmanager
def joined(connection: Connection, placement: Placement, *, ends: bool = False) -> Iterator[None]:
    """A caller's transaction, in which nobody else migrates.

    Args:
        connection: The caller's, in what SQLAlchemy holds for a transaction.
        placement: Where the tables are.
        ends: If SQLite itself is in no transaction yet, one is begun. It ends with the
            block where the caller's statements commit one by one, else with the caller's.
    """
    began = _take_lock(connection, placement, own=False)
    try:
        yield
    except BaseException:
        if began:
            _on_driver(connection, "ROLLBACK")
        raise
    if began and ends:
        _on_driver(connection, "COMMIT")
    forget_verified(connection.dialect)


def _on_driver(connection: Connection, statement: str) -> None:
    cursor = connection.connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()


def commits_by_itself(connection: Connection) -> bool:
    """Whether the driver commits each statement and its `commit()` does nothing."""
    return getattr(connection.connection.driver_connection, "autocommit", None) is True


def _refuse_autocommit(connection: Connection) -> None:
    if connection.dialect.name == "sqlite" and commits_by_itself(connection):
        raise UnusableBind(
            "migrating",
            "the engine commits every statement by itself",
            hint="Migrate with an engine that is not in autocommit mode: a migration must be all or nothing.",
        )


def _take_lock(connection: Connection, placement: Placement, *, own: bool) -> bool:
    """Keep others from migrating; whether a transaction of SQLite's was begun for it."""
    if connection.dialect.name == "postgresql":
        # At READ COMMITTED each later statement sees what the one before us committed.
        number = zlib.crc32(f"sagalog:{placement.schema or ''}:{placement.prefix}".encode())
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})
        return False
    dbapi: Any = connection.connection
    cursor = dbapi.cursor()
    try:
        if in_driver_transaction(dbapi):
            if not own:
                return False
            cursor.execute("ROLLBACK")  # a host's begin hook sent a plain BEGIN, which takes no lock
        take_write_lock(dbapi, cursor, time.sleep)
    finally:
        cursor.close()
    return True


def adopt(connection: Connection, placement: Placement) -> None:
    """Record the revision of tables that the earlier program made; others are refused."""
    found = read_found(connection, placement)
    if found.revision is not None:
        return
    tables = found_tables(connection, placement)
    if not tables:
        return
    check_shape(connection, placement, tables, name_of(connection.engine))
    complete_indexes(connection, placement)
    context = MigrationContext.configure(connection, opts=options(placement))
    context.stamp(scripts(), BASE)


def found_in(bind: Engine | Connection, placement: Placement) -> Found:
    """What the database says of its saga log; nothing is written."""
    if isinstance(bind, Connection):
        return read_found(bind, placement)
    with bind.connect() as connection:
        return read_found(connection, placement)


class Way(NamedTuple):
    """Where a migration goes: a revision or "base", and whether that lies above."""

    to: str
    up: bool

    def steps(self, revision: Any, context: MigrationContext) -> Any:
        """What has to be run, from the revision that the tables are at."""
        return (scripts()._upgrade_revs if self.up else scripts()._downgrade_revs)(self.to, revision)


def run(connection: Connection, placement: Placement, way: Way) -> None:
    """Run scripts, and leave a host's own `alembic.op` as it was.

    Args:
        connection: In a transaction of `transaction` or `joined`.
        placement: Where the tables are.
        way: Where to.
    """
    opts = {**options(placement), "fn": way.steps}
    _run_in(MigrationContext.configure(connection, opts=opts), way)


def print_sql(host: MigrationContext, placement: Placement, start: str, way: Way) -> None:
    """Write the scripts' SQL where a host in offline mode writes its own.

    Args:
        host: The host's context, in offline mode.
        placement: Where the tables are.
        start: The revision that the tables are at, or "base".
        way: Where to.
    """
    offline = {"as_sql": True, "output_buffer": host.output_buffer, "starting_rev": start}
    opts = {**options(placement), "fn": way.steps, **offline}
    _run_in(MigrationContext.configure(dialect=host.dialect, opts=opts), way)


def _run_in(context: MigrationContext, way: Way) -> None:
    with keeping_hosts_op(), Operations.context(context):
        context.run_migrations()
        if way.to == "base":  # Alembic leaves its table behind
            context.impl.drop_table(context._version, if_exists=True)


@contextmanager
def keeping_hosts_op() -> Iterator[None]:
    """`alembic.op` is one proxy for the process: put the host's back afterwards."""
    with _one_at_a_time:
        outer = getattr(alembic.op, "_proxy", None)
        try:
            yield
        finally:
            if outer is not None:
                outer._install_proxy()
