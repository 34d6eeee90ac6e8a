"""How long a step in doubt may be under way, and what is done meanwhile: each was once undone before it happened."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from sagalog import (
    AsyncSagaCoordinator,
    AsyncSagaLog,
    CommandBus,
    LeaseLost,
    Retry,
    SagaCoordinator,
    SagaFailed,
    SagaLog,
    StepFailed,
    StepInfo,
)
from sagalog.coordinator.effects import Write
from sagalog.log import owned_steps, owning
from sagalog.log.database import Call, Kind
from sagalog.log.fencing import Fence
from sagalog.moments import to_ms
from tests.coordinating import Killed, Order, Shop, Stage, placing, recoverer
from tests.processes import LONGEST
from tests.troubled import Charge, Done, Release, Reserve, reserving
from tests.troubled import Shop as Lamps

AT_ONCE = Retry(attempts=3, initial=0.0)


def test_a_step_is_not_undone_while_what_an_earlier_process_sent_may_be_under_way(stage: Stage) -> None:
    shop = Shop(stage.bus, retry=AT_ONCE, on_unknown="compensate", timeout=600.0, settle=0.0)
    shop.fails("charge", Killed(), *[OSError("no route")] * 3)
    coordinator = stage.coordinator()
    placing(coordinator)
    with pytest.raises(Killed):
        coordinator.run("place_order", Order())
    sent_until = stage.log.get(1).steps[1].deadline_at
    (left,) = recoverer(stage).recover().left
    assert "may still be under way" in left.reason
    assert stage.log.get(1).steps[1].deadline_at >= sent_until
    assert shop.calls == ["reserve", *["charge"] * 4]
    stage.sql("UPDATE saga_step SET deadline_at = 1")
    assert recoverer(stage).recover().compensated == [1]
    assert shop.calls[-2:] == ["refund", "release"]


def test_a_step_is_not_undone_while_a_call_that_was_cut_off_may_be_under_way(sqlite_path: Path) -> None:
    happened, calls = list[str](), list[int]()
    bus = CommandBus()

    @bus.handler(retry=AT_ONCE, on_unknown="compensate", timeout=0.6, settle=0.0)
    def reserve(cmd: Reserve, step: StepInfo) -> Done:
        calls.append(1)
        if len(calls) > 1:
            raise OSError("no route")
        time.sleep(0.4)
        happened.append("reserved")
        return Done()

    @bus.handler
    def release(cmd: Release) -> None:
        happened.append("released")

    @bus.compensation(Reserve)
    def release_of(cmd: Reserve, output: Done | None) -> Release:
        return Release()

    async def main() -> None:
        async with await AsyncSagaLog.open(sqlite_path) as log, AsyncSagaCoordinator(log, bus) as coordinator:

            @coordinator.saga("hurries")
            async def hurries(ctx: Any) -> None:
                async with asyncio.timeout(0.05):
                    await ctx.dispatch(Reserve())

            with pytest.raises(SagaFailed) as failed:
                await coordinator.run(hurries)
            assert failed.value.outcome == "compensated"

    asyncio.run(main())
    assert (happened, len(calls)) == (["reserved", "released"], 4)


def slow_after_its_write(coordinator: SagaCoordinator, seconds: float, then: Any = lambda: None) -> None:
    """The first step is in the log, and its process comes to call the handler only later."""

    def slowly(effect: Any, answer: Any) -> Any:
        answered = answer(effect)
        if isinstance(effect, Write) and effect.operation.asked == "dispatch":
            coordinator.interpose = None
            time.sleep(seconds)
            then()
        return answered

    coordinator.interpose = slowly


def test_a_handler_is_told_no_later_end_than_others_are_told(own_log: SagaLog, migrated_url: str) -> None:
    told: list[tuple[int, int]] = []

    def reserve(step: StepInfo) -> Done:
        with SagaLog.open(migrated_url) as other:
            (row,) = other.get(step.saga_id).steps
            assert row.deadline_at is not None
            told.append((to_ms(step.deadline), to_ms(row.deadline_at)))
        return Done()

    shop = Lamps(reserve=reserve, timeout=0.4, settle=0.0)
    with SagaCoordinator(own_log, shop.bus) as coordinator:
        slow_after_its_write(coordinator, 0.3)
        assert coordinator.run(reserving(coordinator), 1) == 1
    ((until, others_wait_until),) = told
    assert until <= others_wait_until


def test_a_process_that_slept_does_not_call_the_handler_of_a_saga_that_was_taken_over(
    own_log: SagaLog, migrated_url: str
) -> None:
    shop = Lamps(timeout=0.4, settle=0.0)

    def take_over() -> None:
        engine = create_engine(migrated_url)
        with engine.begin() as connection:
            connection.execute(text("UPDATE saga SET epoch = epoch + 1"))
        engine.dispose()

    with SagaCoordinator(own_log, shop.bus) as coordinator:
        slow_after_its_write(coordinator, 0.3, take_over)
        with pytest.raises(LeaseLost):
            coordinator.run(reserving(coordinator), 1)
    assert shop.asked == []


def test_a_saga_that_is_given_up_keeps_the_time_of_what_was_sent_before(own_log: SagaLog) -> None:
    drawn = own_log._bind.perform(owning.begin_saga("s", "null", key=None, version=1, executor_id="me"))
    fence = Fence(drawn.saga_id, 1)
    own_log._bind.perform(owned_steps.begin_step(fence, 0, "do", "null", 9_000, cancellable=True))
    own_log._bind.perform(owning.give_up(fence, 0, "late", 7_000))
    (step,) = own_log.get(drawn.saga_id).steps
    assert step.deadline_at is not None
    assert (to_ms(step.deadline_at), step.error) == (9_000, "late")


def test_a_doubt_that_lands_late_changes_nothing_that_was_written_after_it(own_log: SagaLog) -> None:
    drawn = own_log._bind.perform(owning.begin_saga("s", "null", key=None, version=1, executor_id="me"))
    fence = Fence(drawn.saga_id, 1)
    doubt = owned_steps.doubt_step(fence, 0, "of the first try", 2_000, 1_000)
    for operation in (
        owned_steps.begin_step(fence, 0, "do", "null", 1_000, cancellable=True),
        doubt,
        doubt,  # its answer was lost
        owned_steps.try_again(fence, 0, 3_000, 2_000),
        owned_steps.doubt_step(fence, 0, "of the second", 4_000, 3_000),
    ):
        own_log._bind.perform(operation)
    late = {"id_": fence.saga_id, "index_": 0, "epoch_": 1, "error_": "late", "deadline_": 2_000, "seen_": 1_000}
    landed = Call("late", Kind.WRITE, lambda db: db.write(db.sql.owned.note_doubt, late))
    assert own_log._bind.perform(landed) == 0
    (step,) = own_log.get(drawn.saga_id).steps
    assert step.deadline_at is not None
    assert (to_ms(step.deadline_at), step.error) == (4_000, "of the second")


def test_a_step_is_not_tried_again_once_its_wait_would_outlast_its_key(stage: Stage) -> None:
    retry = Retry(attempts=2, initial=60.0, maximum=60.0, jitter=0.0, within=timedelta(seconds=30))
    shop = Shop(stage.bus, retry=retry)
    shop.fails("charge", OSError("no answer"))
    coordinator = stage.coordinator()
    placing(coordinator)
    with pytest.raises(SagaFailed, match="is in doubt"):
        coordinator.run("place_order", Order())
    assert shop.calls == ["reserve", "charge"]


def test_nothing_is_sent_again_once_writing_that_took_longer_than_its_key_lasts(own_log: SagaLog) -> None:
    def reserve(step: StepInfo) -> Done:
        raise Killed

    shop = Lamps(reserve=reserve, retry=Retry(attempts=2, initial=0.0, within=timedelta(seconds=1)), settle=0.0)

    def slowly(effect: Any, answer: Any) -> Any:
        answered = answer(effect)
        if isinstance(effect, Write) and effect.operation.asked == "doubt_step":
            time.sleep(1.1)
        return answered

    with SagaCoordinator(own_log, shop.bus) as coordinator, pytest.raises(Killed):
        coordinator.run(reserving(coordinator), 1)
    with SagaCoordinator(own_log, shop.bus, on_crash="resume") as another:
        reserving(another)
        another.interpose = slowly
        assert list(another.recover().failed_compensation) == [1]
    assert shop.verbs == ["reserve"]


def test_a_read_only_step_that_is_too_late_to_be_asked_again_has_failed(own_log: SagaLog) -> None:
    bus, asked, kinds = CommandBus(), [], []

    @bus.handler(read_only=True, idempotent=True, retry=Retry(attempts=2, initial=0.0, within=timedelta(seconds=1)))
    def look(cmd: Reserve, step: StepInfo) -> Done:
        asked.append(cmd)
        raise OSError("down")

    def slowly(effect: Any, answer: Any) -> Any:
        answered = answer(effect)
        if isinstance(effect, Write) and effect.operation.asked == "doubt_step":
            time.sleep(1.1)
        return answered

    with SagaCoordinator(own_log, bus) as coordinator:
        coordinator.interpose = slowly

        @coordinator.saga("looks")
        def looks(ctx: Any) -> None:
            with pytest.raises(StepFailed) as failure:
                ctx.dispatch(Reserve())
            kinds.append(failure.value.kind)

        coordinator.run("looks")
    assert (kinds, len(asked)) == (["failed"], 1)


def test_the_first_of_several_in_doubt_is_told(own_log: SagaLog) -> None:
    bus, second_is_over, told = CommandBus(), threading.Event(), list[int | None]()

    @bus.handler(pivot=True)
    def charge(cmd: Charge) -> None:
        if cmd.amount == 0:
            second_is_over.wait(LONGEST)
        raise OSError(f"no answer about {cmd.amount}")

    def noticing(effect: Any, answer: Any) -> Any:
        if isinstance(effect, Write) and effect.operation.asked == "doubt_step":
            answer(effect)
            if effect.operation.step_index == 1:
                threading.Timer(0.05, second_is_over.set).start()
            return None
        return answer(effect)

    with SagaCoordinator(own_log, bus) as coordinator:
        coordinator.interpose = noticing

        @coordinator.saga("both")
        def both(ctx: Any) -> None:
            try:
                ctx.dispatch_all([Charge(amount=0), Charge(amount=1)])
            except StepFailed as failure:
                told.append(failure.step_index)

        with pytest.raises(SagaFailed):
            coordinator.run(both)
    assert told == [0]


def test_an_interrupt_of_a_function_that_cleans_up_by_its_context_is_one(own_log: SagaLog) -> None:
    def interrupted(step: StepInfo) -> Done:
        raise KeyboardInterrupt

    shop = Lamps(reserve=interrupted)
    with SagaCoordinator(own_log, shop.bus) as coordinator:

        @coordinator.saga("tidies")
        def tidies(ctx: Any) -> None:
            try:
                ctx.dispatch(Reserve())
            finally:
                ctx.dispatch(Charge(amount=1))

        with pytest.raises(KeyboardInterrupt):
            coordinator.run(tidies)
    assert own_log.get(1).state == "running"


def test_a_cancelled_function_that_cleans_up_by_its_context_is_cancelled(sqlite_path: Path) -> None:
    bus, asked = CommandBus(), asyncio.Event()

    @bus.handler(pivot=True)
    async def charge(cmd: Charge) -> None:
        asked.set()
        await asyncio.Event().wait()

    async def main() -> None:
        async with await AsyncSagaLog.open(sqlite_path) as log, AsyncSagaCoordinator(log, bus) as coordinator:

            @coordinator.saga("tidies")
            async def tidies(ctx: Any) -> None:
                try:
                    await ctx.dispatch(Charge(amount=1))
                finally:
                    await ctx.dispatch(Charge(amount=2))

            running = asyncio.create_task(coordinator.run(tidies))
            await asked.wait()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert (await log.get(1)).state == "running"

    asyncio.run(main())


def asking_in_groups() -> tuple[CommandBus, asyncio.Event]:
    bus, asked = CommandBus(), asyncio.Event()

    @bus.handler(on_unknown="compensate", timeout=600.0, settle=0.0)
    async def reserve(cmd: Reserve) -> Done:
        asked.set()
        await asyncio.Event().wait()
        return Done()

    @bus.handler(pivot=True, rejects=ValueError)
    async def charge(cmd: Charge) -> Done:
        await asked.wait()
        raise ValueError("no money")

    @bus.handler
    async def release(cmd: Release) -> None:
        """Nothing."""

    @bus.compensation(Reserve)
    def release_of(cmd: Reserve, output: Done | None) -> Release:
        return Release()

    return bus, asked


def test_a_group_that_failed_is_no_cancelled_saga(sqlite_path: Path) -> None:
    """Until Python 3.13 a TaskGroup leaves its task counted as one that somebody cancels."""
    bus, _ = asking_in_groups()

    async def main() -> None:
        async with await AsyncSagaLog.open(sqlite_path) as log, AsyncSagaCoordinator(log, bus) as coordinator:

            @coordinator.saga("orders")
            async def orders(ctx: Any) -> None:
                with suppress(ExceptionGroup):
                    async with asyncio.TaskGroup() as group:
                        group.create_task(ctx.dispatch(Reserve()))
                        group.create_task(ctx.dispatch(Charge(amount=1)))
                await ctx.dispatch(Charge(amount=2))

            with pytest.raises(SagaFailed, match="it was cut off"):
                await asyncio.wait_for(coordinator.run(orders), LONGEST)

    asyncio.run(main())


def test_an_async_handler_that_was_cancelled_is_not_waited_for(sqlite_path: Path) -> None:
    """It has ended: its whole time would be ten minutes."""
    bus, _ = asking_in_groups()

    async def main() -> None:
        async with await AsyncSagaLog.open(sqlite_path) as log, AsyncSagaCoordinator(log, bus) as coordinator:

            @coordinator.saga("orders")
            async def orders(ctx: Any) -> None:
                async with asyncio.TaskGroup() as group:
                    group.create_task(ctx.dispatch(Reserve()))
                    group.create_task(ctx.dispatch(Charge(amount=1)))

            with pytest.raises(SagaFailed) as failed:
                await asyncio.wait_for(coordinator.run(orders), LONGEST)
            assert failed.value.outcome == "compensated"

    asyncio.run(main())


@pytest.mark.parametrize("written", ["dispatch", "dispatch_all", "record"])
def test_an_interrupt_of_a_write_is_one_though_the_function_cleans_up(own_log: SagaLog, written: str) -> None:
    shop = Lamps()
    with SagaCoordinator(own_log, shop.bus) as coordinator:

        def interrupting(effect: Any, answer: Any) -> Any:
            if isinstance(effect, Write) and effect.operation.asked == written:
                coordinator.interpose = None
                raise KeyboardInterrupt
            return answer(effect)

        @coordinator.saga("tidies")
        def tidies(ctx: Any) -> None:
            try:
                if written == "dispatch_all":
                    ctx.dispatch_all([Reserve(), Reserve()])
                elif written == "dispatch":
                    ctx.dispatch(Reserve())
                else:
                    ctx.now()
            finally:
                ctx.dispatch(Charge(amount=1))

        coordinator.interpose = interrupting
        with pytest.raises(KeyboardInterrupt):
            coordinator.run(tidies)
    assert own_log.get(1).state == "running"


def test_an_interrupt_of_steps_side_by_side_is_one_though_the_function_cleans_up(own_log: SagaLog) -> None:
    def interrupted(step: StepInfo) -> Done:
        raise KeyboardInterrupt

    shop = Lamps(reserve=interrupted)
    with SagaCoordinator(own_log, shop.bus) as coordinator:

        @coordinator.saga("tidies")
        def tidies(ctx: Any) -> None:
            try:
                ctx.dispatch_all([Reserve(), Reserve()])
            finally:
                try:
                    ctx.dispatch(Charge(amount=1))
                except StepFailed as failure:
                    raise RuntimeError("could not tidy up") from failure

        with pytest.raises(KeyboardInterrupt):
            coordinator.run(tidies)
    assert own_log.get(1).state == "running"
