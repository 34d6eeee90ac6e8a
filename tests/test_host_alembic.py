"""sagalog inside a host's own Alembic: one head, plain commands, SQL, branches, failures, refusals."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from hosts import ASYNC_ENV, ENV, Host
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, inspect, text
from test_migrations import EARLIER, rows, write_earlier

from sagalog import NotASagaLog, SagaLog, SagaLogError, SchemaMissing, SchemaOutOfDate, SchemaTooNew, migrations
from sagalog.schema import HEAD

SAGALOGS = {"saga", "saga_step", "saga_executor", "saga_audit", "sagalog_meta", "sagalog_version"}
CREATE = 'op.create_table("{0}", sa.Column("id", sa.Integer, primary_key=True))'
DROP = 'op.drop_table("{0}")'

MakeHost = Callable[..., Host]


@pytest.fixture
def make_host(tmp_path: Path, database_url: str) -> Iterator[MakeHost]:
    """Builds a host whose first revision makes a table of its own."""
    made: list[Host] = []

    def make(env: str = ENV, **settings: Any) -> Host:
        metadata = MetaData()
        Table("customer", metadata, Column("id", Integer, primary_key=True))
        host = Host(tmp_path, database_url, env, **{"target_metadata": metadata, **settings})
        host.revision("customers", CREATE.format("customer"), DROP.format("customer"))
        made.append(host)
        return host

    yield make
    for host in made:
        host.engine.dispose()


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        (ENV, {}),
        (ENV, {"render_as_batch": True}),
        (ENV, {"transaction_per_migration": True}),
        (ENV, {"transactional_ddl": True}),
        (ASYNC_ENV, {}),
    ],
    ids=["plain", "batch", "a transaction per migration", "transactional ddl", "async env.py"],
)
def test_plain_commands_of_the_host_bring_and_undo_both(
    make_host: MakeHost, env: str, settings: dict[str, Any]
) -> None:
    host = make_host(env, **settings)
    host.write()
    host.revision("parcels", CREATE.format("parcel"), DROP.format("parcel"))
    Table("parcel", host.settings["target_metadata"], Column("id", Integer, primary_key=True))
    assert len(host.heads) == 1
    host.upgrade()
    host.check()
    assert host.tables() == {"alembic_version", "customer", "parcel", *SAGALOGS}
    migrations.check(host.engine)
    assert SagaLog(host.engine).create_saga("s", {"a": 1}) == 1
    host.downgrade("-1")
    assert SagaLog(host.engine).get(1).input == {"a": 1}
    host.downgrade("-1")
    assert host.tables() == {"alembic_version", "customer"}
    host.upgrade()
    host.downgrade("base")
    assert host.tables() == {"alembic_version"}
    host.upgrade()
    migrations.check(host.engine)


def test_the_commands_as_typed_in_a_shell(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("init", "migrations")
    ini = tmp_path / "alembic.ini"
    ini.write_text(re.sub("sqlalchemy.url = .*", "sqlalchemy.url = sqlite:///app.db", ini.read_text()))
    write = (
        "from alembic.config import Config; from sagalog import migrations; "
        "migrations.write_host_revision(Config('alembic.ini'))"
    )
    subprocess.run([sys.executable, "-c", write], cwd=tmp_path, check=True, timeout=60, capture_output=True)
    run("upgrade", "head")
    assert "(head)" in run("current")
    with SagaLog.open(tmp_path / "app.db", migrate=False) as log:
        assert log.counts() == {}
    run("downgrade", "-1")
    assert "CREATE TABLE saga_step" in run("upgrade", "head", "--sql")


def test_the_hosts_op_works_after_the_step_in_the_same_revision(make_host: MakeHost) -> None:
    host = make_host()
    path = host.write()
    source = path.read_text()
    source = source.replace(f'to="{HEAD}")', f'to="{HEAD}")\n    {CREATE.format("after_up")}')
    path.write_text(source.replace('to="base")', f'to="base")\n    {DROP.format("after_up")}'))
    host.upgrade()
    assert "after_up" in host.tables()
    assert "after_up" in host.sql("upgrade", "head").rpartition("sagalog_version")[2]
    host.downgrade("-1")
    assert host.tables() == {"alembic_version", "customer"}


def test_an_operations_object_does_instead_of_the_proxy(database_url: str) -> None:
    engine = create_engine(database_url)
    with engine.begin() as connection:
        op = Operations(MigrationContext.configure(connection))
        migrations.upgrade(op, from_="base", to="sagalog_0002")
        migrations.upgrade(op, HEAD, from_="sagalog_0002")
    migrations.check(engine)
    with engine.begin() as connection:
        op = Operations(MigrationContext.configure(connection))
        migrations.downgrade(op, from_=HEAD, to="sagalog_0001")
    assert migrations.current(engine) == "sagalog_0001"
    engine.dispose()


def test_the_printed_sql_does_what_the_migration_does(make_host: MakeHost, postgres_or_file: Any) -> None:
    host = make_host()
    host.write(to="sagalog_0002")
    host.write()
    up, down = host.sql("upgrade", "head"), host.sql("downgrade", "head:base")
    first = up.index("CREATE TABLE customer")
    assert first < up.index("CREATE TABLE saga ") < up.index("CREATE TABLE saga_audit")
    assert up.count("CREATE TABLE sagalog_version") == 1
    host.upgrade()
    online = _shape(host.engine)
    host.downgrade("base")
    postgres_or_file(host.url, "DROP TABLE alembic_version;" + up)
    assert _shape(host.engine) == online
    migrations.check(host.engine)
    assert SagaLog(host.engine).create_saga("s", None) == 1
    postgres_or_file(host.url, down)
    assert host.tables() <= {"alembic_version"}
    host.engine.dispose()


@pytest.fixture
def postgres_or_file() -> Any:
    """Runs a script as sqlite3's shell or psql would."""

    def run(url: str, script: str) -> None:
        if url.startswith("sqlite"):
            connection = sqlite3.connect(url.removeprefix("sqlite:///"))
            connection.executescript(script)
            connection.close()
            return
        import psycopg

        with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(script.encode())

    return run


def _shape(engine: Engine) -> dict[str, Any]:
    looking = inspect(engine)
    return {
        table: [
            [(c["name"], str(c["type"]), c["nullable"], c["default"]) for c in looking.get_columns(table)],
            sorted(name for (name,) in _indexes(engine, table)),
        ]
        for table in looking.get_table_names()
    }


def _indexes(engine: Engine, table: str) -> list[Any]:
    query = (
        "SELECT name FROM sqlite_master WHERE type IN ('index', 'trigger') AND tbl_name = :t"
        if engine.dialect.name == "sqlite"
        else "SELECT indexdef FROM pg_indexes WHERE tablename = :t"
    )
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query), {"t": table})]


def test_a_host_with_branches_brings_the_log_in_one_of_them(make_host: MakeHost) -> None:
    host = make_host()
    (root,) = host.heads
    host.write(to="sagalog_0002", revision_id="aaaa")
    host.revision("parcels", CREATE.format("parcel"), DROP.format("parcel"), head=root, splice=True, rev_id="bbbb")
    assert set(host.heads) == {"aaaa", "bbbb"}
    with pytest.raises(SagaLogError, match="Multiple head"):
        host.write()
    with pytest.raises(SagaLogError, match=r"aaaa.*does not come before 'bbbb'"):
        host.write(head="bbbb")
    host.upgrade("heads")
    assert host.saga_log() == "sagalog_0002"
    host.write(head="aaaa", revision_id="cccc")
    host.upgrade("cccc")
    host.downgrade("aaaa")
    assert host.saga_log() == "sagalog_0002"
    assert "parcel" in host.tables()
    host.upgrade("heads")
    migrations.check(host.engine)


@pytest.mark.parametrize("transactional", [None, True], ids=["as Alembic has it", "transactional"])
def test_a_host_revision_that_fails_after_the_step(make_host: MakeHost, *, transactional: bool | None) -> None:
    host = make_host(transactional_ddl=transactional)
    path = host.write()
    good = path.read_text()
    path.write_text(good.replace(f'to="{HEAD}")', f'to="{HEAD}")\n    raise RuntimeError("the host failed")'))
    host.upgrade("head-1")
    with pytest.raises(RuntimeError, match="the host failed"):
        host.upgrade()
    # Alembic commits SQLite's statements one by one unless told otherwise: then the step is there, whole.
    kept = host.url.startswith("sqlite") and not transactional
    assert host.tables() == {"alembic_version", "customer", *(SAGALOGS if kept else ())}
    path.write_text(good)
    host.upgrade()
    migrations.check(host.engine)
    with host.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM alembic_version")).scalar() == 1


@pytest.mark.parametrize("transactional", [None, True])
def test_a_step_that_fails_leaves_nothing_of_itself(make_host: MakeHost, *, transactional: bool | None) -> None:
    host = make_host(transactional_ddl=transactional)
    host.upgrade()
    with host.engine.begin() as connection:
        connection.execute(text("CREATE TABLE sagalog_meta (mine INTEGER)"))
        connection.execute(text("DROP TABLE sagalog_meta"))
        connection.execute(text("CREATE VIEW sagalog_meta AS SELECT 1 AS mine"))
    host.write()
    with pytest.raises(SagaLogError) as error:
        host.upgrade()
    assert error.value.__cause__ is not None
    assert host.tables() == {"alembic_version", "customer"}
    with host.engine.begin() as connection:
        connection.execute(text("DROP VIEW sagalog_meta"))
    host.upgrade()
    migrations.check(host.engine)


def test_a_host_in_autocommit_mode_migrates(tmp_path: Path, database_url: str) -> None:
    host = Host(tmp_path, database_url, ENV.replace("(url,", "(url, isolation_level='AUTOCOMMIT',"))
    host.write()
    host.upgrade()
    migrations.check(host.engine)
    host.downgrade("base")
    assert host.tables() == {"alembic_version"}
    host.engine.dispose()


def test_a_host_whose_database_is_the_earlier_programs_adopts_it(tmp_path: Path) -> None:
    path = tmp_path / "sagas.db"
    write_earlier(path)
    before = rows(path)[0]
    host = Host(tmp_path, f"sqlite:///{path}")
    host.write()
    host.upgrade()
    migrations.check(host.engine)
    assert rows(path)[0] == before
    assert len(SagaLog(host.engine).unresolved_sagas()) == 150
    host.engine.dispose()


def test_tables_of_somebody_else_are_refused_untouched(make_host: MakeHost) -> None:
    host = make_host()
    host.upgrade()
    with host.engine.begin() as connection:
        connection.execute(text("CREATE TABLE saga (title TEXT)"))
    host.write()
    with pytest.raises(NotASagaLog):
        host.upgrade()
    assert host.tables() == {"alembic_version", "customer", "saga"}


def test_an_earlier_file_below_the_step_is_not_adopted_by_it(tmp_path: Path) -> None:
    path = tmp_path / "sagas.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(EARLIER)
    connection.close()
    host = Host(tmp_path, f"sqlite:///{path}")
    host.write(from_="sagalog_0002")
    with pytest.raises(NotASagaLog, match="a step from 'base' adopts them"):
        host.upgrade()
    assert host.tables() == {"alembic_version", "saga", "saga_step"}
    host.engine.dispose()


def test_a_database_outside_the_step_is_refused(make_host: MakeHost) -> None:
    host = make_host()
    host.write(from_="sagalog_0001", to="sagalog_0002")
    with pytest.raises(SchemaMissing, match=r"is at base, and this step begins at sagalog_0001.*has to run first"):
        host.upgrade()
    migrations.upgrade(host.engine)
    with pytest.raises(SchemaTooNew, match="alembic stamp") as error:
        host.upgrade()
    assert error.value.found == HEAD
    migrations.downgrade(host.engine, "sagalog_0001")
    host.upgrade()
    assert host.saga_log() == "sagalog_0002"
    migrations.upgrade(host.engine)
    with pytest.raises(SchemaTooNew):
        host.downgrade("-1")
    migrations.downgrade(host.engine, "base")
    with pytest.raises(SchemaMissing, match="ends at sagalog_0001"):
        host.downgrade("-1")
    migrations.upgrade(host.engine, "sagalog_0002")
    host.downgrade("-1")
    assert host.saga_log() == "sagalog_0001"


def test_a_log_of_an_older_revision_is_refused_by_a_later_step(make_host: MakeHost) -> None:
    host = make_host()
    migrations.upgrade(host.engine, "sagalog_0001")
    host.write(from_="sagalog_0002")
    with pytest.raises(SchemaOutOfDate, match="sagalog_0001"):
        host.upgrade()
    assert host.saga_log() == "sagalog_0001"


@pytest.mark.parametrize(("revision", "kind"), [("sagalog_0099", SchemaTooNew), ("somebody_elses", NotASagaLog)])
def test_a_log_that_this_library_does_not_know_is_refused(
    make_host: MakeHost, revision: str, kind: type[SagaLogError]
) -> None:
    host = make_host()
    host.write()
    host.upgrade()
    with host.engine.begin() as connection:
        connection.execute(text("UPDATE sagalog_version SET version_num = :r"), {"r": revision})
    with pytest.raises(kind, match=revision):
        host.downgrade("-1")
    assert host.tables() > SAGALOGS


def test_a_log_that_the_application_brought_itself_goes_on_from_there(make_host: MakeHost) -> None:
    host = make_host()
    migrations.upgrade(host.engine, "sagalog_0002")
    SagaLog(host.engine)
    with host.engine.begin() as connection:
        connection.execute(
            text("INSERT INTO saga (saga_id, name, state, started_at, input_json) VALUES (7, 's', 'running', 1, '1')")
        )
    host.write()
    host.upgrade()
    assert SagaLog(host.engine).get(7).input == 1


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda op: migrations.upgrade(op, from_="base"), "to="),
        (lambda op: migrations.upgrade(op, "head", from_="base"), "has to do the same for ever"),
        (lambda op: migrations.upgrade(op, HEAD), "from_="),
        (lambda op: migrations.upgrade(op, "sagalog_0099", from_="base"), "update the package"),
        (lambda op: migrations.upgrade(op, "sagalog_0001", from_="sagalog_0002"), "is not above"),
        (lambda op: migrations.downgrade(op, HEAD, from_="base"), "is not below"),
        (lambda op: migrations.downgrade(op, "base", from_="base"), "is not below"),
    ],
)
def test_a_step_has_to_name_two_ends_in_order(step: Callable[[Any], None], said: str) -> None:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        op = Operations(MigrationContext.configure(connection))
        with pytest.raises(ValueError, match=said):
            step(op)
        assert inspect(connection).get_table_names() == []
    engine.dispose()


def test_from_is_for_hosts_only() -> None:
    engine = create_engine("sqlite://")
    for refused in (
        lambda: migrations.upgrade(engine, HEAD, from_="base"),  # type: ignore[call-overload]
        lambda: migrations.downgrade(engine, "base", from_=HEAD),  # type: ignore[call-overload]
    ):
        with pytest.raises(ValueError, match="inside a host's Alembic revision"):
            refused()
    engine.dispose()
