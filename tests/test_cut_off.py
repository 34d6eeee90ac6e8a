"""What is cut off in the middle: a write, a call, a transactional handler whose time is up."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from sagalog import (
    AsyncSagaContext,
    AsyncSagaCoordinator,
    AsyncSagaLog,
    CommandBus,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaFailed,
    SagaLog,
    StepFailed,
    StepInfo,
)
from sagalog.coordinator import blocking
from sagalog.coordinator.effects import Effect, Write
from tests import troubled
from tests.coordinating import (
    Charge,
    Killed,
    Release,
    Reserve,
    Shop,
    Stage,
    row_held,
)
from tests.processes import until


class Ask(BaseModel):
    """A command without an answer."""


class TakeBack(BaseModel):
    """What undoes it."""


class SoftLimit(Exception):
    """What a signal's handler raises wherever the process happens to be."""


def cuts_off(coordinator: Any, asked: str) -> None:
    """Raise once a write is in the log, before its answer is there."""
    target = getattr(coordinator, "target", coordinator)
    left = [asked]

    def is_it(effect: Effect[Any]) -> bool:
        found = isinstance(effect, Write) and effect.operation.asked == asked and left == [asked]
        if found:
            left.clear()
        return found

    def interpose(effect: Effect[Any], answer: Callable[[Effect[Any]], Any]) -> Any:
        cut = is_it(effect)
        given = answer(effect)
        if cut:
            raise SoftLimit
        return given

    async def ainterpose(effect: Effect[Any], answer: Callable[[Effect[Any]], Any]) -> Any:
        cut = is_it(effect)
        given = await answer(effect)
        if cut:
            raise SoftLimit
        return given

    target.interpose = ainterpose if isinstance(target, AsyncSagaCoordinator) else interpose


def test_an_undo_by_hand_whose_row_was_cut_off_is_done_once_under_its_key(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Reserve(sku="book"))
        try:
            ctx.compensate(Release(sku="book"))
        except SoftLimit:
            raise ValueError("no time left") from None

    cuts_off(coordinator, "begin_undo")
    with pytest.raises(SagaFailed, match="cut off") as failed:
        coordinator.run("order")
    assert failed.value.outcome == "compensated"
    assert shop.calls == ["reserve", "release"]
    assert shop.infos[-1].idempotency_key == f"{shop.infos[0].idempotency_key}:undo"
    assert stage.states() == [("Reserve", "compensated"), ("Release", "compensated")]


def test_a_saga_that_is_cut_off_when_it_is_completed_already_has_its_result(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> int:
        ctx.dispatch(Reserve(sku="book"))
        return 7

    cuts_off(coordinator, "complete")
    assert coordinator.run("order") == 7
    assert (stage.log.get(1).state, shop.calls) == ("completed", ["reserve"])


def test_a_step_whose_row_was_cut_off_was_not_sent_and_what_came_before_is_undone(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Reserve(sku="book"))
        cuts_off(coordinator, "dispatch")
        ctx.dispatch(Charge(amount=7))

    with pytest.raises(SagaFailed, match="dispatch was cut off") as failed:
        coordinator.run("order")
    assert (failed.value.outcome, shop.calls) == ("compensated", ["reserve", "release"])
    assert stage.states() == [("Reserve", "compensated"), ("Charge", "failed"), ("Release", "compensated")]
    assert stage.log.get(1).steps[1].output == {"error": "it was cut off before it was sent"}


def test_a_row_that_was_cut_off_and_comes_to_be_in_the_log_while_the_saga_is_undone_was_not_sent(
    own_log: SagaLog,
) -> None:
    lamps, sent = troubled.Shop(), list[Any]()

    def holding_back(effect: Any, answer: Callable[[Any], Any]) -> Any:
        if isinstance(effect, Write) and effect.operation.asked == "dispatch" and effect.operation.step_index == 1:
            sent.append(effect.operation)
            raise asyncio.CancelledError
        if isinstance(effect, Write) and effect.operation.asked == "terminate(compensated)" and sent:
            own_log._bind.perform(sent.pop())
        return answer(effect)

    with SagaCoordinator(own_log, lamps.bus) as coordinator:
        coordinator.interpose = holding_back

        @coordinator.saga("order")
        def order(ctx: Any) -> None:
            ctx.dispatch(troubled.Reserve())
            try:
                ctx.dispatch(troubled.Reserve())
            except asyncio.CancelledError:
                raise ValueError("undo it") from None

        with pytest.raises(SagaFailed) as failed:
            coordinator.run(order)
    assert failed.value.outcome == "compensated"
    assert lamps.verbs == ["reserve", "release"]
    assert sorted(step.state for step in own_log.get(1).steps) == ["compensated", "compensated", "failed"]


def test_nothing_is_dispatched_after_a_call_that_was_cut_off(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("charge", Killed())
    coordinator = stage.coordinator()
    told: list[str] = []

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        try:
            ctx.dispatch(Charge(amount=7))
        except Killed:
            try:
                ctx.dispatch(Reserve(sku="book"))
            except StepFailed as error:
                told.append(str(error.kind))

    with pytest.raises(SagaFailed, match="it was cut off"):
        coordinator.run("order")
    assert (told, shop.calls) == (["in_doubt"], ["charge"])


def on_a_file(path: Path, bus: CommandBus, order: Callable[[AsyncSagaContext], Any]) -> Any:
    """What a saga of an async coordinator returns, and its first step's state."""

    async def go() -> Any:
        async with await AsyncSagaLog.open(path) as log, AsyncSagaCoordinator(log, bus) as coordinator:
            coordinator.saga("order")(order)
            return await coordinator.run(order), (await log.get(1)).steps[0].state

    return asyncio.run(go())


def test_a_call_that_a_timeout_of_the_function_cuts_off_is_in_doubt(sqlite_path: Path) -> None:
    """`asyncio.timeout` around a dispatch, caught: the saga does not go on over it."""
    calls: list[str] = []
    bus = CommandBus()

    @bus.handler(pivot=True)
    async def ask(cmd: Ask) -> None:
        calls.append("ask")
        await asyncio.Event().wait()

    @bus.handler(pivot=True)
    async def take_back(cmd: TakeBack) -> None:
        calls.append("take back")

    async def order(ctx: AsyncSagaContext) -> None:
        try:
            async with asyncio.timeout(0.05):
                await ctx.dispatch(Ask())
        except TimeoutError:
            await ctx.dispatch(TakeBack())

    with pytest.raises(SagaFailed, match="it was cut off"):
        on_a_file(sqlite_path, bus, order)
    assert calls == ["ask"]


def test_a_cancellation_that_a_handler_lets_out_is_a_failure_of_its_step(sqlite_path: Path) -> None:
    bus = CommandBus()

    @bus.handler(pivot=True)
    async def ask(cmd: Ask) -> None:
        raise asyncio.CancelledError  # of a task of the handler's own, which nobody else cancelled

    async def order(ctx: AsyncSagaContext) -> None:
        await ctx.dispatch(Ask())

    with pytest.raises(SagaFailed, match="in doubt"):
        on_a_file(sqlite_path, bus, order)


class Note(BaseModel):
    words: str


def with_notes(path: Path) -> None:
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE note (body TEXT)"))
    engine.dispose()


def slow_notes(bus: CommandBus, seconds: float) -> None:
    @bus.handler(transactional=True, timeout=0.1, pivot=True)
    def note(cmd: Note, session: Session) -> str:
        session.execute(text("INSERT INTO note (body) VALUES (:body)"), {"body": cmd.words})
        time.sleep(seconds)  # it holds the file's lock, for which what would call it failed has to wait
        return "noted"


def test_a_transactional_handler_that_commits_when_its_time_is_up_has_succeeded(sqlite_path: Path) -> None:
    bus = CommandBus()
    slow_notes(bus, 0.5)
    with_notes(sqlite_path)

    async def order(ctx: AsyncSagaContext) -> Any:
        return await ctx.dispatch(Note(words="hello"))

    assert on_a_file(sqlite_path, bus, order) == ("noted", "succeeded")


class Pair(BaseModel):
    """It cannot be read back: what it writes is not what it takes."""

    left: int = Field(validation_alias="l", serialization_alias="x")


def test_an_answer_of_a_transactional_handler_that_cannot_be_read_back_undoes_its_writes(sqlite_path: Path) -> None:
    bus = CommandBus()
    with_notes(sqlite_path)

    @bus.handler(transactional=True, pivot=True)
    def note(cmd: Note, session: Session) -> Pair | int:
        session.execute(text("INSERT INTO note (body) VALUES (:body)"), {"body": cmd.words})
        return Pair(l=1)

    async def order(ctx: AsyncSagaContext) -> Any:
        return await ctx.dispatch(Note(words="hello"))

    with pytest.raises(SagaFailed, match="compensated"):
        on_a_file(sqlite_path, bus, order)
    with SagaLog.open(sqlite_path) as log:
        assert log.get(1).steps[0].state == "failed"
    engine = create_engine(f"sqlite:///{sqlite_path}")
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM note")).scalar_one() == 0
    engine.dispose()


def test_a_saga_whose_step_ended_when_its_time_was_up_is_not_taken_from_its_process(sqlite_path: Path) -> None:
    bus = CommandBus()
    slow_notes(bus, 0.5)
    reports: list[Any] = []

    @bus.handler(read_only=True)
    def look(cmd: Ask) -> None:
        time.sleep(0.5)  # the lease's thread, too, had to wait for the file's lock
        reports.append(coordinator.recover())

    with SagaLog.open(sqlite_path) as log, SagaCoordinator(log, bus) as coordinator:
        with_notes(sqlite_path)

        @coordinator.saga("takes a note")
        def takes_a_note(ctx: SagaContext) -> str:
            noted = ctx.dispatch(Note(words="hello"))
            ctx.dispatch(Ask())
            return str(noted)

        assert coordinator.run(takes_a_note) == "noted"
    assert [report.resolved for report in reports] == [0]


# Steps side by side


def test_a_signals_exception_goes_on_once_the_steps_side_by_side_have_ended(
    migrated_url: str,
) -> None:
    bus, begun, heard, returned = CommandBus(), threading.Event(), threading.Event(), threading.Event()
    done = threading.Event()
    ended: list[str] = []
    asked: list[int] = []

    def stop(*_: object) -> None:
        heard.set()
        raise SoftLimit

    @bus.handler(read_only=True)
    def slow(cmd: Ask) -> None:
        assert begun.wait(30)
        for _ in range(300):  # CPython hears a signal late that comes just before a thread begins to wait
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            if heard.wait(0.1):
                break
        ended.append("late" if returned.wait(0.3) else "in time")
        done.set()

    @bus.handler(pivot=True, retry=Retry(attempts=1000, initial=0.001, maximum=0.001), settle=0.0)
    def repeated(cmd: TakeBack, step: StepInfo) -> None:
        asked.append(step.attempt)
        begun.set()
        assert done.wait(30)
        raise OSError("no answer")

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with SagaLog.open(migrated_url) as log, SagaCoordinator(log, bus) as coordinator:

            @coordinator.saga("together")
            def together(ctx: SagaContext) -> None:
                ctx.dispatch_all([Ask(), TakeBack()])

            with pytest.raises(SagaFailed, match="TakeBack"):
                coordinator.run(together)
            returned.set()
            assert ended == ["in time"]
            assert asked == [1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_interrupt_does_not_wait_for_what_steps_side_by_side_cannot_write(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "_ENDS_OF_WRITES", 0.2)
    bus, heard, ended = CommandBus(), threading.Event(), threading.Event()

    def stop(*_: object) -> None:
        heard.set()
        raise KeyboardInterrupt

    @bus.handler(read_only=True, timeout=1.0)
    def look(cmd: Ask, step: StepInfo) -> None:
        if step.step_index == 0:
            held.enter_context(row_held(postgres_url, step.saga_id))
            threading.Thread(target=interrupt, daemon=True).start()

    def interrupt() -> None:
        while not heard.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            ended.wait(0.1)

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with ExitStack() as held, SagaLog.open(postgres_url) as log, SagaCoordinator(log, bus) as coordinator:

            @coordinator.saga("together")
            def together(ctx: SagaContext) -> None:
                ctx.dispatch_all([Ask(), Ask()])

            with pytest.raises(KeyboardInterrupt):
                coordinator.run(together)
            held.close()  # only now
            until(lambda: [thread for thread in threading.enumerate() if "dispatch" in thread.name] == [])
    finally:
        ended.set()
        signal.signal(signal.SIGUSR1, before)


def test_nothing_is_dispatched_after_steps_side_by_side_that_were_cut_off(sqlite_path: Path) -> None:
    called = []

    async def main() -> None:
        begun = asyncio.Event()

        async def wait(cmd: Ask, step: StepInfo) -> None:
            called.append(step.step_index)

        bus = CommandBus()
        bus.handler(pivot=True)(wait)
        log = await AsyncSagaLog.open(sqlite_path)
        coordinator = AsyncSagaCoordinator(log, bus)

        @coordinator.saga("cut off")
        async def cut(ctx: Any) -> None:
            together = asyncio.ensure_future(ctx.dispatch_all([Ask(), Ask()]))
            await begun.wait()
            together.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await together
            with contextlib.suppress(Exception):
                await ctx.dispatch(Ask())

        async def noting(effect: Any, answer: Callable[[Any], Any]) -> Any:
            given = await answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "dispatch_all":
                begun.set()
            return given

        coordinator.interpose = noting
        with pytest.raises(SagaFailed, match="step 1"):
            await coordinator.run("cut off")
        await coordinator.close()
        await log.close()

    asyncio.run(main())
    assert 2 not in called
