"""Whose turn it is on a pool that gives everybody the same connection: there are no two transactions side by side."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Engine
from sqlalchemy.pool import Pool, StaticPool

from sagalog.errors import LogUnavailable

_SECONDS = 5.0
_turns: WeakKeyDictionary[Pool, threading.Lock] = WeakKeyDictionary()
_mutex = threading.Lock()


def turn_of(engine: object) -> threading.Lock | None:
    """The lock of an engine's one connection; None if its pool has more."""
    pool = engine.pool if isinstance(engine, Engine) else None
    if not isinstance(pool, StaticPool):
        return None
    with _mutex:
        return _turns.setdefault(pool, threading.Lock())


@contextmanager
def in_turn(turn: threading.Lock | None, asked: str, sleep: Callable[[float], Any]) -> Iterator[None]:
    """One's turn, if turns are taken; see `take_turn`."""
    if turn is None:
        yield
        return
    take_turn(turn, asked, sleep)
    try:
        yield
    finally:
        turn.release()


def take_turn(turn: threading.Lock, asked: str, sleep: Callable[[float], Any]) -> None:
    """Wait for one's turn, and take it; whoever took it releases it.

    Args:
        turn: From `turn_of`.
        asked: For the message.
        sleep: Waits so many seconds; a task's lets its event loop go on.

    Raises:
        LogUnavailable: Somebody had it all the time.
    """
    until = time.monotonic() + _SECONDS
    while not turn.acquire(blocking=False):
        if time.monotonic() >= until:
            raise LogUnavailable(
                asked,
                "another transaction holds the engine's only connection",
                found="one connection",
                hint="Keep transactions short; or give SagaLog an engine whose pool has more than one connection.",
            )
        sleep(random.uniform(0.001, 0.010))
