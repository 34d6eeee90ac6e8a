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
from contextlib import suppress
from itertools import islice, takewhile
from typing import Any, Generic, TypeVar

from sagalog.errors import LogUnavailable, UnusableBind
from sagalog.log.bind import refuse_finished
from sagalog.log.database import Operation

R = TypeVar("R")
_LARGEST_BATCH = 1000
_MOMENTS = 20


class Ticket(Generic[R]):
    """An operation that waits for its turn; without one, somebody who wants the log alone."""

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

    def wake_up(self) -> None:
        """Let whoever waits for it go on; once more changes nothing."""
        if self.wake is not None:
            with suppress(RuntimeError):  # it is awake
                self.wake.release()


class Turns:
    """Who leads and who waits.

    An exception of a signal may come at any call here: what must not be torn apart is assigned in one line, and what
    ends a turn may be done again.

    Attributes:
        mutex: Held for moments, around every change of the others.
        leader: Who leads: a ticket, or an operation that had not to wait; None if nobody does.
        waiting: Those that wait, in order.
        taken: Those that the leader carries, until they are told.
        decided: Whether what became of those is known.
        company: How many the last commit carried.
        unit_owner: The thread of an open unit of work, in which another operation would wait for itself.
        closed: Nobody leads any more.
    """

    __slots__ = ("closed", "company", "decided", "leader", "mutex", "taken", "unit_owner", "waiting")

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.leader: object | None = None
        self.waiting: deque[Ticket[Any]] = deque()
        self.taken: list[Ticket[Any]] = []
        self.decided = False
        self.company = 1
        self.unit_owner: int | None = None
        self.closed = False

    def lead(self, ticket: Ticket[Any], seconds: float) -> bool:
        """Become the leader (True), or wait until another leader carried the ticket (False).

        Whoever was interrupted in here calls `hand_over`.

        Args:
            ticket: What another leader may carry, if it has an operation.
            seconds: How long to wait for a unit of work that holds the log.

        Raises:
            UnusableBind: The log is closed, or this thread has a unit of work open on it.
            LogUnavailable: A unit of work held the log all the time.
        """
        try:
            with self.mutex:
                if self.closed:
                    raise refuse_finished(asked_of(ticket))
                if self.leader is None:
                    self.leader, ticket.leads = ticket, True
                    return True
                if self.unit_owner == threading.get_ident():
                    raise UnusableBind(
                        asked_of(ticket),
                        "this thread has a unit of work open on the same log, which would wait for itself",
                        hint="Use the object that `with log.unit_of_work() as work` gave.",
                    )
                ticket.wake = threading.Lock()
                ticket.wake.acquire()
                self.waiting.append(ticket)
            woken = ticket.wake.acquire(timeout=seconds)
            is_gone = not woken and self._withdraw(ticket)
        except BaseException:
            self._withdraw(ticket)
            raise
        if is_gone:
            raise LogUnavailable(
                asked_of(ticket),
                "another unit of work of this process holds the log",
                found="unit of work",
                hint="Keep units of work short; repeat it.",
            )
        if not woken:
            ticket.wake.acquire()
        if ticket.leads and self.closed:
            self.hand_over(ticket)
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
            self.hand_over(ticket)
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

    def take_waiting(self) -> None:
        """Let the leader carry all that wait, up to the first that wants the log alone."""
        if not self.waiting:
            return
        with self.mutex:
            carried = takewhile(lambda ticket: ticket.operation is not None, islice(self.waiting, _LARGEST_BATCH))
            taken = list(carried)
            rest = deque(islice(self.waiting, len(taken), None))
            self.taken, self.waiting, self.decided = taken, rest, False

    def hand_over(self, leader: object) -> None:
        """Let the first that waits lead; nothing if the leader leads no more, but that its successor is woken."""
        with self.mutex:
            if self.leader is leader:
                if not self.waiting:
                    self.leader = None
                    return
                successor, rest = self.waiting[0], deque(islice(self.waiting, 1, None))
                self.leader, successor.leads, self.waiting = successor, True, rest
            if isinstance(self.leader, Ticket):
                self.leader.wake_up()


def asked_of(ticket: Ticket[Any]) -> str:
    """What the ticket's caller asked for, for messages."""
    return "unit_of_work" if ticket.operation is None else ticket.operation.asked
