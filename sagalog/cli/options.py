"""Options that several commands share, and the question before an action."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Callable
from typing import Annotated, TypeAlias

import typer

from sagalog.cli.output import Form
from sagalog.cli.text import harmless, read_duration, read_moment
from sagalog.cli.usage import CommandError, bad_usage
from sagalog.schema import REVISIONS

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON; the same as --output json.")]
Output: TypeAlias = Annotated[
    Form | None, typer.Option("--output", help="A table for people, JSON, or JSON with one object a line.")
]
SagaId: TypeAlias = Annotated[int, typer.Argument(metavar="ID", min=1, help="The saga's id.")]
StepIndex: TypeAlias = Annotated[int, typer.Argument(metavar="INDEX", min=0, help="The step's place in it, from 0.")]


def _not_empty(value: str) -> str:
    if not value.strip():
        raise typer.BadParameter("it is empty")
    return value


Note: TypeAlias = Annotated[
    str, typer.Option("--note", metavar="TEXT", callback=_not_empty, help="Why; it stays in the audit.")
]


def _os_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without a name
        return f"uid {os.getuid()}" if hasattr(os, "getuid") else "unknown"


Actor: TypeAlias = Annotated[
    str,
    typer.Option(
        "--actor",
        metavar="NAME",
        default_factory=_os_user,
        callback=_not_empty,
        show_default="the user of the operating system",
        help="Who says so; it stays in the audit.",
    ),
]
Yes: TypeAlias = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; needed where nobody can answer.")]


def ask(question: str, *, yes: bool) -> None:
    """Ask before an action, unless `--yes`.

    Args:
        question: What is about to be done.
        yes: Whether the answer was given beforehand.

    Raises:
        CommandError: Nobody can be asked (exit status 2), or the answer is no (1).
    """
    if yes:
        return
    question = harmless(question)
    if not sys.stdin.isatty():
        raise bad_usage(f"{question} Nobody can answer here: add --yes to do it without asking.")
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        agreed = False
    if not agreed:
        raise CommandError("The answer was not yes. Nothing was changed.")


def moment(value: str | None) -> object:
    """An option that names a moment, as a datetime."""
    return None if value is None else _read(read_moment, value)


def duration(value: str | None) -> object:
    """An option that names a duration, as a timedelta."""
    return None if value is None else _read(read_duration, value)


def _read(reader: Callable[[str], object], value: str) -> object:
    try:
        return reader(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def revision(value: str | None) -> str | None:
    """An option that names a revision of sagalog's, "base" or "head"."""
    known = ("base", "head", *REVISIONS)
    if value not in (None, *known):
        raise typer.BadParameter(f"there is no revision {value!r}; known: {', '.join(known)}")
    return value
