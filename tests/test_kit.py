"""The pytest plugin as a user meets it: pytest in a process and a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from sagalog import AsyncSagaLog, LogUnavailable, SagaLog, SagaOutcome, SchemaMissing, UnusableBind, migrations
from sagalog.testing import MemoryDatabase, start_empty

SYNC = """
    from sagalog import Saga
    from sqlalchemy.orm import Session

    def test_one(saga_log):
        assert saga_log.create_saga("place_order", {"order": 1}) == 1

    def test_another_begins_empty(saga_log):
        assert saga_log.counts() == {}
        assert saga_log.create_saga("place_order", {"order": 2}) == 1

    def test_the_log_is_over_the_engine(saga_log, saga_engine):
        saga_log.create_saga("place_order", {"order": 3})
        with Session(saga_engine) as session:
            assert session.get(Saga, 1).input == {"order": 3}
"""

ASYNC = """
    import pytest
    from sagalog import AsyncSagaLog
    from sqlalchemy.ext.asyncio import AsyncSession

    {mark}

    async def test_one(async_saga_log):
        assert await async_saga_log.create_saga("place_order", {{"order": 1}}) == 1

    async def test_another_begins_empty(async_saga_log):
        assert await async_saga_log.counts() == {{}}
        assert await async_saga_log.create_saga("place_order", {{"order": 2}}) == 1

    async def test_the_log_is_over_the_engine(async_saga_log, async_saga_engine):
        async with AsyncSession(async_saga_engine) as session:
            await AsyncSagaLog(session).create_saga("place_order", {{"order": 3}})
            await session.commit()
        assert (await async_saga_log.get(1)).input == {{"order": 3}}

    async def test_both_logs_are_of_one_database(async_saga_log, saga_log):
        await async_saga_log.create_saga("place_order", {{"order": 4}})
        assert saga_log.get(1).input == {{"order": 4}}
"""

WITHOUT_A_PLUGIN = """
    import asyncio

    def test_one(async_saga_log):
        async def main():
            assert await async_saga_log.create_saga("place_order", {"order": 1}) == 1

        asyncio.run(main())
        asyncio.run(async_saga_log.get(1))

    def test_another_begins_empty(async_saga_log):
        assert asyncio.run(async_saga_log.counts()) == {}
"""

STRICT = "pytestmark = pytest.mark.asyncio"
ANYIO = "pytestmark = pytest.mark.anyio"
ON_ASYNCIO = """
    import pytest

    @pytest.fixture
    def anyio_backend():
        return "asyncio"
"""
PLAIN = ("-p", "no:asyncio", "-p", "no:anyio")
SCOPE = ("-o", "asyncio_default_fixture_loop_scope=function")


class Project:
    """A user's folder with a conftest and tests, and pytest in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = ""

    def write(self, **modules: str) -> None:
        for name, source in modules.items():
            (self.folder / f"{name}.py").write_text(dedent(source))

    def run(self, *arguments: str) -> dict[str, int]:
        """The outcomes; every warning is an error, an unclosed connection's among them."""
        command = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "--rootdir=."]
        done = subprocess.run([*command, *arguments], cwd=self.folder, capture_output=True, text=True, check=False)
        self.output = done.stdout + done.stderr
        try:
            return pytest.RunResult.parse_summary_nouns(done.stdout.splitlines())
        except ValueError:
            pytest.fail(self.output)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An empty folder of a user's."""
    folder = tmp_path / "project"
    folder.mkdir()
    return Project(folder)


def test_each_test_has_a_log_of_its_own(project: Project) -> None:
    project.write(test_it=SYNC)
    assert project.run(*PLAIN) == {"passed": 3}


def test_the_migrations_run_once_for_all_tests(project: Project) -> None:
    project.write(
        test_it="""
        import logging
        import pytest
        from sagalog import migrations

        ran = []

        class Noting(logging.Handler):
            def emit(self, record):
                ran.append(record.getMessage())

        logging.getLogger("alembic.runtime.migration").addHandler(Noting())
        logging.getLogger("alembic.runtime.migration").setLevel(logging.INFO)

        @pytest.mark.parametrize("number", range(20))
        def test_many(saga_log, number):
            assert saga_log.create_saga("place_order", number) == 1

        def test_the_steps_that_were_run():
            steps = [message for message in ran if message.startswith("Running upgrade")]
            assert len(steps) == len(set(steps)) > 0
        """
    )
    assert project.run(*PLAIN) == {"passed": 21}


def test_it_works_on_the_workers_of_xdist(project: Project) -> None:
    project.write(test_sync=SYNC, test_more=SYNC, test_async=WITHOUT_A_PLUGIN)
    assert project.run(*PLAIN, "-n", "2") == {"passed": 8}


@pytest.mark.parametrize(
    ("mark", "arguments"),
    [
        (STRICT, ("-p", "no:anyio", *SCOPE)),
        (STRICT, ("-p", "no:anyio", "-o", "asyncio_default_test_loop_scope=session", *SCOPE)),
        ("", ("-o", "asyncio_mode=auto", *SCOPE)),
        (ANYIO, ("-p", "no:asyncio")),
        (ANYIO, SCOPE),
    ],
    ids=["asyncio-strict", "one-loop-for-all", "asyncio-auto-beside-anyio", "anyio", "anyio-beside-asyncio-strict"],
)
def test_it_works_under_the_plugins_for_async_tests(project: Project, mark: str, arguments: tuple[str, ...]) -> None:
    project.write(conftest=ON_ASYNCIO, test_it=ASYNC.format(mark=mark))
    assert project.run(*arguments) == {"passed": 4}


def test_on_trio_it_says_that_it_needs_asyncio(project: Project) -> None:
    project.write(conftest=ON_ASYNCIO.replace("asyncio", "trio"))
    project.write(test_it=ASYNC.format(mark=ANYIO))
    assert project.run("-p", "no:asyncio") == {"errors": 4}
    assert "works on asyncio, as SQLAlchemy does, and this test runs on trio" in project.output


def test_it_works_without_a_plugin_for_async_tests(project: Project) -> None:
    project.write(test_it=WITHOUT_A_PLUGIN)
    assert project.run(*PLAIN) == {"passed": 2}


@pytest.mark.parametrize("missing", ["aiosqlite", "greenlet"])
def test_without_the_extra_the_async_fixtures_say_what_to_install(project: Project, missing: str) -> None:
    project.write(conftest=f"import sys\nsys.modules[{missing!r}] = None")
    project.write(test_it=SYNC + WITHOUT_A_PLUGIN.replace("test_one", "test_async").replace("_empty", "_empty_async"))
    assert project.run(*PLAIN) == {"passed": 3, "errors": 2}
    assert f"an async engine needs {missing}: pip install 'sagalog[asyncio]'" in project.output


def test_a_run_that_uses_no_fixture_imports_nothing_of_sagalog(project: Project) -> None:
    project.write(
        test_it="""
        import sys

        def test_what_is_loaded():
            assert "pytest_sagalog" in sys.modules
            assert not {"sagalog", "sqlalchemy", "alembic", "pydantic"} & set(sys.modules)
        """
    )
    assert project.run(*PLAIN, "-p", "no:hypothesispytest", "-p", "no:pytest_alembic") == {"passed": 1}


def test_coverage_sees_sagalog_being_imported(project: Project) -> None:
    project.write(test_it=SYNC)
    assert project.run(*PLAIN, "--cov=sagalog", "--cov-report=json:coverage.json") == {"passed": 3}
    files = json.loads((project.folder / "coverage.json").read_text())["files"]
    (states,) = (measured for path, measured in files.items() if path.endswith("states.py"))
    # All that the module defines is run once, by the import.
    assert states["summary"]["percent_covered"] > 60


OVERRIDE = """
    import pytest
    from sqlalchemy import create_engine
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    @pytest.fixture(scope="session")
    def saga_engine():
        engine = create_engine({sync!r})
        yield engine
        engine.dispose()

    @pytest.fixture
    def async_saga_engine():
        return create_async_engine({driver!r}, poolclass=NullPool)
"""


def asyncpg(url: str) -> str:
    from sqlalchemy import make_url

    target = make_url(url).set(drivername="postgresql+asyncpg")
    if "host" in target.query:
        target = target.set(query={"host": target.query["host"]})
    return target.render_as_string(hide_password=False)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg", "aiosqlite"])
def test_overridden_engines_are_migrated_and_begin_every_test_empty(
    project: Project, request: pytest.FixtureRequest, tmp_path: Path, driver: str
) -> None:
    if driver == "aiosqlite":
        url = f"sqlite:///{tmp_path / 'mine.db'}"
        target = url.replace("sqlite", "sqlite+aiosqlite")
    else:
        url = request.getfixturevalue("empty_postgres_url")
        target = asyncpg(url) if driver == "asyncpg" else url
    project.write(conftest=OVERRIDE.format(sync=url, driver=target))
    project.write(test_sync=SYNC, test_async=ASYNC.format(mark=STRICT))
    assert project.run("-p", "no:anyio", *SCOPE) == {"passed": 7}
    # What a run leaves behind, as one that is killed does, is no hindrance to the next.
    assert project.run("-p", "no:anyio", *SCOPE) == {"passed": 7}
    engine = create_engine(url)
    migrations.check(engine)
    engine.dispose()


def test_a_pool_bound_to_the_tests_loop_is_left_alone(project: Project, empty_postgres_url: str) -> None:
    project.write(
        conftest=f"""
        import pytest_asyncio
        from sqlalchemy.ext.asyncio import create_async_engine

        @pytest_asyncio.fixture(scope="session", loop_scope="session")
        async def async_saga_engine():
            engine = create_async_engine({asyncpg(empty_postgres_url)!r})
            yield engine
            await engine.dispose()
        """
    )
    project.write(
        test_it=ASYNC.format(mark='pytestmark = pytest.mark.asyncio(loop_scope="session")').partition(
            "    async def test_both"
        )[0]
    )
    assert project.run("-p", "no:anyio", *SCOPE) == {"passed": 3}


def test_a_database_that_holds_sagas_is_not_emptied(migrated_url: str) -> None:
    engine = create_engine(migrated_url)
    log = SagaLog(engine)
    log.create_saga("place_order", {"order": 42})
    migrations.downgrade(engine, "sagalog_0002")
    with pytest.raises(UnusableBind, match="holds 1 sagas and was never used for tests"):
        start_empty(engine)
    assert migrations.current(engine) == "sagalog_0002", "it was migrated before it was refused"
    migrations.upgrade(engine)
    assert log.get(1).input == {"order": 42}
    engine.dispose()


def test_everything_of_the_log_is_emptied_and_ids_begin_again(database_url: str) -> None:
    engine = create_engine(database_url)
    start_empty(engine)
    log = SagaLog(engine)
    for _ in range(2):
        saga_id = log.create_saga("place_order", {"order": 42}, key="order-42")
        assert saga_id == 1
        log.start_step(saga_id, 0, "ReserveStock", {})
        log.mark_failed_compensation(saga_id, "no answer")
        log.resolve_step(saga_id, 0, "failed", note="looked", actor="ada")
        pruned = log.create_saga("place_order", None)
        log.terminate(pruned, SagaOutcome.completed())
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO saga_executor VALUES ('e', NULL, 0, 0)"))
            connection.execute(text("INSERT INTO sagalog_meta VALUES ('environment', 'production')"))
        start_empty(engine)
    tables = ("saga", "saga_step", "saga_audit", "saga_executor")
    with engine.connect() as connection:
        assert {connection.scalar(text(f"SELECT count(*) FROM {table}")) for table in tables} == {0}
        facts = set(connection.scalars(text("SELECT name FROM sagalog_meta")))
    assert {"log_id", "oldest_revision"} <= facts
    assert not {"environment", "highest_pruned_saga_id"} & facts
    engine.dispose()


def test_tables_with_a_prefix_are_emptied_and_no_others(database_url: str) -> None:
    engine = create_engine(database_url)
    start_empty(engine)
    start_empty(engine, prefix="shop_")
    plain, prefixed = SagaLog(engine), SagaLog(engine, prefix="shop_")
    for log in (plain, prefixed):
        log.create_saga("place_order", None)
    start_empty(engine, prefix="shop_")
    assert (plain.max_saga_id(), prefixed.max_saga_id()) == (1, 0)
    assert prefixed.create_saga("place_order", None) == 1
    engine.dispose()


def test_a_hosts_row_that_refers_to_a_saga_is_told_and_stays(database_url: str) -> None:
    engine = create_engine(database_url)
    start_empty(engine)
    SagaLog(engine).create_saga("place_order", None)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (saga_id BIGINT REFERENCES saga(saga_id))"))
        connection.execute(text("INSERT INTO orders VALUES (1)"))
    if engine.dialect.name == "sqlite":
        engine.dispose()

        from sqlalchemy import event

        event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = ON"))
    with pytest.raises(LogUnavailable, match="host's"):
        start_empty(engine)
    assert SagaLog(engine).counts() == {"running": 1}
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM orders"))
    start_empty(engine)
    assert SagaLog(engine).counts() == {}
    engine.dispose()


def test_a_database_in_memory_enforces_foreign_keys_and_goes_when_closed() -> None:
    with MemoryDatabase() as database:
        engine = database.engine()
        with engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        SagaLog(database.engine()).create_saga("place_order", None)
        assert SagaLog(engine).counts() == {"running": 1}
    database.close()
    with pytest.raises(SchemaMissing):
        SagaLog(engine).counts()
    engine.dispose()


def test_start_empty_may_be_called_while_an_event_loop_runs(empty_postgres_url: str) -> None:
    import asyncio

    async def main() -> None:
        engine = create_async_engine(empty_postgres_url, poolclass=NullPool)
        start_empty(engine)
        assert await AsyncSagaLog(engine).create_saga("place_order", None) == 1

    asyncio.run(main())
