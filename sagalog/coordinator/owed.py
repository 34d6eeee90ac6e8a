"""What a process owes the log of sagas that it stopped working on, and could not say itself.

The lease's thread says it: that a handler outlived its time, and that a saga
is nobody's, once the log answers.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from sagalog.log import owning
from sagalog.log.database import Operation
from sagalog.log.fencing import Fence
from sagalog.moments import now_ms

WRITTEN: Final = "written"
Attempt: TypeAlias = Callable[[Operation[Any], str], str | None]
"""Writes an operation, whose failure is told in the words given: `WRITTEN`, or the code of the refusal; None if it has
to be tried again."""


class Owed:
    """What is owed, and the waiting of the thread that pays it.

    Args:
        gave_up: Is told of a saga that was given up while its handler hangs.

    Attributes:
        orphans: Whether there may be sagas of this process in the log that nobody here works on.
    """

    def __init__(self, gave_up: Callable[[Fence], None]) -> None:
        self._gave_up = gave_up
        self._changed = threading.Condition()
        self._wakes_at = -math.inf
        self._watched: dict[int, tuple[float, Fence, int, float]] = {}
        self._tickets = itertools.count()
        self.orphans = False

    def watch(self, fence: Fence, step_index: int, seconds: float, settle: float) -> int:
        """While a handler runs in a thread that cannot be interrupted: give its saga up once its time is over.

        Returns:
            What `unwatch` wants, once the handler is done.
        """
        ticket, due = next(self._tickets), time.monotonic() + seconds
        self._watched[ticket] = (due, fence, step_index, settle)
        if due < self._wakes_at:  # looked at after the entry was made: see `wait`
            self.wake()
        return ticket

    def is_watching(self, fence: Fence) -> bool:
        """Whether a handler of a saga runs, whose time is not over."""
        now = time.monotonic()
        return any(watched == fence and now < due for due, watched, *_ in list(self._watched.values()))

    def unwatch(self, ticket: int) -> None:
        """The handler is done."""
        self._watched.pop(ticket, None)

    def look_for_orphans(self) -> None:
        """There may be sagas of this process in the log that nobody here works on."""
        with self._changed:
            self.orphans = True
            self._changed.notify()

    def wake(self) -> None:
        """Let the thread look at what it waits for."""
        with self._changed:
            self._changed.notify()

    def wait(self, until: float, closing: threading.Event) -> bool:
        """Wait for something to be due, or for a moment.

        Args:
            until: The moment, of the steady clock.
            closing: The end of the thread.

        Returns:
            False once it is closing.
        """
        with self._changed:
            if closing.is_set():
                return False
            self._wakes_at = math.inf  # until it is known, whoever is watched meanwhile wakes it
            self._wakes_at = due = min([until, *(entry[0] for entry in list(self._watched.values()))])
            if not self.orphans:
                self._changed.wait(max(0.0, due - time.monotonic()))
            return not closing.is_set()

    def give_up_overdue(self, attempt: Attempt) -> None:
        """Give up the sagas whose handlers outlived their time."""
        now = time.monotonic()
        for ticket, (due, fence, step_index, settle) in list(self._watched.items()):
            if due <= now and self._watched.pop(ticket, None) is not None:
                operation = owning.give_up(
                    fence, step_index, "its handler outlived its timeout", now_ms() + int(settle * 1000)
                )
                done = attempt(operation, f"saga {fence.saga_id} could not be given up")
                if done is None:
                    self._watched[ticket] = (now + 1.0, fence, step_index, settle)
                elif done != "invalid_transition":  # but its step has ended
                    self._gave_up(fence)
