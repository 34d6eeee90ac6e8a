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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import alembic.op
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from sagalog.errors import UnusableBind
from sagalog.log.bind import forget_verified, in_driver_transaction, name_of, read_found, take_write_lock
from sagalog.migrations.adopt import check_shape, complete_indexes, found_tables
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
        _take_lock(bind, placement, own=False)
        _adopt(bind, placement)
        yield bind
        forget_verified(bind.dialect)
        return
    level = {} if bind.dialect.name == "sqlite" else {"isolation_level": "READ COMMITTED"}
    with bind.connect().execution_options(**level) as connection, connection.begin():
        _take_lock(connection, placement, own=True)
        _adopt(connection, placement)
        yield connection
    forget_verified(bind.dialect)


def _take_lock(connection: Connection, placement: Placement, *, own: bool) -> None:
    if connection.dialect.name == "postgresql":
        # At READ COMMITTED each later statement sees what the one before us committed.
        number = zlib.crc32(f"sagalog:{placement.schema or ''}:{placement.prefix}".encode())
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})
        return
    dbapi: Any = connection.connection
    if getattr(dbapi.driver_connection, "autocommit", None) is True:
        raise UnusableBind(
            "migrating",
            "the engine commits every statement by itself",
            hint="Migrate with an engine that is not in autocommit mode: a migration must be all or nothing.",
        )
    cursor = dbapi.cursor()
    try:
        if in_driver_transaction(dbapi):
            if not own:
                return
            cursor.execute("ROLLBACK")  # a host's begin hook sent a plain BEGIN, which takes no lock
        take_write_lock(dbapi, cursor, time.sleep)
    finally:
        cursor.close()


def _adopt(connection: Connection, placement: Placement) -> None:
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


def run(connection: Connection, placement: Placement, steps: Callable[[ScriptDirectory, Any], Any]) -> None:
    """Run the scripts that `steps` chooses, and leave a host's own `alembic.op` as it was.

    Args:
        connection: In a transaction of `transaction`.
        placement: Where the tables are.
        steps: From the scripts and the current revision to what is to be run.
    """
    directory = scripts()
    opts = {**options(placement), "fn": lambda revision, context: steps(directory, revision)}
    context = MigrationContext.configure(connection, opts=opts)
    with keeping_hosts_op(), Operations.context(context):
        context.run_migrations()


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
