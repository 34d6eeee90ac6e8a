"""A log on a SQLite file of its own, or in memory: one connection, and commits shared by callers that wait.

Leader and followers: the first caller that comes while nobody writes leads. It
takes along whoever waits by then, runs all their operations in one transaction
and wakes them once it is durable; the first of those that came meanwhile leads
next. A refused operation wrote nothing and does not touch the others; if one
fails after it wrote, the batch is rolled back and each runs alone. No thread is
started, and a lone caller pays for a lock.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Literal, TypeAlias, TypeVar
from urllib.parse import quote
from weakref import WeakSet

from sagalog.errors import LogUnavailable, SagaLogError, UnusableBind
from sagalog.log.bind import begin_immediate, refuse_finished, retry_while_busy
from sagalog.log.database import Call, CursorDatabase, Kind, Operation
from sagalog.log.faults import SQLITE_BUSY, is_fault, sqlite_code, translate
from sagalog.log.statements import Statements

R = TypeVar("R")
Durability: TypeAlias = Literal["full", "normal"]
BUSY_TIMEOUT_MS = 5000
_LARGEST_BATCH = 1000
_MOMENTS = 20
_JOURNAL_LIMIT = 64 * 1024 * 1024


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


class FileBind:
    """The log's own connection to a SQLite file.

    Args:
        path: The file, or None for a database in memory.
        sql: The statements.
        durability: "full" or "normal", SQLite's synchronous.
        fill: Fills a new in-memory connection.
    """

    def __init__(
        self,
        path: str | None,
        sql: Statements,
        *,
        durability: Durability = "full",
        fill: Callable[[sqlite3.Connection], None] | None = None,
    ) -> None:
        self.name = path or "a database in memory"
        self._path = path
        self._sql = sql
        self._synchronous = {"full": "FULL", "normal": "NORMAL"}[durability]
        self._closed = False
        self._leads_for_fork = False
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._renew_locks()
        if fill is not None:
            self._writer = self._prepared(sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None))
            fill(self._writer)
            self._open_database()
        _open_binds.add(self)

    def _renew_locks(self) -> None:
        self._mutex = threading.Lock()
        self._leading = False
        self._unit_owner: int | None = None
        self._waiting: deque[Ticket[Any]] = deque()
        self._company = 1
        self._read_lock = threading.Lock()

    # Connections

    def _prepared(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        for pragma in (
            "foreign_keys = ON",
            "temp_store = MEMORY",
            f"synchronous = {self._synchronous}",
            f"journal_size_limit = {_JOURNAL_LIMIT}",
        ):
            connection.execute(f"PRAGMA {pragma}").close()
        return connection

    def _connect(self, timeout: float) -> sqlite3.Connection:
        # mode=rw: a file that was deleted under the log is an error, not an empty new one.
        assert self._path is not None
        connection = sqlite3.connect(
            file_uri(self._path),
            uri=True,
            timeout=timeout,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
        try:
            return self._prepared(connection)
        except BaseException:
            connection.close()
            raise

    def _open_database(self) -> CursorDatabase:
        if self._writer is None:
            if self._path is None:
                raise sqlite3.ProgrammingError("the database in memory is gone")
            # Its own busy handler starves among many writers: `retry_while_busy` waits instead.
            self._writer = self._connect(0)
        self._database = CursorDatabase(self._writer.cursor(), self._sql)
        return self._database

    def _give_up_writer(self) -> None:
        """After a fault: the next operation opens the file anew, and sees what is really in it."""
        if self._path is not None and self._writer is not None:
            writer, self._writer = self._writer, None
            with contextlib.suppress(sqlite3.Error):
                writer.close()

    # Leading and following

    def perform(self, operation: Operation[R]) -> R:
        """Run one operation; a write is durable when this returns."""
        if operation.kind is Kind.READ and self._path is not None:
            return self._read(operation)
        leads = False
        try:  # around taking the lead too: an interrupt that came between would leave the log without a leader for ever
            with self._mutex:
                if not self._leading and not self._closed:
                    self._leading = leads = True
            if not leads:
                ticket: Ticket[R] = Ticket(operation)
                leads = self._lead(ticket)
                if not leads:
                    return ticket.outcome()  # type: ignore[no-any-return]
            if self._company > 1:
                self._let_others_come()
            if not self._waiting:
                self._company = 1
                if self._writer is None or operation.kind is Kind.SEVERAL:
                    return self._alone(operation)
                try:
                    return operation.run(self._database)
                except sqlite3.Error as error:
                    return self._alone(operation, error)
            own: Ticket[R] = Ticket(operation)
            batch = [own, *self._take_waiting()]
            self._company = len(batch)
            self._commit_together(batch)
        finally:
            if leads:
                self._hand_over()
        return own.outcome()  # type: ignore[no-any-return]

    def _let_others_come(self) -> None:
        # Those whose writes the last commit carried are about to come with their next: without a moment's wait this
        # caller would commit alone, and they would wait for that.
        for _ in range(_MOMENTS):
            if len(self._waiting) >= self._company - 1:
                return
            time.sleep(0)

    def perform_all(self, tickets: Sequence[Ticket[Any]]) -> None:
        """Run the operations of several callers, with shared commits; each ticket then holds its outcome."""
        ready = [ticket for ticket in tickets if ticket.operation is not None]
        try:
            self._lead(None)
        except SagaLogError as error:
            for ticket in ready:
                ticket.error = error
            return
        try:
            self._commit_together(ready)
        finally:
            self._hand_over()

    def _lead(self, ticket: Ticket[Any] | None) -> bool:
        """Become the leader (True), or wait until another leader carried the ticket (False)."""
        with self._mutex:
            if self._closed:
                raise refuse_finished(_asked(ticket))
            if not self._leading:
                self._leading = True
                return True
            if self._unit_owner == threading.get_ident():
                raise UnusableBind(
                    _asked(ticket),
                    "this thread has a unit of work open on the same log, which would wait for itself",
                    hint="Use the object that `with log.unit_of_work() as work` gave.",
                )
            if ticket is None or ticket.operation is None:
                ticket = Ticket(None)
            ticket.wake = threading.Lock()
            ticket.wake.acquire()
            self._waiting.append(ticket)
        try:
            woken = ticket.wake.acquire(timeout=2 * BUSY_TIMEOUT_MS / 1000)
        except BaseException:
            self._withdraw(ticket)
            raise
        if not woken and self._withdraw(ticket):
            raise LogUnavailable(
                _asked(ticket),
                "another unit of work of this process holds the log",
                found="unit of work",
                hint="Keep units of work short; repeat it.",
            )
        if not woken:
            ticket.wake.acquire()
        return ticket.leads

    def _withdraw(self, ticket: Ticket[Any]) -> bool:
        """Leave the queue; False if a leader carries the ticket already."""
        with self._mutex:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                return True
            leads = ticket.leads
        if leads:
            self._hand_over()
            return True
        return False

    def _take_waiting(self) -> list[Ticket[Any]]:
        if not self._waiting:
            return []
        with self._mutex:
            taken: list[Ticket[Any]] = []
            while self._waiting and self._waiting[0].operation is not None and len(taken) < _LARGEST_BATCH:
                taken.append(self._waiting.popleft())
            return taken

    def _hand_over(self) -> None:
        with self._mutex:
            if not self._waiting:
                self._leading = False
                return
            successor = self._waiting.popleft()
            successor.leads = True
        successor.wake.release()

    # Transactions

    def _commit_together(self, batch: list[Ticket[Any]]) -> None:
        carried = False
        try:
            if len(batch) == 1 or not self._in_one_transaction(batch):
                for ticket in batch:
                    assert ticket.operation is not None
                    try:
                        ticket.value = self._alone(ticket.operation)
                    except Exception as error:
                        ticket.error = error
            carried = True
        finally:
            if not carried:
                # An interrupt of the leader is no matter of the others': theirs is rolled back, and told so.
                self._roll_back()
            for ticket in batch:
                if not carried and ticket.value is None and ticket.error is None:
                    ticket.error = LogUnavailable(
                        _asked(ticket), "the thread that wrote for it was interrupted", hint="Repeat it.", unknown=True
                    )
                if ticket.wake is not None and not ticket.leads:
                    ticket.wake.release()

    def _in_one_transaction(self, batch: list[Ticket[Any]]) -> bool:
        """Run all in one transaction; False if that is undone and each is to run alone."""
        if any(ticket.operation is None or ticket.operation.kind is Kind.SEVERAL for ticket in batch):
            return False
        first = batch[0].operation
        assert first is not None
        try:
            database = self._database if self._writer is not None else self._open_database()
            begin_immediate(database._cursor.execute, BUSY_TIMEOUT_MS / 1000, time.sleep)
        except sqlite3.Error as error:
            self._tell_all(batch, error, committing=False)
            return True
        for ticket in batch:
            assert ticket.operation is not None
            written = database.writes
            try:
                ticket.value = ticket.operation.run(database)
            except Exception as error:
                if is_fault(error) or database.writes != written:
                    self._roll_back()
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
        self._roll_back()
        for ticket in batch:
            if ticket.error is None and ticket.operation is not None:
                ticket.value = None
                ticket.error = translate(error, ticket.operation, self.name, committing=committing)
                ticket.error.__cause__ = error
        if sqlite_code(error) != SQLITE_BUSY:
            self._give_up_writer()

    def _alone(self, operation: Operation[R], first: sqlite3.Error | None = None) -> R:
        """Run one operation; a single guarded statement is a transaction by itself.

        Args:
            operation: What to run.
            first: What a first try, that held nobody up, met.
        """
        try:
            if first is not None and sqlite_code(first) != SQLITE_BUSY:
                raise first
            database = self._database if self._writer is not None else self._open_database()
            if operation.kind is not Kind.SEVERAL:
                return retry_while_busy(lambda: operation.run(database), BUSY_TIMEOUT_MS / 1000, time.sleep)
            begin_immediate(database._cursor.execute, BUSY_TIMEOUT_MS / 1000, time.sleep)
            value = operation.run(database)
            database._cursor.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            if sqlite_code(error) != SQLITE_BUSY:
                self._give_up_writer()
            raise translate(error, operation, self.name, committing=operation.kind is not Kind.READ) from error
        except BaseException:
            self._roll_back()
            raise
        return value

    def _roll_back(self) -> None:
        try:
            if self._writer is not None and self._writer.in_transaction:
                self._writer.execute("ROLLBACK").close()
        except sqlite3.Error:
            self._give_up_writer()

    def _read(self, operation: Operation[R]) -> R:
        """On a connection of its own: a reader waits for no writer, and sees what is committed."""
        with self._read_lock:
            if self._closed:
                raise refuse_finished(operation.asked)
            try:
                if self._reader is None:
                    self._reader = self._connect(BUSY_TIMEOUT_MS / 1000)
                cursor = self._reader.cursor()
                try:
                    return operation.run(CursorDatabase(cursor, self._sql))
                finally:
                    cursor.close()
            except sqlite3.Error as error:
                if self._reader is not None:
                    with contextlib.suppress(sqlite3.Error):
                        self._reader.close()
                    self._reader = None
                raise translate(error, operation, self.name, committing=False) from error

    # Units of work

    @contextmanager
    def unit_of_work(self) -> Iterator[HeldFile]:
        """One transaction for several operations; other callers of this log wait for its end."""
        held = self.enter_unit(threading.get_ident())
        try:
            yield held
        except BaseException:
            held.end(commit=False)
            raise
        held.end(commit=True)

    def enter_unit(self, owner: int | None) -> HeldFile:
        """Begin a unit of work.

        Args:
            owner: The thread in which another operation of this log would wait for itself.
        """
        self._lead(None)
        operation: Operation[None] = Call("unit_of_work", Kind.SEVERAL, lambda database: None)
        try:
            database = self._database if self._writer is not None else self._open_database()
            begin_immediate(database._cursor.execute, BUSY_TIMEOUT_MS / 1000, time.sleep)
        except BaseException as error:
            self._roll_back()
            self._hand_over()
            if not is_fault(error):
                raise
            raise translate(error, operation, self.name, committing=False) from error
        self._unit_owner = owner
        return HeldFile(self, database, operation)

    def end_unit(self, operation: Operation[None], *, commit: bool, broken: SagaLogError | None) -> None:
        """End a unit of work; nothing of a broken one is committed."""
        assert self._writer is not None
        self._unit_owner = None
        try:
            if not commit or broken is not None:
                self._roll_back()
                if broken is not None:
                    self._give_up_writer()
                if commit and broken is not None:
                    raise broken
                return
            try:
                self._writer.execute("COMMIT").close()
            except sqlite3.Error as error:
                self._roll_back()
                self._give_up_writer()
                raise translate(error, operation, self.name, committing=True) from error
        finally:
            self._hand_over()

    # The end

    def close(self) -> None:
        """Close the connections, when whoever writes is done. Once closed, every operation is refused."""
        if self._closed:
            return
        with contextlib.suppress(UnusableBind):
            self._lead(None)
            self._closed = True
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close()
            with self._read_lock:
                reader, self._reader = self._reader, None
                if reader is not None:
                    reader.close()
            self._hand_over()

    # A fork: the child must not inherit a lock that nobody will release, nor use the parent's connection

    def before_fork(self) -> None:
        """Wait until no thread is inside the log."""
        self._leads_for_fork = False
        if self._unit_owner != threading.get_ident():
            # Whoever holds the log for too long is not waited for: the child opens its own connection in any case.
            with contextlib.suppress(SagaLogError):
                self._leads_for_fork = self._lead(None)
        self._read_lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._read_lock.release()
        if self._leads_for_fork:
            self._hand_over()

    def after_fork_in_child(self) -> None:
        """New locks, new connections; the old ones stay referenced, for closing them would end the parent's locks."""
        _inherited.append((self._writer, self._reader))
        if self._path is not None:
            self._writer = None
        self._reader = None
        self._renew_locks()


class HeldFile:
    """The bind of a unit of work on the file: operations in its open transaction."""

    def __init__(self, file: FileBind, database: CursorDatabase, operation: Operation[None]) -> None:
        self._file = file
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
        self._file.end_unit(self._operation, commit=commit, broken=self._broken)

    @contextmanager
    def unit_of_work(self) -> Iterator[HeldFile]:
        """The unit that is open already."""
        yield self

    def close(self) -> None:
        """Nothing: the unit's block ends it."""


def _asked(ticket: Ticket[Any] | None) -> str:
    return "unit_of_work" if ticket is None or ticket.operation is None else ticket.operation.asked


def file_uri(path: str) -> str:
    """What SQLite opens for reading and writing, and does not create."""
    return f"file:{quote(os.path.abspath(path))}?mode=rw"


_open_binds: WeakSet[FileBind] = WeakSet()
_inherited: list[Any] = []
_forking: list[FileBind] = []


def _before_fork() -> None:
    _forking[:] = [bind for bind in list(_open_binds) if not bind._closed]
    for bind in _forking:
        bind.before_fork()


def _after_fork(name: str) -> None:
    for bind in _forking:
        getattr(bind, name)()
    _forking.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=lambda: _after_fork("after_fork_in_parent"),
        after_in_child=lambda: _after_fork("after_fork_in_child"),
    )
