"""Transactional handlers that end their transaction themselves: refused, or the step is in doubt."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import suppress
from typing import Any, Literal

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sagalog import (
    AsyncSagaCoordinator,
    AsyncSagaLog,
    Command,
    CommandBus,
    Retry,
    SagaCoordinator,
    SagaFailed,
    SagaLog,
    UnusableBind,
)
from sagalog.coordinator.ending_sql import ends_transaction
from tests.coordinating import ON_POSTGRES, ON_SQLITE, Keep, Stage, notes
from tests.troubled import Done, Release, Reserve, reserving


def test_a_transactional_handler_cannot_commit_without_its_step(stocked: Engine) -> None:
    bus, undone = CommandBus(), []

    @bus.handler(transactional=True)
    def do_reserve(cmd: Reserve, session: Session) -> Done:
        session.execute(text("INSERT INTO stock VALUES (1)"))
        session.commit()
        raise ValueError("too late")

    @bus.compensation(Reserve)
    def undo_reserve(cmd: Reserve, output: Done) -> Release:
        return Release()

    @bus.handler
    def do_release(cmd: Release) -> None:
        undone.append(cmd)

    with SagaCoordinator(SagaLog(stocked), bus) as coordinator, pytest.raises(SagaFailed, match="commit") as failed:
        coordinator.run(reserving(coordinator), 1)
    assert failed.value.outcome == "compensated"
    with stocked.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM stock")).scalar_one() == 0


@pytest.mark.parametrize("driver", ["sync", "async"])
def test_a_transactional_handler_cannot_commit_by_its_connection(migrated_url: str, driver: str) -> None:
    engine = create_engine(migrated_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE kept (place INTEGER)"))
    bus = CommandBus()
    insert = text("INSERT INTO kept VALUES (1)")

    async def main() -> None:
        @bus.handler(transactional=True, read_only=True)
        async def keep(cmd: Keep, session: AsyncSession) -> int:
            await session.execute(insert)
            await (await session.connection()).commit()
            return 1

        own = create_async_engine(migrated_url.replace("sqlite:", "sqlite+aiosqlite:"))
        coordinator = AsyncSagaCoordinator(AsyncSagaLog(own), bus)

        @coordinator.saga("keeps")
        async def keeps(ctx: Any) -> None:
            await ctx.dispatch(Keep())

        with pytest.raises(SagaFailed, match="without the end of its step"):
            await coordinator.run(keeps)
        await coordinator.close()
        await own.dispose()

    if driver == "async":
        asyncio.run(main())
    else:

        @bus.handler(transactional=True, read_only=True)
        def keep(cmd: Keep, session: Session) -> int:
            session.execute(insert)
            session.connection().commit()
            return 1

        with SagaCoordinator(SagaLog(engine), bus) as coordinator:

            @coordinator.saga("keeps")
            def keeps(ctx: Any) -> None:
                ctx.dispatch(Keep())

            with pytest.raises(SagaFailed, match="without the end of its step"):
                coordinator.run(keeps)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM kept")).scalar_one() == 0
    engine.dispose()


class Sneak(Command[None]):
    """Its handler writes a row, and then runs a statement on the driver, and then perhaps raises."""

    statement: str
    raises: bool = False
    also: Literal["", "rollback", "close"] = ""


def by_the_driver(session: Session, statement: str) -> None:
    cursor = session.connection().connection.cursor()
    cursor.execute(statement)
    cursor.close()


def sneaking(stage: Stage, tries: list[Any], **arguments: Any) -> Any:
    stage.sql("CREATE TABLE note (body TEXT NOT NULL)")
    insert = text("INSERT INTO note VALUES ('kept')")
    if stage.asynchronous:

        @stage.bus.handler(transactional=True, read_only=True, **arguments)
        async def asneak(cmd: Sneak, session: AsyncSession) -> None:
            tries.append(cmd)
            await session.execute(insert)
            await session.run_sync(by_the_driver, cmd.statement)
            if cmd.also:
                await getattr(session, cmd.also)()
            if cmd.raises:
                raise ValueError("after all")
            await session.execute(insert)
    else:

        @stage.bus.handler(transactional=True, read_only=True, **arguments)
        def sneak(cmd: Sneak, session: Session) -> None:
            tries.append(cmd)
            session.execute(insert)
            by_the_driver(session, cmd.statement)
            if cmd.also:
                getattr(session, cmd.also)()
            if cmd.raises:
                raise ValueError("after all")
            session.execute(insert)

    coordinator = stage.coordinator()

    @coordinator.saga("sneaks")
    def sneaks(ctx: Any, cmd: Sneak) -> None:
        ctx.dispatch(cmd)

    return coordinator


@pytest.mark.parametrize(
    ("statement", "swallows"),
    [("COMMIT", True), (" end;", False), ("/* so */ ROLLBACK", True), ("-- so\n commit work", False)],
)
def test_a_statement_that_ends_a_transactional_handlers_transaction_is_refused(
    stage: Stage, statement: str, swallows: bool
) -> None:
    stage.sql("CREATE TABLE note (body TEXT NOT NULL)")
    insert = text("INSERT INTO note VALUES ('kept')")
    stops = contextlib.suppress(UnusableBind) if swallows else contextlib.nullcontext()

    if stage.asynchronous:

        @stage.bus.handler(transactional=True, read_only=True)
        async def akeep(cmd: Keep, session: AsyncSession) -> int:
            await session.execute(text("/* a box */\n" * 60 + str(insert)))
            async with session.begin_nested() as nested:
                await session.execute(insert)
                await nested.rollback()
            with stops:
                await session.execute(text(statement))
            return 7
    else:

        @stage.bus.handler(transactional=True, read_only=True)
        def keep(cmd: Keep, session: Session) -> int:
            session.execute(text("/* a box */\n" * 60 + str(insert)))
            with session.begin_nested() as nested:
                session.execute(insert)
                nested.rollback()
            with stops:
                session.execute(text(statement))
            return 7

    coordinator = stage.coordinator()

    @coordinator.saga("keeps")
    def keeps(ctx: Any) -> int:
        return int(ctx.dispatch(Keep()))

    if swallows:
        assert (coordinator.run("keeps"), notes(stage)) == (7, ["kept"])
        return
    with pytest.raises(SagaFailed, match="Leave the end of the transaction to the coordinator"):
        coordinator.run("keeps")
    assert (stage.log.get(1).steps[0].state, notes(stage)) == ("failed", [])


@pytest.mark.parametrize(("raises", "also"), [(False, ""), (True, ""), (True, "rollback"), (True, "close")])
def test_a_step_whose_handler_commits_by_the_drivers_own_means_is_in_doubt(
    stage: Stage, raises: bool, also: Any
) -> None:
    tries: list[Any] = []
    coordinator = sneaking(stage, tries)
    with pytest.raises(SagaFailed, match="ended by SQL of its own") as failure:
        coordinator.run("sneaks", Sneak(statement="COMMIT", raises=raises, also=also))
    assert failure.value.outcome == "failed_compensation"
    record = stage.log.get(failure.value.saga_id)
    assert [step.state for step in record.steps] == ["pending"]
    assert len(tries) == 1


def test_what_a_handler_ended_itself_is_not_taken_for_undone_by_recovery(stage: Stage) -> None:
    coordinator = sneaking(stage, [])
    with pytest.raises(SagaFailed) as failure:
        coordinator.run("sneaks", Sneak(statement="COMMIT"))
    saga_id = failure.value.saga_id
    stage.sql("UPDATE saga SET state = 'running', executor_id = NULL")
    assert "in doubt" in coordinator.recover().failed_compensation[saga_id]


def test_a_handler_that_ended_its_transaction_is_not_called_again_though_it_may_be(stage: Stage) -> None:
    tries: list[Any] = []
    coordinator = sneaking(stage, tries, idempotent=True, retry=Retry(attempts=3, initial=0.0))
    with pytest.raises(SagaFailed, match="ended by SQL of its own") as failure:
        coordinator.run("sneaks", Sneak(statement="COMMIT"))
    saga_id = failure.value.saga_id
    stage.sql("UPDATE saga SET state = 'running', executor_id = NULL")
    assert "in doubt" in coordinator.recover().failed_compensation[saga_id]
    assert len(tries) == 1


def test_a_transactional_handler_may_roll_back_and_go_on(stocked: Engine) -> None:
    bus = CommandBus()

    @bus.handler(transactional=True, pivot=True)
    def do_reserve(cmd: Reserve, session: Session) -> Done:
        session.execute(text("INSERT INTO stock VALUES (1)"))
        session.rollback()
        session.execute(text("INSERT INTO stock VALUES (2)"))
        return Done()

    with SagaCoordinator(SagaLog(stocked), bus) as coordinator:
        assert coordinator.run(reserving(coordinator), 1) == 1
    with stocked.connect() as connection:
        assert connection.execute(text("SELECT amount FROM stock")).scalars().all() == [2]


# A transaction that the database ends by itself


class Put(Command[None]):
    statement: str = ""
    after: Literal["raises", "returns", "goes on", "rolls back and goes on"] = "raises"


class Unput(Command[None]):
    """Deletes what was put."""


TWICE = "INSERT OR ROLLBACK INTO note VALUES ('there')"
TRIGGERED = "INSERT INTO note VALUES ('never')"


def putting(stage: Stage, tries: list[Any]) -> Any:
    """A saga of one transactional step that SQLite rolls back, beside a row that is somebody else's."""
    for statement in (
        "CREATE TABLE note (body TEXT PRIMARY KEY)",
        "INSERT INTO note VALUES ('there')",
        "CREATE TRIGGER never BEFORE INSERT ON note WHEN new.body = 'never' BEGIN SELECT raise(ROLLBACK, 'never'); END",
    ):
        stage.sql(statement)

    def put_in(cmd: Put, session: Session) -> None:
        tries.append(cmd)
        session.execute(text("INSERT INTO note VALUES ('first')"))
        try:
            session.execute(text(cmd.statement))
        except DBAPIError:
            if cmd.after == "raises":
                raise
        if cmd.after == "rolls back and goes on":
            session.rollback()
        if cmd.after.endswith("goes on"):
            session.execute(text("INSERT INTO note VALUES ('second')"))

    if stage.asynchronous:

        @stage.bus.handler(transactional=True, on_unknown="compensate")
        async def aput(cmd: Put, session: AsyncSession) -> None:
            await session.run_sync(lambda sync: put_in(cmd, sync))
    else:

        @stage.bus.handler(transactional=True, on_unknown="compensate")
        def put(cmd: Put, session: Session) -> None:
            put_in(cmd, session)

    @stage.bus.handler(transactional=True)
    def unput(cmd: Unput, session: Session) -> None:
        session.execute(text("DELETE FROM note"))

    @stage.bus.compensation(Put)
    def unput_of(cmd: Put, output: None) -> Unput:
        return Unput()

    coordinator = stage.coordinator()

    @coordinator.saga("puts")
    def puts(ctx: Any, cmd: Put) -> None:
        ctx.dispatch(cmd)

    return coordinator


@pytest.mark.parametrize("stage", ON_SQLITE, indirect=True)
@pytest.mark.parametrize("statement", [TWICE, TRIGGERED], ids=["OR ROLLBACK", "trigger"])
@pytest.mark.parametrize("after", ["raises", "returns", "goes on"])
def test_a_transactional_handler_whose_transaction_sqlite_rolled_back_did_nothing(
    stage: Stage, statement: str, after: Any
) -> None:
    tries: list[Any] = []
    coordinator = putting(stage, tries)
    with pytest.raises(SagaFailed) as failure:
        coordinator.run("puts", Put(statement=statement, after=after))
    assert failure.value.outcome == "compensated"
    record = stage.log.get(failure.value.saga_id)
    assert ([(step.name, step.state) for step in record.steps], notes(stage)) == ([("Put", "failed")], ["there"])
    assert len(tries) == 1


@pytest.mark.parametrize("stage", ON_SQLITE, indirect=True)
def test_a_transactional_handler_may_roll_back_what_sqlite_rolled_back_and_go_on(stage: Stage) -> None:
    coordinator = putting(stage, [])
    coordinator.run("puts", Put(statement=TWICE, after="rolls back and goes on"))
    assert sorted(notes(stage)) == ["second", "there"]


@pytest.mark.parametrize("stage", ON_SQLITE, indirect=True)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_handler_committed_beside_a_rollback_of_sqlites_is_in_doubt(stage: Stage, when: str) -> None:
    stage.sql("CREATE TABLE note (body TEXT PRIMARY KEY)")
    stage.sql("INSERT INTO note VALUES ('there')")

    def commit_beside(cmd: Put, session: Session) -> None:
        session.execute(text("INSERT INTO note VALUES ('first')"))
        if when == "before":
            by_the_driver(session, "COMMIT")
            session.execute(text("INSERT INTO note VALUES ('second')"))
        with suppress(DBAPIError):
            session.execute(text(TWICE))
        if when == "after":
            by_the_driver(session, "INSERT INTO note VALUES ('third')")
            by_the_driver(session, "COMMIT")
        session.rollback()
        raise ValueError("after all")

    if stage.asynchronous:

        @stage.bus.handler(transactional=True, pivot=True)
        async def abeside(cmd: Put, session: AsyncSession) -> None:
            await session.run_sync(lambda sync: commit_beside(cmd, sync))
    else:
        stage.bus.handler(transactional=True, pivot=True)(commit_beside)
    coordinator = stage.coordinator()

    @coordinator.saga("commits")
    def commits(ctx: Any) -> None:
        ctx.dispatch(Put())

    with pytest.raises(SagaFailed, match="ended by SQL of its own") as failure:
        coordinator.run("commits")
    assert failure.value.outcome == "failed_compensation"
    assert sorted(notes(stage)) == (["first", "there"] if when == "before" else ["there", "third"])


@pytest.mark.parametrize("stage", ON_SQLITE, indirect=True)
def test_a_transactional_handler_on_a_full_disk_did_nothing_and_is_tried_again(stage: Stage) -> None:
    tries: list[Any] = []
    stage.sql("CREATE TABLE note (body TEXT)")
    (pages,) = stage.sql("PRAGMA page_count")[0]

    def fill(cmd: Put, session: Session) -> None:
        tries.append(cmd)
        session.execute(text(f"PRAGMA max_page_count = {pages + 5 if len(tries) < 3 else 1_000_000}"))
        session.execute(text("INSERT INTO note VALUES (hex(randomblob(100000)))"))

    bus = CommandBus()
    if stage.asynchronous:

        @bus.handler(transactional=True, pivot=True)
        async def afull(cmd: Put, session: AsyncSession) -> None:
            await session.run_sync(lambda sync: fill(cmd, sync))
    else:
        bus.handler(transactional=True, pivot=True)(fill)
    full = stage.coordinator(bus)

    @full.saga("fills")
    def fills(ctx: Any) -> None:
        ctx.dispatch(Put())

    full.run("fills")
    assert (len(tries), len(notes(stage))) == (3, 1)


@pytest.mark.parametrize("stage", ON_POSTGRES, indirect=True)
def test_a_transactional_handler_may_go_on_after_its_connection_was_lost(stage: Stage) -> None:
    stage.sql("CREATE TABLE note (body TEXT)")
    tries: list[Any] = []

    def lose(cmd: Put, session: Session) -> None:
        tries.append(cmd)
        session.execute(text("INSERT INTO note VALUES ('first')"))
        backend = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        stage.sql("SELECT pg_terminate_backend(:backend)", backend=backend)
        with suppress(DBAPIError):
            session.execute(text("SELECT 1"))
        session.rollback()
        session.execute(text("INSERT INTO note VALUES ('second')"))

    if stage.asynchronous:

        @stage.bus.handler(transactional=True, pivot=True)
        async def alose(cmd: Put, session: AsyncSession) -> None:
            await session.run_sync(lambda sync: lose(cmd, sync))
    else:
        stage.bus.handler(transactional=True, pivot=True)(lose)
    coordinator = stage.coordinator()

    @coordinator.saga("loses")
    def loses(ctx: Any) -> None:
        ctx.dispatch(Put())

    coordinator.run("loses")
    assert (len(tries), notes(stage)) == (1, ["second"])


# Which SQL is refused


@pytest.mark.parametrize(
    "statement",
    ["COMMIT", " end;", ";commit", "-- so\rcommit work", "/* a */ /* b */ROLLBACK", "rollback and chain", "Abort",
     "prepare /* it */ transaction 'a'", "ROLLBACK WORK"],
)  # fmt: skip
@pytest.mark.parametrize("comments_nest", [True, False])
def test_what_ends_a_transaction_is_told_by_its_first_words(statement: str, comments_nest: bool) -> None:
    assert ends_transaction(statement, comments_nest=comments_nest)


@pytest.mark.parametrize(
    "statement",
    ["", "SELECT 1 -- commit", "endow", "ROLLBACK /* c */ TO SAVEPOINT a", "rollback work to a", "PREPARE commit AS",
     "/* COMMIT", "'commit'", "(select 1)", "-- commit", "/* a */"],
)  # fmt: skip
def test_what_ends_no_transaction_is_left_alone(statement: str) -> None:
    assert not ends_transaction(statement, comments_nest=True)


def test_a_comment_in_a_comment_hides_a_commit_where_comments_nest() -> None:
    statement = "/* a /* b */ COMMIT */ SELECT 1"
    assert not ends_transaction(statement, comments_nest=True)
    assert ends_transaction(statement, comments_nest=False)
