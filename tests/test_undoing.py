"""Undos by hand and pivots, and what is undone whatever was raised."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy.orm import Session

from sagalog import (
    SagaFailed,
    StepInfo,
    UnusableHandler,
)
from tests.coordinating import (
    Charge,
    Killed,
    Refund,
    Release,
    Reserve,
    Shop,
    Stage,
)


class Ask(BaseModel):
    """A command without an answer."""


class TakeBack(BaseModel):
    """What undoes it."""


class Note(BaseModel):
    words: str


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
    assert [state for _, state in stage.states()] == ["compensated", "succeeded", "compensated"]


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
    assert stage.states() == [("Charge", "succeeded")]


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
