"""Parcels, which the coordinator sends after the request."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from fastapi_shop.courier import Courier
from fastapi_shop.models import Order
from sagalog import AsyncSagaCoordinator, SagaFailed, SagaLog

TEA = {"sku": "TEA-1", "quantity": 2, "card": "tok-1"}
KEY = {"Idempotency-Key": "basket-7"}


def sagas(database: Engine) -> list[int]:
    """The parcels' sagas."""
    with Session(database) as session:
        return [saga.saga_id for saga in SagaLog(session).find(name="send_parcel")]


def sent(app: FastAPI, client: TestClient, database: Engine) -> Any:
    """Wait for the worker to end the one parcel's saga; what it returned."""
    (saga_id,) = sagas(database)
    assert client.portal is not None
    return client.portal.call(partial(app.state.parcels.wait, saga_id, timeout=60))


def test_a_paid_order_is_sent_by_the_worker(
    app: FastAPI, client: TestClient, courier: Courier, database: Engine
) -> None:
    assert client.post("/orders", json=TEA, headers=KEY).status_code == 201
    assert sent(app, client, database) == "P-1"
    assert client.get("/orders/1/parcel").json() == {"tracking": "P-1"}
    # The same request again is the same order, and the same parcel.
    assert client.post("/orders", json=TEA, headers=KEY).status_code == 201
    assert len(sagas(database)) == len(courier.booked) == 1


def test_what_is_not_paid_is_not_sent(client: TestClient, courier: Courier, database: Engine) -> None:
    client.post("/orders", json={**TEA, "card": "declined"})
    assert sagas(database) == []
    assert courier.booked == {}
    assert client.get("/orders/1/parcel").status_code == 404


def test_a_crash_before_the_commit_leaves_neither_the_payment_nor_the_parcel(
    app: FastAPI, client: TestClient, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = AsyncSagaCoordinator.submit

    async def submit_and_crash(self: AsyncSagaCoordinator, *arguments: Any, **named: Any) -> None:
        await submit(self, *arguments, **named)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(AsyncSagaCoordinator, "submit", submit_and_crash)
        assert client.post("/orders", json=TEA, headers=KEY).status_code == 500
    assert client.get("/orders/1").json()["status"] == "accepted"
    assert sagas(database) == []
    assert client.post("/orders", json=TEA, headers=KEY).json()["status"] == "paid"
    assert sent(app, client, database) == "P-1"


def test_the_courier_is_cancelled_if_the_money_was_given_back_meanwhile(
    app: FastAPI, client: TestClient, courier: Courier, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = courier.book

    async def book_and_refund(order: int, key: str) -> str:
        with Session(database) as session:
            session.get_one(Order, order).status = "refunded"
            session.commit()
        return await book(order, key)

    monkeypatch.setattr(courier, "book", book_and_refund)
    client.post("/orders", json=TEA)
    with pytest.raises(SagaFailed, match="order 1 is refunded") as failure:
        sent(app, client, database)
    assert failure.value.outcome == "compensated"
    assert courier.cancelled == ["P-1"]
    assert client.get("/orders/1/parcel").status_code == 404
