"""Orders over HTTP, and what is left when a request fails half-way."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from fastapi_shop.app import create_app
from fastapi_shop.bank import Bank, BankUnreachable, CardCharged, ChargeCard
from fastapi_shop.models import Order, Product
from fastapi_shop.orders import settle_all
from fastapi_shop.report import in_doubt
from sagalog import AsyncSagaLog, SagaLog

TEA = {"sku": "TEA-1", "quantity": 2, "card": "tok-1"}


def stock(database: Engine) -> int:
    with Session(database) as session:
        return session.get_one(Product, "TEA-1").stock


def counts(database: Engine) -> dict[str, int]:
    """The orders, and their sagas by state."""
    with Session(database) as session:
        sagas = Counter(saga.state for saga in SagaLog(session).find(name="place_order"))
        return {"orders": len(session.scalars(select(Order)).all()), **sagas}


def test_an_order_is_paid(client: TestClient, bank: Bank, database: Engine) -> None:
    answer = client.post("/orders", json=TEA)
    assert answer.status_code == 201
    paid = {"status": "paid", "saga": "completed", "steps": {"ReserveStock": "succeeded", "ChargeCard": "succeeded"}}
    assert answer.json() == {"id": 1, **paid}
    assert client.get("/orders/1").json() == answer.json()
    assert stock(database) == 1
    assert [charge.pence for charge in bank.charged.values()] == [500]


def test_a_declined_card_gives_the_stock_back(client: TestClient, database: Engine) -> None:
    answer = client.post("/orders", json={**TEA, "card": "declined"})
    undone = {"ReserveStock": "compensated", "ChargeCard": "failed"}
    assert answer.json() == {"id": 1, "status": "cancelled", "saga": "compensated", "steps": undone}
    assert stock(database) == 3


def test_a_request_that_fails_between_the_saga_and_the_order_leaves_neither(
    client: TestClient, database: Engine
) -> None:
    # The saga and its first step are written before the shop sees that there is not enough.
    answer = client.post("/orders", json={**TEA, "quantity": 4})
    assert answer.status_code == 409
    assert counts(database) == {"orders": 0}
    assert stock(database) == 3


def test_a_crash_between_the_saga_and_the_order_leaves_neither(
    client: TestClient, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(self: AsyncSagaLog, *arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(AsyncSagaLog, "finish_step", crash)
        assert client.post("/orders", json=TEA, headers={"Idempotency-Key": "k"}).status_code == 500
    assert counts(database) == {"orders": 0}
    assert stock(database) == 3
    assert client.post("/orders", json=TEA, headers={"Idempotency-Key": "k"}).status_code == 201


def test_the_same_request_again_is_the_same_order(client: TestClient, database: Engine) -> None:
    key = {"Idempotency-Key": "basket-7"}
    first, again = (client.post("/orders", json=TEA, headers=key) for _ in range(2))
    assert first.json() == again.json()
    assert counts(database) == {"orders": 1, "completed": 1}
    assert client.post("/orders", json={**TEA, "quantity": 1}, headers=key).status_code == 409


class Silent(Bank):
    """Charges the card, and the answer is lost."""

    async def charge(self, charge: ChargeCard, key: str) -> CardCharged:
        """Charge, then fail."""
        await super().charge(charge, key)
        raise BankUnreachable("no answer from the bank")


@pytest.mark.parametrize("by", ["the customer", "the shop"])
def test_a_payment_in_doubt_is_found_and_settled(
    app: FastAPI, client: TestClient, bank: Bank, database: Engine, url: str, by: str
) -> None:
    app.state.bank = silent = Silent()
    key = {"Idempotency-Key": "basket-7"}
    assert client.post("/orders", json=TEA, headers=key).status_code == 502
    assert client.get("/orders/1").json()["steps"]["ChargeCard"] == "pending"
    assert counts(database) == {"orders": 1, "running": 1}
    assert client.get("/doubts").json() == ["saga 1: ChargeCard in doubt"]

    if by == "the customer":
        app.state.bank = bank
        assert client.post("/orders", json=TEA, headers=key).json()["status"] == "paid"
    else:
        with TestClient(create_app(url, bank)) as started_again:
            assert started_again.get("/orders/1").json()["status"] == "paid"
    assert counts(database) == {"orders": 1, "completed": 1}
    assert bank.charged == silent.charged, "asked again under the same key"
    assert client.get("/doubts").json() == []


class Watched(Bank):
    """While one request asks it, the shop settles what it takes for interrupted."""

    asked = 0

    def __init__(self, app: FastAPI) -> None:
        super().__init__()
        self.app = app

    async def charge(self, charge: ChargeCard, key: str) -> CardCharged:
        """Let the other go first."""
        self.asked += 1
        if self.asked == 1:
            async with self.app.state.sessions() as session:
                await settle_all(session, self, self.app.state.parcels)
        return await super().charge(charge, key)


@pytest.mark.parametrize(("card", "status", "left"), [("tok-1", "paid", 1), ("declined", "cancelled", 3)])
def test_two_that_settle_one_order_do_it_once(
    app: FastAPI, client: TestClient, database: Engine, card: str, status: str, left: int
) -> None:
    app.state.bank = bank = Watched(app)
    assert client.post("/orders", json={**TEA, "card": card}).json()["status"] == status
    assert bank.asked == 2
    assert stock(database) == left


def test_bad_input_is_refused(client: TestClient) -> None:
    assert client.post("/orders", json={"sku": "TEA-1"}).status_code == 422
    assert client.get("/orders/99").status_code == 404


def test_the_report_names_the_step_in_doubt(async_saga_log: AsyncSagaLog) -> None:
    # sagalog's fixture: a log in memory, fresh for each test; no application and no database of the shop's is needed.
    async def main() -> None:
        await async_saga_log.start_saga(7, "place_order", {})
        await async_saga_log.start_step(7, 0, "ReserveStock", {})
        await async_saga_log.finish_step(7, 0, [])
        assert [line async for line in in_doubt(async_saga_log)] == ["saga 7: no step in doubt"]
        await async_saga_log.start_step(7, 1, "ChargeCard", {})
        assert [line async for line in in_doubt(async_saga_log)] == ["saga 7: ChargeCard in doubt"]

    asyncio.run(main())
