"""A log on a SQLite file of its own, or in memory: one connection, and commits shared by callers that wait.

A leader (see `turns`) runs the operations of all that wait in one transaction,
and each is told once it is durable. A refused operation wrote nothing and does
not touch the others; if one fails after it wrote, the batch is rolled back and
each runs alone.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from sagalog.errors import LogUnavailable, SagaLogError, UnusableBind
from sagalog.log.bind import begin_immediate, refuse_finished, retry_while_busy
from sagalog.log.connections import CHECKPOINT_AFTER, Connections, Durability
from sagalog.log.database import Call, CursorDatabase, Kind, Operation
from sagalog.log.faults import SQLITE_BUSY, is_fault, sqlite_code, translate
from sagalog.log.forking import tell_no_more, tell_of_forks
from sagalog.log.statements import Statements
from sagalog.log.turns import Ticket, Turns, asked_of

R = TypeVar("R")
BUSY_TIMEOUT_MS = 5000
_OF_OPERATIONS = (SagaLogError, sqlite3.Error, OverflowError, TypeError, ValueError)
"""What comes out of an operation; anything else is a signal's, and of the thread that leads."""


class FileBind:
    """The log's own connection to a SQLite file.

    Args:
        path: The file, or None for a database in memory.
        sql: The statements.
        durability: "full" or "normal", SQLite's synchronous.
        fill: Fills a new in-memory connection.
        checkpoint_after: Pages of the write-ahead log after which a commit moves them into the file.
    """

    def __init__(
        self,
        path: str | None,
        sql: Statements,
        *,
        durability: Durability = "full",
        fill: Callable[[sqlite3.Connection], None] | None = None,
        checkpoint_after: int = CHECKPOINT_AFTER,
    ) -> None:
        self.name = path or "a database in memory"
        self._path = path
        self._sql = sql
        self._durability: Durability = durability
        self._leads_for_fork: Ticket[None] | None = None
        self._turns = Turns()
        self._read_lock = threading.Lock()
        self._connections = Connections(path, sql, durability, fill, checkpoint_after)
        tell_of_forks(self)

    @property
    def path(self) -> str | None:
        """The file; None in memory."""
        return self._path

    @property
    def sql(self) -> Statements:
        """The statements."""
        return self._sql

    @property
    def durability(self) -> Durability:
        """ "full" or "normal"."""
        return self._durability

    def _lead(self, ticket: Ticket[Any]) -> bool:
        return self._turns.lead(ticket, 2 * BUSY_TIMEOUT_MS / 1000)

    def _lead_alone(self) -> Ticket[None]:
        """Lead without an operation; the ticket is for `_end_turn`."""
        alone: Ticket[None] = Ticket(None)
        try:
            self._lead(alone)
        except BaseException:
            self._turns.hand_over(alone)
            raise
        return alone

    def _end_turn(self, leader: object) -> None:
        """Tell those that were carried, and let the next one lead; to do it again changes nothing.

        Whoever calls it does so again if a signal's exception comes out of it: that may be before its first line.
        """
        turns = self._turns
        if turns.taken and turns.leader is leader:
            if not turns.decided:
                # An interrupt of the leader is no matter of the others': theirs is rolled back, and told so.
                self._connections.roll_back()
                for ticket in turns.taken:
                    ticket.value, ticket.error = None, _interrupted(ticket)  # what refused it is rolled back as well
                turns.decided = True
            for ticket in turns.taken:
                ticket.wake_up()
            turns.taken = []
        turns.hand_over(leader)

    def _database(self) -> CursorDatabase:
        connections = self._connections
        if connections.writer is not None:
            return connections.database
        return connections.open_database(BUSY_TIMEOUT_MS / 1000)

    def _begin(self) -> CursorDatabase:
        database = self._database()
        begin_immediate(database._cursor.execute, BUSY_TIMEOUT_MS / 1000, time.sleep)
        return database

    def perform(self, operation: Operation[R]) -> R:
        """Run one operation; a write is durable when this returns."""
        kind = operation.kind
        apart = kind.apart and self._path is not None
        if apart and not kind.brief:
            return self._read(operation)
        turns, connections = self._turns, self._connections
        leader: object | None = None
        try:  # around taking the lead too: an interrupt that came between would leave the log without a leader for ever
            with turns.mutex:
                if turns.leader is None and not turns.closed:
                    turns.leader = leader = operation
            if leader is None:
                if apart:
                    return self._read(operation)
                leader = ticket = Ticket(operation)
                if not self._lead(ticket):
                    leader = None
                    return ticket.outcome()  # type: ignore[no-any-return]
            if turns.company > 1 and not apart:
                turns.let_others_come()
            if apart or not turns.waiting:
                if not apart:
                    turns.company = 1
                if connections.writer is None or kind.several:
                    return self._alone(operation)
                try:
                    return operation.run(connections.database)
                except sqlite3.Error as error:
                    return self._alone(operation, error)
            own: Ticket[R] = Ticket(operation)
            turns.take_waiting()
            batch = [own, *turns.taken]
            turns.company = len(batch)
            self._commit_together(batch)
        finally:
            if leader is not None:
                try:
                    self._end_turn(leader)
                except BaseException:
                    self._end_turn(leader)
                    raise
        return own.outcome()  # type: ignore[no-any-return]

    def try_now(self, operation: Operation[R]) -> Ticket[R] | None:
        """Run one statement at once, if nothing and nobody has to be waited for.

        Returns:
            None if another caller writes, or another process holds the lock; else a ticket that holds the outcome.
        """
        turns, connections = self._turns, self._connections
        if operation.kind.several or connections.writer is None:
            return None
        ticket: Ticket[R] = Ticket(operation)
        leader: object | None = None
        try:  # around taking the lead too: see `perform`
            with turns.mutex:
                if turns.leader is not None or turns.closed:
                    return None
                turns.leader = leader = ticket
            ticket.value = operation.run(connections.database)
        except sqlite3.Error as error:
            if sqlite_code(error) == SQLITE_BUSY:
                return None
            ticket.value = self._alone(operation, error)
        finally:
            if leader is not None:
                try:
                    self._end_turn(leader)
                except BaseException:
                    self._end_turn(leader)
                    raise
        return ticket

    def perform_all(self, tickets: Sequence[Ticket[Any]]) -> None:
        """Run the operations of several callers, with shared commits; each ticket then holds its outcome."""
        ready = [ticket for ticket in tickets if ticket.operation is not None]
        try:
            leader = self._lead_alone()
        except SagaLogError as error:
            for ticket in ready:
                ticket.error = refuse_finished(asked_of(ticket)) if self._turns.closed else error
            return
        try:
            self._turns.taken, self._turns.decided = ready, False
            self._commit_together(ready)
        finally:
            try:
                self._end_turn(leader)
            except BaseException:
                self._end_turn(leader)
                raise

    # Transactions

    def _commit_together(self, batch: list[Ticket[Any]]) -> None:
        # What only reads waits for no lock, and must not begin to in a transaction of others.
        writes = [ticket for ticket in batch if ticket.operation is None or not ticket.operation.kind.reads]
        shared = len(writes) > 1 and self._in_one_transaction(writes)
        for ticket in batch:
            assert ticket.operation is not None
            if shared and not ticket.operation.kind.reads:
                continue
            try:
                ticket.value = self._alone(ticket.operation)
            except _OF_OPERATIONS as error:
                ticket.error = error
        self._turns.decided = True

    def _in_one_transaction(self, batch: list[Ticket[Any]]) -> bool:
        """Run all in one transaction; False if that is undone and each is to run alone."""
        if any(ticket.operation is None or ticket.operation.kind.several for ticket in batch):
            return False
        first = batch[0].operation
        assert first is not None
        try:
            database = self._begin()
        except sqlite3.Error as error:
            self._tell_all(batch, error, committing=False)
            return True
        for ticket in batch:
            assert ticket.operation is not None
            written = database.writes
            try:
                ticket.value = ticket.operation.run(database)
            except _OF_OPERATIONS as error:
                if is_fault(error) or database.writes != written:
                    self._connections.roll_back()
                    for started in batch:
                        started.value = started.error = None
                    return False
                ticket.error = error
        try:
            database._cursor.execute("COMMIT")
        except sqlite3.Error as error:
            self._tell_all(batch, error, committing=True)
        return True

    def _tell_all(self, batch: list[Ticket[Any]], error: sqlite3.Error, *, committing: bool) -> None:
        self._connections.roll_back()
        for ticket in batch:
            if ticket.error is None and ticket.operation is not None:
                ticket.value = None
                ticket.error = translate(error, ticket.operation, self.name, committing=committing)
                ticket.error.__cause__ = error
        if sqlite_code(error) != SQLITE_BUSY:
            self._connections.give_up_writer()

    def _alone(self, operation: Operation[R], first: sqlite3.Error | None = None) -> R:
        """Run one operation; a single guarded statement is a transaction by itself.

        Args:
            operation: What to run.
            first: What a first try, that held nobody up, met.
        """
        try:
            if first is not None and sqlite_code(first) != SQLITE_BUSY:
                raise first
            if not operation.kind.several:
                alone = self._database()
                return retry_while_busy(lambda: operation.run(alone), BUSY_TIMEOUT_MS / 1000, time.sleep)
            database = self._begin()
            value = operation.run(database)
            database._cursor.execute("COMMIT")
        except sqlite3.Error as error:
            self._connections.roll_back()
            if sqlite_code(error) != SQLITE_BUSY:
                self._connections.give_up_writer()
            raise translate(error, operation, self.name, committing=not operation.kind.reads) from error
        except BaseException:
            self._connections.roll_back()
            raise
        return value

    def _read(self, operation: Operation[R]) -> R:
        """On a connection of its own: a reader waits for no writer, and sees what is committed."""
        with self._read_lock:
            if self._turns.closed:
                raise refuse_finished(operation.asked)
            try:
                cursor = self._connections.reader(BUSY_TIMEOUT_MS / 1000).cursor()
                try:
                    return operation.run(CursorDatabase(cursor, self._sql))
                finally:
                    cursor.close()
            except sqlite3.Error as error:
                self._connections.give_up_reader()
                raise translate(error, operation, self.name, committing=False) from error

    # Units of work

    @contextmanager
    def unit_of_work(self) -> Iterator[HeldFile]:
        """One transaction for several operations; other callers of this log wait for its end."""
        held = self.enter_unit(threading.get_ident())
        try:
            yield held
            held.end(commit=True)
        except BaseException:  # ended again if a signal comes into that, see `_end_turn`; nothing, if it has ended
            try:
                held.end(commit=False)
            except BaseException:
                held.end(commit=False)
                raise
            raise

    def enter_unit(self, owner: int | None) -> HeldFile:
        """Begin a unit of work.

        Args:
            owner: The thread in which another operation of this log would wait for itself.
        """
        operation: Operation[None] = Call("unit_of_work", Kind.SEVERAL, lambda database: None)
        leader = self._lead_alone()
        try:
            database = self._begin()
            self._turns.unit_owner = owner
            return HeldFile(self, database, operation, leader)
        except BaseException as error:
            self._turns.unit_owner = None
            self._connections.roll_back()
            try:
                self._end_turn(leader)
            except BaseException:
                self._end_turn(leader)
                raise
            if not is_fault(error):
                raise
            raise translate(error, operation, self.name, committing=False) from error

    def end_unit(
        self, operation: Operation[None], leader: object, *, commit: bool, broken: SagaLogError | None
    ) -> None:
        """End a unit of work, if it has not ended; nothing of a broken one is committed."""
        if self._turns.leader is not leader:
            if commit:
                raise refuse_finished(operation.asked)  # in a forked child, say: it is the parent's
            return
        assert self._connections.writer is not None
        self._turns.unit_owner = None
        try:
            if not commit or broken is not None:
                self._connections.roll_back()
                if broken is not None:
                    self._connections.give_up_writer()
                if commit and broken is not None:
                    raise broken
                return
            try:
                self._connections.writer.execute("COMMIT").close()
            except sqlite3.Error as error:
                self._connections.roll_back()
                self._connections.give_up_writer()
                raise translate(error, operation, self.name, committing=True) from error
        except BaseException:
            self._connections.roll_back()  # of one that was interrupted; nothing, if it is committed
            raise
        finally:
            try:
                self._end_turn(leader)
            except BaseException:
                self._end_turn(leader)
                raise

    # The end

    def close(self) -> None:
        """Close the connections, when whoever writes is done. Once closed, every operation is refused."""
        if self._turns.closed:
            return
        with contextlib.suppress(UnusableBind):
            leader = self._lead_alone()
            try:
                self._turns.closed = True
                tell_no_more(self)
                self._connections.close_writer()
                with self._read_lock:
                    self._connections.close_reader()
            finally:
                try:
                    self._end_turn(leader)
                except BaseException:
                    self._end_turn(leader)
                    raise

    # A fork: see `forking`

    def before_fork(self) -> None:
        """Wait until no thread is inside the log."""
        self._leads_for_fork = None
        if self._turns.unit_owner != threading.get_ident():
            # Whoever holds the log for too long is not waited for: the child opens its own connection in any case.
            with contextlib.suppress(SagaLogError):
                self._leads_for_fork = self._lead_alone()
        self._read_lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._read_lock.release()
        if self._leads_for_fork is not None:
            self._end_turn(self._leads_for_fork)

    def after_fork_in_child(self) -> None:
        """New locks, new connections."""
        self._connections.leave_to_parent()
        self._turns = Turns()
        self._read_lock = threading.Lock()


class HeldFile:
    """The bind of a unit of work on the file: operations in its open transaction."""

    def __init__(
        self, file: FileBind, database: CursorDatabase, operation: Operation[None], leader: Ticket[None]
    ) -> None:
        self._file = file
        self._leader = leader
        self._database = database
        self._operation = operation
        self._broken: SagaLogError | None = None
        self._over = False

    def perform(self, operation: Operation[R]) -> R:
        """Run one operation in the unit's transaction."""
        if self._over:
            raise refuse_finished(operation.asked)
        if self._broken is not None:
            raise self._broken
        try:
            return operation.run(self._database)
        except sqlite3.Error as error:
            self._broken = translate(error, operation, self._file.name, committing=False)
            raise self._broken from error

    def end(self, *, commit: bool) -> None:
        """Commit or roll back, and let the next caller write."""
        self._over = True
        self._file.end_unit(self._operation, self._leader, commit=commit, broken=self._broken)

    @contextmanager
    def unit_of_work(self) -> Iterator[HeldFile]:
        """The unit that is open already."""
        yield self

    def close(self) -> None:
        """Nothing: the unit's block ends it."""


def _interrupted(ticket: Ticket[Any]) -> LogUnavailable:
    problem = "the thread that wrote for it was interrupted"
    return LogUnavailable(asked_of(ticket), problem, hint="Repeat it.", unknown=True)
