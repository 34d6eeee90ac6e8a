"""Taking over the tables of the earlier program, which recorded no revision.

Their shape is checked first: exactly that of `sagalog_0001`, or they are
somebody else's and stay untouched.
"""

from __future__ import annotations

from sqlalchemy import Connection, inspect

from sagalog.errors import NotASagaLog
from sagalog.placement import Placement

_SAGA = {
    "saga_id": ("INTEGER", True), "name": ("TEXT", True), "state": ("TEXT", True), "started_at": ("INTEGER", True),
    "terminal_at": ("INTEGER", False), "failure_reason": ("TEXT", False), "input_json": ("TEXT", True),
}  # fmt: skip
_STEP = {
    "saga_id": ("INTEGER", True), "step_index": ("INTEGER", True), "name": ("TEXT", True), "state": ("TEXT", True),
    "cmd_json": ("TEXT", True), "output_json": ("TEXT", False), "started_at": ("INTEGER", True),
    "ended_at": ("INTEGER", False),
}  # fmt: skip
_SHAPES = {"saga": (_SAGA, ["saga_id"]), "saga_step": (_STEP, ["saga_id", "step_index"])}
_LATER = ("saga_executor", "saga_audit", "sagalog_meta")
TABLES = (*_SHAPES, *_LATER)
_INDEXES = {
    "saga_state_idx": ("state", " WHERE state IN ('running', 'compensating')"),
    "saga_terminal_idx": ("terminal_at", ""),
}


def found_tables(connection: Connection, placement: Placement) -> list[str]:
    """The log's tables that are there, by their names without the prefix."""
    there = set(inspect(connection).get_table_names(schema=placement.schema))
    return [name for name in TABLES if placement.prefix + name in there]


def check_shape(connection: Connection, placement: Placement, tables: list[str], database: str) -> None:
    """See that unversioned tables are those of the earlier program.

    Raises:
        NotASagaLog: A table or column is missing, has another type or key, or is one too many.
    """
    looking = inspect(connection)
    problems = [f"table {placement.prefix}{name} is missing" for name in _SHAPES if name not in tables]
    problems += [f"table {placement.prefix}{name} is there" for name in tables if name in _LATER]
    for name, (shape, key) in _SHAPES.items():
        if name not in tables:
            continue
        table = placement.prefix + name
        found = {column["name"]: column for column in looking.get_columns(table, schema=placement.schema)}
        problems += [f"column {table}.{column} is missing" for column in shape if column not in found]
        problems += [f"column {table}.{column} is not sagalog's" for column in found if column not in shape]
        if looking.get_pk_constraint(table, schema=placement.schema)["constrained_columns"] != key:
            problems.append(f"the primary key of {table} is not ({', '.join(key)})")
        for column, (kind, required) in shape.items():
            if column not in found:
                continue
            declared = str(found[column]["type"]).upper().replace("BIGINT", "INTEGER")
            if declared != kind:
                problems.append(f"column {table}.{column} is {declared}, not {kind}")
            # SQLite reports a key column without NOT NULL as nullable, though the rowid never is.
            if required and found[column]["nullable"] and column not in key:
                problems.append(f"column {table}.{column} may be NULL")
    if problems:
        raise NotASagaLog(
            f"adopting the tables in {database}",
            "they are not those of a saga log: " + "; ".join(problems[:5]),
            found=problems[0],
            hint="Place sagalog's tables elsewhere with schema= or prefix=, or give it a file of its own.",
        )


def complete_indexes(connection: Connection, placement: Placement) -> None:
    """Make the indexes of `sagalog_0001` that an adopted file may lack."""
    table = f"{placement.prefix}saga"
    there = {index["name"] for index in inspect(connection).get_indexes(table, schema=placement.schema)}
    quote = connection.dialect.identifier_preparer.quote
    where = f"{quote(placement.schema)}.{quote(table)}" if placement.schema else quote(table)
    for name, (column, condition) in _INDEXES.items():
        if placement.prefix + name not in there:
            connection.exec_driver_sql(f"CREATE INDEX {quote(placement.prefix + name)} ON {where}({column}){condition}")
