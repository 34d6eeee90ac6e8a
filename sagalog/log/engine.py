"""A log on a host's Engine: each operation is one transaction of its own.

On SQLite it runs on the driver's cursor: no begin hook of the host's fires,
the write lock is taken first, and COMMIT is SQL, for under some of the driver's
settings SQLAlchemy's commit does nothing. On Postgres one statement is one
round trip, in autocommit at READ COMMITTED; an ending, which locks first, is one too
where the driver knows pipelines; what needs more begins and commits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NoReturn, TypeVar

from sqlalchemy import Engine, PoolProxiedConnection
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from sagalog.errors import SagaExists, SagaLogError, StepExists, UnusableBind
from sagalog.log.bind import (
    in_driver_transaction,
    name_of,
    read_found,
    refuse_finished,
    take_write_lock,
    verified_on,
    verify_once,
)
from sagalog.log.database import (
    AutocommitDatabase,
    Call,
    CoreDatabase,
    CursorDatabase,
    Database,
    Kind,
    Operation,
)
from sagalog.log.faults import SQLITE_IOERR, driver_error, is_disconnect, is_fault, sqlite_code, translate, was_sent
from sagalog.log.forking import leave_to_parent, tell_no_more, tell_of_forks
from sagalog.log.one_connection import Holding, in_turn, take_turn, turn_of
from sagalog.log.statements import Statements
from sagalog.schema import Found

R = TypeVar("R")
A = TypeVar("A")


class EngineBind:
    """Opens, commits and gives back a connection for each operation.

    Args:
        engine: The host's, SQLite or Postgres.
        sql: The statements of the tables' placement.
        owned: Whether `close` disposes the engine.
        sleep: Waits so many seconds; an async face gives its loop's.
    """

    def __init__(
        self, engine: Engine, sql: Statements, *, owned: bool = False, sleep: Callable[[float], Any] = time.sleep
    ) -> None:
        if engine.dialect.name not in ("sqlite", "postgresql"):
            raise UnusableBind(
                "SagaLog",
                f"an engine of {engine.dialect.name}",
                found=engine.dialect.name,
                hint="sagalog works on SQLite and on Postgres.",
            )
        self._engine = engine
        self._sql = sql
        self._owned = owned
        self._sleep = sleep
        self._closed = False
        self._verified = verified_on(engine.dialect)
        if owned:
            tell_of_forks(self)
        self._on_sqlite = engine.dialect.name == "sqlite"
        self._turn = turn_of(engine)
        if not self._on_sqlite:
            self._transacting = engine.execution_options(isolation_level="READ COMMITTED")
            # SQLAlchemy's errors on it quote no payload, whatever the host's own setting.
            self._transacting.hide_parameters = True

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self._engine

    @property
    def sql(self) -> Statements:
        """The statements."""
        return self._sql

    @property
    def name(self) -> str:
        """The database's name for messages."""
        return name_of(self._engine)

    def _admit(self, operation: Operation[Any]) -> None:
        """Refuse on a closed log, and on a schema that this library cannot work on."""
        if self._closed:
            raise refuse_finished(operation.asked)
        if self._sql.placement in self._verified:
            return

        def look() -> Found:
            with in_turn(self._turn, operation.asked, self._sleep), self._engine.connect() as connection:
                return read_found(connection, self._sql.placement)

        try:
            verify_once(self._engine.dialect, self._sql, self.name, look)
        except Exception as error:
            self._raise(error, operation, committing=False)

    @property
    def ready(self) -> bool:
        """Whether nothing has to be looked at before an operation."""
        return not self._closed and self._sql.placement in self._verified

    def perform(self, operation: Operation[R], lost: Exception | None = None) -> R:
        """Run one operation; it is durable when this returns.

        Args:
            operation: What to run.
            lost: How the connection broke on which it was tried before, with others.
        """
        self._admit(operation)
        if self._on_sqlite:
            return self._on_sqlite_cursor(operation)
        if lost is None:
            try:
                return self.on_connection(self._run, operation)
            except Exception as error:
                lost = error
        if operation.kind.several or not is_disconnect(lost):
            raise self._told(lost, operation, committing=was_sent(lost) and not operation.kind.reads)
        # Once more, on a fresh connection: updates are idempotent, and an insert that is refused now may have been the
        # lost one. Outside the except block, for the lost error's text quotes parameters.
        unknown = was_sent(lost) and not operation.kind.reads
        try:
            return self.on_connection(self._run, operation)
        except (SagaExists, StepExists):
            pass
        except Exception as error:
            unknown = unknown or (was_sent(error) and not operation.kind.reads)
            lost = error
        raise self._told(lost, operation, committing=unknown)

    def _told(self, error: BaseException, operation: Operation[Any], *, committing: bool) -> BaseException:
        if isinstance(error, SagaLogError) or not is_fault(error):
            return error
        told = translate(error, operation, self.name, committing=committing)
        told.__cause__ = driver_error(error)
        return told

    def _raise(self, error: BaseException, operation: Operation[Any], *, committing: bool) -> NoReturn:
        raise self._told(error, operation, committing=committing)

    def on_connection(self, work: Callable[[PoolProxiedConnection, Any, A], R], given: A) -> R:
        """Work on a Postgres connection of the pool's, in autocommit.

        Args:
            work: Is called with the connection, the driver's, and `given`.
            given: What to work on.

        Raises:
            DBAPIError: The driver's error; the connection is given up.
        """
        dialect = self._engine.dialect
        try:
            connected = self._engine.raw_connection()
        except dialect.loaded_dbapi.Error as error:
            raise OperationalError(None, None, error, hide_parameters=True) from error
        driver: Any = connected.dbapi_connection
        refusal: SagaLogError | None = None
        try:
            was_autocommit = driver.autocommit
            driver.autocommit = True
            try:
                result = work(connected, driver, given)
            except SagaLogError as error:
                refusal = error
            driver.autocommit = was_autocommit
        except Exception as error:
            lost = dialect.is_disconnect(error, driver, None)  # type: ignore[arg-type]
            if not (lost or isinstance(error, (dialect.loaded_dbapi.Error, SQLAlchemyError, OSError))):
                connected.invalidate()
                raise  # a signal's handler may raise anything
            if lost:
                # As Core does: every connection of the pool that is as old is opened anew.
                self._engine.pool._invalidate(connected, error)
            else:
                connected.invalidate(error)
            raise DBAPIError(None, None, error, hide_parameters=True, connection_invalidated=lost) from error
        except BaseException:
            connected.invalidate()
            raise
        finally:
            # As Core gives it back: its transaction has ended, and a rollback would cost what a checkout does.
            connected._close_special(transaction_reset=True)
            self._close_returned()
        if refusal is not None:
            raise refusal
        return result

    def _run(self, connected: PoolProxiedConnection, driver: Any, operation: Operation[R]) -> R:
        # On the driver's cursor: one statement is one round trip, and Core's way there costs twice that.
        kind = operation.kind
        if kind.reads:  # on a cursor of its own, that keeps no rows in memory
            with closing(connected.cursor()) as cursor:
                return operation.run(AutocommitDatabase(cursor, self._sql, self._engine.dialect, driver, cursor))
        database = self._database(connected, driver)
        if not kind.several:
            return operation.run(database)
        with database.transaction() as begun:
            return operation.run(begun)

    def _database(self, connected: PoolProxiedConnection, driver: Any) -> AutocommitDatabase:
        """What stays with a pool's connection: to make a cursor costs as much as a checkout."""
        kept: AutocommitDatabase | None = connected.info.get(self._sql)
        if kept is None:
            cursor, spare = connected.cursor(), connected.cursor()
            kept = AutocommitDatabase(cursor, self._sql, self._engine.dialect, driver, spare)
            connected.info[self._sql] = kept
        return kept

    def _on_sqlite_cursor(self, operation: Operation[R]) -> R:
        with self._sqlite(operation, writing=not operation.kind.reads) as database:
            return operation.run(database)

    def _sqlite(self, operation: Operation[Any], *, writing: bool) -> _SqliteTransaction:
        return _SqliteTransaction(self, operation, writing)

    @contextmanager
    def unit_of_work(self) -> Iterator[_HeldBind]:
        """One transaction for several operations; committed at the end, rolled back by an exception."""
        operation: Operation[None] = Call("unit_of_work", Kind.SEVERAL, lambda database: None)
        self._admit(operation)
        if self._on_sqlite:
            with self._sqlite(operation, writing=True) as database:
                held = _HeldBind(database, self.name)
                try:
                    yield held
                finally:
                    held.over = True
                held.refuse_if_broken()
            return
        committing = False
        users: list[BaseException] = []
        try:
            with self._transacting.begin() as connection:
                held = _HeldBind(CoreDatabase(connection, self._sql), self.name)
                try:
                    yield held
                except BaseException as error:
                    users.append(error)
                    raise
                finally:
                    held.over = True
                held.refuse_if_broken()
                committing = True
        except Exception as error:
            if error in users:
                raise
            self._raise(error, operation, committing=committing)
        finally:
            self._close_returned()

    def close(self) -> None:
        """Close what the log opened; a connection on which somebody still writes, once it is given back."""
        if self._owned and not self._closed:
            tell_no_more(self)
            self._closed = True
            self._close_returned()

    def _close_returned(self) -> None:
        # The engine's own `dispose` makes another pool: what is given back later would be left to garbage collection.
        if self._closed:
            self._engine.pool.dispose()

    # A fork: see `forking`. A host's engine is the host's to dispose in the child.

    def before_fork(self) -> None:
        """The child takes no connection along, so nobody is waited for."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """New connections; the old ones are the parent's, and stay open."""
        leave_to_parent(self._engine.pool)
        self._engine.dispose(close=False)


class _HeldBind:
    """The bind of a unit of work: operations in a transaction that somebody else ends."""

    def __init__(self, database: Database, name: str) -> None:
        self._database = database
        self._name = name
        self._fault: SagaLogError | None = None
        self.over = False

    def refuse_if_broken(self) -> None:
        """Nothing of a transaction in which the database gave up may be committed."""
        if self._fault is not None:
            raise self._fault

    def perform(self, operation: Operation[R]) -> R:
        """Run one operation in the unit's transaction."""
        if self.over:
            raise refuse_finished(operation.asked)
        self.refuse_if_broken()
        try:
            return operation.run(self._database)
        except Exception as error:
            if not is_fault(error):
                raise
            self._fault = translate(error, operation, self._name, committing=False)
            raise self._fault from driver_error(error)

    @contextmanager
    def unit_of_work(self) -> Iterator[_HeldBind]:
        """The unit that is open already."""
        yield self

    def close(self) -> None:
        """Nothing: the unit's block ends it."""


class _SqliteTransaction:
    """A transaction on a SQLite driver's cursor; a class, for contextlib's blocks cost as much as a statement."""

    __slots__ = ("_bind", "_connection", "_cursor", "_operation", "_turn", "_was_manual", "_writing")

    def __init__(self, bind: EngineBind, operation: Operation[Any], writing: bool) -> None:  # noqa: FBT001
        self._bind = bind
        self._operation = operation
        self._writing = writing
        self._was_manual = False
        self._cursor: Any = None
        self._turn: Holding | None = None

    def __enter__(self) -> CursorDatabase:
        bind = self._bind
        if bind._turn is not None:
            self._turn = take_turn(bind._turn, self._operation.asked, bind._sleep)
        try:
            self._connection = bind._engine.raw_connection()
        except BaseException as error:
            self._let_others()
            if not isinstance(error, Exception):
                raise
            bind._raise(error, self._operation, committing=False)
        try:
            self._cursor = self._connection.cursor()
            if self._writing:
                self._begin()
        except BaseException as error:
            self._end()
            bind._raise(error, self._operation, committing=False)
        return CursorDatabase(self._cursor, bind._sql)

    def _begin(self) -> None:
        driver: Any = self._connection.driver_connection
        if driver.in_transaction and getattr(driver, "autocommit", None) is False:
            driver.rollback()
            driver.autocommit = True
            self._was_manual = True
        take_write_lock(self._connection, self._cursor, self._bind._sleep)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            if not self._writing:
                self._end()
                return
            try:
                self._cursor.execute("COMMIT")
            except BaseException as failed:
                self._undo(failed)
                self._bind._raise(failed, self._operation, committing=True)
            self._end()
            return
        self._undo(error)
        if is_fault(error):
            self._bind._raise(error, self._operation, committing=False)

    def _undo(self, error: BaseException) -> None:
        try:
            if self._writing and in_driver_transaction(self._connection):
                self._cursor.execute("ROLLBACK")
        except Exception as second:
            # The first error is the one to be told; this connection is given up.
            self._connection.invalidate(second)
        if sqlite_code(error) == SQLITE_IOERR and self._connection.is_valid:
            self._connection.invalidate(error if isinstance(error, Exception) else None)
        self._end()

    def _end(self) -> None:
        connection = self._connection
        try:
            if connection.is_valid:
                if self._was_manual:
                    driver: Any = connection.driver_connection
                    driver.autocommit = False
                if self._cursor is not None:
                    self._cursor.close()
            connection.close()
        finally:
            self._let_others()
        self._bind._close_returned()

    def _let_others(self) -> None:
        if self._turn is not None:
            self._turn.release()
