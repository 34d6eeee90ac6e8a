"""Processes of several versions beside each other, as a deploy that rolls leaves them."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pydantic import BaseModel, model_validator

from tests.coordinating import Order, Reserve, Shop, Stage


class Earlier(BaseModel):
    """The input of the earlier version."""

    sku: str


class Breaking(BaseModel):
    """The input of the earlier version, as its class raises something that Pydantic does not wrap."""

    sku: str

    @model_validator(mode="before")
    @classmethod
    def look_up(cls, data: Any) -> Any:
        return {"sku": data["sku"]}


class Later(BaseModel):
    """The input of the later version."""

    order_id: str


def versioned(stage: Stage, version: int, takes: Any = Order) -> Any:
    coordinator = stage.coordinator()

    def place_order(ctx: Any, order: Any) -> int:
        ctx.dispatch(Reserve(sku="book"))
        return version

    place_order.__annotations__["order"] = takes
    coordinator.saga("place_order", version=version)(place_order)
    return coordinator


def test_a_submitted_saga_has_the_version_that_runs_it(stage: Stage) -> None:
    Shop(stage.bus)
    older, newer = versioned(stage, 1), versioned(stage, 2)
    saga_id = older.submit("place_order", Order())
    with newer.worker(poll=0.05):
        assert newer.wait(saga_id, timeout=30) == 2
    assert stage.log.get(saga_id).version == 2


@pytest.mark.parametrize(
    ("version", "takes", "took"),
    [(2, Earlier, Earlier), (1, Later, Earlier), (1, Later, Breaking)],
    ids=["a later version", "another input", "another input that breaks its class"],
)
def test_a_saga_that_a_process_cannot_run_stays_submitted_for_one_that_can(
    stage: Stage, version: int, takes: Any, took: Any, told: pytest.LogCaptureFixture
) -> None:
    shop = Shop(stage.bus)
    older, newer = versioned(stage, 1, took), versioned(stage, version, takes)
    left = newer.submit("place_order", takes.model_validate({"order_id": "x", "sku": "book"}))
    with older.worker(poll=0.05):
        until = time.monotonic() + 30
        while "stays submitted" not in told.text:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert older.wait(older.submit("place_order", took(sku="book")), timeout=30) == 1
    assert told.text.count("stays submitted") == 1  # and is looked at again after a while only
    assert stage.log.get(left).state == "submitted"
    with newer.worker(poll=0.05):
        assert newer.wait(left, timeout=30) == version
    assert shop.calls == ["reserve", "reserve"]
