"""Schema versions: adoption, refusals, rolling deploys, several deploys at once, models equal migrations."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import StaticPool
from sqlalchemy.schema import CreateIndex

from sagalog import (
    NotASagaLog,
    SagaLog,
    SagaLogError,
    SagaOutcome,
    SchemaMissing,
    SchemaOutOfDate,
    SchemaTooNew,
    migrations,
)
from sagalog.migrations.environment import options, scripts
from sagalog.models import models_at
from sagalog.placement import Placement
from sagalog.schema import HEAD, REVISIONS

ROOT = Path(__file__).parent.parent

EARLIER = """
CREATE TABLE saga (saga_id INTEGER PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, started_at INTEGER NOT NULL,
  terminal_at INTEGER, failure_reason TEXT, input_json TEXT NOT NULL);
CREATE TABLE saga_step (saga_id INTEGER NOT NULL REFERENCES saga(saga_id), step_index INTEGER NOT NULL,
  name TEXT NOT NULL, state TEXT NOT NULL, cmd_json TEXT NOT NULL, output_json TEXT, started_at INTEGER NOT NULL,
  ended_at INTEGER, PRIMARY KEY (saga_id, step_index));
CREATE INDEX saga_state_idx ON saga(state) WHERE state IN ('running', 'compensating');
CREATE INDEX saga_terminal_idx ON saga(terminal_at);
"""
STATES = ("running", "compensating", "completed", "compensated", "failed", "failed_compensation")


def write_earlier(path: Path, sagas: int = 300, version: int = 1) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(f"PRAGMA journal_mode = WAL; PRAGMA user_version = {version};" + EARLIER)
    for n in range(1, sagas + 1):
        state = STATES[n % len(STATES)]
        ended = None if state in ("running", "compensating") else 1_700_000_000_000 + n
        text_input = f'{{"n": {n}, "text": "\u00fc\\u2028 \\"quoted\\" \U0001f600"}}'
        connection.execute(
            "INSERT INTO saga VALUES (?,?,?,?,?,?,?)", (n, f"saga {n % 7}", state, n, ended, None, text_input)
        )
        for i in range(n % 4):
            step = ("pending", "succeeded", "failed", "compensated")[(n + i) % 4]
            cmd = "" if step == "compensated" else f'{{"i":  {i}}}'
            connection.execute("INSERT INTO saga_step VALUES (?,?,?,?,?,?,?,?)", (n, i, "c", step, cmd, None, n, None))
    connection.commit()
    connection.close()


def rows(path: Path) -> tuple[list[Any], list[Any], int]:
    connection = sqlite3.connect(path)
    sagas = connection.execute(
        "SELECT saga_id, name, state, started_at, terminal_at, failure_reason, input_json FROM saga ORDER BY 1"
    ).fetchall()
    steps = connection.execute(
        "SELECT saga_id, step_index, name, state, cmd_json, output_json, started_at, ended_at "
        "FROM saga_step ORDER BY 1, 2"
    ).fetchall()
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    connection.close()
    return sagas, steps, version


@pytest.mark.parametrize("version", [0, 1])
def test_an_earlier_file_is_adopted_and_loses_no_character(tmp_path: Path, version: int) -> None:
    path = tmp_path / "sagas.db"
    write_earlier(path, version=version)
    sagas, steps, _ = rows(path)
    with SagaLog.open(path) as log:
        assert sum(log.counts().values()) == 300
        assert len(log.unresolved_sagas()) == 150
        assert log.get(3).input["n"] == 3
        assert log.get(2).steps[1].cmd is None
        assert log.create_saga("new", None) == 301
    after_sagas, after_steps, after_version = rows(path)
    assert after_sagas[:300] == sagas
    assert after_steps == [(*s[:4], s[4] or "null", *s[5:]) for s in steps]
    assert after_version == version
    engine = create_engine(f"sqlite:///{path}")
    assert migrations.current(engine) == HEAD
    engine.dispose()


def test_the_earlier_program_still_reads_and_writes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sagas.db"
    write_earlier(path, 10)
    SagaLog.open(path).close()
    earlier = sqlite3.connect(path)
    earlier.execute(
        "INSERT INTO saga (saga_id, name, state, started_at, input_json) VALUES (11, 'old', 'running', 5, '{}')"
    )
    earlier.execute(
        "INSERT INTO saga_step (saga_id, step_index, name, state, cmd_json, started_at) "
        "VALUES (11, 0, 'c', 'pending', '', 5)"
    )
    earlier.execute("UPDATE saga_step SET state = 'succeeded', output_json = '[]', ended_at = 6 WHERE saga_id = 11")
    earlier.execute("DELETE FROM saga WHERE saga_id = 10 AND NOT EXISTS (SELECT 1 FROM saga_step WHERE saga_id = 10)")
    earlier.commit()
    assert earlier.execute("SELECT max(saga_id) FROM saga").fetchone() == (11,)
    earlier.close()
    with SagaLog.open(path) as log:
        record = log.get(11)
        assert (record.state, record.epoch, record.executor_id, record.steps[0].cmd) == ("running", 0, None, None)
        log.terminate(11, SagaOutcome.completed())


def test_an_adopted_file_without_its_indexes_gets_them(tmp_path: Path) -> None:
    path = tmp_path / "sagas.db"
    write_earlier(path, 3)
    connection = sqlite3.connect(path)
    connection.executescript("DROP INDEX saga_state_idx; DROP INDEX saga_terminal_idx")
    connection.close()
    SagaLog.open(path).close()
    fresh = tmp_path / "fresh.db"
    SagaLog.open(fresh).close()
    assert _objects(path) == _objects(fresh)


def _objects(path: Path) -> set[str]:
    connection = sqlite3.connect(path)
    found = connection.execute(
        "SELECT type, name, sql FROM sqlite_master WHERE type IN ('index', 'trigger')"
    ).fetchall()
    connection.close()
    return {re.sub(r"[\s\"]+", " ", f"{kind} {name} {sql}").replace(" (", "(") for kind, name, sql in found if sql}


@pytest.mark.parametrize(
    "ddl",
    [
        "CREATE TABLE saga (id INTEGER PRIMARY KEY, title TEXT)",
        "CREATE TABLE saga_step (anything TEXT)",
        EARLIER.replace("input_json TEXT NOT NULL", "input_json TEXT NOT NULL, extra TEXT"),
        EARLIER.replace("started_at INTEGER NOT NULL", "started_at TEXT NOT NULL"),
        EARLIER.replace("PRIMARY KEY (saga_id, step_index)", "PRIMARY KEY (step_index)"),
        EARLIER + "CREATE TABLE saga_audit (mine TEXT);",
    ],
    ids=["another saga", "another saga_step", "a column more", "another type", "another key", "a later table"],
)
def test_foreign_tables_of_that_name_are_refused_untouched(tmp_path: Path, ddl: str) -> None:
    path = tmp_path / "sagas.db"
    connection = sqlite3.connect(path)
    connection.executescript(ddl)
    before = connection.execute("SELECT name, sql FROM sqlite_master").fetchall()
    with pytest.raises(NotASagaLog):
        SagaLog.open(path)
    engine = create_engine(f"sqlite:///{path}")
    for refused in (
        lambda: migrations.upgrade(engine),
        lambda: migrations.check(engine),
        lambda: SagaLog(engine).counts(),
        lambda: SagaLog.open(path, migrate=False),
    ):
        with pytest.raises(NotASagaLog, match="not those of a saga log"):
            refused()
    engine.dispose()
    assert connection.execute("SELECT name, sql FROM sqlite_master").fetchall() == before
    connection.close()


def test_revision_0001_is_the_earlier_schema(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'new.db'}")
    migrations.upgrade(engine, "sagalog_0001")
    write_earlier(tmp_path / "old.db", 0)
    old = create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    for table in ("saga", "saga_step"):
        with engine.connect() as new_connection, old.connect() as old_connection:
            pragma = f"PRAGMA table_info({table})"
            assert [
                # the rowid is never NULL, whether declared so or not
                (c[1], c[2], c[3] or c[5] == 1, c[5])
                for c in new_connection.exec_driver_sql(pragma)
            ] == [(c[1], c[2], c[3] or c[5] == 1, c[5]) for c in old_connection.exec_driver_sql(pragma)]
            keys = f"PRAGMA foreign_key_list({table})"
            assert new_connection.exec_driver_sql(keys).fetchall() == old_connection.exec_driver_sql(keys).fetchall()
    engine.dispose()
    old.dispose()


def test_upgrade_downgrade_and_upgrade_again_keep_the_rows(database_url: str) -> None:
    engine = create_engine(database_url)
    assert migrations.current(engine) is None
    migrations.upgrade(engine, "sagalog_0001")
    assert migrations.current(engine) == "sagalog_0001"
    migrations.upgrade(engine)
    migrations.upgrade(engine)
    migrations.upgrade(engine, "sagalog_0001")
    migrations.check(engine)
    log = SagaLog(engine)
    log.create_saga("s", {"a": 1})
    log.start_step(1, 0, "c", None)
    for revision in reversed(REVISIONS):
        migrations.downgrade(engine, revision)
        assert migrations.current(engine) == revision
    migrations.upgrade(engine)
    assert log.get(1).input == {"a": 1}
    assert log.create_saga("s", None) == 2
    migrations.downgrade(engine, "base")
    left = set(inspect(engine).get_table_names())
    assert left <= {"sagalog_version"}
    with pytest.raises(SagaLogError):
        log.get(1)
    migrations.upgrade(engine)
    with pytest.raises(ValueError, match="sagalog_0009"):
        migrations.upgrade(engine, "sagalog_0009")
    engine.dispose()


def test_check_says_what_is_wrong(database_url: str) -> None:
    engine = create_engine(database_url)
    with pytest.raises(SchemaMissing):
        migrations.check(engine)
    with pytest.raises(SchemaMissing):
        SagaLog(engine).max_saga_id()
    with engine.connect() as connection, pytest.raises(SchemaMissing):
        SagaLog(connection).start_saga(1, "s", None)
    migrations.upgrade(engine, "sagalog_0002")
    with pytest.raises(SchemaOutOfDate) as old:
        migrations.check(engine)
    assert old.value.found == "sagalog_0002"
    with pytest.raises(SchemaOutOfDate):
        SagaLog(engine).start_saga(1, "s", None)
    migrations.upgrade(engine)
    migrations.check(engine)
    SagaLog(engine).start_saga(1, "s", None)
    engine.dispose()


def test_a_newer_database_is_used_if_it_allows_this_library(database_url: str) -> None:
    engine = create_engine(database_url)
    migrations.upgrade(engine)
    _pretend(engine, "sagalog_0099", HEAD)
    migrations.check(engine)
    migrations.upgrade(engine)
    assert migrations.current(engine) == "sagalog_0099"
    SagaLog(engine).start_saga(1, "s", None)
    _pretend(engine, "sagalog_0100", "sagalog_0099")
    late = create_engine(database_url)
    for refused in (
        lambda: migrations.check(engine),
        lambda: migrations.upgrade(engine),
        lambda: migrations.downgrade(engine, "base"),
        lambda: SagaLog(late).start_saga(2, "s", None),
    ):
        with pytest.raises(SchemaTooNew) as error:
            refused()
        assert error.value.found == "sagalog_0100"
    late.dispose()
    _pretend(engine, "somebody_elses", None)
    with pytest.raises(NotASagaLog):
        migrations.check(engine)
    engine.dispose()


def _pretend(engine: Engine, revision: str, oldest: str | None) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE sagalog_version SET version_num = :r"), {"r": revision})
        connection.execute(text("UPDATE sagalog_meta SET value = :o WHERE name = 'oldest_revision'"), {"o": oldest})


def test_a_failing_migration_leaves_nothing_behind(database_url: str) -> None:
    engine = create_engine(database_url)
    migrations.upgrade(engine, "sagalog_0001")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE saga_audit (mine INTEGER)"))
    before = _tables(engine)
    with pytest.raises(SagaLogError):
        migrations.upgrade(engine)
    assert _tables(engine) == before
    assert migrations.current(engine) == "sagalog_0001"
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE saga_audit"))
    migrations.upgrade(engine)
    migrations.check(engine)
    engine.dispose()


def _tables(engine: Engine) -> dict[str, list[str]]:
    looking = inspect(engine)
    return {t: sorted(c["name"] for c in looking.get_columns(t)) for t in looking.get_table_names()}


def test_a_callers_connection_is_joined(database_url: str) -> None:
    engine = create_engine(database_url)
    with engine.connect() as connection:
        migrations.upgrade(connection)
        SagaLog(connection).start_saga(1, "s", None)
        connection.rollback()
    assert migrations.current(engine) is None
    with engine.begin() as connection:
        migrations.upgrade(connection)
    migrations.check(engine)
    engine.dispose()


def test_async_engines_and_connections_are_migrated(database_url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(database_url.replace("sqlite:", "sqlite+aiosqlite:"))
        await migrations.upgrade(engine, "sagalog_0002")
        async with engine.begin() as connection:
            await migrations.upgrade(connection)
        assert await migrations.current(engine) == HEAD
        await migrations.check(engine)
        await migrations.downgrade(engine, "base")
        with pytest.raises(SchemaMissing):
            await migrations.check(engine)
        await engine.dispose()

    asyncio.run(main())


def test_an_engine_in_memory_is_migrated() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    migrations.upgrade(engine)
    SagaLog(engine).start_saga(1, "s", None)
    assert SagaLog(engine).counts() == {"running": 1}
    engine.dispose()


def test_four_processes_upgrade_one_database_at_once(database_url: str, tmp_path: Path) -> None:
    if database_url.startswith("sqlite"):
        write_earlier(Path(database_url.removeprefix("sqlite:///")), 50)
    code = (
        "import sys; from sqlalchemy import create_engine; from sagalog import migrations;"
        "sys.stdin.readline(); migrations.upgrade(create_engine(sys.argv[1]))"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, database_url], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    outcomes = []
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(b"\n")
        worker.stdin.flush()
    for worker in workers:
        _, errors = worker.communicate(timeout=60)
        outcomes.append((worker.returncode, errors.decode()))
    assert outcomes == [(0, "")] * 4
    engine = create_engine(database_url)
    migrations.check(engine)
    engine.dispose()


@pytest.mark.parametrize("prefix", ["", "app_"])
def test_models_equal_migrations(database_url: str, prefix: str) -> None:
    engine = create_engine(database_url)
    schema = None
    if engine.dialect.name == "postgresql" and prefix:
        schema = "Sagas"
        with engine.begin() as connection:
            connection.execute(text('CREATE SCHEMA "Sagas"'))
    migrations.upgrade(engine, schema=schema, prefix=prefix)
    placement = Placement(schema, prefix)
    metadata = models_at(placement).metadata
    with engine.connect() as connection:
        opts = {**options(placement), "compare_server_default": True, "include_schemas": schema is not None}
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # expression indexes: compared below
            different = compare_metadata(MigrationContext.configure(connection, opts=opts), metadata)
        assert different == []
        if engine.dialect.name == "sqlite":
            found = connection.execute(text("SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"))
            made = {_normal(row[0]) for row in found}
            expected = {
                _normal(str(CreateIndex(index).compile(engine)))
                for table in metadata.tables.values()
                for index in table.indexes
            }
            assert made == expected
        else:
            names = {
                row[0]
                for row in connection.execute(text("SELECT indexname FROM pg_indexes WHERE indexname LIKE '%_idx'"))
            }
            assert names == {index.name for table in metadata.tables.values() for index in table.indexes}
    log = SagaLog(engine, schema=schema, prefix=prefix)
    assert log.create_saga("s", {"a": 1}, key="k") == log.create_saga("s", {"a": 1}, key="k")
    log.start_step(1, 0, "c", None)
    log.compensate_step(1, 0, [])
    log.terminate(1, SagaOutcome.compensated("r"))
    assert log.get(1).state == "compensated"
    log.create_saga("s", None)
    from datetime import timedelta

    with engine.begin() as connection:
        table = f'"{schema}".{prefix}saga' if schema else f"{prefix}saga"
        connection.execute(text(f"UPDATE {table} SET terminal_at = 1, started_at = 1"))
    assert log.prune(keep_last=0, older_than=timedelta(days=1)) == 1
    migrations.downgrade(engine, "base", schema=schema, prefix=prefix)
    engine.dispose()


def _normal(sql: str) -> str:
    return re.sub(r"\s+", " ", sql.replace('"', "")).strip()


def test_the_list_of_revisions_is_that_of_the_scripts() -> None:
    directory: ScriptDirectory = scripts()
    assert tuple(script.revision for script in directory.walk_revisions())[::-1] == REVISIONS


def test_plain_alembic_works_in_a_checkout(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'sagas.db'}"

    def alembic(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "alembic", "-x", f"url={url}", *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    alembic("upgrade", "head")
    assert HEAD in alembic("current")
    assert "No new upgrade operations" in alembic("check")
    alembic("downgrade", "-1")
    assert REVISIONS[-2] in alembic("current")
    assert "CREATE TABLE saga_step" in alembic("upgrade", "head", "--sql")
    alembic("upgrade", "head")
    with SagaLog.open(tmp_path / "sagas.db", migrate=False) as log:
        assert log.counts() == {}


def test_sagas_of_one_token_get_one_each(database_url: str) -> None:
    """An earlier library could make two sagas of one start; no third one can be made."""
    engine = create_engine(database_url)
    migrations.upgrade(engine, "sagalog_0003")
    insert = text(
        "INSERT INTO saga (saga_id, name, state, started_at, input_json, token) "
        "VALUES (:id, 'order', 'running', 1, 'null', :token)"
    )
    with engine.begin() as connection:
        for saga_id, token in enumerate(("a", "a", None, None, "b", "c", "c", "c"), 1):
            connection.execute(insert, {"id": saga_id, "token": token})
        connection.execute(
            text(
                "INSERT INTO saga_step (saga_id, step_index, name, state, cmd_json, started_at) "
                "VALUES (7, 0, 'pay', 'pending', 'null', 1)"
            )
        )
    migrations.upgrade(engine)
    tokens = ["a", "a-2", None, None, "b", "c-6", "c", "c-8"]  # what was sent keeps its key
    assert [SagaLog(engine).get(saga_id).token for saga_id in range(1, 9)] == tokens
    with engine.connect() as connection, pytest.raises(IntegrityError):
        connection.execute(insert, {"id": 9, "token": "b"})
    migrations.downgrade(engine, "sagalog_0003")
    with engine.begin() as connection:
        connection.execute(insert, {"id": 9, "token": "b"})
    engine.dispose()


def test_open_without_migrate_only_checks(tmp_path: Path) -> None:
    path = tmp_path / "sagas.db"
    with pytest.raises(SagaLogError):
        SagaLog.open(path, migrate=False)
    assert not path.exists()
    write_earlier(path, 3)
    with pytest.raises(SchemaOutOfDate):
        SagaLog.open(path, migrate=False)
    assert rows(path)[0][0][0] == 1


def test_a_file_that_open_makes_has_small_pages_and_a_hosts_keeps_its_own(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "host.db")) as host:
        host.execute("CREATE TABLE theirs (x)")
    for name, pages in (("made.db", 2048), ("host.db", 4096)):
        SagaLog.open(tmp_path / name).close()
        SagaLog.open(tmp_path / name).close()
        with closing(sqlite3.connect(tmp_path / name)) as looking:
            assert looking.execute("PRAGMA page_size").fetchone() == (pages,)
