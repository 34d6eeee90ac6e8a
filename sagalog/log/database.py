"""What an operation sees: a `Database` that runs the log's statements inside somebody's transaction.

An operation (`sagas`, `steps`, `reading`, ...) is prepared first: its arguments are
checked and its payloads encoded, in the caller's thread and before any
transaction, for both may run the user's code. What remains is an `Operation`,
whose `run` talks to a `Database` only; who opens that, and when it commits, is
a bind's business.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

from sqlalchemy import Connection, TwoPhaseTransaction
from sqlalchemy.engine import Dialect

from sagalog.errors import SagaLogError, UnusableBind
from sagalog.log.statements import Statement, Statements
from sagalog.moments import now_ms

R = TypeVar("R")
Rows: TypeAlias = Sequence[Sequence[Any]]


class Kind:
    """What an operation needs of its transaction; no Enum, for each look at a member would cost what a call does.

    Attributes:
        reads: It writes nothing.
        apart: On a file it may be read on another connection than the one that writes.
        brief: On a file it is read on the one that writes, if nobody does: the other one's cache is stale.
        locked: It is one guarded statement by `write_locked`.
        several: It is several statements, all or none.
    """

    __slots__ = ("apart", "brief", "locked", "reads", "several")

    READ: ClassVar[Kind]
    READ_ROW: ClassVar[Kind]
    READ_OWN: ClassVar[Kind]
    WRITE: ClassVar[Kind]
    LOCKED: ClassVar[Kind]
    SEVERAL: ClassVar[Kind]

    def __init__(
        self,
        *,
        reads: bool = False,
        apart: bool = False,
        brief: bool = False,
        locked: bool = False,
        several: bool = False,
    ) -> None:
        self.reads = reads
        self.apart = apart
        self.brief = brief
        self.locked = locked
        self.several = several


Kind.READ = Kind(reads=True, apart=True)
"""One SELECT, a snapshot of its own."""
Kind.READ_ROW = Kind(reads=True, apart=True, brief=True)
"""One SELECT of one row."""
Kind.READ_OWN = Kind(reads=True)
"""One SELECT of what its own process has just written."""
Kind.WRITE = Kind()
"""One guarded statement; repeated, an UPDATE changes nothing and an INSERT is refused."""
Kind.LOCKED = Kind(locked=True)
"""One guarded statement by `write_locked`, that may be repeated."""
Kind.SEVERAL = Kind(several=True)
"""Several statements, all or none."""


class Operation(Generic[R]):
    """An operation with its arguments checked, ready to run in a transaction.

    Attributes:
        asked: The operation's public name, for messages.
        kind: What it needs of its transaction.
        saga_id: The saga concerned, or None.
        step_index: The step concerned, or None.
    """

    __slots__ = ("saga_id", "step_index")

    asked: str
    kind: Kind

    def __init__(self, saga_id: int | None, step_index: int | None) -> None:
        self.saga_id = saga_id
        self.step_index = step_index

    def run(self, db: Database) -> R:
        """Do it; it may be run again after its transaction was rolled back."""
        raise NotImplementedError


class Call(Operation[R]):
    """An operation that is a function of the database."""

    __slots__ = ("_work", "asked", "kind")

    def __init__(
        self,
        asked: str,
        kind: Kind,
        work: Callable[[Database], R],
        saga_id: int | None = None,
        step_index: int | None = None,
    ) -> None:
        self.saga_id = saga_id
        self.step_index = step_index
        self.asked = asked
        self.kind = kind
        self._work = work

    def run(self, db: Database) -> R:
        """See `Operation`."""
        return self._work(db)


class Database(Protocol):
    """One transaction's view of the log's tables."""

    sql: Statements
    on_postgres: bool
    may_notify: bool
    writes: int

    def write(self, statement: Statement, values: dict[str, Any]) -> int:
        """Run a guarded write; the number of rows that it changed."""
        ...

    def write_locked(self, statement: Statement, values: dict[str, Any], asked: str) -> int:
        """Run a write whose guard looks at other rows than it writes; `id_` is the saga.

        On Postgres the saga's row is locked first, in a statement of its own, so that the guard's snapshot is younger
        than the wait for the lock and sees every step that a concurrent `start_step` inserted. On SQLite the write
        lock does it.

        Raises:
            UnusableBind: The caller's transaction reads from one old snapshot, in which a step that was started since
                does not exist: it would be called done while it is in doubt.
        """
        ...

    def write_unless_locked(self, statement: Statement, values: dict[str, Any]) -> int:
        """Run a guarded write that gives up when another transaction holds the row for longer than a second.

        Of claims, for the sagas after it, and of the lease's thread, for the lease. On Postgres, and where the
        transaction is the log's own; on SQLite nothing locks rows.
        """
        ...

    def fetch(self, statement: Statement, **values: Any) -> Rows:
        """Run a statement that returns rows; all of them."""
        ...

    def fetch_unless_locked(self, statement: Statement, values: dict[str, Any]) -> Rows:
        """The same of a write, that gives up as `write_unless_locked` does: another transaction may hold its key."""
        ...

    def now(self) -> int:
        """The moment to be written, in Unix milliseconds."""
        ...


class CoreDatabase:
    """Over a SQLAlchemy connection."""

    def __init__(self, connection: Connection, sql: Statements) -> None:
        self.sql = sql
        self.on_postgres = connection.dialect.name == "postgresql"
        # A transaction that is prepared cannot have notified anybody.
        self.may_notify = self.on_postgres and not isinstance(connection.get_transaction(), TwoPhaseTransaction)
        self.writes = 0
        self._execute = connection.execute

    def write(self, statement: Statement, values: dict[str, Any]) -> int:
        """See `Database`."""
        changed = self._execute(statement.clause, values, execution_options=_ROWCOUNT).rowcount
        self.writes += changed
        return changed

    def write_locked(self, statement: Statement, values: dict[str, Any], asked: str) -> int:
        """See `Database`."""
        if self.on_postgres:
            _lock_saga(self, values["id_"], asked)
        return self.write(statement, values)

    def write_unless_locked(self, statement: Statement, values: dict[str, Any]) -> int:
        """See `Database`."""
        return self.write(statement, values)

    def fetch(self, statement: Statement, **values: Any) -> Rows:
        """See `Database`."""
        return self._execute(statement.clause, values).fetchall()

    def fetch_unless_locked(self, statement: Statement, values: dict[str, Any]) -> Rows:
        """See `Database`; how long a caller's transaction waits is the caller's to say."""
        return self.fetch(statement, **values)

    now = staticmethod(now_ms)


# Without it an INSERT's rowcount is -1, which is true.
_ROWCOUNT = {"preserve_rowcount": True}


class CursorDatabase:
    """Over a SQLite driver's own cursor, with ready SQL text: a third of the way through Core."""

    on_postgres = False
    may_notify = False

    def __init__(self, cursor: Any, sql: Statements) -> None:
        self.sql = sql
        self.writes = 0
        self._cursor = cursor

    def write(self, statement: Statement, values: dict[str, Any]) -> int:
        """See `Database`."""
        text, order = statement.sqlite
        cursor = self._cursor
        cursor.execute(text, order(values))
        changed: int = cursor.rowcount
        self.writes += changed
        return changed

    def write_locked(self, statement: Statement, values: dict[str, Any], asked: str) -> int:
        """See `Database`."""
        return self.write(statement, values)

    def write_unless_locked(self, statement: Statement, values: dict[str, Any]) -> int:
        """See `Database`."""
        return self.write(statement, values)

    def fetch(self, statement: Statement, **values: Any) -> Rows:
        """See `Database`; fetched whole, for an unfinished cursor is a reader that keeps the log file growing."""
        text, order = statement.sqlite
        cursor = self._cursor
        try:
            cursor.execute(text, order(values))
            rows: Rows = cursor.fetchall()
        except BaseException:
            with suppress(sqlite3.Error):
                cursor.fetchall()  # a signal's exception may have come between, and what is not fetched keeps the lock
            raise
        return rows

    def fetch_unless_locked(self, statement: Statement, values: dict[str, Any]) -> Rows:
        """See `Database`."""
        return self.fetch(statement, **values)

    now = staticmethod(now_ms)


class PostgresCursorDatabase(CursorDatabase):
    """The same over a Postgres driver's, in a transaction that somebody else began."""

    on_postgres = True
    may_notify = True

    def __init__(self, cursor: Any, sql: Statements, dialect: Dialect) -> None:
        super().__init__(cursor, sql)
        self._dialect = dialect

    def write(self, statement: Statement, values: dict[str, Any]) -> int:
        """See `Database`."""
        self._send(statement, values)
        return self._changed()

    def _send(self, statement: Statement, values: dict[str, Any]) -> None:
        text, order = statement.ready(self._dialect)
        self._cursor.execute(text, order(values))

    def _changed(self) -> int:
        changed: int = self._cursor.rowcount
        self.writes += changed
        return changed

    def write_locked(self, statement: Statement, values: dict[str, Any], asked: str) -> int:
        """See `Database`."""
        _lock_saga(self, values["id_"], asked)
        return self.write(statement, values)

    def write_unless_locked(self, statement: Statement, values: dict[str, Any]) -> int:
        """See `Database`."""
        self._cursor.execute(LOCK_TIMEOUT)
        return self.write(statement, values)

    def fetch(self, statement: Statement, **values: Any) -> Rows:
        """See `Database`."""
        self._send(statement, values)
        rows: Rows = self._cursor.fetchall()
        return rows

    def fetch_unless_locked(self, statement: Statement, values: dict[str, Any]) -> Rows:
        """See `Database`."""
        self._cursor.execute(LOCK_TIMEOUT)
        return self.fetch(statement, **values)


class AutocommitDatabase(PostgresCursorDatabase):
    """The same in autocommit: each statement is a transaction of its own, and so is `write_locked`.

    Args:
        cursor: Of the driver.
        sql: The statements.
        dialect: The engine's.
        connection: The driver's; one that knows pipelines sends all of a transaction in one round trip.
        spare: Another cursor, for each keeps the result of one statement.
    """

    def __init__(self, cursor: Any, sql: Statements, dialect: Dialect, connection: Any, spare: Any) -> None:
        super().__init__(cursor, sql, dialect)
        self._connection = connection
        self._spare = spare

    def write_locked(self, statement: Statement, values: dict[str, Any], asked: str) -> int:
        """See `Database`."""
        text, order = self.sql.lock_saga.ready(self._dialect)
        self._send_after(text, order(values), statement, values)
        return self._changed()

    def write_unless_locked(self, statement: Statement, values: dict[str, Any]) -> int:
        """See `Database`."""
        self._send_after(LOCK_TIMEOUT, None, statement, values)
        return self._changed()

    def fetch_unless_locked(self, statement: Statement, values: dict[str, Any]) -> Rows:
        """See `Database`."""
        self._send_after(LOCK_TIMEOUT, None, statement, values)
        rows: Rows = self._cursor.fetchall()
        return rows

    def _send_after(self, first: str, given: Any, statement: Statement, values: dict[str, Any]) -> None:
        """Send a statement after another one, in a transaction of the two."""
        spare = self._spare
        with self._in_one_round_trip():
            spare.execute(BEGIN)
            spare.execute(first, given)
            self._send(statement, values)
            spare.execute("COMMIT")

    @contextmanager
    def transaction(self) -> Iterator[PostgresCursorDatabase]:
        """Several statements, all or none; a refusal undoes them."""
        cursor = self._cursor
        cursor.execute(BEGIN)
        try:
            yield PostgresCursorDatabase(cursor, self.sql, self._dialect)
        except SagaLogError:
            cursor.execute("ROLLBACK")
            raise
        cursor.execute("COMMIT")

    def _in_one_round_trip(self) -> AbstractContextManager[Any]:
        pipeline = getattr(self._connection, "pipeline", None)
        dbapi: Any = self._dialect.loaded_dbapi
        if pipeline is None or not dbapi.Pipeline.is_supported():  # by a libpq older than 14
            return nullcontext()
        piped: AbstractContextManager[Any] = pipeline()
        return piped


LOCK_TIMEOUT = "SET LOCAL lock_timeout = 1000"
"""In milliseconds, for the rest of a transaction."""
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"


def _lock_saga(db: Database, saga_id: int, asked: str) -> None:
    for (level,) in db.fetch(db.sql.lock_saga, id_=saga_id):
        if level != "read committed":
            raise UnusableBind(
                f"{asked} of saga {saga_id}",
                f"the caller's transaction is at {level.upper()} and cannot see a step started since it began",
                saga_id=saga_id,
                found=level,
                hint="Use a transaction at READ COMMITTED, or give SagaLog the Engine.",
            )
