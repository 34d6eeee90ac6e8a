"""Troubles that a coordinator meets: each was once a defect."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from sagalog import (
    CommandBus,
    SagaCoordinator,
    SagaFailed,
    SagaLog,
    StepInfo,
)
from sagalog.coordinator.effects import Write


class Reserve(BaseModel):
    sku: str = "lamp"


class Release(BaseModel):
    sku: str = "lamp"
    amount: Any = 1


class Charge(BaseModel):
    amount: int = 1


class Refund(BaseModel):
    amount: int = 1


class Done(BaseModel):
    ok: bool = True


class Killed(BaseException):
    """The process is gone here."""


class Shop:
    """A bus whose handlers note what was asked for, and then do what the test says."""

    def __init__(
        self,
        *,
        reserve: Callable[[StepInfo], Any] = lambda step: Done(),
        derive: Callable[[], Release] = Release,
        releases: bool = True,
        **arguments: Any,
    ) -> None:
        self.asked: list[tuple[str, str]] = []
        self.bus = CommandBus()

        @self.bus.handler(**arguments)
        def do_reserve(cmd: Reserve, step: StepInfo) -> Done:
            self.asked.append(("reserve", step.idempotency_key))
            return reserve(step)  # type: ignore[no-any-return]

        @self.bus.compensation(Reserve)
        def undo_reserve(cmd: Reserve, output: Done | None) -> Release:
            return derive()

        @self.bus.handler
        def do_charge(cmd: Charge, step: StepInfo) -> Done:
            self.asked.append(("charge", step.idempotency_key))
            return Done()

        @self.bus.compensation(Charge)
        def undo_charge(cmd: Charge, output: Done | None) -> Refund:
            return Refund()

        @self.bus.handler
        def do_refund(cmd: Refund, step: StepInfo) -> None:
            self.asked.append(("refund", step.idempotency_key))

        if releases:

            @self.bus.handler
            def do_release(cmd: Release, step: StepInfo) -> None:
                self.asked.append(("release", step.idempotency_key))

    @property
    def verbs(self) -> list[str]:
        return [verb for verb, _ in self.asked]


@pytest.fixture
def log(migrated_url: str) -> Iterator[SagaLog]:
    with SagaLog.open(migrated_url) as opened:
        yield opened


def reserving(coordinator: SagaCoordinator, *, fails: bool = False) -> Callable[..., Any]:
    """Register a saga of one step."""

    @coordinator.saga("reserving")
    def reserving(ctx: Any, order: int) -> int:
        ctx.dispatch(Reserve())
        if fails:
            raise ValueError("no lamp fits")
        return order

    return reserving


def beginning_elsewhere(log: SagaLog, name: str, *, input: object = 1, submitted: bool = False) -> int:
    """A saga that a process left that is gone; or one that it submitted."""
    elsewhere = SagaCoordinator(log, CommandBus())

    @elsewhere.saga(name)
    def left(ctx: Any, order: Any) -> None:
        raise Killed

    if submitted:
        return elsewhere.submit(left, input)
    with pytest.raises(Killed):
        elsewhere.run(left, input)
    elsewhere.close()
    return log.max_saga_id()


# Whose a saga is


def test_a_saga_that_has_just_begun_is_not_recovered_by_its_own_process(log: SagaLog) -> None:
    shop = Shop()
    with SagaCoordinator(log, shop.bus) as coordinator:
        saga = reserving(coordinator)

        def recovering(effect: Any, answer: Callable[[Any], Any]) -> Any:
            given = answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "run":
                coordinator.interpose = None
                beside = threading.Thread(target=coordinator.recover)
                beside.start()
                beside.join()
            return given

        coordinator.interpose = recovering
        assert coordinator.run(saga, 5) == 5
    assert shop.verbs == ["reserve"]


def test_a_saga_that_its_process_could_not_undo_is_recovered_by_another_one(log: SagaLog) -> None:
    knows_less, knows_all = Shop(releases=False), Shop()
    with SagaCoordinator(log, knows_less.bus) as here, SagaCoordinator(log, knows_all.bus) as there:
        with pytest.raises(SagaFailed) as failed:
            here.run(reserving(here, fails=True), 1)
        assert failed.value.outcome == "failed"
        reserving(there)
        assert there.recover().compensated == [1]
    assert knows_all.verbs == ["release"]


def test_a_child_that_exits_inside_a_handler_does_not_give_its_parents_saga_away(log: SagaLog) -> None:
    owners: list[str | None] = []

    def forking(step: StepInfo) -> Done:
        child = os.fork()
        if child == 0:
            sys.exit(0)
        os.waitpid(child, 0)
        owners.append(log.get(step.saga_id).executor_id)
        return Done()

    shop = Shop(reserve=forking)
    with SagaCoordinator(log, shop.bus) as coordinator:
        saga = reserving(coordinator)
        here = os.getpid()
        try:
            assert coordinator.run(saga, 5) == 5
        finally:
            if os.getpid() != here:
                os._exit(0)
        assert owners == [coordinator.executor_id]


def test_a_saga_whose_handler_hangs_is_recovered_by_its_own_process(log: SagaLog) -> None:
    hangs, woken = threading.Event(), threading.Event()

    def hanging(step: StepInfo) -> Done:
        hangs.set()
        woken.wait()
        return Done()

    shop = Shop(reserve=hanging, timeout=0.1, settle=0.0, on_unknown="compensate")
    with SagaCoordinator(log, shop.bus) as coordinator:
        saga = reserving(coordinator)
        raised: list[BaseException] = []

        def run() -> None:
            try:
                coordinator.run(saga, 1)
            except BaseException as error:
                raised.append(error)

        hung = threading.Thread(target=run)
        hung.start()
        hangs.wait()
        compensated: list[int] = []
        while not compensated:
            compensated = coordinator.recover().compensated
        woken.set()
        hung.join()
    assert compensated == [1]
    assert type(raised[0]).__name__ == "LeaseLost"
    assert shop.verbs == ["reserve", "release"]
