"""What the tests of a coordinator's troubles share: a small shop, and a saga that reserves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

from sagalog import (
    CommandBus,
    SagaCoordinator,
    SagaLog,
    StepInfo,
)
from sagalog.coordinator.effects import Write
from tests.processes import LONGEST


class Reserve(BaseModel):
    sku: str = "lamp"


class Release(BaseModel):
    sku: str = "lamp"
    amount: float = 1


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


# Handlers that only answer


class Ask(BaseModel):
    word: str = "hello"


class One(BaseModel):
    number: int


def answering(answer: Any, returns: Any) -> Any:
    def ask(cmd: Ask) -> Any:
        return answer

    ask.__annotations__["return"] = returns
    return ask


def claiming(coordinator: SagaCoordinator, claim: Callable[[Callable[[], Any]], Any]) -> None:
    """Put something around each claim."""

    def around(effect: Any, answer: Callable[[Any], Any]) -> Any:
        if isinstance(effect, Write) and effect.operation.asked == "claim":
            return claim(lambda: answer(effect))
        return answer(effect)

    coordinator.interpose = around


def until_one_ends(coordinator: SagaCoordinator) -> int:
    """Recover until there was something to recover."""
    report = coordinator.recover()
    while not report.resolved:
        report = coordinator.recover()
    return report.resolved


class Slow:
    """A handler that a test lets end."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.shop = Shop(reserve=self._reserve)

    def _reserve(self, step: StepInfo) -> Done:
        self.begun.set()
        self.may_end.wait(LONGEST)
        return Done()
