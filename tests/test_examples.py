"""The example applications: their own tests pass, and their READMEs' commands work on an installed wheel."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHOPS = ("flask_shop", "fastapi_shop")


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command as a user of the example would, with nothing of this test run in its environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "SHOP_", "COV_"))}
    done = subprocess.run(
        command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{output}"
    return output


@pytest.mark.parametrize("shop", SHOPS)
def test_a_shops_own_tests_pass_on_both_databases(shop: str, postgres_server: str, tmp_path: Path) -> None:
    output = _run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:asyncio", "-p", "no:anyio", "-p", "no:cacheprovider",
        "--basetemp", tmp_path / "of_the_shop",
        cwd=ROOT / "examples" / shop,
        SHOP_TEST_POSTGRES_URL=postgres_server,
    )  # fmt: skip
    assert "skipped" not in output
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None
    assert int(passed[1]) >= 10 + 2 * 8


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install sagalog` installs."""
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("sagalog-*.whl")
    return built


def _commands(readme: Path) -> list[list[str]]:
    """The commands of its one block of shell."""
    (block,) = re.findall(r"```sh\n(.*?)```", readme.read_text(), re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("shop", SHOPS)
def test_the_readmes_commands_lead_from_a_wheel_to_passing_tests(shop: str, wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / shop
    shutil.copytree(ROOT / "examples" / shop, folder, ignore=shutil.ignore_patterns("__pycache__", "*.db"))
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    done = []
    for command in _commands(folder / "README.md"):
        arguments = [re.sub(r"^sagalog(?=$|\[)", str(wheel), word) for word in command[1:]]
        done.append(_run(programs / command[0], *arguments, cwd=folder, PIP_NO_COMPILE="1", PIP_QUIET="1"))
    assert re.search(r"\d+ passed, \d+ skipped", done[-1]), "on SQLite, for no Postgres is named"
    assert "failed" not in done[-1]
    where = _run(programs / "python", "-c", "import sagalog; print(sagalog.__file__)", cwd=tmp_path)
    assert str(programs.parent) in where
    assert "No new upgrade operations" in _run(programs / "alembic", "check", cwd=folder)
