"""A page of the documentation, and running what it says: in its order, in one folder, by one virtual environment."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {str(path.relative_to(DOCS).with_suffix("")): path for path in sorted(DOCS.rglob("*.md"))}
INSTALLS = "it installs from the package index"
"""Why most of the blocks that a run in the checkout leaves out are left out; a run on the wheel does not."""

_FENCE = re.compile(
    r"^(?:% not run: (?P<reason>[^\n]+)\n)?```(?P<language>[\w{}-]+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
_FILE = re.compile(r"# (?P<name>[\w./-]+\.\w+)\n")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    body: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """The page's blocks that are code to run, or files for it."""
    found = [Block(match["language"], match["body"], match["reason"]) for match in _FENCE.finditer(page.read_text())]
    return [block for block in found if block.language in ("python", "console", "bash", "sh", "toml", "ini")]


INSTALLING = [name for name, page in PAGES.items() if any(block.reason == INSTALLS for block in blocks(page))]
"""The pages that begin with installing: they run on a wheel only."""


def of_a_user(**more: str) -> dict[str, str]:
    """The environment of a user, with nothing in it of the test run that asks."""
    own = ("PYTEST_", "SHOP_", "COV_", "SAGALOG_")
    return {**{name: value for name, value in os.environ.items() if not name.startswith(own)}, **more}


def run_page(page: Path, folder: Path, programs: Path, *, wheel: Path | None = None, **environment: str) -> None:
    """Run a page's examples: a block that begins with a file's name becomes that file.

    Args:
        page: The page.
        folder: Where to run it.
        programs: The folder of the virtual environment's programs.
        wheel: What `pip install sagalog` installs into that environment; without it nothing is installed.
        environment: More variables.
    """
    variables = of_a_user(**environment, PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")
    for block in blocks(page):
        named = _FILE.match(block.body)
        if block.reason is not None and not (wheel and block.reason == INSTALLS):
            continue
        if named:
            (folder / named["name"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / named["name"]).write_text(block.body)
        elif block.language == "python":
            (folder / "example.py").write_text(block.body)
            _run([str(programs / "python"), "example.py"], folder, variables)
        else:
            assert block.language == "console", f"{page}: a {block.language} block neither runs nor is a file"
            for command, shown in _commands(block.body):
                typed = on_the_wheel(command, wheel) if wheel else command
                printed = _run(["bash", "-euo", "pipefail", "-c", typed], folder, variables)
                same = doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS)
                assert same or not shown, f"$ {command}\nprints\n{printed}\nand not\n{shown}"


def on_the_wheel(command: str, wheel: Path) -> str:
    """A command in which `pip install sagalog[extras]` installs the wheel."""
    if not command.startswith("pip install "):
        return command
    return re.sub(r"(?<![\w/-])sagalog(?=$|[\[\"' ])", str(wheel), command)


def _commands(body: str) -> list[tuple[str, str]]:
    """Each command of a console block, with the output that the page shows."""
    parts = re.split(r"^\$ ", body, flags=re.MULTILINE)
    assert parts[0] == "", "a console block begins with `$ `"
    return [(command, output) for command, _, output in (part.partition("\n") for part in parts[1:])]


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
    return done.stdout
