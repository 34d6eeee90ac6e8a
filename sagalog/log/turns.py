"""Whose turn it is to write on one connection: leader and followers.

The first caller that comes while nobody writes leads. It takes along whoever
waits by then, and wakes them once their operations are decided; the first of
those that came meanwhile leads next. No thread is started, and a lone caller
pays for a lock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Generic, TypeVar

from sagalog.errors import LogUnavailable, UnusableBind
from sagalog.log.bind import refuse_finished
from sagalog.log.database import Operation

R = TypeVar("R")
_LARGEST_BATCH = 1000
_MOMENTS = 20


class Ticket(Generic[R]):
    """An operation that waits for its turn; without one, a unit of work that wants the log alone."""

    __slots__ = ("error", "leads", "operation", "value", "wake")

    def __init__(self, operation: Operation[R] | None) -> None:
        self.operation = operation
        self.value: Any = None
        self.error: BaseException | None = None
        self.leads = False
        self.wake: Any = None

    def outcome(self) -> Any:
        """What the operation returned; what it raised is raised."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None  # no cycle through the traceback
        return self.value


class Turns:
    """Who leads and who waits.

    Attributes:
        mutex: Held for moments, around every change of the others.
        leading: Whether somebody leads.
        waiting: Those that wait, in order.
        company: How many the last commit carried.
        unit_owner: The thread of an open unit of work, in which another operation would wait for itself.
        closed: Nobody leads any more.
    """

    __slots__ = ("closed", "company", "leading", "mutex", "unit_owner", "waiting")

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.leading = False
        self.waiting: deque[Ticket[Any]] = deque()
        self.company = 1
        self.unit_owner: int | None = None
        self.closed = False

    def lead(self, ticket: Ticket[Any] | None, seconds: float) -> bool:
        """Become the leader (True), or wait until another leader carried the ticket (False).

        Args:
            ticket: What another leader may carry; None for who wants the log alone.
            seconds: How long to wait for a unit of work that holds the log.

        Raises:
            UnusableBind: The log is closed, or this thread has a unit of work open on it.
            LogUnavailable: A unit of work held the log all the time.
        """
        with self.mutex:
            if self.closed:
                raise refuse_finished(asked_of(ticket))
            if not self.leading:
                self.leading = True
                return True
            if self.unit_owner == threading.get_ident():
                raise UnusableBind(
                    asked_of(ticket),
                    "this thread has a unit of work open on the same log, which would wait for itself",
                    hint="Use the object that `with log.unit_of_work() as work` gave.",
                )
            if ticket is None or ticket.operation is None:
                ticket = Ticket(None)
            ticket.wake = threading.Lock()
            ticket.wake.acquire()
            self.waiting.append(ticket)
        try:
            woken = ticket.wake.acquire(timeout=seconds)
        except BaseException:
            self._withdraw(ticket)
            raise
        if not woken and self._withdraw(ticket):
            raise LogUnavailable(
                asked_of(ticket),
                "another unit of work of this process holds the log",
                found="unit of work",
                hint="Keep units of work short; repeat it.",
            )
        if not woken:
            ticket.wake.acquire()
        if ticket.leads and self.closed:
            self.hand_over()
            raise refuse_finished(asked_of(ticket))
        return ticket.leads

    def _withdraw(self, ticket: Ticket[Any]) -> bool:
        """Leave the queue; False if a leader carries the ticket already."""
        with self.mutex:
            if ticket in self.waiting:
                self.waiting.remove(ticket)
                return True
            leads = ticket.leads
        if leads:
            self.hand_over()
            return True
        return False

    def let_others_come(self) -> None:
        """Give those whose writes the last commit carried a moment to come with their next.

        Without it the leader would commit alone, and they would wait for that.
        """
        for _ in range(_MOMENTS):
            if len(self.waiting) >= self.company - 1:
                return
            time.sleep(0)

    def take_waiting(self) -> list[Ticket[Any]]:
        """Those whom the leader carries: all that wait, up to the first that wants the log alone."""
        if not self.waiting:
            return []
        with self.mutex:
            taken: list[Ticket[Any]] = []
            while self.waiting and self.waiting[0].operation is not None and len(taken) < _LARGEST_BATCH:
                taken.append(self.waiting.popleft())
            return taken

    def hand_over(self) -> None:
        """Let the first that waits lead."""
        with self.mutex:
            if not self.waiting:
                self.leading = False
                return
            successor = self.waiting.popleft()
            successor.leads = True
        successor.wake.release()


def asked_of(ticket: Ticket[Any] | None) -> str:
    """What the ticket's caller asked for, for messages."""
    return "unit_of_work" if ticket is None or ticket.operation is None else ticket.operation.asked
