"""Whose turn it is on a pool that gives everybody the same connection: there are no two transactions side by side."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Engine
from sqlalchemy.pool import Pool, StaticPool

from sagalog.errors import LogUnavailable, UnusableBind

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


class Holding:
    """A turn that was taken, until it is released."""

    def __init__(self, turn: threading.Lock) -> None:
        self.turn: threading.Lock | None = turn

    def release(self) -> None:
        """Let others come."""
        turn, self.turn = self.turn, None
        if turn is not None:
            turn.release()


_held: ContextVar[tuple[Holding, ...]] = ContextVar("sagalog_held", default=())


def take_turn(turn: threading.Lock, asked: str, sleep: Callable[[float], Any]) -> Holding:
    """Wait for one's turn, and take it.

    Args:
        turn: From `turn_of`.
        asked: For the message.
        sleep: Waits so many seconds; a task's lets its event loop go on.

    Raises:
        UnusableBind: Whoever asks has it already, and would wait for itself.
        LogUnavailable: Somebody had it all the time.
    """
    held = tuple(holding for holding in _held.get() if holding.turn is not None)
    if any(holding.turn is turn for holding in held):
        raise UnusableBind(
            asked,
            "a transaction that is open here holds the engine's only connection",
            hint="Use SagaLog(session) in it, or give SagaLog an engine whose pool has more than one connection.",
        )
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
    holding = Holding(turn)
    _held.set((*held, holding))
    return holding


@contextmanager
def in_turn(turn: threading.Lock | None, asked: str, sleep: Callable[[float], Any]) -> Iterator[None]:
    """One's turn, if turns are taken; see `take_turn`."""
    if turn is None:
        yield
        return
    holding = take_turn(turn, asked, sleep)
    try:
        yield
    finally:
        holding.release()
