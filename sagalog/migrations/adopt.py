"""Taking over the tables of the earlier program: exactly those of `sagalog_0001`, or they stay untouched."""

from __future__ import annotations

from sqlalchemy import Connection, inspect

from sagalog.earlier import strange_in
from sagalog.errors import NotASagaLog
from sagalog.placement import Placement

_INDEXES = {
    "saga_state_idx": ("state", " WHERE state IN ('running', 'compensating')"),
    "saga_terminal_idx": ("terminal_at", ""),
}


def check_shape(connection: Connection, placement: Placement, tables: list[str], database: str) -> None:
    """See that unversioned tables are those of the earlier program.

    Raises:
        NotASagaLog: A table or column is missing, has another type or key, or is one too many.
    """
    strange = strange_in(connection, placement, tables)
    if strange:
        raise NotASagaLog.of_strange_tables(f"adopting the tables in {database}", strange)


def complete_indexes(connection: Connection, placement: Placement) -> None:
    """Make the indexes of `sagalog_0001` that an adopted file may lack."""
    table = f"{placement.prefix}saga"
    there = {index["name"] for index in inspect(connection).get_indexes(table, schema=placement.schema)}
    quote = connection.dialect.identifier_preparer.quote
    where = f"{quote(placement.schema)}.{quote(table)}" if placement.schema else quote(table)
    for name, (column, condition) in _INDEXES.items():
        if placement.prefix + name not in there:
            connection.exec_driver_sql(f"CREATE INDEX {quote(placement.prefix + name)} ON {where}({column}){condition}")
