"""The world outside the shop's database: a bank, a warehouse and a courier, in a SQLite file of their own.

Each request is one transaction there, which no transaction of the shop spans.
A request carries an idempotency key: one whose key came before is answered as
it was then, and nothing is done a second time.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

_SCHEMA = """
CREATE TABLE account (owner TEXT PRIMARY KEY, pence INTEGER NOT NULL);
CREATE TABLE stock (sku TEXT PRIMARY KEY, quantity INTEGER NOT NULL);
CREATE TABLE deed (
    number       INTEGER PRIMARY KEY,
    key          TEXT NOT NULL UNIQUE,
    verb         TEXT NOT NULL,
    order_number INTEGER NOT NULL,
    asked        INTEGER NOT NULL
);
"""
SHOP = "the shop"


class CardDeclined(Exception):
    """The customer has not so much money; none was moved."""


class SoldOut(Exception):
    """There is not so much of it; nothing was reserved."""


class NoCourier(Exception):
    """No courier goes there; none was booked."""


class Deed(NamedTuple):
    """What was done, once, for an order; and how often it was asked for."""

    key: str
    verb: str
    order: int
    asked: int


class Found(NamedTuple):
    """What a count of the outside finds."""

    money: Counter[str]
    stock: Counter[str]
    deeds: list[Deed]


class Outside:
    """The bank, the warehouse and the courier, as the shop reaches them.

    Args:
        path: Their file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, money: Mapping[str, int], stock: Mapping[str, int]) -> Outside:
        """Make the file, with the pence that each customer has, and the pieces of each sku."""
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.executescript(_SCHEMA)
            connection.executemany("INSERT INTO account VALUES (?, ?)", {**money, SHOP: 0}.items())
            connection.executemany("INSERT INTO stock VALUES (?, ?)", stock.items())
        return cls(path)

    def reserve(self, order: int, sku: str, quantity: int, *, key: str) -> str:
        """Take pieces out of the stock; `SoldOut` if there are too few."""
        return self.ask("reserve", order, key, lambda at: _take(at, sku, quantity))

    def release(self, order: int, sku: str, quantity: int, *, key: str) -> str:
        """Put them back."""
        return self.ask("release", order, key, lambda at: _take(at, sku, -quantity))

    def charge(self, order: int, customer: str, pence: int, *, key: str) -> str:
        """Move money from a customer to the shop; `CardDeclined` if there is too little."""
        return self.ask("charge", order, key, lambda at: _pay(at, customer, SHOP, pence))

    def refund(self, order: int, customer: str, pence: int, *, key: str) -> str:
        """Move it back."""
        return self.ask("refund", order, key, lambda at: _pay(at, SHOP, customer, pence))

    def book(self, order: int, postcode: str, *, key: str) -> str:
        """Book a courier, who fetches the parcel at once; `NoCourier` if none goes there."""
        return self.ask("book", order, key, lambda at: _send(postcode))

    def ask(self, verb: str, order: int, key: str, do: Callable[[sqlite3.Connection], None]) -> str:
        """Carry out a request, unless one of that key was; returns its reference, the same every time."""
        with closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as at, at:
            at.execute("BEGIN IMMEDIATE")
            ((number, asked),) = at.execute(
                "INSERT INTO deed (key, verb, order_number, asked) VALUES (?, ?, ?, 1) "
                "ON CONFLICT (key) DO UPDATE SET asked = asked + 1 RETURNING number, asked",
                (key, verb, order),
            ).fetchall()
            if asked == 1:
                do(at)
            return f"{verb}-{number}"

    def count(self) -> Found:
        """Count the money, the stock and what was done."""
        with closing(sqlite3.connect(self.path, timeout=30)) as at:
            money = Counter(dict(at.execute("SELECT owner, pence FROM account")))
            stock = Counter(dict(at.execute("SELECT sku, quantity FROM stock")))
            deeds = at.execute("SELECT key, verb, order_number, asked FROM deed ORDER BY order_number, number")
            return Found(money, stock, [Deed(*row) for row in deeds])


def _take(at: sqlite3.Connection, sku: str, quantity: int) -> None:
    enough = "UPDATE stock SET quantity = quantity - :n WHERE sku = :sku AND quantity >= :n"
    if at.execute(enough, {"sku": sku, "n": quantity}).rowcount == 0:
        raise SoldOut(f"there are not {quantity} of {sku}")


def _pay(at: sqlite3.Connection, payer: str, payee: str, pence: int) -> None:
    if (
        at.execute("UPDATE account SET pence = pence - ?1 WHERE owner = ?2 AND pence >= ?1", (pence, payer)).rowcount
        == 0
    ):
        raise CardDeclined(f"{payer} has not so much money")
    at.execute("UPDATE account SET pence = pence + ? WHERE owner = ?", (pence, payee))


def _send(postcode: str) -> None:
    if postcode.startswith("ZE"):
        raise NoCourier(f"no courier goes to {postcode}")
