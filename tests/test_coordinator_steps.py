"""What is known of a step, and what a handler may do: each was once a defect."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    StepRejected,
)
from sagalog.coordinator.effects import Write
from sagalog.errors import UnusableHandler
from tests.coordinating import Stage
from tests.troubled import Charge, Done, Killed, Release, Reserve, Shop, reserving

# What is known of a step


def test_a_timeout_shorter_than_a_write_is_stretched_until_the_handler_is_called(own_log: SagaLog) -> None:
    shop = Shop(timeout=0.0001, settle=0.0)
    with SagaCoordinator(own_log, shop.bus) as coordinator:
        assert coordinator.run(reserving(coordinator), 1) == 1
    assert shop.verbs == ["reserve"]


def test_a_timeout_is_no_rejection_whatever_the_handler_rejects_with(sqlite_path: Any) -> None:
    """The request may have landed, so the step is undone."""
    bus, asked = CommandBus(), []

    @bus.handler(rejects=(OSError,), timeout=0.05, settle=0.0, on_unknown="compensate")
    async def do_reserve(cmd: Reserve) -> Done:
        asked.append("reserve")
        await asyncio.Event().wait()
        return Done()

    @bus.compensation(Reserve)
    def undo_reserve(cmd: Reserve, output: Done | None) -> Release:
        return Release()

    @bus.handler
    async def do_release(cmd: Release) -> None:
        asked.append("release")

    async def main() -> None:
        async with await AsyncSagaLog.open(sqlite_path) as own_log, AsyncSagaCoordinator(own_log, bus) as coordinator:

            @coordinator.saga("reserving")
            async def reserving(ctx: Any, order: int) -> None:
                await ctx.dispatch(Reserve())

            with pytest.raises(SagaFailed, match="is in doubt"):
                await coordinator.run(reserving, 1)

    asyncio.run(main())
    assert asked == ["reserve", "release"]


def test_an_async_handler_behind_a_plain_decorator_is_awaited(sqlite_path: Any) -> None:
    bus = CommandBus()

    def plain(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function(*args)

        return wrapper

    @bus.handler(read_only=True)
    @plain
    async def do_reserve(cmd: Reserve) -> Done:
        return Done()

    async def main() -> Done:
        async with await AsyncSagaLog.open(sqlite_path) as own_log, AsyncSagaCoordinator(own_log, bus) as coordinator:

            @coordinator.saga("reserving")
            async def reserving(ctx: Any, order: int) -> Done:
                done: Done = await ctx.dispatch(Reserve())
                return done

            answer: Done = await coordinator.run(reserving, 1)
            return answer

    assert asyncio.run(main()) == Done()


def test_a_step_is_tried_as_often_as_its_handler_says_and_no_more(own_log: SagaLog) -> None:
    def failing(step: StepInfo) -> Done:
        raise RuntimeError("no answer")

    shop = Shop(reserve=failing, retry=Retry(attempts=3, initial=0.0), settle=0.0)
    with SagaCoordinator(own_log, shop.bus) as coordinator, pytest.raises(SagaFailed):
        coordinator.run(reserving(coordinator), 1)
    assert shop.verbs == ["reserve"] * 3


def test_a_slow_write_before_a_step_does_not_end_its_saga(sqlite_path: Any) -> None:
    shop = Shop(timeout=0.05, settle=0.0)
    with SagaLog.open(sqlite_path) as own_log, SagaCoordinator(own_log, shop.bus) as coordinator:
        saga = reserving(coordinator)

        def waiting(effect: Any, answer: Callable[[Any], Any]) -> Any:
            given = answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "dispatch":
                late = time.monotonic() + 0.1
                while time.monotonic() < late:
                    """The disk is slow."""
            return given

        coordinator.interpose = waiting
        assert coordinator.run(saga, 5) == 5
    assert shop.verbs == ["reserve"]


def test_the_reason_of_a_rejection_is_the_same_on_a_resume(own_log: SagaLog) -> None:
    def rejecting(step: StepInfo) -> Done:
        raise StepRejected("sold \x00 out")

    reasons: list[str] = []
    shop = Shop(reserve=rejecting)
    with SagaCoordinator(own_log, shop.bus, on_crash="resume") as coordinator:

        @coordinator.saga("asking")
        def asking(ctx: Any, order: int) -> None:
            try:
                ctx.dispatch(Reserve())
            except StepFailed as failure:
                reasons.append(failure.reason)
            if len(reasons) == 1:
                raise Killed

        with pytest.raises(Killed):
            coordinator.run(asking, 1)
        assert coordinator.recover().completed == [1]
    assert reasons[0] == reasons[1] == "sold \ufffd out"


# Going on, and undoing by hand


def test_a_resumed_function_that_undoes_before_it_did_what_the_log_holds_is_undone(own_log: SagaLog) -> None:
    shop = Shop()
    lives: list[int] = []
    with SagaCoordinator(own_log, shop.bus, on_crash="resume") as coordinator:

        @coordinator.saga("wavering")
        def wavering(ctx: Any, order: int) -> None:
            lives.append(1)
            ctx.dispatch(Reserve())
            if len(lives) == 1:
                ctx.dispatch(Charge())
                raise Killed
            ctx.compensate(Release())

        with pytest.raises(Killed):
            coordinator.run(wavering, 1)
        assert coordinator.recover().compensated == [1]
    assert shop.verbs == ["reserve", "charge", "refund", "release"]


def test_a_deadline_does_not_stop_an_undo_by_hand(own_log: SagaLog) -> None:
    shop = Shop()
    with SagaCoordinator(own_log, shop.bus) as coordinator:
        undone_by_hand: list[int] = []

        @coordinator.saga("late", timeout=0.2)
        def late(ctx: Any, order: int) -> None:
            ctx.dispatch(Reserve())
            deadline = own_log.get(ctx.saga_id).deadline_at
            assert deadline is not None
            while time.time() < deadline.timestamp():
                """Time passes."""
            ctx.compensate(Release())
            undone_by_hand.append(ctx.saga_id)

        with pytest.raises(SagaFailed, match="its time is up") as failed:
            coordinator.run(late, 1)
    assert failed.value.outcome == "compensated"
    assert undone_by_hand == [1]
    assert shop.asked[1:] == [("release", f"{shop.asked[0][1]}:undo")]


# Registration


@pytest.mark.parametrize(
    "arguments",
    [
        {"rejects": "CardDeclined"},
        {"rejects": (KeyboardInterrupt,)},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"settle": float("nan")},
        {"retry": 5},
    ],
)
def test_what_would_only_fail_while_a_step_is_done_is_refused_at_registration(arguments: dict[str, Any]) -> None:
    with pytest.raises(UnusableHandler):
        Shop(**arguments)


def test_rejections_may_be_listed(own_log: SagaLog) -> None:
    def rejecting(step: StepInfo) -> Done:
        raise ValueError("sold out")

    shop = Shop(reserve=rejecting, rejects=[ValueError])
    with (
        SagaCoordinator(own_log, shop.bus) as coordinator,
        pytest.raises(SagaFailed, match="failed: ValueError: sold out"),
    ):
        coordinator.run(reserving(coordinator), 1)
    assert own_log.get(1).state == "compensated"


def test_a_handler_is_never_given_the_key_in_place_of_its_own_parameter() -> None:
    bus = CommandBus()
    with pytest.raises(UnusableHandler, match="comes after 'loud'"):

        @bus.handler
        def do_reserve(cmd: Reserve, loud: bool = False, step: StepInfo | None = None) -> Done:
            return Done()


def test_a_handler_may_take_its_info_optionally(own_log: SagaLog) -> None:
    bus, keys = CommandBus(), []

    @bus.handler(read_only=True, retry=Retry())
    def do_reserve(cmd: Reserve, step: StepInfo | None = None) -> Done:
        keys.append(None if step is None else step.idempotency_key)
        return Done()

    with SagaCoordinator(own_log, bus) as coordinator:
        coordinator.run(reserving(coordinator), 1)
    assert keys[0] is not None


def test_an_async_compensation_is_refused() -> None:
    bus = CommandBus()
    with pytest.raises(UnusableHandler, match="async"):

        @bus.compensation(Reserve)
        async def undo_reserve(cmd: Reserve, output: Done) -> Release:
            return Release()


# What a handler may not do


@pytest.mark.parametrize("how", ["dispatch", "compensate", "record", "now", "dispatch_all"])
def test_a_handler_cannot_go_on_with_its_saga(stage: Stage, how: str) -> None:
    contexts: list[Any] = []
    asked: list[str] = []

    def do(cmd: Charge, step: StepInfo) -> Done:
        asked.append(step.idempotency_key)
        ctx = contexts[0]
        calls: dict[str, Callable[[], Any]] = {
            "dispatch": lambda: ctx.dispatch(Reserve()),
            "compensate": lambda: ctx.compensate(Release()),
            "record": lambda: ctx.record("kept", lambda: 1),
            "now": ctx.now,
            "dispatch_all": lambda: ctx.dispatch_all([Reserve()]),
        }
        calls[how]()
        return Done()

    def reserve(cmd: Reserve) -> Done:
        raise AssertionError("it was dispatched")

    stage.bus.handler(pivot=True, rejects=UnusableHandler)(do)
    stage.bus.handler(read_only=True)(reserve)
    coordinator = stage.coordinator()

    @coordinator.saga("charges")
    def charges(ctx: Any) -> None:
        contexts.append(ctx)
        ctx.dispatch(Charge())

    with pytest.raises(SagaFailed, match="a handler of the saga calls it"):
        coordinator.run("charges")
    assert len(asked) == 1
    assert stage.states() == [("Charge", "failed")]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["of its log", "of another log, of the same id"])
def test_a_handler_may_run_another_saga(own_log: SagaLog, elsewhere: bool) -> None:
    bus = CommandBus()
    with (
        SagaCoordinator(own_log, bus) as coordinator,
        SagaLog.open_in_memory() as other_log,
        SagaCoordinator(other_log, bus) as another,
    ):
        inside = another if elsewhere else coordinator

        @bus.handler(read_only=True)
        def look(cmd: Charge) -> int:
            return 7

        @bus.handler(pivot=True)
        def run(cmd: Reserve) -> int:
            return int(inside.run("inner"))

        @inside.saga("inner")
        def inner(ctx: Any) -> int:
            return int(ctx.dispatch(Charge()))

        @coordinator.saga("outer")
        def outer(ctx: Any) -> int:
            return int(ctx.dispatch(Reserve()))

        assert coordinator.run(outer) == 7


def test_a_saga_of_another_log_that_a_handler_lost_is_not_its_own(stage: Stage) -> None:
    @stage.bus.handler(pivot=True)
    def charge(cmd: Charge, step: StepInfo) -> None:
        raise LeaseLost("finish_step", step.saga_id, epoch=1, found=2)

    coordinator = stage.coordinator()

    @coordinator.saga("charges")
    def charges(ctx: Any) -> None:
        ctx.dispatch(Charge())

    with pytest.raises(SagaFailed, match="in doubt: LeaseLost"):
        coordinator.run("charges")
    assert stage.log.get(1).state == "failed_compensation"


def test_a_task_that_a_handler_began_may_dispatch_once_the_handler_has_returned(sqlite_path: Path) -> None:
    """It serves whoever asks, the saga's function as well."""
    bus = CommandBus()
    asked: asyncio.Queue[Any] = asyncio.Queue()
    tasks: list[asyncio.Task[None]] = []

    async def serve() -> None:
        ctx, answer = await asked.get()
        answer.set_result(await ctx.dispatch(Reserve()))

    @bus.handler(pivot=True)
    async def begin(cmd: Charge) -> None:
        tasks.append(asyncio.create_task(serve()))

    @bus.handler(read_only=True)
    async def reserve(cmd: Reserve) -> int:
        return 7

    async def main() -> int:
        async with await AsyncSagaLog.open(sqlite_path) as own_log, AsyncSagaCoordinator(own_log, bus) as coordinator:

            @coordinator.saga("serves")
            async def serves(ctx: Any) -> int:
                await ctx.dispatch(Charge())
                answer = asyncio.get_running_loop().create_future()
                await asked.put((ctx, answer))
                return int(await answer)

            return int(await asyncio.wait_for(coordinator.run(serves), timeout=30))

    assert asyncio.run(main()) == 7
