"""The tables of the earlier program, which recorded no revision, and how they are told from somebody else's."""

from __future__ import annotations

from sqlalchemy import Connection, inspect

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


def found_tables(connection: Connection, placement: Placement) -> list[str]:
    """The log's tables that are there, by their names without the prefix."""
    there = set(inspect(connection).get_table_names(schema=placement.schema))
    return [name for name in TABLES if placement.prefix + name in there]


def strange_in(connection: Connection, placement: Placement, tables: list[str]) -> list[str]:
    """What tells unversioned tables from those of the earlier program, whose shape is exactly that of `sagalog_0001`.

    A table or column that is missing, has another type or key, or is one too many.
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
    return problems
