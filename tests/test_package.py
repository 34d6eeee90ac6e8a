"""What importing costs, what is public, what the README promises."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sagalog

ROOT = Path(__file__).parent.parent
HEAVY = ("alembic", "greenlet", "typer", "rich", "starlette", "opentelemetry")
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_importing_sagalog_loads_nothing_heavy() -> None:
    code = (
        "import sys, sagalog\n"
        "for name in sagalog.__all__: getattr(sagalog, name)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_are_loaded_when_they_are_first_asked_for() -> None:
    code = (
        "import sys, sagalog; print('sqlalchemy' in sys.modules); sagalog.SagaLog; print('sqlalchemy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    assert set(sagalog.__all__) <= set(dir(sagalog))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sagalog.nothing  # noqa: B018


def test_opening_a_current_file_loads_no_alembic(sqlite_path: Path) -> None:
    code = "import sys, sagalog; sagalog.SagaLog.open(sys.argv[1]).close(); print('alembic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(sqlite_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_everything_public_is_importable_and_documented() -> None:
    for name in sagalog.__all__:
        assert getattr(sagalog, name).__doc__, name
    for face in (sagalog.SagaLog, sagalog.AsyncSagaLog):
        for name in dir(face):
            if not name.startswith("_"):
                assert getattr(face, name).__doc__, name


@pytest.mark.parametrize("face", [sagalog.SagaLog, sagalog.AsyncSagaLog])
def test_help_shows_an_operations_own_arguments_and_result(face: type) -> None:
    log = face.__new__(face)
    assert str(inspect.signature(log.start_saga)).startswith("(saga_id: 'int', name: 'str', input: ")
    assert inspect.signature(log.next_step_index).return_annotation == "int"


def test_both_faces_have_the_same_operations() -> None:
    public = [
        {name for name in dir(face) if not name.startswith("_")} for face in (sagalog.SagaLog, sagalog.AsyncSagaLog)
    ]
    assert public[0] == public[1]


@pytest.mark.parametrize("block", BLOCKS, ids=[str(n) for n in range(len(BLOCKS))])
def test_the_readmes_examples_run(block: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_shows_examples() -> None:
    assert len(BLOCKS) >= 4
