"""The example applications and the guides: their tests pass, and their commands work on an installed wheel."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from pages import INSTALLING, PAGES, of_a_user, on_the_wheel, run_page
from sqlalchemy import create_engine, inspect

from sagalog import migrations

ROOT = Path(__file__).parent.parent
SHOPS = ("flask_shop", "fastapi_shop")
QUICKLY = {"PIP_NO_COMPILE": "1", "PIP_QUIET": "1"}


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command as a user of the example would."""
    done = subprocess.run(
        command, cwd=cwd, env=of_a_user(**environment), capture_output=True, text=True, timeout=300, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{output}"
    return output


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install sagalog` installs."""
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("sagalog-*.whl")
    return built


def _commands(readme: Path) -> list[str]:
    """The commands of its one block of shell."""
    (block,) = re.findall(r"```sh\n(.*?)```", readme.read_text(), re.DOTALL)
    return str(block).splitlines()


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """The programs of a new virtual environment."""
    venv.create(tmp_path / "venv", with_pip=True)
    return tmp_path / "venv" / "bin"


@pytest.mark.slow
@pytest.mark.parametrize("shop", SHOPS)
def test_the_readmes_commands_lead_from_a_wheel_to_passing_tests_on_both_databases(
    shop: str, wheel: Path, programs: Path, tmp_path: Path, postgres_server: str, empty_postgres_url: str
) -> None:
    folder = tmp_path / shop
    shutil.copytree(ROOT / "examples" / shop, folder, ignore=shutil.ignore_patterns("__pycache__", "*.db"))
    typed = [shlex.split(on_the_wheel(line, wheel)) for line in _commands(folder / "README.md")]
    installing = [words for words in typed if words[0] == "pip"]
    using = [words for words in typed if words[0] != "pip"]
    for words in installing:
        _run(programs / words[0], *words[1:], cwd=folder, **QUICKLY)
    where = _run(programs / "python", "-c", "import sagalog; print(sagalog.__file__)", cwd=tmp_path)
    assert str(programs.parent) in where

    # Once as they stand, then with the variables that the README names.
    on_postgres = {"SHOP_URL": empty_postgres_url, "SHOP_TEST_POSTGRES_URL": postgres_server}
    for database in ({}, on_postgres):
        for words in using:
            output = _run(programs / words[0], *words[1:], cwd=folder, **database)
        assert using[-1] == ["pytest"]
        passed, skipped = (re.search(rf"(\d+) {word}", output) for word in ("passed", "skipped"))
        assert bool(skipped) == (not database), output
        assert "No new upgrade operations" in _run(programs / "alembic", "check", cwd=folder, **database)
    assert passed is not None
    assert int(passed[1]) >= 10 + 2 * 8
    engine = create_engine(empty_postgres_url)
    migrations.check(engine)
    assert {"product", "shop_order", "saga"} < set(inspect(engine).get_table_names())
    engine.dispose()


def test_the_guides_for_host_applications_begin_with_installing() -> None:
    assert {"howto/alembic", "howto/fastapi", "howto/flask", "tutorial"} <= set(INSTALLING)


@pytest.mark.slow
@pytest.mark.parametrize("page", INSTALLING)
def test_a_pages_commands_lead_from_a_wheel_to_its_end(
    page: str, wheel: Path, programs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    needed = dict(QUICKLY)
    if "DATABASE_URL" in PAGES[page].read_text():
        needed["DATABASE_URL"] = request.getfixturevalue("empty_postgres_url")
    run_page(PAGES[page], folder, programs, wheel=wheel, **needed)
