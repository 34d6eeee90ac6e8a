"""From an error to one clear sentence on stderr, and an exit status.

0: done. 1: refused or failed. 2: bad usage. 130: interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from sagalog.cli.text import harmless
from sagalog.errors import PayloadError, SagaLogError

GLOBAL_OPTIONS = ("--url", "--schema", "--prefix", "--app")


class CommandError(Exception):
    """A command that could not be done, in words for the person who typed it."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        self.sentence = sentence
        self.status = status
        super().__init__(sentence)


def bad_usage(sentence: str) -> CommandError:
    """What was typed is not understood; the exit status is 2."""
    return CommandError(sentence, 2)


class SagalogGroup(TyperGroup):
    """The group of all commands: every error passes here and leaves as one sentence."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; what it raises is told on stderr."""
        try:
            extra["windows_expand_args"] = windows_expand_args
            status = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except CommandError as error:
            _leave(f"Error: {error.sentence}", error.status)
        except PayloadError as error:  # an argument that no log can hold
            _leave(f"Error: {error}", 2)
        except SagaLogError as error:
            _leave(f"Error: {error}", 1)
        except (typer.Abort, KeyboardInterrupt):
            _leave("Interrupted.", 130)
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            _leave(_sentence_of(error), getattr(error, "exit_code", 2))
        if not standalone_mode:
            return status
        sys.exit(status if isinstance(status, int) else 0)


def _leave(sentence: str, status: int) -> NoReturn:
    typer.echo(harmless(sentence), err=True)
    sys.exit(status)


def _sentence_of(error: Any) -> str:
    """Typer's own complaint about what was typed, on one line."""
    context = getattr(error, "ctx", None)
    message: str = error.format_message()
    if context is not None and message == context.get_help():
        typer.echo(message)
        return "Error: No command. Begin with `sagalog diag`."
    option = getattr(error, "option_name", None)
    if option in GLOBAL_OPTIONS:
        return f"Error: {option} goes before the command: sagalog {option} {option[2:].upper()} COMMAND."
    where = "" if context is None else f" Try '{context.command_path} --help'."
    ending = "" if message.endswith((".", ")", "?")) else "."
    return f"Error: {' '.join(message.split())}{ending}{where}"
