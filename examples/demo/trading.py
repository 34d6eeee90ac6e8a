"""A shop is killed, another process recovers what it left; then money and stock are counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from examples.demo.killed import LEASE, ORDERS, kill_a_shop
from examples.demo.outside import SHOP, Found, Outside
from examples.demo.shop import TEA, Order, open_shop
from examples.demo.showing import Observer
from sagalog import SagaCoordinator, SagaLog, SagaState, StepState, UnresolvedSaga

MONEY = {order.customer: 500 if order.customer == "Blaise" else 10_000 for order in ORDERS}
STOCK = {TEA: 100}
PATIENCE = 30.0
"""Seconds after which a recovery that does not end is wrong."""


def open_outside(path: Path) -> Outside:
    """A bank, a warehouse and a courier, with money and stock in them."""
    return Outside.create(path, MONEY, STOCK)


def trade(see: Observer, url: str, outside: Outside) -> None:
    """A shop takes orders and is killed; what it left is as expected.

    Args:
        see: Who tells of it.
        url: Where its saga log is.
        outside: What it reaches.
    """
    kill_a_shop(see, url, outside)
    with SagaLog.open(url) as log:
        ended = {order.number: state for order, state in _orders(log) if order.number <= 3}
    see.expect(
        "two orders were completed, and a declined one was undone at once",
        ended,
        {1: "completed", 2: "completed", 3: "compensated"},
    )


def recover(see: Observer, url: str, outside: Outside) -> None:
    """Bring what the dead shop left to an end, and count money and stock.

    Args:
        see: Who tells of it.
        url: Where the dead shop's saga log is.
        outside: What both shops reach.
    """
    with SagaLog.open(url) as log:
        left = log.unresolved_sagas()
        doubts = {saga.decode(Order).number: _in_doubt(saga) for saga in left}
        see.expect(
            "the log knows the five, and which step of each may or may not have happened",
            doubts,
            {4: "ReserveTea", 5: "ChargeCard", 6: "ChargeCard", 7: "RefundCard", 8: "BookCourier"},
        )
        killed = Count.of(log, outside)
        with open_shop(log, outside, lease=LEASE) as coordinator:
            recover_all(log, coordinator)
        see.say("recover() asks for each step in doubt again, under its key; then each order goes back, or forward:")
        now = {saga.decode(Order).number: saga for saga in (log.get(saga.saga_id) for saga in left)}
        see.table(
            ("order", "in doubt", "is now", "because"),
            [
                (str(order), doubts[order], str(saga.state), saga.failure_reason or "its parcel may have left")
                for order, saga in sorted(now.items())
            ],
        )
        see.expect(
            "four were undone; the one whose parcel may have left was finished",
            {order: saga.state for order, saga in now.items()},
            {4: "compensated", 5: "compensated", 6: "compensated", 7: "compensated", 8: "completed"},
        )
        compare(see, killed, Count.of(log, outside))


def recover_all(log: SagaLog, coordinator: SagaCoordinator) -> None:
    """Take over what a dead process left, as soon as its lease has run out, until nothing is left."""
    until = time.monotonic() + PATIENCE
    while log.unresolved_sagas() and time.monotonic() < until:
        coordinator.recover()
        time.sleep(0.1)


class Count(NamedTuple):
    """What the outside has, and the orders that the log calls completed."""

    found: Found
    completed: list[Order]

    @classmethod
    def of(cls, log: SagaLog, outside: Outside) -> Count:
        """Count now."""
        return cls(outside.count(), [order for order, state in _orders(log) if state == SagaState.COMPLETED])

    def row(self, when: str) -> list[str]:
        """It as a row: what is there, each time beside what the completed orders say."""
        sold = sum(order.quantity for order in self.completed)
        there = (self.found.money[SHOP], self.earned, STOCK[TEA] - self.found.stock[TEA], sold)
        return [when, *map(str, (*there, len(self.parcels), len(self.completed)))]

    @property
    def earned(self) -> int:
        """What the completed orders cost, in pence."""
        return sum(order.pence for order in self.completed)

    @property
    def parcels(self) -> list[int]:
        """The orders whose parcels left."""
        return [deed.order for deed in self.found.deeds if deed.verb == "book"]


def compare(see: Observer, killed: Count, now: Count) -> None:
    """Compare money and stock with what the completed orders say.

    Args:
        see: Who tells of it.
        killed: The count between the kill and the recovery, when much was half done.
        now: The count after it.
    """
    heads = ("", "money", "earned", "tea taken", "sold", "parcels", "completed")
    see.table(heads, [killed.row("after the kill"), now.row("after the recovery")])
    found = now.found
    see.expect("the shop has what its completed orders cost", found.money[SHOP], now.earned)
    paid = {customer: before - found.money[customer] for customer, before in MONEY.items()}
    owed = dict.fromkeys(MONEY, 0)
    for order in now.completed:
        owed[order.customer] += order.pence
    see.expect("each customer paid that, and nothing else", paid, owed)
    sold = sum(order.quantity for order in now.completed)
    see.expect("the warehouse lacks what they took", STOCK[TEA] - found.stock[TEA], sold)
    sent = sorted(order.number for order in now.completed)
    see.expect("each of them has one parcel, and no other order has", sorted(now.parcels), sent)
    done = Counter((deed.order, deed.verb) for deed in found.deeds)
    see.expect("nothing was done or undone twice", [deed for deed, times in done.items() if times > 1], [])
    repeated = [(deed.order, deed.verb) for deed in found.deeds if deed.asked > 1]
    see.expect(
        "four requests came twice, and were known by their keys",
        repeated,
        [(4, "reserve"), (6, "charge"), (7, "refund"), (8, "book")],
    )


def _orders(log: SagaLog) -> Iterator[tuple[Order, str]]:
    """Every order in the log, with its saga's state."""
    for found in log.find(name="place_order"):
        saga = log.get(found.saga_id)
        yield saga.decode(Order), saga.state


def _in_doubt(saga: UnresolvedSaga) -> str:
    return ", ".join(step.name for step in saga.steps if step.state == StepState.PENDING)
