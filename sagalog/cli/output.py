"""What a command prints: tables for people, JSON for programs.

Text of the database goes to a terminal as Rich `Text` of harmless characters,
never as markup; JSON is ASCII, so that it cannot steer a terminal either.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

import typer

from sagalog.cli.settings import settings_of
from sagalog.cli.text import harmless
from sagalog.cli.usage import bad_usage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

UNLIMITED_WIDTH = 10_000

STATE_STYLES = {
    "submitted": "cyan",
    "running": "blue",
    "compensating": "yellow",
    "completed": "green",
    "compensated": "green",
    "failed": "red",
    "failed_compensation": "bold red",
    "abandoned": "dim",
    "pending": "yellow",
    "succeeded": "green",
}


class Form(StrEnum):
    """The forms of output."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"


def chosen_form(as_json: bool, output: Form | None) -> Form | None:
    """The form that `--json` and `--output` ask for together; None without either."""
    if as_json and output not in (None, Form.JSON):
        raise bad_usage(f"--json and --output {output} are two forms; give one of them.")
    return Form.JSON if as_json else output


def form_of(context: typer.Context, as_json: bool = False, output: Form | None = None) -> Form:
    """The form that was asked for, after the command or before it; a table otherwise."""
    before = settings_of(context).output
    return chosen_form(as_json, output) or (Form(before) if before else Form.TABLE)


def print_json(form: Form, value: Any) -> None:
    """One document; or with `jsonl` one line, or a line for each item of a list."""
    items = value if form is Form.JSONL and isinstance(value, list) else [value]
    for item in items:
        text = (
            json.dumps(_plain(item), indent=2) if form is Form.JSON else json.dumps(_plain(item), separators=(",", ":"))
        )
        typer.echo(text)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def console(*, stderr: bool = False) -> Console:
    """Where tables go. What is no terminal gets whole lines, for `grep` and `cut`, unless COLUMNS says otherwise."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else UNLIMITED_WIDTH
    return Console(file=stream, width=wide, highlight=False, markup=False, emoji=False)


def plain(text: object, style: str = "") -> Text:
    """Text of the database for a terminal: never markup, never control."""
    from rich.text import Text

    return Text("" if text is None else harmless(text), style)


def state(name: str) -> Text:
    """A state in its colour."""
    return plain(name, STATE_STYLES.get(name, ""))


def table(*headings: str, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """A table with these headings; those named in `right` hold numbers, those in `whole` are never broken."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False, header_style="bold")
    for heading in headings:
        side: Literal["left", "right"] = "right" if heading in right else "left"
        made.add_column(heading, justify=side, overflow="fold", no_wrap=heading in (*right, *whole))
    return made


def print_lines(lines: Iterable[object]) -> None:
    """Lines for people: strings of the command's own, or `Text`."""
    out = console()
    for line in lines:
        out.print(line, soft_wrap=True)
