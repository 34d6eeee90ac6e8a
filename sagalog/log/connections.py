"""The log's own connections to a SQLite file, or to a database in memory: one that writes, one that reads."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from typing import Final, Literal, TypeAlias
from urllib.parse import quote

from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import NullPool

from sagalog.log.bind import retry_while_busy
from sagalog.log.database import CursorDatabase
from sagalog.log.forking import leave_to_parent
from sagalog.log.statements import Statements

Durability: TypeAlias = Literal["full", "normal"]
_JOURNAL_LIMIT = 64 * 1024 * 1024
CHECKPOINT_AFTER: Final = 2000
"""Pages of the write-ahead log: as many bytes as SQLite's own 1000 are, of a file whose pages are twice as large."""
CHECKPOINT_BESIDE: Final = 8 * CHECKPOINT_AFTER
"""The same of a connection beside another one that writes: until SQLite 3.51.3 a checkpoint could lose commits if two
connections of a process made one at once."""


def file_uri(path: str) -> str:
    """What SQLite opens for reading and writing, and does not create."""
    return f"file:{quote(os.path.abspath(path))}?mode=rw"


def file_engine(path: str) -> Engine:
    """An engine on the file, with a new connection each time."""
    uri = file_uri(path)

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(uri, uri=True, timeout=5.0, check_same_thread=False)

    return create_engine("sqlite://", creator=connect, poolclass=NullPool)


class Connections:
    """Opened when first needed, and anew after a fault.

    Args:
        path: The file, or None for a database in memory.
        sql: The statements.
        durability: "full" or "normal", SQLite's synchronous.
        fill: Fills a new in-memory connection.
        checkpoint_after: Pages of the write-ahead log after which a commit moves them into the file.

    Attributes:
        writer: The connection that writes; None until it is needed.
        database: Over the writer.
    """

    database: CursorDatabase

    def __init__(
        self,
        path: str | None,
        sql: Statements,
        durability: Durability,
        fill: Callable[[sqlite3.Connection], None] | None,
        checkpoint_after: int,
    ) -> None:
        self.path = path
        self._checkpoint_after = checkpoint_after
        self._sql = sql
        self._synchronous = {"full": "FULL", "normal": "NORMAL"}[durability]
        self.writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        if fill is not None:
            self.writer = self._prepared(sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None))
            fill(self.writer)
            self.open_database()

    def _prepared(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        for pragma in (
            "foreign_keys = ON",
            "temp_store = MEMORY",
            f"synchronous = {self._synchronous}",
            f"journal_size_limit = {_JOURNAL_LIMIT}",
            f"wal_autocheckpoint = {self._checkpoint_after}",
        ):
            connection.execute(f"PRAGMA {pragma}").close()
        return connection

    def _connect(self, timeout: float) -> sqlite3.Connection:
        # mode=rw: a file that was deleted under the log is an error, not an empty new one.
        assert self.path is not None
        connection = sqlite3.connect(
            file_uri(self.path),
            uri=True,
            timeout=timeout,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
        try:
            return self._prepared(connection)
        except BaseException:
            connection.close()
            raise

    def open_database(self, seconds: float = 0.0) -> CursorDatabase:
        """The database to write to.

        Args:
            seconds: How long to wait for a process that recovers the file after a crash, or is the last to close it.
        """
        if self.writer is None:
            if self.path is None:
                raise sqlite3.ProgrammingError("the database in memory is gone")
            # Its own busy handler starves among many writers: `retry_while_busy` waits instead, here and later.
            self.writer = retry_while_busy(lambda: self._connect(0), seconds, time.sleep)
        self.database = CursorDatabase(self.writer.cursor(), self._sql)
        return self.database

    def reader(self, timeout: float) -> sqlite3.Connection:
        """The connection that reads: it waits for no writer, and sees what is committed."""
        if self._reader is None:
            self._reader = self._connect(timeout)
        return self._reader

    def roll_back(self) -> None:
        """Undo what the writer has begun, if anything."""
        try:
            if self.writer is not None and self.writer.in_transaction:
                self.writer.execute("ROLLBACK").close()
        except sqlite3.Error:
            self.give_up_writer()

    def give_up_writer(self) -> None:
        """After a fault: the next operation opens the file anew, and sees what is really in it."""
        if self.path is not None and self.writer is not None:
            writer, self.writer = self.writer, None
            with contextlib.suppress(sqlite3.Error):
                writer.close()

    def give_up_reader(self) -> None:
        """After a fault of a read."""
        reader, self._reader = self._reader, None
        if reader is not None:
            with contextlib.suppress(sqlite3.Error):
                reader.close()

    def close_writer(self) -> None:
        """At the end of the log."""
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()

    def close_reader(self) -> None:
        """At the end of the log."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def leave_to_parent(self) -> None:
        """In a forked child: new ones."""
        leave_to_parent(self.writer, self._reader)
        if self.path is not None:
            self.writer = None
        self._reader = None
