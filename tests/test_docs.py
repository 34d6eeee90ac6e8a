"""The documentation is true: its examples run, its errors and tests are there, its reference is whole."""

from __future__ import annotations

import ast
import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import sagalog
import sagalog.migrations
import sagalog.testing
from sagalog import errors

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS).with_suffix("")): path for path in sorted(DOCS.rglob("*.md"))}
NOT_RUN = 8
"""So many blocks may be marked as not run; each says why."""

_FENCE = re.compile(
    r"^(?:% not run: (?P<reason>.+)\n)?```(?P<language>[\w{}-]+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
_FILE = re.compile(r"# (?P<name>[\w./-]+\.\w+)\n")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    body: str
    reason: str | None


def blocks(path: Path) -> list[Block]:
    """The page's blocks that are code to run, or files for it."""
    found = [Block(match["language"], match["body"], match["reason"]) for match in _FENCE.finditer(path.read_text())]
    return [block for block in found if block.language in ("python", "console", "bash", "sh", "toml", "ini")]


RUN_ELSEWHERE = {"reference/cli": "tests/test_cli_docs.py"}
RUNNING = [
    name
    for name, path in PAGES.items()
    if name not in RUN_ELSEWHERE and any(block.reason is None for block in blocks(path))
]


def commands(body: str) -> list[tuple[str, str]]:
    """Each command of a console block, with the output that the page shows."""
    parts = re.split(r"^\$ ", body, flags=re.MULTILINE)
    assert parts[0] == "", "a console block begins with `$ `"
    return [(command, output) for command, _, output in (part.partition("\n") for part in parts[1:])]


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", RUNNING)
def test_the_pages_examples_run(page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In the page's order, in one folder: a block that begins with a file's name becomes that file."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("SAGALOG_URL", None)
    if "DATABASE_URL" in PAGES[page].read_text():
        environment["DATABASE_URL"] = request.getfixturevalue("empty_postgres_url")
    for block in blocks(PAGES[page]):
        named = _FILE.match(block.body)
        if block.reason is not None:
            continue
        if named:
            (tmp_path / named["name"]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / named["name"]).write_text(block.body)
        elif block.language == "python":
            (tmp_path / "example.py").write_text(block.body)
            run([sys.executable, "example.py"], tmp_path, environment)
        else:
            assert block.language == "console", f"{page}: a {block.language} block neither runs nor is a file"
            for command, shown in commands(block.body):
                printed = run(["bash", "-euo", "pipefail", "-c", command], tmp_path, environment)
                same = doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS)
                assert same or not shown, f"$ {command}\nprints\n{printed}\nand not\n{shown}"


def test_few_examples_are_not_run() -> None:
    assert sum(block.reason is not None for path in PAGES.values() for block in blocks(path)) <= NOT_RUN


def test_every_error_is_documented_with_its_code() -> None:
    page = PAGES["reference/errors"].read_text()
    documented = dict(re.findall(r"^## (\w+)\n\nCode `(\w+)`\.", page, flags=re.MULTILINE))
    known = {
        name: kind.code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.SagaLogError) and kind is not errors.SagaLogError
    }
    assert documented == known
    assert page.count("**What to do.**") == len(known)
    assert dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)) == known


def test_every_test_that_the_promises_name_exists() -> None:
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", PAGES["explanation/promises"].read_text())
    assert len(named) > 20
    for module, function in named:
        tree = ast.parse((ROOT / module).read_text())
        there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert not function or function in there, f"{module}::{function}"


def test_every_public_name_is_in_the_reference() -> None:
    reference = "".join(path.read_text() for name, path in PAGES.items() if name.startswith("reference/"))
    named = set(re.findall(r"\.\. auto(?:class|exception|function|data):: ([\w.]+)", reference))
    sections = set(re.findall(r"^## (\w+)$", reference, flags=re.MULTILINE))
    assert set(sagalog.__all__) - named - sections == set()
    for module in (sagalog.migrations, sagalog.testing):
        assert {f"{module.__name__}.{name}" for name in module.__all__} - named == set()


def test_every_page_is_listed() -> None:
    listed = {"index"}
    for name, path in PAGES.items():
        for tree in re.findall(r"```{toctree}\n(.*?)```", path.read_text(), flags=re.DOTALL):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {str(Path(name).parent / entry) for entry in entries}
    assert listed == set(PAGES)
