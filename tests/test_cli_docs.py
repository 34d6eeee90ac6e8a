"""The page docs/reference/cli.md is the command line: same commands, same options, examples that run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from cli import sagalog

from sagalog.cli.app import app

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reference" / "cli.md").read_text()
SECTIONS: dict[str, str] = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
EXAMPLES = re.findall(r"^\$ (.+)$", PAGE, flags=re.MULTILINE)


def options_of(command: Any) -> set[str]:
    return {name for param in command.params for name in param.opts if name.startswith("--")} - {"--help"}


def test_every_command_is_documented_and_no_other() -> None:
    documented = {title for title in SECTIONS if re.fullmatch("[a-z][a-z-]*", title)}
    assert documented == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_of_a_command_is_documented_and_no_other(name: str) -> None:
    rows = [line.split("|")[1] for line in SECTIONS[name].splitlines() if line.startswith("| `--")]
    documented = {option for row in rows for option in re.findall(r"`(--[a-z-]+)`", row)}
    assert documented == options_of(COMMANDS[name])


def test_the_options_before_the_command_are_documented() -> None:
    before = SECTIONS["Which database"] + SECTIONS["What is printed"]
    for option in options_of(GROUP):
        assert f"`{option}" in before, option


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_an_example_and_help(name: str) -> None:
    assert re.search(rf"sagalog (--app \S+ )?{name}", SECTIONS[name])
    assert COMMANDS[name].help
    for param in COMMANDS[name].params:
        assert getattr(param, "help", None), (name, param.name)
    shown = sagalog(name, "--help")
    assert shown.status == 0
    assert shown.out.startswith(f"Usage: sagalog {name}")


def test_the_readmes_commands_and_options_are_there() -> None:
    typed = re.findall(r"^sagalog (.+?)(?:  +#.*)?$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(typed) > 5
    for command, *words in map(shlex.split, typed):
        assert {word for word in words if word.startswith("--")} <= options_of(COMMANDS[command]), command


def test_the_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (settings,) = re.findall(r"```toml\n# pyproject.toml\n(.*?)```", PAGE, flags=re.DOTALL)
    subprocess.run([sys.executable, "-c", code], check=True)
    Path("pyproject.toml").write_text(settings)
    assert len(EXAMPLES) > 15
    for line in EXAMPLES:
        program, *words = shlex.split(line)
        assert program == "sagalog"
        done = sagalog(*words)
        assert done.status == 0, (line, done.err)
        assert done.out, line
