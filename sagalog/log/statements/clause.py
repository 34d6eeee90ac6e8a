"""One SQL statement: a Core clause, its ready text for drivers' own cursors, and the parts it is made of.

Statements speak stored values (integers, JSON text), so that the compiled text
needs no processors and runs on a driver's own cursor as well as through Core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import Any, TypeAlias

from sqlalchemy import BigInteger, ColumnElement, Executable, Integer, Text, bindparam, literal_column
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

BIGINT = BigInteger()
_INTEGER = Integer()
TEXT = Text()

_BINDS: Mapping[str, TypeEngine[Any]] = {
    "id_": BIGINT, "index_": _INTEGER, "at_": BIGINT, "epoch_": BIGINT, "until_": BIGINT, "since_": BIGINT,
    "before_": BIGINT, "limit_": BIGINT, "skip_": BIGINT, "deadline_": BIGINT, "seen_": BIGINT, "run_at_": BIGINT,
    "lease_": BIGINT, "version_": _INTEGER, "given_": _INTEGER, "undo_": _INTEGER,
}  # fmt: skip


def bind(name: str) -> Any:
    """A parameter of the stored type."""
    return bindparam(name, type_=_BINDS.get(name, TEXT))


Ready: TypeAlias = tuple[str, Callable[[dict[str, Any]], Any]]
"""SQL text for a driver's cursor, and what puts named values into the form that the text wants."""


@lru_cache(maxsize=1)
def _sqlite_dialect() -> Dialect:
    from sqlalchemy.dialects import sqlite

    return sqlite.dialect(paramstyle="qmark")


def insert_into(into: Any) -> Any:
    """An INSERT that knows ON CONFLICT, on either database."""
    # Loaded when the statements are made: the dialect costs as much to import as the rest of sagalog.
    from sqlalchemy.dialects.postgresql import insert

    return insert(into)


class Statement:
    """A Core clause, and its ready text for drivers' own cursors."""

    __slots__ = ("_ready", "clause", "sqlite")

    def __init__(self, clause: Executable) -> None:
        self.clause = clause
        self.sqlite = _ready(clause, _sqlite_dialect())
        self._ready: dict[str, Ready] = {}

    def ready(self, dialect: Dialect) -> Ready:
        """The text for a Postgres driver; compiled once for each."""
        made = self._ready.get(dialect.driver)
        if made is None:
            made = self._ready[dialect.driver] = _ready(self.clause, _positional(dialect))
        return made


def _positional(dialect: Dialect) -> Dialect:
    """One of the kind whose parameters have places: a driver puts named ones in order each time."""
    kind: Any = type(dialect)
    return dialect if dialect.positional else kind(paramstyle="format")


def _ready(clause: Executable, dialect: Dialect) -> Ready:
    compiled: Any = clause.compile(dialect=dialect)  # type: ignore[attr-defined]
    if compiled._bind_processors:
        raise TypeError(f"these values would need SQLAlchemy's processors: {sorted(compiled._bind_processors)}")
    fixed = {name: value for name, value in compiled.params.items() if value is not None}
    order: list[str] = compiled.positiontup
    if len(order) == 1 and not fixed:
        only = order[0]
        return str(compiled), lambda values: (values[only],)
    if fixed or not order:  # SQLite writes LIMIT as LIMIT ? OFFSET 0
        return str(compiled), lambda values: tuple({**fixed, **values}[name] for name in order)
    return str(compiled), itemgetter(*order)


def literal(word: str) -> ColumnElement[str]:
    """A word of ours, written into the SQL."""
    return literal_column(f"'{word}'", TEXT)


def one_of(states: Iterable[str], of: Any) -> ColumnElement[bool]:
    """`of IN (...)`, in the order of the partial indexes' own predicates: a bound list would scan the table."""
    held: ColumnElement[bool] = of.in_([literal(state) for state in states])
    return held


class DatabaseNow(FunctionElement[int]):
    """The database's clock, in Unix milliseconds; not the moment at which a transaction began."""

    type = BigInteger()
    inherit_cache = True


@compiles(DatabaseNow)
def _on_sqlite(element: DatabaseNow, compiler: Any, **options: Any) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER)"


@compiles(DatabaseNow, "postgresql")
def _on_postgres(element: DatabaseNow, compiler: Any, **options: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"


class Greater(FunctionElement[int]):
    """The greater of two integers."""

    type = BigInteger()
    inherit_cache = True


@compiles(Greater)
def _greater_on_sqlite(element: Greater, compiler: Any, **options: Any) -> str:
    return f"max({compiler.process(element.clauses, **options)})"


@compiles(Greater, "postgresql")
def _greater_on_postgres(element: Greater, compiler: Any, **options: Any) -> str:
    return f"greatest({compiler.process(element.clauses, **options)})"
