"""Where the tables of a log are."""

from __future__ import annotations

from typing import NamedTuple


class Placement(NamedTuple):
    """Where the tables are: a schema (Postgres) and a prefix of every name."""

    schema: str | None = None
    prefix: str = ""
