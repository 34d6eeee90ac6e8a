"""Transactional handlers that end their transaction themselves: refused, or the step is in doubt."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Literal

import pytest
from sqlalchemy import Engine, create_engine, text
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
from tests.coordinating import Keep, Stage, by_the_driver, notes
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
