"""Transactional handlers: a Session on the log's database, whose commit is the step's end as well."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from sagalog.coordinator.effects import Invoke
from sagalog.coordinator.threads import in_thread
from sagalog.errors import SagaLogError, UnusableBind
from sagalog.log.apart import inner_bind
from sagalog.log.caller import CallerBind
from sagalog.log.connections import file_engine, file_uri
from sagalog.log.database import Call, Kind, Operation
from sagalog.log.engine import EngineBind
from sagalog.log.faults import driver_error, is_transient, translate
from sagalog.log.file import FileBind
from sagalog.log.statements import Statements
from sagalog.placement import Placement

_COMMIT: Operation[None] = Call("commit of a transactional handler", Kind.SEVERAL, lambda database: None)


class Transactions:
    """Opens the transactions of transactional handlers over a log's bind."""

    def __init__(self, bind: object) -> None:
        self._inner = inner_bind(bind)
        self._engine: Engine | None = None
        self._async_engine: Any = None

    @property
    def _sql(self) -> Statements:
        assert isinstance(self._inner, EngineBind | FileBind)
        return self._inner.sql

    @property
    def placement(self) -> Placement:
        """Where the log's tables are."""
        return self._sql.placement

    def _sync_engine(self) -> Engine:
        if self._engine is None:
            self._engine = self._inner.engine if isinstance(self._inner, EngineBind) else self._file_engine()
        return self._engine

    def _file(self) -> tuple[str, str]:
        """The path, and SQLite's `synchronous`."""
        assert isinstance(self._inner, FileBind)
        if self._inner.path is None:
            raise UnusableBind(
                "a transactional handler",
                "the log's database is in memory, of one connection, and no Session can share it",
                hint="Give SagaLog an Engine, or open a file.",
            )
        return self._inner.path, self._inner.durability.upper()

    def _file_engine(self) -> Engine:
        path, synchronous = self._file()
        engine = file_engine(path)
        _as_durable(engine, synchronous)
        return engine

    def perform(self, effect: Invoke[Any]) -> Any:
        """Call a sync handler with a Session, and commit what it wrote with the end of its step."""
        engine = self._sync_engine()
        if engine.dialect.is_async:
            raise UnusableBind("a transactional handler", "the engine is async", hint="Use an AsyncSagaCoordinator.")
        with Session(engine) as session:
            return self._inside(session, effect, None)

    def _inside(self, session: Session, effect: Invoke[Any], sleep: Any) -> Any:
        caller = self._begun(session, sleep)
        try:
            with _not_committed(session):
                value = effect.handler.function(*effect.arguments(session))
        except Exception as error:
            raise self._told(error) from error
        self._end(session, caller, effect, value)
        return value

    def _begun(self, session: Session, sleep: Any) -> CallerBind:
        caller = CallerBind(session, self._sql) if sleep is None else CallerBind(session, self._sql, sleep=sleep)
        caller.begin()
        return caller

    def _end(self, session: Session, caller: CallerBind, effect: Invoke[Any], value: Any) -> None:
        assert effect.ended is not None
        ended = effect.ended(value)
        try:
            caller.perform(ended)
            session.commit()
        except SagaLogError:
            raise
        except Exception as error:
            raise translate(error, _COMMIT, "the log's database", committing=True) from driver_error(error)

    def _told(self, error: Exception) -> Exception:
        """A handler whose transaction the database gave up did nothing, and may be tried again."""
        if not isinstance(error, DBAPIError) or not is_transient(error):
            return error
        return translate(error, _COMMIT, "the log's database", committing=False)

    async def aperform(self, effect: Invoke[Any]) -> Any:
        """Call a handler, sync or async, with the AsyncSession or its sync counterpart."""
        from sqlalchemy.ext.asyncio import AsyncSession

        from sagalog.log.asynchronous import sleep_in_greenlet

        if not effect.handler.signature.is_async and isinstance(self._inner, FileBind):
            return await in_thread(self.perform, effect)
        async with AsyncSession(self._asyncs()) as session:
            if not effect.handler.signature.is_async:
                return await session.run_sync(lambda sync: self._inside(sync, effect, sleep_in_greenlet))
            return await self._around(session, effect)

    async def _around(self, session: Any, effect: Invoke[Any]) -> Any:
        from sagalog.log.asynchronous import decided, sleep_in_greenlet

        caller = await session.run_sync(lambda sync: self._begun(sync, sleep_in_greenlet))
        try:
            with _not_committed(session.sync_session):
                value = effect.handler.function(*effect.arguments(session))
                if inspect.isawaitable(value):
                    value = await value
        except Exception as error:
            raise self._told(error) from error
        await decided(session.run_sync(lambda sync: self._end(sync, caller, effect, value)))
        return value

    def _asyncs(self) -> Any:
        if self._async_engine is None:
            from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

            if isinstance(self._inner, EngineBind):
                self._async_engine = AsyncEngine(self._inner.engine)
            else:
                path, synchronous = self._file()
                url = f"sqlite+aiosqlite:///{file_uri(path)}&uri=true"
                self._async_engine = create_async_engine(url, poolclass=NullPool)
                _as_durable(self._async_engine.sync_engine, synchronous)
        return self._async_engine


@contextmanager
def _not_committed(session: Session) -> Iterator[None]:
    """What a handler committed would stay without its step's end."""

    def refuse(_: object) -> None:
        raise UnusableBind(
            "commit in a transactional handler",
            "its writes would be there without the end of its step",
            hint="Leave the commit to the coordinator: return, or raise.",
        )

    def refuse_outermost(_: Session) -> None:
        if not session.in_nested_transaction():
            refuse(_)

    connection = session.connection()
    event.listen(session, "before_commit", refuse_outermost)
    event.listen(connection, "commit", refuse)
    try:
        yield
    finally:
        event.remove(session, "before_commit", refuse_outermost)
        event.remove(connection, "commit", refuse)


def _as_durable(engine: Engine, synchronous: str) -> None:
    """What a handler commits is as durable as what the log commits."""

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute(f"PRAGMA synchronous = {synchronous}")
        cursor.close()
