"""What is left in the middle: a write or a call that was cut off, a handler that hangs, a person who settles it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
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
    UnusableHandler,
)
from sagalog.coordinator.effects import Effect, Write
from tests.coordinating import STAGES, Charge, Killed, Order, Refund, Release, Reserve, Shop, Stage, stage_of


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> Any:
    yield from stage_of(request, request.param)


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


def states(stage: Stage, saga_id: int = 1) -> list[tuple[str, str]]:
    return [(step.name, step.state) for step in stage.log.get(saga_id).steps]


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
    assert states(stage) == [("Reserve", "compensated"), ("Release", "compensated")]


def test_a_step_whose_row_was_cut_off_is_in_doubt_and_what_came_before_is_not_undone_first(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Reserve(sku="book"))
        cuts_off(coordinator, "dispatch")
        ctx.dispatch(Charge(amount=7))

    with pytest.raises(SagaFailed, match=r"step 1 \(Charge\) is in doubt") as failed:
        coordinator.run("order")
    assert (failed.value.outcome, shop.calls) == ("failed_compensation", ["reserve"])
    assert states(stage) == [("Reserve", "succeeded"), ("Charge", "pending")]


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


def test_a_call_that_a_timeout_of_the_function_cuts_off_is_in_doubt(tmp_path: Path) -> None:
    """`asyncio.timeout` around a dispatch, caught: the saga does not go on over it."""
    calls: list[str] = []
    bus = CommandBus()

    @bus.handler(pivot=True)
    async def charge(cmd: Ask) -> None:
        calls.append("charge")
        await asyncio.sleep(60)

    @bus.handler(pivot=True)
    async def reserve(cmd: TakeBack) -> None:
        calls.append("reserve")

    async def go() -> None:
        log = await AsyncSagaLog.open(tmp_path / "sagas.db")
        coordinator = AsyncSagaCoordinator(log, bus)

        @coordinator.saga("order")
        async def order(ctx: AsyncSagaContext) -> None:
            try:
                async with asyncio.timeout(0.05):
                    await ctx.dispatch(Ask())
            except TimeoutError:
                await ctx.dispatch(TakeBack())

        with pytest.raises(SagaFailed, match="it was cut off"):
            await coordinator.run(order)
        await coordinator.close()
        await log.close()

    asyncio.run(go())
    assert calls == ["charge"]


def test_a_cancellation_that_a_handler_lets_out_is_a_failure_of_its_step(tmp_path: Path) -> None:
    bus = CommandBus()

    @bus.handler(pivot=True)
    async def charge(cmd: Ask) -> None:
        raise asyncio.CancelledError  # of a task of the handler's own, which nobody else cancelled

    async def go() -> None:
        log = await AsyncSagaLog.open(tmp_path / "sagas.db")
        coordinator = AsyncSagaCoordinator(log, bus)

        @coordinator.saga("order")
        async def order(ctx: AsyncSagaContext) -> None:
            await ctx.dispatch(Ask())

        with pytest.raises(SagaFailed, match="in doubt"):
            await coordinator.run(order)
        await coordinator.close()
        await log.close()

    asyncio.run(go())


# Workers


def test_a_worker_recovers_while_submitted_sagas_wait(stage: Stage) -> None:
    shop = Shop(stage.bus)
    first = stage.coordinator()
    second = stage.coordinator()
    for coordinator, dies in ((first, True), (second, False)):

        @coordinator.saga("order")
        def order(ctx: Any, dies: bool = dies) -> None:
            ctx.dispatch(Reserve(sku="book"))
            if dies:
                raise Killed

    over = threading.Event()

    @second.saga("again")
    def again(ctx: Any) -> None:
        if not over.is_set():
            second.submit("again")

    with pytest.raises(Killed):
        first.run("order", True)
    for _ in range(3):
        second.submit("again")
    with second.worker(concurrency=1):
        try:
            with pytest.raises(SagaFailed) as failed:
                second.wait(1, timeout=30)
        finally:
            over.set()
    assert (failed.value.outcome, shop.calls) == ("compensated", ["reserve", "release"])


def test_a_handler_that_hangs_holds_no_slot_once_its_saga_is_given_up(sqlite_path: Path) -> None:
    bus = CommandBus()
    ends = threading.Event()

    @bus.handler(timeout=0.2, settle=0.1, on_unknown="compensate")
    def charge(cmd: Ask) -> None:
        ends.wait(60)

    @bus.compensation(Ask)
    def refund_of(cmd: Ask, output: None) -> TakeBack:
        return TakeBack()

    @bus.handler
    def refund(cmd: TakeBack) -> None:
        pass

    with SagaLog.open(sqlite_path) as log, SagaCoordinator(log, bus) as coordinator:

        @coordinator.saga("hangs")
        def hangs(ctx: SagaContext) -> None:
            ctx.dispatch(Ask())

        @coordinator.saga("quick")
        def quick(ctx: SagaContext) -> str:
            return "done"

        with coordinator.worker(concurrency=1, poll=0.05):
            first = coordinator.submit(hangs)
            while log.get(first).state == "submitted":
                time.sleep(0.01)
            assert coordinator.wait(coordinator.submit(quick), timeout=20) == "done"
            with pytest.raises(SagaFailed) as failed:
                coordinator.wait(first, timeout=30)  # the same worker recovers it
            ends.set()
    assert failed.value.outcome == "compensated"


# Transactional handlers that end when their time is up


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


def test_a_transactional_handler_that_commits_when_its_time_is_up_has_succeeded(tmp_path: Path) -> None:
    bus = CommandBus()
    slow_notes(bus, 0.5)

    async def go() -> Any:
        log = await AsyncSagaLog.open(tmp_path / "sagas.db")
        with_notes(tmp_path / "sagas.db")
        coordinator = AsyncSagaCoordinator(log, bus)

        @coordinator.saga("takes a note")
        async def takes_a_note(ctx: AsyncSagaContext) -> Any:
            return await ctx.dispatch(Note(words="hello"))

        try:
            return await coordinator.run(takes_a_note), (await log.get(1)).steps[0].state
        finally:
            await coordinator.close()
            await log.close()

    assert asyncio.run(go()) == ("noted", "succeeded")


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


# A person settles


def in_doubt(stage: Stage, **charging: Any) -> tuple[Shop, Any]:
    """A saga whose second step is in doubt, with a person."""
    shop = Shop(stage.bus, **charging)
    shop.fails("charge", ConnectionError("no answer"))
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any, order: Order) -> str:
        ctx.dispatch(Reserve(sku=order.sku))
        return "charged" if ctx.dispatch(Charge(amount=order.amount)) is None else "with an answer"

    with pytest.raises(SagaFailed):
        coordinator.run("order", Order())
    stage.sql("UPDATE saga_step SET deadline_at = 1")
    return shop, coordinator


def test_a_step_that_a_person_calls_succeeded_is_undone_without_an_output(stage: Stage) -> None:
    shop, coordinator = in_doubt(stage)
    stage.log.resolve_step(1, 1, "succeeded", note="the bank shows it", actor="ann")
    assert stage.log.get(1).executor_id is None  # anybody may take it
    assert coordinator.retry(1, note="undo it", actor="ann").state == "compensated"
    assert shop.calls == ["reserve", "charge", "refund", "release"]


def test_a_pivot_that_a_person_calls_succeeded_is_gone_on_with(stage: Stage) -> None:
    _, coordinator = in_doubt(stage, pivot=True)
    stage.log.resolve_step(1, 1, "succeeded", note="the bank shows it", actor="ann")
    record = coordinator.retry(1, note="go on", actor="ann")
    assert (record.state, record.result) == ("completed", "charged")


def test_a_step_that_succeeded_may_be_called_undone_at_once(stage: Stage) -> None:
    in_doubt(stage)
    stage.sql("UPDATE saga_step SET deadline_at = 9999999999999 WHERE step_index = 0")
    stage.log.resolve_step(1, 0, "compensated", note="by hand", actor="ann")
    assert states(stage)[0] == ("Reserve", "compensated")


def test_what_a_person_settles_on_both_sides_of_an_undo_comes_to_an_end(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("refund", *[ConnectionError("no answer")] * 5)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Reserve(sku="book"))
        ctx.dispatch(Charge(amount=7))
        raise ValueError("no")

    with pytest.raises(SagaFailed):
        coordinator.run("order")
    stage.sql("UPDATE saga_step SET deadline_at = 1")
    stage.log.resolve_step(1, 2, "succeeded", note="the bank shows it", actor="ann")
    stage.log.resolve_step(1, 1, "compensated", note="and it is undone", actor="ann")
    assert coordinator.retry(1, note="go on", actor="ann").state == "compensated"
    assert [state for _, state in states(stage)] == ["compensated"] * 4
    assert (shop.calls.count("refund"), shop.calls[-1]) == (5, "release")


def test_a_person_may_give_a_saga_back_however_few_take_overs_are_allowed(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("charge", ConnectionError("no answer"))
    coordinator = stage.coordinator(max_recoveries=0)

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Charge(amount=7))

    with pytest.raises(SagaFailed):
        coordinator.run("order")
    stage.sql("UPDATE saga_step SET deadline_at = 1")
    stage.log.resolve_step(1, 0, "failed", note="the bank never saw it", actor="ann")
    assert coordinator.retry(1, note="undo it", actor="ann").state == "compensated"


def test_a_saga_of_the_log_alone_stays_one_when_a_person_settles_its_step(stage: Stage) -> None:
    stage.log.start_saga(1, "order", None)
    stage.log.start_step(1, 0, "Charge", Charge(amount=7))
    stage.log.resolve_step(1, 0, "failed", note="the bank never saw it", actor="ann")
    Shop(stage.bus)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        raise AssertionError

    (left,) = coordinator.recover().left
    assert (left.saga_id, "adopt=True" in left.reason) == (1, True)


# Undos by hand, and pivots


def test_the_newest_step_to_undo_by_hand_is_one_that_changed_something(stage: Stage) -> None:
    shop = Shop(stage.bus, read_only=True)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Reserve(sku="book"))
        ctx.dispatch(Charge(amount=7))
        ctx.compensate(Release(sku="book"))

    coordinator.run("order")
    assert shop.infos[-1].idempotency_key == f"{shop.infos[0].idempotency_key}:undo"
    assert [state for _, state in states(stage)] == ["compensated", "succeeded", "compensated"]


@pytest.mark.parametrize("named", [False, True], ids=["the newest", "named"])
def test_a_pivot_is_not_undone_by_hand(stage: Stage, named: bool) -> None:
    Shop(stage.bus, pivot=True)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        charge = Charge(amount=7)
        ctx.dispatch(charge)
        with pytest.raises(UnusableHandler, match="is a pivot"):
            ctx.compensate(Refund(amount=7), **({"undoes": [charge]} if named else {}))

    coordinator.run("order")
    assert states(stage) == [("Charge", "succeeded")]


def test_an_undo_that_cannot_itself_be_undone_is_finished_by_recovery(stage: Stage) -> None:
    calls: list[str] = []

    @stage.bus.handler
    def reserve(cmd: Ask) -> None:
        calls.append("reserve")

    @stage.bus.compensation(Ask)
    def release_of(cmd: Ask, output: None) -> TakeBack:
        return TakeBack()

    @stage.bus.handler(pivot=True)
    def release(cmd: TakeBack, step: StepInfo) -> None:
        calls.append("release")
        if calls.count("release") == 1:
            raise Killed

    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Ask())
        raise ValueError("no")

    with pytest.raises(Killed):
        coordinator.run("order")
    stage.sql("UPDATE saga_step SET deadline_at = 1")
    assert coordinator.recover().compensated == [1]
    assert calls == ["reserve", "release", "release"]


# What is the same on a resume


class Red(BaseModel):
    name: str


class Blue(BaseModel):
    name: str


class Paint(BaseModel):
    pass


class Tag(BaseModel):
    words: frozenset[str]


def resumed(stage: Stage, command: BaseModel) -> tuple[Any, Any]:
    """What a step answers at first, and once its saga is gone on with."""
    answers: list[Any] = []
    coordinator = stage.coordinator(on_crash="resume")

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        answers.append(ctx.dispatch(command))
        if len(answers) == 1:
            raise Killed

    with pytest.raises(Killed):
        coordinator.run("order")
    [(held,)] = stage.sql("SELECT cmd_json FROM saga_step")
    if '"words"' in held:
        words = json.loads(held)["words"]
        stage.sql("UPDATE saga_step SET cmd_json = :text", text=json.dumps({"words": words[::-1]}))
    assert coordinator.recover().completed == [1]
    first, second = answers
    return first, second


def test_an_answer_of_another_class_than_the_log_will_give_is_never_seen(stage: Stage) -> None:
    @stage.bus.handler(read_only=True)
    def paint(cmd: Paint) -> Red | Blue:
        return Blue(name="sky")

    first, second = resumed(stage, Paint())
    assert (type(first), first) == (type(second), second)


def test_an_answer_without_any_annotation_is_what_the_log_holds(stage: Stage) -> None:
    @stage.bus.handler(read_only=True)
    def paint(cmd: Paint):  # type: ignore[no-untyped-def]
        return [Blue(name="sky")]

    assert resumed(stage, Paint()) == ({"name": "sky"}, {"name": "sky"})


def test_a_command_with_a_set_is_the_same_in_whichever_order_another_process_wrote_it(stage: Stage) -> None:
    @stage.bus.handler(read_only=True)
    def tag(cmd: Tag) -> str:
        return "tagged"

    assert resumed(stage, Tag(words=frozenset("ab"))) == ("tagged", "tagged")


def test_an_input_whose_keys_come_in_another_order_is_the_same(stage: Stage) -> None:
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any, order: dict[str, int]) -> int:
        return sum(order.values())

    assert coordinator.run("order", {"a": 1, "b": 2}, key="k") == 3
    assert coordinator.run("order", {"b": 2, "a": 1}, key="k") == 3
    assert stage.log.max_saga_id() == 1


def test_a_transactional_pivot_that_was_cut_off_did_not_happen(stage: Stage) -> None:
    shop = Shop(stage.bus)

    @stage.bus.handler(transactional=True, pivot=True)
    def note(cmd: Note, session: Session) -> None:
        raise Killed

    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Reserve(sku="book"))
        ctx.dispatch(Note(words="hello"))

    with pytest.raises(Killed):
        coordinator.run("order")
    assert coordinator.recover().compensated == [1]
    assert shop.calls == ["reserve", "release"]


# Bad input


def test_a_timeout_shorter_than_a_write_is_stretched_until_the_handler_is_called(stage: Stage) -> None:
    shop = Shop(stage.bus, timeout=0.0001, settle=0)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Charge(amount=7))

    if stage.asynchronous:
        with pytest.raises(SagaFailed, match="outlived its timeout"):
            coordinator.run("order")
    else:
        coordinator.run("order")
    assert shop.calls[0] == "charge"


def test_an_exception_that_cannot_be_shown_is_a_failure_like_any_other(stage: Stage) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise TypeError

    shop = Shop(stage.bus)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Reserve(sku="book"))
        raise Mute

    with pytest.raises(SagaFailed, match="Mute"):
        coordinator.run("order")
    assert shop.calls == ["reserve", "release"]


class Plain:
    pass


def test_what_no_log_could_give_back_is_refused_at_registration() -> None:
    bus = CommandBus()
    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:
        for seconds in (0, -1, float("inf"), float("nan"), "3", True):
            with pytest.raises(UnusableHandler, match="timeout="):
                coordinator.saga("order", timeout=seconds)(lambda ctx: None)  # type: ignore[arg-type]
            with pytest.raises(UnusableHandler, match="lease="):
                SagaCoordinator(log, bus, lease=seconds)  # type: ignore[arg-type]
        with pytest.raises(UnusableHandler, match=r"resumes=\(1, 2\)"):
            coordinator.saga("order", resumes=1)(lambda ctx: None)  # type: ignore[arg-type]
        with pytest.raises(UnusableHandler, match="its input, a Plain"):

            @coordinator.saga("plain")
            def plain(ctx: SagaContext, order: Plain) -> None:
                pass

        with pytest.raises(UnusableHandler, match="its command, a Plain"):

            @bus.handler
            def do(cmd: Plain) -> None:
                pass

        @coordinator.saga("order")
        def order(ctx: SagaContext) -> None:
            with pytest.raises(UnusableHandler, match=r"Reserve\(\.\.\.\)"):
                ctx.dispatch(Reserve)
            with pytest.raises(UnusableHandler, match="undoes= is a Reserve"):
                ctx.compensate(Release(sku="book"), undoes=Reserve(sku="book"))  # type: ignore[arg-type]
            assert ctx.dispatch_all(command for command in ()) == []  # type: ignore[arg-type, var-annotated]

        Shop(bus)
        coordinator.run(order)


def test_a_retry_that_meets_the_same_trouble_does_not_say_it_again(stage: Stage) -> None:
    shop = Shop(stage.bus, retry=Retry(attempts=1))
    shop.fails("refund", *[ConnectionError("no answer")] * 20)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Charge(amount=7))
        raise ValueError("no")

    with pytest.raises(SagaFailed):
        coordinator.run("order")
    reason = stage.log.get(1).failure_reason
    stage.sql("UPDATE saga_step SET deadline_at = 1")
    assert coordinator.retry(1, note="once more", actor="ann", again=True).failure_reason == reason
