"""Transactional handlers: their rows commit with their step, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from sagalog import (
    CommandBus,
    Retry,
    SagaCoordinator,
    SagaFailed,
    SagaLog,
    StepFailed,
    StepInfo,
    StepRejected,
    UnusableHandler,
)
from sagalog.coordinator.effects import Invoke
from sagalog.errors import LogUnavailable
from tests.coordinating import Keep, Stage, Unkeep, notes
from tests.troubled import Done, Release, Reserve, reserving


class Note(BaseModel):
    text: str


def noting(stage: Stage, bus: CommandBus, trouble: list[BaseException]) -> None:
    """A handler that writes a row of the host's, sync or async, and then perhaps raises."""
    insert = text("INSERT INTO note (body) VALUES (:body)")

    if stage.asynchronous:

        @bus.handler(transactional=True, pivot=True)
        async def anote(cmd: Note, session: AsyncSession) -> None:
            await session.execute(insert, {"body": cmd.text})
            if trouble:
                raise trouble.pop()
    else:

        @bus.handler(transactional=True, pivot=True)
        def note(cmd: Note, session: Session) -> None:
            session.execute(insert, {"body": cmd.text})
            if trouble:
                raise trouble.pop()


def note_taking(stage: Stage, trouble: list[BaseException], then: Any = None) -> Any:
    stage.sql("CREATE TABLE note (body TEXT NOT NULL UNIQUE)")
    noting(stage, stage.bus, trouble)
    coordinator = stage.coordinator()

    @coordinator.saga("take_note")
    def take_note(ctx: Any, words: str) -> None:
        ctx.dispatch(Note(text=words))
        if then is not None:
            then(ctx)

    return coordinator


def test_a_transactional_handlers_writes_commit_with_its_step(stage: Stage) -> None:
    seen: list[Any] = []
    coordinator = note_taking(
        stage, [], lambda ctx: seen.append((notes(stage), stage.log.get(ctx.saga_id).steps[0].state))
    )
    coordinator.run("take_note", "hello")
    assert seen == [(["hello"], "succeeded")]


def test_a_transactional_handler_that_raises_did_nothing(stage: Stage) -> None:
    coordinator = note_taking(stage, [OSError("too late")])
    with pytest.raises(SagaFailed, match="OSError: too late") as failure:
        coordinator.run("take_note", "hello")
    assert failure.value.outcome == "compensated"
    assert notes(stage) == []
    assert stage.log.get(failure.value.saga_id).steps[0].state == "failed"


def test_a_transactional_handler_that_breaks_a_constraint_did_nothing(stage: Stage) -> None:
    coordinator = note_taking(stage, [])
    coordinator.run("take_note", "hello")
    with pytest.raises(SagaFailed) as failure:
        coordinator.run("take_note", "hello")
    assert isinstance(failure.value.cause.__cause__, IntegrityError)  # type: ignore[union-attr]
    assert failure.value.outcome == "compensated"
    assert notes(stage) == ["hello"]


def test_a_transactional_handler_of_a_process_that_lost_its_saga_commits_nothing(stage: Stage) -> None:
    class Late(BaseModel):
        text: str

    coordinator = note_taking(stage, [], lambda ctx: ctx.dispatch(Late(text="late")))

    def lose(cmd: Late, session: Session) -> None:
        session.execute(text("INSERT INTO note (body) VALUES (:body)"), {"body": cmd.text})
        session.execute(text("UPDATE saga SET epoch = epoch + 1"))

    stage.bus.handler(transactional=True, pivot=True)(lose)
    with pytest.raises(Exception, match="taken over"):
        coordinator.run("take_note", "hello")
    assert notes(stage) == ["hello"]


def test_a_transactional_handler_may_use_savepoints_and_flush(stocked: Engine) -> None:
    bus = CommandBus()

    @bus.handler(transactional=True, pivot=True)
    def do_reserve(cmd: Reserve, session: Session) -> Done:
        with session.begin_nested():
            session.execute(text("INSERT INTO stock VALUES (1)"))
        session.flush()
        return Done()

    with SagaCoordinator(SagaLog(stocked), bus) as coordinator:
        assert coordinator.run(reserving(coordinator), 1) == 1
    with stocked.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM stock")).scalar_one() == 1


def test_a_transactional_handler_may_return_a_row_that_expires_with_its_commit(stocked: Engine) -> None:
    class Base(MappedAsDataclass, DeclarativeBase):
        """The application's."""

    class Order(Base):
        __tablename__ = "shop_order"
        name: Mapped[str] = mapped_column(primary_key=True)

    Base.metadata.create_all(stocked)
    bus = CommandBus()

    @bus.handler(transactional=True, pivot=True)
    def do_reserve(cmd: Reserve, session: Session) -> Any:
        order = Order(name="lamp")
        session.add(order)
        session.flush()
        return order

    with SagaCoordinator(SagaLog(stocked), bus) as coordinator:
        assert coordinator.run(reserving(coordinator), 1) == 1
        assert coordinator.log.get(1).steps[0].output == [{"name": "lamp"}]


@pytest.mark.parametrize("undo", [False, True], ids=["step", "undo"])
def test_a_transactional_commit_whose_answer_was_lost_is_recognised(migrated_url: str, undo: bool) -> None:
    engine = create_engine(migrated_url)
    lost = [Unkeep if undo else Keep]
    bus = CommandBus()

    @bus.handler(transactional=True, settle=0)
    def write(cmd: Keep, session: Session) -> int:
        return 7

    @bus.handler(transactional=True, settle=0)
    def undone(cmd: Unkeep, session: Session) -> None:
        """Nothing is left."""

    @bus.compensation(Keep)
    def undoes(cmd: Keep, output: int | None) -> Unkeep:
        return Unkeep()

    coordinator = SagaCoordinator(SagaLog(engine), bus)

    @coordinator.saga("writes")
    def writes(ctx: Any) -> int:
        answer: int = ctx.dispatch(Keep())
        if undo:
            raise ValueError("undo it")
        return answer

    def losing(effect: Any, answer: Callable[[Any], Any]) -> Any:
        given = answer(effect)
        if isinstance(effect, Invoke) and type(effect.cmd) in lost:
            lost.clear()
            raise LogUnavailable("commit", "the connection is gone", unknown=True)
        return given

    coordinator.interpose = losing
    if undo:
        with pytest.raises(SagaFailed, match="everything that was done is undone"):
            coordinator.run(writes)
    else:
        assert coordinator.run(writes) == 7
    assert lost == []
    coordinator.close()
    engine.dispose()


def test_a_session_of_the_wrong_kind_is_refused() -> None:
    bus = CommandBus()

    async def asynchronous(cmd: Keep, session: Session) -> int:
        return 1

    def synchronous(cmd: Keep, session: AsyncSession) -> int:
        return 1

    for function, wanted in ((asynchronous, "AsyncSession"), (synchronous, "Session")):
        with pytest.raises(UnusableHandler, match=f"Annotate it as {wanted}"):
            bus.handler(transactional=True)(function)


class Base(DeclarativeBase):
    """The application's."""


class NoteRow(Base):
    __tablename__ = "note"
    body: Mapped[str] = mapped_column(primary_key=True)


@pytest.mark.parametrize("then", ["rejects", "returns", "returns at once"])
@pytest.mark.parametrize("undo", [False, True], ids=["forward", "undo"])
def test_a_transactional_handler_whose_flush_failed_did_nothing(stage: Stage, then: str, undo: bool) -> None:
    """A flush that fails rolls the whole transaction back by itself."""
    stage.sql("CREATE TABLE note (body TEXT PRIMARY KEY)")
    stage.sql("INSERT INTO note VALUES ('there')")
    tries: list[str] = []

    def trouble() -> None:
        if then == "rejects":
            raise StepRejected("it is there")

    def body() -> str:
        tries.append("try")
        return "there" if len(tries) == 1 else "new"

    if stage.asynchronous:

        async def act(session: Any) -> None:
            session.add(NoteRow(body=body()))
            if then != "returns at once":
                try:
                    await session.flush()
                except IntegrityError:
                    trouble()

        async def ado_reserve(cmd: Reserve, session: AsyncSession) -> None:
            await act(session)

        async def ado_release(cmd: Release, session: AsyncSession) -> None:
            await act(session)

        do: Any = ado_release if undo else ado_reserve
    else:

        def act_now(session: Session) -> None:
            session.add(NoteRow(body=body()))
            if then != "returns at once":
                try:
                    session.flush()
                except IntegrityError:
                    trouble()

        def do_reserve(cmd: Reserve, session: Session) -> None:
            act_now(session)

        def do_release(cmd: Release, session: Session) -> None:
            act_now(session)

        do = do_release if undo else do_reserve

    how: dict[str, Any] = {"transactional": True, "retry": Retry(attempts=3, initial=0.0), "settle": 0.0}
    stage.bus.handler(**(how if undo else {**how, "pivot": True}))(do)
    if undo:

        @stage.bus.handler
        def plainly(cmd: Reserve) -> None:
            """Nothing."""

        stage.bus.compensation(Reserve)(lambda cmd, output: Release())
    coordinator = stage.coordinator()

    @coordinator.saga("reserving")
    def saga(ctx: Any) -> None:
        ctx.dispatch(Reserve())
        raise ValueError("undo it")

    with pytest.raises(SagaFailed) as failure:
        coordinator.run("reserving")
    again = undo and then != "rejects"  # an undo is tried again, whatever it raised
    assert (failure.value.outcome, len(tries)) == (
        ("failed_compensation", 1) if undo and then == "rejects" else ("compensated", 2 if again else 1)
    )
    assert sorted(notes(stage)) == (["new", "there"] if again else ["there"])


def dispatched(coordinator: Any) -> str:
    """What a saga's function is told of a step that did not succeed."""
    told: list[str] = []

    @coordinator.saga("tries")
    def tries(ctx: Any) -> None:
        try:
            ctx.dispatch(Note(text="hello"))
        except StepFailed as failure:
            told.append(failure.kind)

    with suppress(SagaFailed):
        coordinator.run("tries")
    (kind,) = told
    return kind


@pytest.mark.parametrize("commits", [True, False])
def test_a_transaction_that_the_database_gave_up_did_nothing(stage: Stage, commits: bool) -> None:
    """Only a commit whose answer was lost may have done something."""
    coordinator = note_taking(stage, [])

    def give_up(effect: Any) -> None:
        if isinstance(effect, Invoke):
            raise LogUnavailable("commit", "no answer", unknown=commits)

    async def agiving_up(effect: Any, answer: Callable[[Any], Any]) -> Any:
        give_up(effect)
        return await answer(effect)

    def giving_up(effect: Any, answer: Callable[[Any], Any]) -> Any:
        give_up(effect)
        return answer(effect)

    shell = coordinator.target if stage.asynchronous else coordinator
    shell.interpose = agiving_up if stage.asynchronous else giving_up
    assert (dispatched(coordinator), notes(stage)) == ("in_doubt" if commits else "failed", [])


@pytest.mark.parametrize("unknown", [True, False])
def test_another_logs_lost_answer_is_a_failure_of_the_handler_that_asked(stage: Stage, unknown: bool) -> None:
    trouble: list[BaseException] = [LogUnavailable("submit", "no answer", unknown=unknown)] * 5
    coordinator = note_taking(stage, trouble)
    assert (dispatched(coordinator), notes(stage)) == ("failed", [])
    assert len(trouble) == 4


class OwnSession(Session):
    """As a host's, or another library's."""

    def answer(self) -> int:
        return 42


class AsyncOwnSession(AsyncSession):
    def answer(self) -> int:
        return 42


def test_a_handler_gets_the_session_that_it_is_annotated_with(stage: Stage) -> None:
    answers: list[int] = []
    if stage.asynchronous:

        @stage.bus.handler(transactional=True, pivot=True)
        async def anote(cmd: Note, session: AsyncOwnSession) -> None:
            answers.append(session.answer())

    @stage.bus.handler(transactional=True, pivot=True)
    def reserve(cmd: Reserve, session: OwnSession) -> None:
        answers.append(session.answer())

    coordinator = stage.coordinator()

    @coordinator.saga("asks")
    def asks(ctx: Any) -> None:
        ctx.dispatch(Reserve())
        if stage.asynchronous:
            ctx.dispatch(Note(text="hello"))

    coordinator.run("asks")
    assert answers == [42] * (2 if stage.asynchronous else 1)


def test_a_commit_that_a_deferred_constraint_refuses_did_nothing(stage: Stage) -> None:
    stage.sql("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
    stage.sql("CREATE TABLE child (id INTEGER REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)")
    orphan, tries = text("INSERT INTO child VALUES (1)"), []
    foreign_keys = text("SELECT 1" if stage.url.startswith("postgresql") else "PRAGMA defer_foreign_keys = ON")
    if stage.engine is not None and not stage.url.startswith("postgresql"):
        event.listen(
            getattr(stage.engine, "sync_engine", stage.engine),
            "connect",
            lambda connection, _: connection.cursor().execute("PRAGMA foreign_keys = ON"),
        )
    if stage.asynchronous:

        @stage.bus.handler(transactional=True, read_only=True)
        async def akeep(cmd: Keep, session: AsyncSession) -> int:
            tries.append(cmd)
            await session.execute(foreign_keys)
            await session.execute(orphan)
            return 1
    else:

        @stage.bus.handler(transactional=True, read_only=True)
        def keep(cmd: Keep, session: Session) -> int:
            tries.append(cmd)
            session.execute(foreign_keys)
            session.execute(orphan)
            return 1

    coordinator = stage.coordinator()

    @coordinator.saga("keeps")
    def keeps(ctx: Any) -> None:
        ctx.dispatch(Keep())

    for _ in range(3):
        with pytest.raises(SagaFailed, match=r"(?i)foreign.?key") as failure:
            coordinator.run("keeps")
        assert failure.value.outcome == "compensated"
        assert [step.state for step in stage.log.get(failure.value.saga_id).steps] == ["failed"]
    assert len(tries) == 3
    assert stage.sql("SELECT count(*) FROM child") == [(0,)]


# Undos


@pytest.mark.parametrize("raises", [1, 2, 9])
def test_a_transactional_undo_that_raises_is_tried_again(stage: Stage, raises: int) -> None:
    stage.sql("CREATE TABLE note (body TEXT NOT NULL)")
    insert = text("INSERT INTO note VALUES ('undone')")
    keys: list[str] = []

    @stage.bus.handler
    def do_reserve(cmd: Reserve) -> None:
        """Nothing."""

    @stage.bus.compensation(Reserve)
    def undo_reserve(cmd: Reserve, output: None) -> Release:
        return Release()

    def trouble(step: StepInfo) -> None:
        keys.append(step.idempotency_key)
        if len(keys) <= raises:
            raise OSError("not now")

    retry = Retry(attempts=3, initial=0.001)
    if stage.asynchronous:

        @stage.bus.handler(transactional=True, retry=retry, settle=0.0)
        async def ado_release(cmd: Release, session: AsyncSession, step: StepInfo) -> None:
            await session.execute(insert)
            trouble(step)
    else:

        @stage.bus.handler(transactional=True, retry=retry, settle=0.0)
        def do_release(cmd: Release, session: Session, step: StepInfo) -> None:
            session.execute(insert)
            trouble(step)

    coordinator = stage.coordinator()

    @coordinator.saga("reserving")
    def saga(ctx: Any) -> None:
        ctx.dispatch(Reserve())
        raise ValueError("undo it")

    with pytest.raises(SagaFailed) as failure:
        coordinator.run("reserving")
    assert (failure.value.outcome, len(notes(stage))) == (
        ("compensated", 1) if raises < 3 else ("failed_compensation", 0)
    )
    assert (len(keys), len(set(keys))) == (min(raises + 1, 3), 1)


def test_a_savepoint_that_a_handler_left_open_is_committed_with_the_rest(stage: Stage) -> None:
    stage.sql("CREATE TABLE note (body TEXT NOT NULL)")
    write = text("INSERT INTO note VALUES ('kept')")
    if stage.asynchronous:

        @stage.bus.handler(transactional=True, read_only=True)
        async def akeep(cmd: Keep, session: AsyncSession) -> int:
            await session.begin_nested()
            await session.begin_nested()
            await session.execute(write)
            return 1
    else:

        @stage.bus.handler(transactional=True, read_only=True)
        def keep(cmd: Keep, session: Session) -> int:
            session.begin_nested()
            session.begin_nested()
            session.execute(write)
            return 1

    coordinator = stage.coordinator()

    @coordinator.saga("keeps")
    def keeps(ctx: Any) -> int:
        return int(ctx.dispatch(Keep()))

    assert coordinator.run("keeps") == 1
    assert notes(stage) == ["kept"]
