"""The filter that keeps a host's autogenerate away from sagalog's tables."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, MutableMapping
from typing import Any, TypeAlias, overload

from sqlalchemy.exc import SAWarning

from sagalog.earlier import TABLES
from sagalog.schema import VERSION_TABLE

NameFilter: TypeAlias = Callable[[str | None, str, MutableMapping[Any, str | None]], bool]
_OURS = frozenset((*TABLES, VERSION_TABLE))


@overload
def include_name(name: str | None, type_: str, parent_names: MutableMapping[Any, str | None]) -> bool: ...
@overload
def include_name(*, schema: str | None = ..., prefix: str = ...) -> NameFilter: ...
def include_name(
    name: str | None = None,
    type_: str | None = None,
    parent_names: MutableMapping[Any, str | None] | None = None,
    *,
    schema: str | None = None,
    prefix: str = "",
) -> bool | NameFilter:
    """Whether a host's autogenerate should look at a name of the database: not at sagalog's tables.

    It goes into the `context.configure` of the host's env.py as it is,
    ``include_name=include_name``, or for tables placed elsewhere as
    ``include_name=include_name(schema="sagas", prefix="app_")``. A filter of
    the host's own asks it first: ``include_name(name, type_, parent_names) and ...``.

    Args:
        name: The name found, as Alembic gives it.
        type_: What it names: "table", "column", ...
        parent_names: The names of what it is in.
        schema: The schema of sagalog's tables, if not the default one.
        prefix: What the tables' names begin with.

    Returns:
        True or False given a name, and a filter given only schema or prefix.
    """

    def included(name: str | None, type_: str, parent_names: MutableMapping[Any, str | None]) -> bool:
        if type_ != "table" or name is None or not name.startswith(prefix):
            return True
        if name.removeprefix(prefix) not in _OURS:
            return True
        # Comparing a host's table that refers to saga reflects saga too, and SQLite's part of SQLAlchemy then
        # warns of an index that it cannot reflect, which is no concern of the host's.
        warnings.filterwarnings("ignore", rf".*expression-based index {re.escape(prefix)}saga_recent_idx", SAWarning)
        # Alembic gives None for the default schema, which on Postgres is public unless somebody chose another.
        return (parent_names.get("schema_name") or "public") != (schema or "public")

    if type_ is None or parent_names is None:
        return included
    return included(name, type_, parent_names)
