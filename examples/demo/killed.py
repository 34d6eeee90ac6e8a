"""The process that is killed: it takes eight orders, and five of them are under way when it dies."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn

from examples.demo.outside import Outside
from examples.demo.shop import Order, open_shop, place_order
from examples.demo.showing import Observer
from sagalog import SagaCoordinator, SagaFailed, SagaLog

LEASE = 0.5
ORDERS = (
    Order(number=1, customer="Ada"),
    Order(number=2, customer="Alan", quantity=1, pence=625),
    Order(number=3, customer="Blaise"),
    Order(number=4, customer="Edsger"),
    Order(number=5, customer="Grace"),
    Order(number=6, customer="Barbara"),
    Order(number=7, customer="Donald", quantity=3, pence=1875, postcode="ZE2 9PN"),
    Order(number=8, customer="Ken"),
)
STOPS = {
    4: ("after", "reserve", "the tea is reserved, the answer is still under way"),
    5: ("before", "charge", "the tea is reserved, the bank has not been reached yet"),
    6: ("after", "charge", "the card is charged, the answer is still under way"),
    7: ("after", "refund", "no courier goes there; the card is refunded, the answer is still under way"),
    8: ("after", "book", "the parcel has left, the answer is still under way"),
}
"""By order: whether its process is stopped before or after that request is carried out, and what is true by then."""

_URL, _OUTSIDE, _STOPPED = "DEMO_LOG_URL", "DEMO_OUTSIDE", "all are under way"


class Hanging(Outside):
    """An outside that does not answer in time: the shop is killed while it waits."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.stopped: SimpleQueue[int] = SimpleQueue()

    def ask(self, verb: str, order: int, key: str, do: Callable[[sqlite3.Connection], None]) -> str:
        """As ever, but for the orders in STOPS."""
        when, stop, _ = STOPS.get(order, ("never", "", ""))
        if (when, stop) == ("before", verb):
            self._hang(order)
        answer = super().ask(verb, order, key, do)
        if (when, stop) == ("after", verb):
            self._hang(order)
        return answer

    def _hang(self, order: int) -> NoReturn:
        self.stopped.put(order)
        while True:
            threading.Event().wait()


def kill_a_shop(see: Observer, url: str, outside: Outside) -> None:
    """Start a shop in a process of its own, and kill it once its five last orders are under way.

    Args:
        see: Who tells of it.
        url: Where its saga log is.
        outside: What it reaches.
    """
    command = [sys.executable, "-m", "examples.demo", "--shop"]
    environment = {**os.environ, _URL: url, _OUTSIDE: os.fspath(outside.path)}
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as shop:
        assert shop.stdout is not None
        patience = threading.Timer(30, shop.kill)
        patience.start()
        said = ""
        for line in shop.stdout:
            said = line.strip()
            if said == _STOPPED:
                break
            see.say(said)
        shop.send_signal(signal.SIGKILL)
        shop.wait()
        patience.cancel()
    ended = (said, shop.returncode)
    see.expect("in the middle of these five the shop is killed, with SIGKILL", ended, (_STOPPED, -signal.SIGKILL))


def be_killed() -> None:
    """What the shop's process does."""
    outside = Hanging(Path(os.environ[_OUTSIDE]))
    coordinator = open_shop(SagaLog.open(os.environ[_URL]), outside, lease=LEASE)
    for order in ORDERS:
        if order.number not in STOPS:
            print(_placed(coordinator, order), flush=True)
    for order in ORDERS:
        if order.number in STOPS:
            threading.Thread(target=_placed, args=(coordinator, order), daemon=True).start()
    for number in sorted(outside.stopped.get() for _ in STOPS):
        print(f"order {number}: {STOPS[number][2]}", flush=True)
    print(_STOPPED, flush=True)
    sys.stdin.read()  # nothing comes


def _placed(coordinator: SagaCoordinator, order: Order) -> str:
    try:
        receipt = coordinator.run(place_order, order, key=order.key)
    except SagaFailed as failure:
        return f"order {order.number}: {failure.outcome}; {failure.reason}"
    return f"order {order.number}: completed; {receipt.payment}, {receipt.parcel}"
