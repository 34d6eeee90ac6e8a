"""In-memory databases: the migrations run once a process, and every new database is a copy of the result."""

from __future__ import annotations

import atexit
import os
import sqlite3
import threading

from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

_lock = threading.Lock()
_template: tuple[int, sqlite3.Connection] | None = None


def fill_migrated(connection: sqlite3.Connection) -> None:
    """Copy a migrated, empty log into a new in-memory database.

    Args:
        connection: Of the standard library, on an empty database.
    """
    global _template
    with _lock:
        if _template is None or _template[0] != os.getpid():
            from sagalog import migrations

            made = sqlite3.connect(":memory:", check_same_thread=False)
            migrations.upgrade(create_engine("sqlite://", creator=lambda: made, poolclass=StaticPool))
            _template = (os.getpid(), made)
            atexit.register(made.close)
        # Not by serialize and deserialize: they would take the connection out of the database that others know by name.
        _template[1].backup(connection)
