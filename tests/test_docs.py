"""The documentation is true: its examples run, its errors and tests are there, its reference is whole."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from pages import INSTALLING, INSTALLS, PAGES, blocks, run_page

import sagalog
import sagalog.migrations
import sagalog.testing
from sagalog import errors

ROOT = Path(__file__).parent.parent
NOT_RUN = 2
"""So many blocks may be marked as not run, besides those that install something; each says why."""

RUN_ELSEWHERE = {
    "reference/cli": "tests/test_cli_docs.py",
    **dict.fromkeys(INSTALLING, "tests/test_examples.py, on a wheel"),
}
RUNNING = [
    name
    for name, path in PAGES.items()
    if name not in RUN_ELSEWHERE and any(block.reason is None for block in blocks(path))
]


@pytest.mark.parametrize("page", RUNNING)
def test_the_pages_examples_run(page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    text = PAGES[page].read_text()
    if "$ python examples/" in text:
        (tmp_path / "examples").symlink_to(ROOT / "examples")
    needed = {}
    if "DATABASE_URL" in text:
        needed["DATABASE_URL"] = request.getfixturevalue("empty_postgres_url")
    run_page(PAGES[page], tmp_path, Path(sys.executable).parent, **needed)


def test_every_block_of_code_is_seen() -> None:
    for name, path in PAGES.items():
        begun = re.findall(r"^```(python|console|bash|sh|toml|ini)$", path.read_text(), flags=re.MULTILINE)
        assert [block.language for block in blocks(path)] == begun, name


def test_few_examples_are_not_run() -> None:
    reasons = [block.reason for path in PAGES.values() for block in blocks(path)]
    assert sum(reason not in (None, INSTALLS) for reason in reasons) <= NOT_RUN


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
