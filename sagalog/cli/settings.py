"""Which database is meant: the options before the command, else the environment, else pyproject.toml."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from sagalog.cli.usage import bad_usage

_KEYS = ("url", "schema", "prefix", "app")


@dataclass(frozen=True)
class Settings:
    """What stands before the command.

    Attributes:
        url: A SQLAlchemy URL, or the path of a SQLite file.
        schema: The schema of the tables (Postgres).
        prefix: What the tables' names begin with.
        app: The application's coordinator, as module:name.
        output: The form of the output that was asked for before the command.
        typed: The options as they were typed, to be repeated in a command that is proposed.
    """

    url: str | None
    schema: str | None
    prefix: str
    app: str | None = None
    output: str | None = None
    typed: tuple[tuple[str, str], ...] = ()

    @property
    def placement(self) -> dict[str, Any]:
        """The arguments of `SagaLog` and of the migrations for where the tables are."""
        return {"schema": self.schema, "prefix": self.prefix}

    def command(self, *words: object) -> str:
        """A command line to type next, on the same database; a password in it is hidden."""
        typed = [
            part for option, value in self.typed for part in (option, _shown(value) if option == "--url" else value)
        ]
        return shlex.join(["sagalog", *typed, *map(str, words)])


def _shown(url: str) -> str:
    if "://" not in url:
        return url
    from sqlalchemy import make_url

    from sagalog.urls import shown_url

    return shown_url(make_url(url))


def settings_of(context: typer.Context) -> Settings:
    """What was given before the command."""
    found = context.find_object(Settings)
    if found is None:
        raise RuntimeError("the command was run without the application")
    return found


def read_settings(url: str | None, schema: str | None, prefix: str | None, app: str | None) -> Settings:
    """Complete what was typed, or stood in the environment, by `[tool.sagalog]` of this folder's pyproject.toml."""
    written = _from_pyproject(Path("pyproject.toml")) if None in (url, schema, prefix, app) else {}
    return Settings(
        url=url or written.get("url"),
        schema=schema if schema is not None else written.get("schema"),
        prefix=prefix if prefix is not None else written.get("prefix", ""),
        app=app or written.get("app"),
    )


def _from_pyproject(path: Path) -> dict[str, str]:
    import tomllib

    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("sagalog", {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise bad_usage(f"{path} cannot be read: {error}.") from None
    except AttributeError:
        table = None
    if not isinstance(table, dict):
        raise bad_usage(f"[tool.sagalog] in {path} is no table.")
    for key in _KEYS:
        if not isinstance(table.get(key, ""), str):
            raise bad_usage(f"{key} of [tool.sagalog] in {path} is no string.")
    return {key: table[key] for key in _KEYS if key in table}
