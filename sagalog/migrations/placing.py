"""What the scripts share: operations at the placement of the tables, on either database."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from sagalog.placement import Placement


def placement() -> Placement:
    """Where the tables that are being migrated are."""
    placed_at: Placement = op.get_context().opts.get("sagalog_placement") or Placement()
    return placed_at


def on_postgres() -> bool:
    """Whether the migration runs on Postgres."""
    return op.get_context().dialect.name == "postgresql"


def stored_integer() -> sa.types.TypeEngine[int]:
    """A 64-bit integer: INTEGER on SQLite, BIGINT on Postgres."""
    return sa.BigInteger() if on_postgres() else sa.Integer()


def placed(name: str) -> str:
    """A table's name, with schema and prefix, for SQL text."""
    schema, prefix = placement()
    quote = op.get_context().dialect.identifier_preparer.quote
    table = str(quote(prefix + name))
    return f"{quote(schema)}.{table}" if schema else table


def create_index(name: str, table: str, *columns: Any, unique: bool = False, where: str | None = None) -> None:
    """Create an index, its predicate in the very words that the queries use."""
    schema, prefix = placement()
    condition: dict[str, Any] = (
        {} if where is None else {"sqlite_where": sa.text(where), "postgresql_where": sa.text(where)}
    )
    op.create_index(prefix + name, prefix + table, list(columns), unique=unique, schema=schema, **condition)


def drop_index(name: str, table: str) -> None:
    """Drop an index."""
    schema, prefix = placement()
    op.drop_index(prefix + name, prefix + table, schema=schema)


def add_columns(table: str, *columns: sa.Column[Any]) -> None:
    """Add columns; on SQLite too this rebuilds nothing."""
    schema, prefix = placement()
    for column in columns:
        op.add_column(prefix + table, column, schema=schema)


def drop_columns(table: str, *names: str) -> None:
    """Drop columns; SQLite rewrites the table's rows in place, keeping triggers and references."""
    for name in names:
        quote = op.get_context().dialect.identifier_preparer.quote
        op.execute(f"ALTER TABLE {placed(table)} DROP COLUMN {quote(name)}")
