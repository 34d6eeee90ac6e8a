"""Troubles that a coordinator meets: each was once a defect."""

from __future__ import annotations

import asyncio
import functools
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from sagalog import (
    AsyncSagaCoordinator,
    AsyncSagaLog,
    CommandBus,
    Retry,
    SagaCoordinator,
    SagaFailed,
    SagaLog,
    StepFailed,
    StepInfo,
    StepRejected,
)
from sagalog.coordinator.effects import Write
from sagalog.errors import PayloadError, UnusableHandler


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
