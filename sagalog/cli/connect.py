"""Opening the database that is meant: never created, never migrated, unless the command says so."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.exc import DBAPIError, NoSuchModuleError, SQLAlchemyError

from sagalog import SagaLog
from sagalog.cli.settings import Settings
from sagalog.cli.usage import CommandError, bad_usage
from sagalog.files import make_file
from sagalog.urls import SECRETS, shown_url

CONNECT_SECONDS = 10
_DRIVERS = {
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+asyncpg": "postgresql+psycopg",
    "postgresql+psycopg_async": "postgresql+psycopg",
    "sqlite+aiosqlite": "sqlite",
}
_ASYNCPG_ONLY = ("async_fallback", "prepared_statement_cache_size", "prepared_statement_name_func")


def url_of(settings: Settings) -> URL:
    """The database, as a URL of a blocking driver: an application's own async URL will do.

    Raises:
        CommandError: None was given, or it cannot be read, or it is of another kind of database.
    """
    if not settings.url:
        raise bad_usage("No database: give --url URL, or set SAGALOG_URL, or url in [tool.sagalog] of pyproject.toml.")
    if "://" not in settings.url:
        return URL.create("sqlite", database=settings.url)
    try:
        url = make_url(settings.url)
    except (SQLAlchemyError, ValueError):  # its message would quote the URL, with the password
        raise bad_usage("The URL cannot be read; write it like postgresql://host/name or sqlite:///file.db.") from None
    kind = url.drivername.partition("+")[0]
    if kind not in ("sqlite", "postgres", "postgresql"):
        raise bad_usage(f"The URL is of {kind!r}; sagalog works on SQLite and on Postgres.")
    if kind == "sqlite" and url.database in (None, "", ":memory:"):
        raise bad_usage("The URL names no file, and a database in memory holds nothing for another process to see.")
    if url.drivername == "postgresql+asyncpg":
        kept = url.difference_update_query(_ASYNCPG_ONLY).query
        url = url.set(query={("sslmode" if key == "ssl" else key): value for key, value in kept.items()})
    return url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))


def file_of(url: URL) -> Path | None:
    """The SQLite file; None for Postgres, and for a `file:` URI of SQLite's own."""
    on_file = url.get_backend_name() == "sqlite" and not (url.database or "").startswith("file:")
    return Path(url.database or "") if on_file else None


@contextmanager
def opened_engine(settings: Settings, *, writing: bool = False) -> Iterator[Engine]:
    """An engine on an existing database; a server answered already.

    Args:
        settings: Which database.
        writing: Whether the command may write; otherwise SQLite itself refuses every write.

    Raises:
        CommandError: There is no such file, or the server cannot be reached.
    """
    url = url_of(settings)
    file = file_of(url)
    if file is not None and not file.exists():
        make = settings.command("upgrade")
        raise CommandError(f"There is no file {file}, and nothing was created; `{make}` makes a new log.")
    engine = _engine(url, file, writing=writing)
    try:
        if file is None:
            _see_that_it_answers(engine)
        yield engine
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise CommandError(f"{shown_url(url)} gave up: {_reason(url, error)}.") from None
    finally:
        engine.dispose()


@contextmanager
def opened_log(settings: Settings, *, writing: bool = False) -> Iterator[SagaLog]:
    """A log on an existing database; see `opened_engine`."""
    with opened_engine(settings, writing=writing) as engine:
        yield log_on(engine, settings)


def log_on(engine: Engine, settings: Settings) -> SagaLog:
    """The log on an engine; its first operation sees whether the schema fits."""
    return SagaLog(engine, **settings.placement)


def make_missing_file(settings: Settings) -> None:
    """For `upgrade`: make the SQLite file if it is not there.

    One that is made stays, empty, if the upgrade then fails: another process may be at work on it already.

    Raises:
        CommandError: It cannot be made.
    """
    file = file_of(url_of(settings))
    if file is None or file.exists():
        return
    try:
        make_file(file)
    except FileExistsError:
        pass  # another process made it just now
    except (OSError, sqlite3.Error) as error:
        raise CommandError(f"The file {file} cannot be made: {getattr(error, 'strerror', None) or error}.") from None


def _engine(url: URL, file: Path | None, *, writing: bool) -> Engine:
    options: dict[str, Any] = {}
    if file is not None:
        options["creator"] = lambda: _connect(file, writing=writing)
    elif url.get_backend_name() == "postgresql":
        options["connect_args"] = {"connect_timeout": CONNECT_SECONDS, "application_name": "sagalog"}
        options["connect_args"] = {key: value for key, value in options["connect_args"].items() if key not in url.query}
    try:
        return create_engine(url, **options)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        extra = ' Install it: pip install "sagalog[postgres]"' if "psycopg" in str(error) else ""
        raise bad_usage(f"The driver of {shown_url(url)} is not installed: {error}.{extra}") from None


def _connect(file: Path, *, writing: bool) -> sqlite3.Connection:
    # mode=rw: what is not there is not made. The write-ahead log's side files are cleared away again at the end, as
    # a connection in mode=ro could not.
    connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=5.0, check_same_thread=False)
    for pragma in ("foreign_keys = ON", "synchronous = FULL", f"query_only = {'OFF' if writing else 'ON'}"):
        connection.execute(f"PRAGMA {pragma}").close()
    return connection


def _see_that_it_answers(engine: Engine) -> None:
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1").fetchall()
    except DBAPIError as error:
        raise CommandError(f"{shown_url(engine.url)} cannot be reached: {_reason(engine.url, error)}.") from None


def _reason(url: URL, error: Exception) -> str:
    """The first line of what the driver said, without secrets."""
    original = getattr(error, "orig", None) or error
    reason, *_ = [*str(original).strip().splitlines(), type(original).__name__]
    for secret in (url.password, *(url.query.get(key) for key in SECRETS)):
        if isinstance(secret, str) and secret:
            reason = reason.replace(secret, "***")
    return reason.rstrip(".")
