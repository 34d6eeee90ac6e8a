"""Transactional handlers: a Session on the log's database, whose commit is the step's end as well."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import Engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from sagalog.coordinator.effects import Invoke
from sagalog.coordinator.marking import MarkedTransaction
from sagalog.coordinator.threads import in_thread
from sagalog.errors import UnusableBind
from sagalog.log.apart import inner_bind, like_engine
from sagalog.log.connections import file_engine, file_uri
from sagalog.log.engine import EngineBind
from sagalog.log.file import FileBind
from sagalog.log.one_connection import turn_of
from sagalog.log.statements import Statements
from sagalog.placement import Placement

IN_MEMORY: Final = "in memory"


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
                found=IN_MEMORY,
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
        with effect.handler.signature.session(bind=engine) as session:
            return self._inside(session, effect, time.sleep)

    def _inside(self, session: Session, effect: Invoke[Any], sleep: Callable[[float], Any]) -> Any:
        transaction = MarkedTransaction(session, self._sql, sleep)
        try:
            transaction.begin()
            try:
                value = effect.handler.function(*effect.arguments(session))
            except Exception as error:
                raise transaction.told(effect, error) from error
            transaction.end(effect, value)
        finally:
            transaction.close()
        return value

    async def aperform(self, effect: Invoke[Any]) -> Any:
        """Call an async handler with an AsyncSession; a sync one in a thread, with a Session."""
        from sqlalchemy.ext.asyncio import AsyncSession

        from sagalog.log.asynchronous import sleep_in_greenlet

        if not effect.handler.signature.is_async and not self._has_one_connection:
            return await in_thread(self.perform if isinstance(self._inner, FileBind) else self._in_own_loop, effect)
        signature = effect.handler.signature
        if signature.is_async:
            async with signature.session(bind=self._asyncs()) as session:
                return await self._around(session, effect)
        async with AsyncSession(self._asyncs(), sync_session_class=signature.session) as session:
            return await session.run_sync(lambda sync: self._inside(sync, effect, sleep_in_greenlet))

    @property
    def _has_one_connection(self) -> bool:
        return isinstance(self._inner, EngineBind) and turn_of(self._inner.engine) is not None

    def _in_own_loop(self, effect: Invoke[Any]) -> Any:
        """In a thread: an async driver's connections belong to the loop that opened them, so it has its own."""
        from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

        from sagalog.log.asynchronous import sleep_in_greenlet

        assert isinstance(self._inner, EngineBind)
        engine = AsyncEngine(like_engine(self._inner.engine))

        async def call() -> Any:
            try:
                async with AsyncSession(engine, sync_session_class=effect.handler.signature.session) as session:
                    return await session.run_sync(lambda sync: self._inside(sync, effect, sleep_in_greenlet))
            finally:
                await engine.dispose()

        return asyncio.run(call())

    async def _around(self, session: Any, effect: Invoke[Any]) -> Any:
        from sagalog.log.asynchronous import decided, sleep_in_greenlet

        transaction = MarkedTransaction(session.sync_session, self._sql, sleep_in_greenlet)
        try:
            await session.run_sync(lambda _: transaction.begin())
            try:
                value = effect.handler.function(*effect.arguments(session))
                if inspect.isawaitable(value):
                    value = await value
            except Exception as error:
                raise await session.run_sync(lambda _, raised: transaction.told(effect, raised), error) from error
            await decided(session.run_sync(lambda _: transaction.end(effect, value)))
        finally:
            await decided(session.run_sync(lambda _: transaction.close()))
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


def _as_durable(engine: Engine, synchronous: str) -> None:
    """What a handler commits is as durable as what the log commits."""

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute(f"PRAGMA synchronous = {synchronous}")
        cursor.close()
