"""Transactional handlers whose transaction the database itself rolls back: they did nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sagalog import (
    Command,
    SagaFailed,
)
from tests.coordinating import ON_POSTGRES, ON_SQLITE, Stage, by_the_driver, notes


class Put(Command[None]):
    statement: str = ""
    after: Literal["raises", "returns", "goes on", "rolls back and goes on"] = "raises"


class Unput(Command[None]):
    """Deletes what was put."""


TWICE = "INSERT OR ROLLBACK INTO note VALUES ('there')"
TRIGGERED = "INSERT INTO note VALUES ('never')"


def handles(stage: Stage, function: Callable[[Put, Session], None], **arguments: Any) -> None:
    """Register a transactional handler of `Put`, sync or async as the stage is."""

    async def handle_async(cmd: Put, session: AsyncSession) -> None:
        await session.run_sync(lambda sync: function(cmd, sync))

    def handle(cmd: Put, session: Session) -> None:
        function(cmd, session)

    stage.bus.handler(transactional=True, **arguments)(handle_async if stage.asynchronous else handle)


def putting(stage: Stage) -> Any:
    """A saga of one `Put`."""
    coordinator = stage.coordinator()

    @coordinator.saga("puts")
    def puts(ctx: Any, cmd: Put) -> None:
        ctx.dispatch(cmd)

    return coordinator


def rolled_back(stage: Stage, tries: list[Any]) -> Any:
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

    handles(stage, put_in, on_unknown="compensate")

    @stage.bus.handler(transactional=True)
    def unput(cmd: Unput, session: Session) -> None:
        session.execute(text("DELETE FROM note"))

    @stage.bus.compensation(Put)
    def unput_of(cmd: Put, output: None) -> Unput:
        return Unput()

    return putting(stage)


@pytest.mark.parametrize("stage", ON_SQLITE, indirect=True)
@pytest.mark.parametrize("statement", [TWICE, TRIGGERED], ids=["OR ROLLBACK", "trigger"])
@pytest.mark.parametrize("after", ["raises", "returns", "goes on"])
def test_a_transactional_handler_whose_transaction_sqlite_rolled_back_did_nothing(
    stage: Stage, statement: str, after: Any
) -> None:
    tries: list[Any] = []
    coordinator = rolled_back(stage, tries)
    with pytest.raises(SagaFailed) as failure:
        coordinator.run("puts", Put(statement=statement, after=after))
    assert failure.value.outcome == "compensated"
    record = stage.log.get(failure.value.saga_id)
    assert ([(step.name, step.state) for step in record.steps], notes(stage)) == ([("Put", "failed")], ["there"])
    assert len(tries) == 1


@pytest.mark.parametrize("stage", ON_SQLITE, indirect=True)
def test_a_transactional_handler_may_roll_back_what_sqlite_rolled_back_and_go_on(stage: Stage) -> None:
    coordinator = rolled_back(stage, [])
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

    handles(stage, commit_beside, pivot=True)
    coordinator = putting(stage)

    with pytest.raises(SagaFailed, match="ended by SQL of its own") as failure:
        coordinator.run("puts", Put())
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

    handles(stage, fill, pivot=True)
    full = putting(stage)
    full.run("puts", Put())
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

    handles(stage, lose, pivot=True)
    coordinator = putting(stage)

    coordinator.run("puts", Put())
    assert (len(tries), notes(stage)) == (1, ["second"])
