"""Orders over HTTP, and what is left when a request fails half-way."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from flask_shop.bank import Bank, BankUnreachable, CardCharged, ChargeCard
from flask_shop.models import Order, Product, db
from flask_shop.orders import settle_all
from flask_shop.report import in_doubt
from sagalog import SagaLog

TEA = {"sku": "TEA-1", "quantity": 2, "card": "tok-1"}


def stock(app: Flask) -> int:
    with app.app_context():
        return db.session.get_one(Product, "TEA-1").stock


def counts(app: Flask) -> dict[str, int]:
    with app.app_context():
        return {"orders": db.session.query(Order).count(), **SagaLog(db.session).counts()}


def test_an_order_is_paid(app: Flask, client: FlaskClient, bank: Bank) -> None:
    answer = client.post("/orders", json=TEA)
    assert answer.status_code == 201
    paid = {"status": "paid", "saga": "completed", "steps": {"ReserveStock": "succeeded", "ChargeCard": "succeeded"}}
    assert answer.json == {"id": 1, **paid}
    assert client.get("/orders/1").json == answer.json
    assert stock(app) == 1
    assert [charge.pence for charge in bank.charged.values()] == [500]


def test_a_declined_card_gives_the_stock_back(app: Flask, client: FlaskClient) -> None:
    answer = client.post("/orders", json={**TEA, "card": "declined"})
    undone = {"ReserveStock": "compensated", "ChargeCard": "failed"}
    assert answer.json == {"id": 1, "status": "cancelled", "saga": "compensated", "steps": undone}
    assert stock(app) == 3


def test_a_request_that_fails_between_the_saga_and_the_order_leaves_neither(app: Flask, client: FlaskClient) -> None:
    # The saga and its first step are written before the shop sees that there is not enough.
    answer = client.post("/orders", json={**TEA, "quantity": 4})
    assert answer.status_code == 409
    assert counts(app) == {"orders": 0}
    assert stock(app) == 3


def test_a_crash_between_the_saga_and_the_order_leaves_neither(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: SagaLog, *arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(SagaLog, "finish_step", crash)
        assert client.post("/orders", json=TEA, headers={"Idempotency-Key": "k"}).status_code == 500
    assert counts(app) == {"orders": 0}
    assert stock(app) == 3
    assert client.post("/orders", json=TEA, headers={"Idempotency-Key": "k"}).status_code == 201


def test_the_same_request_again_is_the_same_order(app: Flask, client: FlaskClient) -> None:
    key = {"Idempotency-Key": "basket-7"}
    first, again = (client.post("/orders", json=TEA, headers=key) for _ in range(2))
    assert first.json == again.json
    assert counts(app) == {"orders": 1, "completed": 1}
    assert client.post("/orders", json={**TEA, "quantity": 1}, headers=key).status_code == 409


class Silent(Bank):
    """Charges the card, and the answer is lost."""

    def charge(self, charge: ChargeCard, key: str) -> CardCharged:
        """Charge, then fail."""
        super().charge(charge, key)
        raise BankUnreachable("no answer from the bank")


@pytest.mark.parametrize("by", ["the customer", "the shop"])
def test_a_payment_in_doubt_is_found_and_settled(app: Flask, client: FlaskClient, bank: Bank, by: str) -> None:
    app.extensions["bank"] = silent = Silent()
    key = {"Idempotency-Key": "basket-7"}
    assert client.post("/orders", json=TEA, headers=key).status_code == 502
    assert client.get("/orders/1").json["steps"]["ChargeCard"] == "pending"
    assert counts(app) == {"orders": 1, "running": 1}
    shell = app.test_cli_runner()
    assert shell.invoke(args=["doubts"]).output == "saga 1: ChargeCard in doubt\n"

    app.extensions["bank"] = bank
    if by == "the customer":
        assert client.post("/orders", json=TEA, headers=key).json["status"] == "paid"
    else:
        assert shell.invoke(args=["settle"]).output == "order 1 is paid\n"
    assert counts(app) == {"orders": 1, "completed": 1}
    assert bank.charged == silent.charged, "asked again under the same key"
    assert shell.invoke(args=["doubts"]).output == ""


class Watched(Bank):
    """While one request asks it, the shop settles what it takes for interrupted."""

    asked = 0

    def __init__(self, app: Flask) -> None:
        super().__init__()
        self.app = app

    def charge(self, charge: ChargeCard, key: str) -> CardCharged:
        """Let the other go first."""
        self.asked += 1
        if self.asked == 1:
            with self.app.app_context():
                settle_all(self)
        return super().charge(charge, key)


@pytest.mark.parametrize(("card", "status", "left"), [("tok-1", "paid", 1), ("declined", "cancelled", 3)])
def test_two_that_settle_one_order_do_it_once(
    app: Flask, client: FlaskClient, card: str, status: str, left: int
) -> None:
    app.extensions["bank"] = bank = Watched(app)
    assert client.post("/orders", json={**TEA, "card": card}).json["status"] == status
    assert bank.asked == 2
    assert stock(app) == left


def test_bad_input_is_refused(client: FlaskClient) -> None:
    assert client.post("/orders", json={"sku": "TEA-1"}).status_code == 422
    assert client.get("/orders/99").status_code == 404


def test_the_report_names_the_step_in_doubt(saga_log: SagaLog) -> None:
    # sagalog's fixture: a log in memory, fresh for each test; no application and no database of the shop's is needed.
    saga_log.start_saga(7, "place_order", {})
    saga_log.start_step(7, 0, "ReserveStock", {})
    saga_log.finish_step(7, 0, [])
    assert list(in_doubt(saga_log)) == ["saga 7: no step in doubt"]
    saga_log.start_step(7, 1, "ChargeCard", {})
    assert list(in_doubt(saga_log)) == ["saga 7: ChargeCard in doubt"]
