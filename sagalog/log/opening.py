"""From what a user gives, a bind: an engine, a session or a connection; a file's path, or a URL."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, scoped_session

from sagalog.errors import UnusableBind
from sagalog.files import make_file
from sagalog.log.bind import Bind, read_found, retry_while_busy
from sagalog.log.caller import CallerBind
from sagalog.log.connections import Durability, file_engine
from sagalog.log.database import Call, Kind, Operation
from sagalog.log.engine import EngineBind
from sagalog.log.faults import driver_error, translate
from sagalog.log.file import BUSY_TIMEOUT_MS, FileBind
from sagalog.log.statements import statements_at
from sagalog.placement import Placement
from sagalog.schema import HEAD, verify


def sync_bind(bind: object, placement: Placement, sleep: Callable[[float], Any] | None = None) -> Bind:
    """The bind over a host's own; `UnusableBind` if it is nothing to write through."""
    waiting: dict[str, Any] = {} if sleep is None else {"sleep": sleep}
    if isinstance(bind, scoped_session):
        bind = bind()
    if isinstance(bind, Engine):
        return EngineBind(bind, statements_at(placement), **waiting)
    if isinstance(bind, Session | Connection):
        return CallerBind(bind, statements_at(placement), **waiting)
    kind = type(bind).__name__
    is_async = hasattr(bind, "sync_engine") or hasattr(bind, "sync_session") or kind == "async_scoped_session"
    raise UnusableBind(
        "SagaLog",
        f"a {kind} is no bind",
        found=kind,
        hint="Use AsyncSagaLog for it." if is_async else "Give an Engine, a Session or a Connection; or use open().",
    )


def sync_counterpart(bind: object) -> object:
    """What an async bind of SQLAlchemy's runs on."""
    if type(bind).__name__ == "async_scoped_session":
        bind = bind()  # type: ignore[operator]
    for name in ("sync_session", "sync_connection", "sync_engine"):
        counterpart = getattr(bind, name, None)
        if counterpart is not None:
            return counterpart
    if hasattr(bind, "sync_engine"):
        raise UnusableBind(
            "AsyncSagaLog", "the AsyncConnection is not started", hint="Use it inside `async with engine.connect()`."
        )
    kind = type(bind).__name__
    raise UnusableBind(
        "AsyncSagaLog",
        f"a {kind} is no async bind",
        found=kind,
        hint="Give an AsyncEngine, an AsyncSession or an AsyncConnection; or use open().",
    )


def located(path_or_url: str | os.PathLike[str]) -> tuple[str | None, URL | None]:
    """A SQLite file's path, or another database's URL."""
    text = os.fspath(path_or_url)
    if "://" not in text:
        return text, None
    try:
        url = make_url(text)
    except (SQLAlchemyError, ValueError):
        raise UnusableBind(
            "open", "the URL cannot be read", hint="For example postgresql+psycopg://host/name."
        ) from None
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            raise UnusableBind("open", "a URL without a file", hint="Use open_in_memory().")
        return url.database, None
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() != "postgresql":
        raise UnusableBind(
            "open", f"a URL of {url.get_backend_name()}", hint="sagalog works on SQLite and on Postgres."
        )
    return None, url


def checked_durability(durability: str) -> Durability:
    """As given; `UnusableBind` if it is none."""
    if durability == "full":
        return "full"
    if durability == "normal":
        return "normal"
    raise UnusableBind("open", f"durability {durability!r}", hint='Use "full" or "normal".')


_OPENING: Operation[None] = Call("open", Kind.READ, lambda database: None)


def prepare_schema(engine: Engine, *, migrate: bool, name: str) -> None:
    """Bring the schema to this library's revision, or see that it is; Alembic is loaded only if there is work."""
    try:
        with engine.connect() as connection:
            found = read_found(connection, Placement())
        if migrate and found.revision != HEAD:
            from sagalog import migrations

            migrations.upgrade(engine)
        else:
            verify(found, name)
    except SQLAlchemyError as error:
        raise translate(error, _OPENING, name, committing=False) from driver_error(error)


def open_file(path: str, durability: Durability, *, migrate: bool) -> FileBind:
    """A file of the log's own, made if it is missing."""
    existing = Path(path).exists()
    if not existing and migrate:
        try:
            make_file(path)
        except FileExistsError:
            pass  # another process created it just now
        except OSError as error:
            raise translate(error, _OPENING, path, committing=False) from error
    engine = file_engine(path)
    try:
        prepare_schema(engine, migrate=migrate, name=path)
        # SQLite's own busy handler does not wait for this lock: of processes that start together some would fail.
        retry_while_busy(lambda: _put_into_wal_mode(engine), BUSY_TIMEOUT_MS / 1000, time.sleep)
    except SQLAlchemyError as error:
        raise translate(error, _OPENING, path, committing=False) from driver_error(error)
    return FileBind(path, statements_at(Placement()), durability=durability)


def _put_into_wal_mode(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = WAL").fetchall()


def open_memory() -> FileBind:
    """A private database in memory."""
    from sagalog.log.memory import fill_migrated

    return FileBind(None, statements_at(Placement()), fill=fill_migrated)
