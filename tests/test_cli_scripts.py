"""`sql` and `alembic-revision`, run as their users run them."""

from __future__ import annotations

import io
import sqlite3
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from cli import execute, sagalog
from sqlalchemy import create_engine

from sagalog import SagaLog, migrations
from sagalog.schema import HEAD, REVISIONS


def run_sql(url: str, script: str) -> None:
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"))
        connection.executescript(script)
        connection.close()
        return
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(script)
    engine.dispose()


def test_the_printed_sql_makes_a_log_and_takes_it_away(database_url: str) -> None:
    up = sagalog("--url", database_url, "sql")
    assert up.status == 0
    run_sql(database_url, up.out)
    assert sagalog("--url", database_url, "check").status == 0
    engine = create_engine(database_url)
    assert SagaLog(engine).create_saga("place_order", None) == 1
    engine.dispose()
    run_sql(database_url, sagalog("--url", database_url, "sql", "--from", "head", "--to", REVISIONS[0]).out)
    assert sagalog("--url", database_url, "current").out.strip() == REVISIONS[0]
    run_sql(database_url, sagalog("--url", database_url, "sql", "--from", REVISIONS[0], "--to", HEAD).out)
    assert sagalog("--url", database_url, "current", "--json").json["revision"] == HEAD
    run_sql(database_url, sagalog("--url", database_url, "sql", "--from", "head", "--to", "base").out)
    assert sagalog("--url", database_url, "current", "--json").json["revision"] is None


def test_sql_opens_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_url = sagalog("--url", "postgresql://me@127.0.0.1:1/shop", "sql")
    by_name = sagalog("sql", "--dialect", "postgresql")
    assert by_url.out == by_name.out
    assert "BIGINT" in by_name.out
    assert sagalog("--prefix", "app_", "sql", "--dialect", "sqlite").out.count("app_saga") > 10
    assert "ops.saga" in sagalog("--schema", "ops", "sql", "--dialect", "postgresql").out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("sql",), "--url"),
        (("sql", "--dialect", "oracle"), "--dialect"),
        (("sql", "--dialect", "sqlite", "--from", HEAD), "nothing to print"),
        (("sql", "--dialect", "sqlite", "--to", "sagalog_9999"), "there is no revision"),
        (("alembic-revision",), "there is no file alembic.ini"),
        (("alembic-revision", "--to", "sagalog_9999"), "there is no revision"),
    ],
)
def test_bad_usage_is_told(
    words: tuple[str, ...], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = sagalog(*words)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert complaint in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An application with an Alembic environment as `alembic init` makes it."""
    monkeypatch.chdir(tmp_path)
    command.init(Config("alembic.ini", stdout=io.StringIO()), "migrations")
    return tmp_path


def upgrade_host(url: str) -> None:
    config = Config("alembic.ini")
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    command.upgrade(config, "head")


def test_a_written_revision_brings_the_log_by_the_hosts_own_upgrade(host: Path, database_url: str) -> None:
    first = sagalog("alembic-revision", "--to", REVISIONS[1], "-m", "the saga log")
    assert first.status == 0, first.err
    (written,) = (host / "migrations" / "versions").glob("*.py")
    assert written.name in first.out
    assert f'to="{REVISIONS[1]}"' in written.read_text()
    second = sagalog("alembic-revision", "--json")
    assert Path(second.json["path"]).exists()
    upgrade_host(database_url)
    engine = create_engine(database_url)
    assert migrations.current(engine) == HEAD
    engine.dispose()
    assert execute(database_url, "SELECT count(*) FROM alembic_version") == [(1,)]
    third = sagalog("alembic-revision")
    assert (third.status, third.out) == (1, "")
    assert "nothing newer" in third.err


def test_a_written_revision_has_the_placement(host: Path) -> None:
    assert sagalog("--schema", "ops", "--prefix", "app_", "alembic-revision").status == 0
    (written,) = (host / "migrations" / "versions").glob("*.py")
    assert 'schema="ops", prefix="app_"' in written.read_text()


def test_a_host_that_is_configured_in_pyproject_is_found(host: Path) -> None:
    (host / "alembic.ini").unlink()
    (host / "pyproject.toml").write_text('[tool.alembic]\nscript_location = "%(here)s/migrations"\n')
    done = sagalog("alembic-revision")
    assert done.status == 0, done.err
    assert len(list((host / "migrations" / "versions").glob("*.py"))) == 1
