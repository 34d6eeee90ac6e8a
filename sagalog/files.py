"""A SQLite file of the log's own, as it is made."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress

PAGE_BYTES = 2048
"""A commit writes whole pages: with SQLite's 4096 a saga of small payloads takes a fifth longer (benchmarks/log.py)."""


def make_file(path: str | os.PathLike[str]) -> None:
    """Make an empty database that only its owner may read, with small pages and in WAL mode.

    Raises:
        FileExistsError: It is there already.
        OSError: It cannot be made.
    """
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    with closing(sqlite3.connect(path)) as connection, suppress(sqlite3.OperationalError):
        # Not where another process found it at once, and is at work on it.
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}").close()
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
