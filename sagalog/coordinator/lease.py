"""A process as an executor: its identity, what it works on, its lease, and a thread that keeps it beside the work.

The thread has connections of its own. It renews the lease, and does what this
process owes the log (see `owed`).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from sagalog.coordinator.owed import WRITTEN, Owed
from sagalog.errors import SagaLogError
from sagalog.log import claiming, owning
from sagalog.log.apart import Apart
from sagalog.log.bind import is_closed
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.fencing import Fence
from sagalog.log.forking import tell_of_forks

_log = logging.getLogger("sagalog")
_ENDS_WITHIN = 10.0
"""Seconds in which the thread of an identity that is given up ends."""


def _join(thread: threading.Thread | None) -> None:
    if thread is not None and thread is not threading.current_thread() and thread.ident is not None:
        thread.join(timeout=_ENDS_WITHIN)


class _NothingToKeep(Exception):
    """The log is closed."""


class Executor:
    """One process's identity and lease.

    Args:
        lease: Seconds that a lease holds without being renewed.
        label: What people see of this process.
        apart: Opens a way to the database for the thread; its answer None means that there is none, and that the
            lease is renewed with the coordinator's own writes.
    """

    def __init__(self, lease: float, label: str | None, apart: Callable[[], Apart | None]) -> None:
        self.lease = lease
        self._label = label
        self._apart = apart
        self._begin_anew()
        tell_of_forks(self)

    def _begin_anew(self) -> None:
        self.label = self._label or f"{socket.gethostname()}:{os.getpid()}"
        self.executor_id = uuid.uuid4().hex
        self.active: dict[int, Fence] = {}
        self.given_up: set[Fence] = set()
        self.coming: set[object] = set()
        self.claiming: dict[int, Fence] = {}
        self._idle: tuple[set[Fence], set[object]] = set(), set()
        self.owed = Owed(self._gave_up)
        self._changing = threading.RLock()  # a signal's handler may close the coordinator
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._registered = False
        self._asked = False
        self._retired: list[str] = []
        self._renew_at = 0.0
        self._ends_at = 0.0

    def before_fork(self) -> None:
        """See `forking`: nothing is waited for, the child has locks of its own."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """Another executor: the parent's lease, thread and sagas are not the child's."""
        self._begin_anew()

    @property
    def lease_ms(self) -> int:
        """The lease in milliseconds."""
        return int(self.lease * 1000)

    def come(self, ticket: object) -> None:
        """A saga is about to be this process's: until it is, or is not, the identity is not given up."""
        with self._changing:
            self.coming.add(ticket)

    def begin_renewal(self, executor_id: str) -> Operation[None]:
        """What renews the lease of this identity, which may be in the log from now on."""
        self._asked = True
        return claiming.renew(executor_id, self.label, self.lease_ms)

    def is_due(self) -> bool:
        """Whether the coordinator itself must renew before it goes on.

        At first, after a fork, with no thread, or with one that does not come to it.
        """
        if not self._registered:
            return True
        due = self._ends_at - self.lease / 3 if self._is_kept() else self._renew_at
        return time.monotonic() >= due

    def _is_kept(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_registered(self) -> bool:
        """Whether the lease was written since the start."""
        return self._registered

    def renewed(self, executor_id: str) -> None:
        """The lease of this identity was written; the thread takes over, if it can."""
        with self._changing:
            if executor_id != self.executor_id:
                return  # it was given up meanwhile
            closing = self._closing  # a signal's handler may give the identity up from here on
            self._was_written()
            self._registered = True
            apart = None if self._is_kept() else self._apart()
            if apart is None:
                return
            keeping = (executor_id, apart, closing)
            thread = self._thread = threading.Thread(target=self._keep, args=keeping, name="sagalog-lease", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the process may have no more threads now
                self._thread, self._renew_at = None, 0.0
                apart.close()
                _log.warning("executor %s: the lease is renewed at starts only, for now: %s", self.executor_id, error)
            except BaseException:
                self._stop()  # whether it runs is not known
                raise

    def _was_written(self) -> None:
        now = time.monotonic()
        self._renew_at, self._ends_at = now + self.lease / 3, now + self.lease

    def holds(self, fence: Fence) -> bool:
        """Whether this process works on a saga under this fence, and has not given it up."""
        return self.active.get(fence.saga_id) is fence

    def look_for_orphans(self) -> None:
        """There may be sagas of this process in the log that nobody here works on; the thread gives them back.

        A start, or a claim, whose answer was lost may come to be there only later: each renewal looks as well.
        """
        self.owed.look_for_orphans()

    def _gave_up(self, fence: Fence) -> None:
        if self.holds(fence):
            self.active.pop(fence.saga_id, None)  # its own thread may have ended it in between
            self.given_up.add(fence)

    def retirement(self) -> tuple[str, ...]:
        """Give the identity up, unless it is still in use.

        What begins after it begins under another identity, whose lease nobody gives up.

        Returns:
            The identities whose leases are to be given up; `is_gone` is told of each that is.
        """
        thread = None
        with self._changing:
            # In this order: what comes moves from one to the other.
            if not (self.coming or self.active) and (self._registered or self._asked):
                self._retired.append(self.executor_id)
                self.executor_id = uuid.uuid4().hex
                thread = self._stop()
            retired = tuple(self._retired)
        _join(thread)  # it would write the lease once more
        return retired

    def is_gone(self, retired: str) -> None:
        """The lease of this identity was given up."""
        with self._changing, suppress(ValueError):  # another close was faster
            self._retired.remove(retired)

    def stop(self) -> None:
        """Stop the thread; the lease runs out by itself."""
        with self._changing:
            thread = self._stop()
        _join(thread)

    def abandon(self, mine: Collection[int] = ()) -> None:
        """Stop the thread without waiting for it, unless there is other work under the lease than the caller's."""
        with self._changing:
            claims = len(self.claiming.keys() & set(mine))
            if len(self.coming) <= claims and self.active.keys() <= set(mine):
                self._stop()

    def _stop(self) -> threading.Thread | None:
        self._closing.set()  # for ever, of a thread that is held up now and comes to look later
        self._closing = threading.Event()
        self.owed.wake()
        thread, self._thread = self._thread, None
        self._registered = self._asked = False
        return thread

    # The thread

    def _keep(self, executor_id: str, apart: Apart, closing: threading.Event) -> None:
        def attempt(operation: Operation[Any], problem: str) -> str | None:
            return self._attempt(apart, operation, problem)

        def renew() -> bool:
            is_due = time.monotonic() >= self._renew_at
            if is_due:
                self._renew(executor_id, apart)
            return is_due

        try:
            while self.owed.wait(self._renew_at, closing):
                if renew() or self.owed.orphans:
                    self.owed.orphans = False  # first: what is left from here on is looked for again
                    if not self._gave_back_orphans(executor_id, apart, renew):
                        self.owed.orphans = True
                        closing.wait(self._pause)
                self.owed.give_up_overdue(attempt)
        except _NothingToKeep:
            pass  # nobody can write under this lease any more
        finally:
            apart.close()

    def _gave_back_orphans(self, executor_id: str, apart: Apart, renew: Callable[[], object]) -> bool:
        """Whether all is given back that the log holds as this process's and nobody here works on, or is about to.

        Two looks tell: whatever was about to be worked on at the first one has come to be in `active` by the second.
        """
        held: list[Fence] = []

        def look(db: Database) -> None:
            held.extend(claiming.held(executor_id).run(db))

        if self._attempt(apart, Call("held", Kind.READ, look), "sagas may stay here") is None:
            return False
        coming = self.coming.copy()  # after the look, and before `active`: in this order a saga moves through them
        idle = {fence for fence in held if fence.saga_id not in self.active}
        before, came_before = self._idle
        if not came_before.isdisjoint(coming):
            return False
        orphans = idle & before
        for fence in orphans:
            renew()  # each may wait for a lock
            release = owning.release(fence, executor_id, counted=True)
            if self._attempt(apart, release, f"saga {fence.saga_id} stays here") is not None:
                idle.discard(fence)
        self._idle = idle, coming
        return not idle

    @property
    def _pause(self) -> float:
        return min(1.0, self.lease / 10)

    def _renew(self, executor_id: str, apart: Apart) -> None:
        done = self._attempt(apart, self.begin_renewal(executor_id), "the lease could not be renewed")
        if executor_id != self.executor_id:
            return
        if done == WRITTEN:
            self._was_written()
        else:
            self._renew_at = time.monotonic() + self._pause

    def _attempt(self, apart: Apart, operation: Operation[Any], problem: str) -> str | None:
        """See `owed.Attempt`."""
        try:
            apart.perform(operation)
        except SagaLogError as error:
            if error.code in ("lease_lost", "invalid_transition", "saga_not_found"):
                return error.code
            if is_closed(error):
                raise _NothingToKeep from None
            _log.warning("executor %s: %s: %s", self.executor_id, problem, error)
            return None
        except Exception:
            _log.exception("executor %s: %s", self.executor_id, problem)
            return None
        return WRITTEN
