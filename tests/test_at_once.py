"""Calls of a context at once, and those that outlive the saga's function."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from sagalog import (
    CommandBus,
    SagaCoordinator,
    SagaFailed,
    SagaLog,
    StepFailed,
    StepInfo,
    StepRejected,
    UnusableHandler,
)
from sagalog.coordinator.effects import Write
from tests.coordinating import Charge, Charged, Release, Reserve, Shop, Stage


class SlowShop(Shop):
    """A shop whose charge lasts until the function has ended, and longer if anything is undone meanwhile."""

    def __init__(self, bus: CommandBus, **charging: Any) -> None:
        self.begun, self.ended, self.undone = threading.Event(), threading.Event(), threading.Event()
        super().__init__(bus, **charging)

    def charge(self, cmd: Charge, step: StepInfo) -> Charged:
        self.begun.set()
        assert self.ended.wait(30)
        self.undone.wait(0.3)
        return super().charge(cmd, step)

    def release(self, cmd: Release, step: StepInfo) -> None:
        self.undone.set()
        super().release(cmd, step)


def charging(ctx: Any) -> None:
    with suppress(Exception):  # the saga is told
        ctx.dispatch(Charge(amount=1))


def ending_beside(stage: Stage, shop: SlowShop, *, raises: bool) -> SagaFailed:
    """Run a saga whose function ends while another thread's charge is under way."""
    coordinator = stage.coordinator()
    threads: list[threading.Thread] = []

    @coordinator.saga("ends")
    def ends(ctx: Any) -> None:
        ctx.dispatch(Reserve(sku="book"))
        threads.append(threading.Thread(target=charging, args=(ctx,)))
        threads[0].start()
        assert shop.begun.wait(30)
        shop.ended.set()
        if raises:
            raise ValueError("no courier")

    with pytest.raises(SagaFailed) as raised:
        coordinator.run("ends")
    threads[0].join(30)
    return raised.value


def test_a_pivot_under_way_when_the_function_raises_keeps_what_was_done_before_it(stage: Stage) -> None:
    shop = SlowShop(stage.bus, pivot=True)
    assert ending_beside(stage, shop, raises=True).outcome == "failed_compensation"
    assert shop.calls == ["reserve", "charge"]
    assert stage.states() == [("Reserve", "succeeded"), ("Charge", "succeeded")]


@pytest.mark.parametrize(
    ("raises", "words"), [(True, "no courier"), (False, "returned while a call of its context was under way")]
)
def test_a_step_under_way_when_the_function_ends_is_undone_after_it_was_done(
    stage: Stage, raises: bool, words: str
) -> None:
    shop = SlowShop(stage.bus)
    failed = ending_beside(stage, shop, raises=raises)
    assert failed.outcome == "compensated"
    assert words in str(failed)
    assert shop.calls == ["reserve", "charge", "refund", "release"]


def test_a_command_whose_row_was_being_written_when_the_function_raised_is_not_sent(
    migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, writing, waits, sent = CommandBus(), threading.Event(), threading.Event(), list[int]()

    @bus.handler(pivot=True)
    def charge(cmd: Charge) -> Charged:
        sent.append(cmd.amount)
        return Charged(amount=cmd.amount)

    with SagaLog.open(migrated_url.removeprefix("sqlite:///")) as log, SagaCoordinator(log, bus) as coordinator:
        sleep = time.sleep

        def waiting(seconds: float) -> None:
            waits.set()  # the function has ended, and its call is waited for
            sleep(seconds)

        def holding(effect: Any, answer: Callable[[Any], Any]) -> Any:
            if isinstance(effect, Write) and effect.operation.asked == "dispatch":
                writing.set()
                assert waits.wait(30)
            return answer(effect)

        @coordinator.saga("ends")
        def ends(ctx: Any) -> None:
            threading.Thread(target=charging, args=(ctx,)).start()
            assert writing.wait(30)
            monkeypatch.setattr(time, "sleep", waiting)
            raise ValueError("no courier")

        coordinator.interpose = holding
        with pytest.raises(SagaFailed, match="no courier") as raised:
            coordinator.run(ends)
        steps = log.get(raised.value.saga_id).steps
    assert raised.value.outcome == "compensated"
    assert [(step.name, step.state) for step in steps] == [("Charge", "failed")]
    assert sent == []


def test_two_undos_by_hand_at_once_undo_two_steps(stage: Stage) -> None:
    shop, both = Shop(stage.bus), threading.Barrier(2)
    coordinator = stage.coordinator()

    @coordinator.saga("undoes")
    def undoes(ctx: Any) -> None:
        for sku in ("book", "lamp"):
            ctx.dispatch(Reserve(sku=sku))

        def undo(sku: str) -> None:
            both.wait(30)
            ctx.compensate(Release(sku=sku))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(undo, ("lamp", "book")))

    coordinator.run("undoes")
    assert stage.states()[:2] == [("Reserve", "compensated"), ("Reserve", "compensated")]
    assert sorted(info.compensates.step_index for info in shop.infos if info.compensates) == [0, 1]


class SlowRelease(Shop):
    """A shop whose release lasts until the test says."""

    def __init__(self, bus: CommandBus) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        super().__init__(bus)

    def release(self, cmd: Release, step: StepInfo) -> None:
        self.begun.set()
        assert self.may_end.wait(30)
        super().release(cmd, step)


def test_a_step_that_is_being_undone_by_hand_cannot_be_named_again(stage: Stage) -> None:
    shop = SlowRelease(stage.bus)
    coordinator = stage.coordinator()

    @coordinator.saga("undoes")
    def undoes(ctx: Any) -> None:
        cmd = Reserve(sku="book")
        ctx.dispatch(cmd)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(ctx.compensate, Release(sku="book"), [cmd])
            assert shop.begun.wait(30)
            try:
                with pytest.raises(UnusableHandler, match="is undone"):
                    ctx.compensate(Release(sku="book"), [cmd])
            finally:
                shop.may_end.set()
            first.result(30)

    coordinator.run("undoes")
    assert shop.calls == ["reserve", "release"]


def test_an_undo_by_hand_that_was_refused_may_be_tried_again(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("release", StepRejected("not yet"))
    coordinator = stage.coordinator()

    @coordinator.saga("undoes")
    def undoes(ctx: Any) -> None:
        ctx.dispatch(Reserve(sku="book"))
        with pytest.raises(StepFailed, match="not yet"):
            ctx.compensate(Release(sku="book"))
        ctx.compensate(Release(sku="book"))

    coordinator.run("undoes")
    assert shop.calls == ["reserve", "release", "release"]
    assert stage.states() == [("Reserve", "compensated"), ("Release", "failed"), ("Release", "compensated")]
