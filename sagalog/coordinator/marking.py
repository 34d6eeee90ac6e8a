"""A transactional handler's transaction: marked, so that whoever ends it, and how, is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Dialect, ExceptionContext, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, SessionTransaction

from sagalog.coordinator.effects import EndedInside, Invoke
from sagalog.coordinator.ending_sql import ends_transaction
from sagalog.errors import SagaLogError, UnusableBind
from sagalog.log.bind import in_driver_transaction
from sagalog.log.caller import CallerBind
from sagalog.log.database import Call, Kind, Operation
from sagalog.log.faults import driver_error, is_savepoint_missing, is_transient, translate
from sagalog.log.one_connection import Holding, take_turn, turn_of
from sagalog.log.statements import Statements

_COMMIT: Operation[None] = Call("commit of a transactional handler", Kind.SEVERAL, lambda database: None)
_MARK = "sagalog_handler"
_MARKING = (
    f"CREATE TEMP TABLE IF NOT EXISTS {_MARK} (number)",
    f"DELETE FROM temp.{_MARK}",
    f"INSERT INTO temp.{_MARK} VALUES ({{}})",
)
"""The row that marks a transaction on SQLite; each has a number of its own, for an earlier one's may be there."""
_numbers = itertools.count()
_ENDED = "its transaction was ended by SQL of its own, so what it wrote may be there; leave COMMIT to the coordinator"


class MarkedTransaction:
    """A transactional handler's transaction, from before it is called to its step's end.

    SQL that ends it is refused. A savepoint marks it: where the mark is gone, the handler has ended it by the driver's
    own means, and what it wrote may be there without the end of its step. On SQLite, which may roll back by itself, a
    row in a temporary table marks it as well: gone with a rollback, and there after a commit.
    """

    def __init__(self, session: Session, sql: Statements, sleep: Callable[[float], Any]) -> None:
        self._session = session
        self._sql = sql
        self._caller = CallerBind(session, sql, sleep=sleep)
        self._sleep = sleep
        self._turn: Holding | None = None
        self._connection: Connection | None = None
        self._driver: Any = None
        self._is_rolled_back = self._is_ended_inside = self._was_inside = False
        self._gave_up: Exception | None = None
        self._number, self._changes = next(_numbers), 0
        self._listened: list[tuple[object, str, Callable[..., None]]] = []

    def begin(self) -> None:
        """Begin it, for writing."""
        turn = turn_of(self._session.get_bind())
        if turn is not None:
            self._turn = take_turn(turn, _COMMIT.asked, self._sleep)
        self._listen(self._session, "after_begin", self._begun)
        self._listen(self._session, "before_commit", self._refuse_outermost)
        self._caller.begin()

    def _begun(self, session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        # Called again where a handler has rolled back, and goes on in another one.
        if transaction.nested or not self._is_ours(connection):
            return
        was_ended, self._is_ended_inside = self._is_ended_inside, True  # what is refused here may be gone on with
        self._caller.enter(connection, _COMMIT)
        if connection.dialect.name == "sqlite":
            # The host's own BEGIN may have been a deferred one; before the first read the lock can be waited for.
            _on_driver(connection, self._sql.take_lock.sqlite[0])
            for statement in _MARKING:
                _on_driver(connection, statement.format(self._number))
            _hear_errors(connection.dialect)
            _heard_by[connection] = self
        _on_driver(connection, f"SAVEPOINT {_MARK}")
        self._connection, self._is_rolled_back, self._is_ended_inside = connection, False, was_ended
        self._gave_up = None
        self._listen(connection, "begin", _refuse_begin)
        self._listen(connection, "rollback", self._look_before_rollback)
        self._listen(connection, "before_cursor_execute", self._before_statement)
        if connection.dialect.driver == "aiosqlite" and self._driver is None:
            self._listen(connection.engine.pool, "invalidate", self._roll_back_what_was_cut_off)
            self._driver = connection.connection.dbapi_connection
        self._listen(connection, "commit", _refuse_commit)

    def _is_ours(self, connection: Connection) -> bool:
        """Whether it is on the log's engine; a Session may read on another one as well."""
        return self._connection is None or connection.engine is self._connection.engine

    def _refuse_outermost(self, session: Session) -> None:
        if not session.in_nested_transaction():
            _refuse_commit(session)

    def _listen(self, target: object, name: str, heard: Callable[..., None]) -> None:
        event.listen(target, name, heard)
        self._listened.append((target, name, heard))

    def _listen_no_more(self) -> None:
        while self._listened:
            event.remove(*self._listened.pop())

    def _before_statement(self, connection: Connection, cursor: object, statement: str, *_: object) -> None:
        if self._gave_up is not None:  # it would be in a transaction of its own
            raise UnusableBind(
                "a statement in a transactional handler",
                f"the database has rolled its transaction back: {self._gave_up}",
                hint="Raise, or go on after session.rollback().",
            )
        if ends_transaction(statement, comments_nest=connection.dialect.name == "postgresql"):
            _refuse_commit(connection)
        if connection.dialect.name == "sqlite":
            self._was_inside = in_driver_transaction(connection.connection)

    def note_error(self, error: Exception, connection: Connection) -> None:
        """SQLite rolls a transaction back by itself where its disk is full, or a statement or trigger says so."""
        if not self._was_inside or connection.invalidated or in_driver_transaction(connection.connection):
            return
        if self._is_marked(connection):
            self._is_ended_inside = True  # this one was another one's rollback
        else:
            self._gave_up, self._is_rolled_back, self._changes = error, True, _changes_on(connection)

    def _is_marked(self, connection: Connection) -> bool:
        try:
            return bool(_on_driver(connection, f"SELECT 1 FROM temp.{_MARK} WHERE number = {self._number}"))
        except DBAPIError:  # the table is gone with the rest
            return False

    def _look_for_changes(self, connection: Connection) -> None:
        """What the driver has written after SQLite rolled back is in no transaction of the step's."""
        if self._gave_up is not None and _changes_on(connection) != self._changes:
            self._is_ended_inside = True

    def told(self, effect: Invoke[Any], error: Exception) -> Exception:
        """What a handler that raised has done: nothing, if its transaction is still the one that was begun.

        Returns:
            Its error; `LogUnavailable` where the database gave the transaction up, so that it may be tried again; or
            `EndedInside`.
        """
        try:
            self._look_for_mark(f"ROLLBACK TO SAVEPOINT {_MARK}")
        except EndedInside as ended:
            return ended
        except Exception as second:
            error = second if _is_given_up(second) else error
        if self._gave_up is not None and _is_given_up(self._gave_up):
            error = self._gave_up
        if _is_given_up(error):
            return translate(error, _COMMIT, "the log's database", committing=False)
        assert effect.ended is not None
        effect.ended.raised = error
        return error

    def end(self, effect: Invoke[Any], value: Any) -> None:
        """Commit what the handler wrote, with the end of its step."""
        assert effect.ended is not None
        ended = effect.ended(value)
        try:
            self._session.flush()
            while (nested := self._session.get_nested_transaction()) is not None:
                nested.commit()  # left open: as their outer one's commit would
            if not self._session.is_active:
                self._session.connection()  # raises: a flush has failed, and the handler went on all the same
            if self._gave_up is not None:
                raise self._gave_up
        except Exception as error:
            raise self.told(effect, error) from error
        try:
            self._look_for_mark(f"RELEASE SAVEPOINT {_MARK}")
        except DBAPIError as error:
            raise self.told(effect, error) from error
        self._listen_no_more()
        try:
            self._caller.perform(ended)
            self._session.commit()
        except SagaLogError:
            raise
        except Exception as error:
            self._roll_back()
            if not is_transient(error):
                raise  # a deferred constraint, say: the database refused it
            raise translate(error, _COMMIT, "the log's database", committing=True) from driver_error(error)

    def _look_for_mark(self, statement: str) -> None:
        connection = self._connection
        assert connection is not None
        self._look_for_changes(connection)
        if self._is_ended_inside:
            raise EndedInside(_ENDED)
        if self._is_rolled_back or connection.invalidated:
            return
        try:
            _on_driver(connection, statement)
        except DBAPIError as error:
            if is_savepoint_missing(error):
                raise EndedInside(_ENDED) from error
            raise

    def _look_before_rollback(self, connection: Connection) -> None:
        """SQLAlchemy is about to roll back, as it does when a flush fails: what the handler has ended it could not."""
        self._look_for_changes(connection)
        self._gave_up = None
        if self._is_rolled_back or connection.invalidated:
            self._is_rolled_back = True
            return
        try:
            _on_driver(connection, f"ROLLBACK TO SAVEPOINT {_MARK}")
        except DBAPIError as error:
            self._is_ended_inside = self._is_ended_inside or is_savepoint_missing(error)
        self._is_rolled_back = True

    def _roll_back(self) -> None:
        """SQLAlchemy gives the connection back as it is; on SQLite a refused commit leaves its transaction open."""
        connection = self._connection
        if connection is None or connection.closed or connection.invalidated:
            return
        try:
            connection.connection.rollback()
        except Exception as error:
            connection.invalidate(error)

    def close(self) -> None:
        """Undo what was not committed."""
        try:
            self._listen_no_more()
            self._session.close()
        except Exception as error:  # of a savepoint that is gone, say: what is known of the step comes first
            if self._connection is not None and not self._connection.closed:
                self._connection.invalidate(error)
        finally:
            turn, self._turn = self._turn, None
            if turn is not None:
                turn.release()

    def _roll_back_what_was_cut_off(self, driver: Any, record: object, error: BaseException | None) -> None:
        """A cancelled statement goes on in aiosqlite's thread; closed in the middle, it keeps SQLite's write lock."""
        from sqlalchemy.util import await_only

        if driver is self._driver:
            for end in (driver.driver_connection.interrupt, driver.driver_connection.rollback):
                with suppress(Exception):
                    await_only(end())


def _is_given_up(error: Exception) -> bool:
    return isinstance(error, DBAPIError) and is_transient(error)


def _refuse_begin(_: object) -> None:
    raise UnusableBind(
        "a statement in a transactional handler",
        "its connection's transaction is over",
        hint="Go on through the Session, after its rollback().",
    )


_heard_by: WeakKeyDictionary[Connection, MarkedTransaction] = WeakKeyDictionary()
"""The transactions of transactional handlers on SQLite, by connection."""


def _on_driver(connection: Connection, statement: str) -> list[Any]:
    """Run a statement past SQLAlchemy's events, in which an application may raise something else."""
    dialect: Any = connection.dialect
    cursor = connection.connection.cursor()
    try:
        cursor.execute(statement)
        return list(cursor.fetchall()) if cursor.description else []
    except dialect.loaded_dbapi.Error as error:
        raise DBAPIError.instance(
            statement, None, error, dialect.loaded_dbapi.Error, hide_parameters=True, dialect=dialect
        ) from error
    finally:
        cursor.close()


def _changes_on(connection: Connection) -> int:
    """How many rows were ever changed on a SQLite connection."""
    driver: Any = connection.connection.driver_connection
    return int(driver.total_changes)


def _hear_errors(dialect: Dialect) -> None:
    """Once a dialect, which engines share: SQLAlchemy tells nobody else of a statement that failed."""
    if not event.contains(dialect, "handle_error", _note_error):
        event.listen(dialect, "handle_error", _note_error, insert=True)  # an application's may raise


def _note_error(context: ExceptionContext) -> None:
    transaction = None if context.connection is None else _heard_by.get(context.connection)
    error = context.sqlalchemy_exception
    if transaction is not None and context.connection is not None and error is not None:
        transaction.note_error(error, context.connection)


def _refuse_commit(_: object) -> None:
    raise UnusableBind(
        "commit, or another end, of a transactional handler's transaction",
        "its writes would be there without the end of its step",
        hint="Leave the end of the transaction to the coordinator: return, or raise; or session.rollback().",
    )
