"""The command line, `sagalog`: what an operator does with a saga log.

`app` holds the commands together, `usage` turns errors into sentences and exit
statuses, `settings` says which database is meant, `connect` opens it, `output`
prints. One module for each group of commands: `diag`, `looking`, `show`,
`acting`, `schema`, `scripts`. They stand on the public names of `sagalog`, and load them, and
SQLAlchemy with them, only once a command runs: help has to be quick. For the
same reason a module of commands has no `from __future__ import annotations`:
Typer evaluates such strings again and again.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import NoReturn

INSTALL = 'pip install "sagalog[cli]"'


def main() -> NoReturn:
    """The script `sagalog`: run the command of `sys.argv`, and exit with its status.

    Exits with 0, with 1 for a refused or failed action, with 2 for bad usage, or without the extra `cli`.
    """
    try:
        import rich  # noqa: F401 - are both there?
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.stderr.write(f"sagalog: the command line needs {error.name}, which is not installed: {INSTALL}\n")
        sys.exit(2)

    from sagalog.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name that the terminal's encoding lacks is shown escaped
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="sagalog")
    sys.exit(0)
