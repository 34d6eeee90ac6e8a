"""A log on a caller's Session or Connection: it joins their transaction, and never ends or poisons it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.orm import Session

from sagalog.errors import SagaLogError, UnusableBind
from sagalog.log.bind import in_driver_transaction, name_of, read_found, take_write_lock, verified_on, verify_once
from sagalog.log.database import Call, CoreDatabase, Kind, Operation
from sagalog.log.faults import driver_error, is_fault, translate
from sagalog.log.statements import Statements

R = TypeVar("R")


class CallerBind:
    """Runs operations in the transaction of a caller's Session or Connection.

    Args:
        caller: The Session (flushed before, as its own execute would) or Connection.
        sql: The statements of the tables' placement.
        sleep: Waits so many seconds; an async face gives its loop's.
    """

    def __init__(
        self, caller: Session | Connection, sql: Statements, *, sleep: Callable[[float], Any] = time.sleep
    ) -> None:
        self._caller = caller
        self._sql = sql
        self._sleep = sleep
        self._models = sql.models

    def _connection(self) -> Connection:
        caller = self._caller
        if isinstance(caller, Connection):
            if not caller.in_transaction():
                caller.begin()
            return caller
        if caller.autoflush:
            caller.flush()
        return caller.connection(bind_arguments={"mapper": self._models.Saga})

    def begin(self) -> None:
        """Open the caller's transaction for writing, before anything of theirs runs in it.

        On SQLite it takes the write lock; on a connection that commits by itself it is refused.
        """
        operation: Operation[None] = Call("begin", Kind.SEVERAL, lambda database: None)
        self.perform(operation)

    def perform(self, operation: Operation[R]) -> R:
        """Run one operation; it is durable with the caller's commit, and gone with their rollback."""
        try:
            connection = self._connection()
            if self._sql.placement not in verified_on(connection.dialect):
                look = partial(read_found, connection, self._sql.placement)
                verify_once(connection.dialect, self._sql, name_of(connection.engine), look)
            if not operation.kind.reads:
                self.enter(connection, operation)
        except Exception as error:
            if isinstance(error, SagaLogError) or not is_fault(error):
                raise
            self._raise(error, operation, "the caller's database")
        on_sqlite = connection.dialect.name == "sqlite"
        inside = on_sqlite and in_driver_transaction(connection.connection)
        try:
            result = operation.run(CoreDatabase(connection, self._sql))
        except Exception as error:
            if not is_fault(error):
                raise
            if inside and not connection.invalidated and not in_driver_transaction(connection.connection):
                self._seal(connection)
            self._raise(error, operation, name_of(connection.engine))
        if isinstance(self._caller, Session) and not operation.kind.reads:
            self._freshen(self._caller, operation)
        return result

    def _raise(self, error: Exception, operation: Operation[Any], name: str) -> None:
        raise translate(error, operation, name, committing=False) from driver_error(error)

    def _seal(self, connection: Connection) -> None:
        # SQLite rolled the whole transaction back while SQLAlchemy thinks that it is open: what the caller did next
        # would be committed alone. Invalidated, every statement and commit raises until they roll back.
        if connection.engine.url.database not in (None, "", ":memory:"):
            connection.invalidate()

    def enter(self, connection: Connection, operation: Operation[Any]) -> None:
        """Make sure that a connection is in a transaction for writing.

        Raises:
            UnusableBind: It commits every statement by itself.
        """
        dbapi: Any = connection.connection
        if connection.dialect.name != "sqlite":
            if connection.dialect.detect_autocommit_setting(dbapi.dbapi_connection):
                raise self._autocommitting(operation)
            return
        driver = dbapi.driver_connection
        if getattr(driver, "autocommit", None) is True:
            raise self._autocommitting(operation)
        if driver.in_transaction:
            return
        if driver.isolation_level is None and connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            raise self._autocommitting(operation)
        if (
            driver.isolation_level is None
            and getattr(connection.dialect, "_on_connect_isolation_level", None) == "AUTOCOMMIT"
        ):
            raise self._autocommitting(operation)
        cursor = dbapi.cursor()
        try:
            take_write_lock(dbapi, cursor, self._sleep)
        finally:
            cursor.close()

    def _autocommitting(self, operation: Operation[Any]) -> UnusableBind:
        return UnusableBind(
            operation.asked,
            "the connection commits every statement by itself, so nothing could be one transaction with the caller's",
            saga_id=operation.saga_id,
            step_index=operation.step_index,
            hint="Give SagaLog the Engine, or a Session or Connection that is not in AUTOCOMMIT.",
        )

    def _freshen(self, session: Session, operation: Operation[Any]) -> None:
        """Objects already loaded do not stay stale; what the caller changed on them stays theirs."""
        if operation.saga_id is None:
            stale = [item for item in session.identity_map.values() if isinstance(item, self._models[:2])]
        else:
            loaded = session.identity_map
            saga = loaded.get(sa_inspect(self._models.Saga).identity_key_from_primary_key((operation.saga_id,)))
            steps = [
                item
                for item in loaded.values()
                if isinstance(item, self._models.SagaStep) and item.__dict__.get("saga_id") == operation.saga_id
            ]
            stale = ([] if saga is None else [saga]) + steps
        for item in stale:
            state = sa_inspect(item)
            names = [name for name in state.dict if name in state.mapper.attrs and name not in state.committed_state]
            if not state.persistent or not names:
                continue
            if operation.asked == "prune":
                session.expire(item)
            else:
                session.refresh(item, names)

    @contextmanager
    def unit_of_work(self) -> Iterator[CallerBind]:
        """The caller's transaction, which is the unit already; nothing is committed here."""
        yield self

    def close(self) -> None:
        """Nothing: the caller opened it."""
