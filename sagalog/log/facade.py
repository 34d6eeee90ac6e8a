"""`SagaLog` and `AsyncSagaLog`: the public faces, each method one operation through a bind."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias, TypeVar, cast

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.orm import Session, scoped_session

from sagalog.errors import UnusableBind
from sagalog.log import operating, pruning, reading, reopening, sagas, steps, watching
from sagalog.log.bind import Bind
from sagalog.log.connections import Durability
from sagalog.log.database import Operation
from sagalog.log.engine import EngineBind
from sagalog.log.opening import (
    checked_durability,
    located,
    open_file,
    open_memory,
    prepare_schema,
    sync_bind,
    sync_counterpart,
)
from sagalog.log.statements import statements_at
from sagalog.placement import Placement
from sagalog.urls import shown_url

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session

    from sagalog.log.asynchronous import AsyncBind

    SyncTarget: TypeAlias = Engine | Session | Connection | scoped_session[Any]
    AsyncTarget: TypeAlias = AsyncEngine | AsyncSession | AsyncConnection | async_scoped_session[Any]

P = ParamSpec("P")
R = TypeVar("R")


def _performs(prepare: Callable[P, Operation[R]]) -> Callable[Concatenate[SagaLog, P], R]:
    """The sync method of an operation."""

    @functools.wraps(prepare)
    def method(self: SagaLog, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._bind.perform(prepare(*args, **kwargs))

    return cast("Callable[Concatenate[SagaLog, P], R]", _as_method(method, prepare))


def _awaits(prepare: Callable[P, Operation[R]]) -> Callable[Concatenate[AsyncSagaLog, P], Awaitable[R]]:
    """The async method of an operation."""

    @functools.wraps(prepare)
    async def method(self: AsyncSagaLog, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._bind.perform(prepare(*args, **kwargs))

    return cast("Callable[Concatenate[AsyncSagaLog, P], Awaitable[R]]", _as_method(method, prepare))


def _as_method(method: Any, prepare: Callable[..., Any]) -> Any:
    """Sign it for `help()` and the reference: with `self`, and with what the operation gives."""
    shown = inspect.signature(prepare)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    gives = str(shown.return_annotation).removeprefix("Operation[").removesuffix("]")
    method.__annotations__ = {**prepare.__annotations__, "return": gives}
    method.__signature__ = shown.replace(parameters=[itself, *shown.parameters.values()], return_annotation=gives)
    return method


class SagaLog:
    """The durable log of sagas, over an Engine, a Session, a Connection, or a file of its own.

    On an Engine each operation is one transaction, durable when it returns. On
    a Session or Connection it joins the caller's transaction and never ends it.

    Args:
        bind: What to write through.
        schema: The schema of the tables (Postgres), if not the default one.
        prefix: What the tables' names begin with.

    Raises:
        UnusableBind: The bind is none of these, or of another database.
    """

    _bind: Bind

    def __init__(self, bind: SyncTarget, *, schema: str | None = None, prefix: str = "") -> None:
        self._placement = Placement(schema, prefix)
        self._bind = sync_bind(bind, self._placement)

    @classmethod
    def _over(cls, bind: Bind) -> SagaLog:
        log = cls.__new__(cls)
        log._bind = bind
        return log

    @classmethod
    def open(
        cls, path_or_url: str | os.PathLike[str], *, durability: Durability = "full", migrate: bool = True
    ) -> SagaLog:
        """Open a log on a SQLite file, or on a Postgres URL.

        A file is created with mode 0600 and put into WAL mode; one of the
        earlier program is adopted in place.

        Args:
            path_or_url: A path, or a URL of SQLAlchemy.
            durability: For a file: "full" survives a power cut (synchronous FULL);
                "normal" survives the death of the process, and a power cut may
                take the last commits with it, never more (synchronous NORMAL).
            migrate: Bring the schema to this library's revision; without, it is only checked.

        Raises:
            SchemaMissing, SchemaOutOfDate, SchemaTooNew: Not a schema to work on.
            NotASagaLog: The file is no database, or its tables are somebody else's.
            UnusableBind: The URL is of another database, or of an async driver.
            LogUnavailable: It cannot be opened.
        """
        path, url = located(path_or_url)
        if path is not None:
            return cls._over(open_file(path, checked_durability(durability), migrate=migrate))
        assert url is not None
        engine = create_engine(url)
        if engine.dialect.is_async:
            hint = "Use AsyncSagaLog.open(), or a driver that blocks: postgresql+psycopg://host/name."
            raise UnusableBind("open", f"{url.drivername} is an async driver", found=url.drivername, hint=hint)
        prepare_schema(engine, migrate=migrate, name=shown_url(url))
        return cls._over(EngineBind(engine, statements_at(Placement()), owned=True))

    @classmethod
    def open_in_memory(cls) -> SagaLog:
        """A log in a private in-memory database, migrated, safe across threads; gone when closed."""
        return cls._over(open_memory())

    @contextmanager
    def unit_of_work(self) -> Iterator[SagaLog]:
        """Several operations, one transaction: committed at the end of the block, rolled back by an exception.

        On a Session or Connection it is the caller's transaction, which stays theirs to end.

        Raises:
            LogUnavailable: The transaction could not begin or commit.
            UnusableBind: Units were nested.
        """
        with self._bind.unit_of_work() as held:
            yield SagaLog._over(held)

    max_saga_id = _performs(reading.max_saga_id)
    start_saga = _performs(sagas.start_saga)
    create_saga = _performs(sagas.create_saga)
    start_step = _performs(steps.start_step)
    finish_step = _performs(steps.finish_step)
    fail_step = _performs(steps.fail_step)
    compensate_step = _performs(steps.compensate_step)
    next_step_index = _performs(reading.next_step_index)
    append_recovery_step = _performs(steps.append_recovery_step)
    mark_compensating = _performs(sagas.mark_compensating)
    mark_all_succeeded_steps_compensated = _performs(steps.mark_all_succeeded_steps_compensated)
    mark_step_compensated = _performs(steps.mark_step_compensated)
    mark_failed_compensation = _performs(sagas.mark_failed_compensation)
    terminate = _performs(sagas.terminate)
    unresolved_sagas = _performs(reading.unresolved_sagas)
    snapshot_recent = _performs(reading.snapshot_recent)
    get = _performs(reading.get)
    find = _performs(reading.find)
    counts = _performs(reading.counts)
    audit = _performs(reading.audit)
    state_counts = _performs(watching.state_counts)
    executors = _performs(watching.executors)
    size = _performs(watching.size)
    prunable = _performs(pruning.prunable)
    request_cancel = _performs(operating.request_cancel)
    resolve = _performs(operating.resolve)
    resolve_step = _performs(operating.resolve_step)

    def prune(
        self, *, keep_last: int = 1000, older_than: timedelta = timedelta(days=7), limit: int | None = None
    ) -> int:
        """Delete sagas that ended, outside both limits, in batches; the newest saga always stays.

        Their steps, audit rows and keys go with them; their ids are never used again.

        Args:
            keep_last: So many of the most recent sagas stay, whatever their age.
            older_than: What ended, or started, more recently than this stays.
            limit: At most so many, the oldest first; None for all.

        Returns:
            How many sagas were deleted.
        """
        total = 0
        while (size := pruning.next_batch(total, limit)) > 0:
            batch = pruning.prune_batch(size, keep_last=keep_last, older_than=older_than)
            deleted = self._bind.perform(batch)
            total += deleted
            if deleted < size:
                break
        return total

    def quarantine(self, *, note: str, actor: str) -> int:
        """Give every open saga to a person, for a restored backup or a copy of a database; audited.

        No process runs or recovers them any more; each is settled, or given back by a coordinator's `retry`.

        Args:
            note: Why; it becomes the reason of each.
            actor: Who says so.

        Returns:
            How many sagas there were.
        """
        total = 0
        more = True
        while more:
            batch = self._bind.perform(reopening.quarantine_batch(note=note, actor=actor))
            total, more = total + batch.moved, batch.more
        return total

    def close(self) -> None:
        """Close what the log opened itself. Calling it again does nothing."""
        self._bind.close()

    def __enter__(self) -> SagaLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncSagaLog:
    """The same log, awaited: over an AsyncEngine, AsyncSession, AsyncConnection, or a file of its own.

    Args:
        bind: What to write through.
        schema: The schema of the tables (Postgres), if not the default one.
        prefix: What the tables' names begin with.

    Raises:
        UnusableBind: The bind is none of these, or of another database.
    """

    _bind: AsyncBind

    def __init__(self, bind: AsyncTarget, *, schema: str | None = None, prefix: str = "") -> None:
        from sagalog.log.asynchronous import sleep_in_greenlet
        from sagalog.log.sharing import awaited

        self._bind = awaited(sync_bind(sync_counterpart(bind), Placement(schema, prefix), sleep_in_greenlet))

    @classmethod
    def _over(cls, bind: AsyncBind) -> AsyncSagaLog:
        log = cls.__new__(cls)
        log._bind = bind
        return log

    @classmethod
    async def open(
        cls, path_or_url: str | os.PathLike[str], *, durability: Durability = "full", migrate: bool = True
    ) -> AsyncSagaLog:
        """See `SagaLog.open`. A file's writes run in one thread, which commits for all tasks that wait."""
        import asyncio

        from sagalog.log.asynchronous import ThreadBind, sleep_in_greenlet

        path, url = located(path_or_url)
        if path is not None:
            opening = functools.partial(open_file, path, checked_durability(durability), migrate=migrate)
            return cls._over(ThreadBind(await asyncio.to_thread(opening)))
        assert url is not None
        from sqlalchemy.ext.asyncio import create_async_engine

        from sagalog.log.sharing import awaited

        engine = create_async_engine(url)
        try:
            from sqlalchemy.util import greenlet_spawn

            await greenlet_spawn(prepare_schema, engine.sync_engine, migrate=migrate, name=shown_url(url))
        except BaseException:
            await engine.dispose()
            raise
        bind = EngineBind(engine.sync_engine, statements_at(Placement()), owned=True, sleep=sleep_in_greenlet)
        return cls._over(awaited(bind))

    @classmethod
    async def open_in_memory(cls) -> AsyncSagaLog:
        """See `SagaLog.open_in_memory`."""
        import asyncio

        from sagalog.log.asynchronous import ThreadBind

        return cls._over(ThreadBind(await asyncio.to_thread(open_memory)))

    @asynccontextmanager
    async def unit_of_work(self) -> AsyncIterator[AsyncSagaLog]:
        """See `SagaLog.unit_of_work`."""
        async with self._bind.unit_of_work() as held:
            yield AsyncSagaLog._over(held)

    max_saga_id = _awaits(reading.max_saga_id)
    start_saga = _awaits(sagas.start_saga)
    create_saga = _awaits(sagas.create_saga)
    start_step = _awaits(steps.start_step)
    finish_step = _awaits(steps.finish_step)
    fail_step = _awaits(steps.fail_step)
    compensate_step = _awaits(steps.compensate_step)
    next_step_index = _awaits(reading.next_step_index)
    append_recovery_step = _awaits(steps.append_recovery_step)
    mark_compensating = _awaits(sagas.mark_compensating)
    mark_all_succeeded_steps_compensated = _awaits(steps.mark_all_succeeded_steps_compensated)
    mark_step_compensated = _awaits(steps.mark_step_compensated)
    mark_failed_compensation = _awaits(sagas.mark_failed_compensation)
    terminate = _awaits(sagas.terminate)
    unresolved_sagas = _awaits(reading.unresolved_sagas)
    snapshot_recent = _awaits(reading.snapshot_recent)
    get = _awaits(reading.get)
    find = _awaits(reading.find)
    counts = _awaits(reading.counts)
    audit = _awaits(reading.audit)
    state_counts = _awaits(watching.state_counts)
    executors = _awaits(watching.executors)
    size = _awaits(watching.size)
    prunable = _awaits(pruning.prunable)
    request_cancel = _awaits(operating.request_cancel)
    resolve = _awaits(operating.resolve)
    resolve_step = _awaits(operating.resolve_step)

    async def prune(
        self, *, keep_last: int = 1000, older_than: timedelta = timedelta(days=7), limit: int | None = None
    ) -> int:
        """See `SagaLog.prune`."""
        total = 0
        while (size := pruning.next_batch(total, limit)) > 0:
            batch = pruning.prune_batch(size, keep_last=keep_last, older_than=older_than)
            deleted = await self._bind.perform(batch)
            total += deleted
            if deleted < size:
                break
        return total

    async def quarantine(self, *, note: str, actor: str) -> int:
        """See `SagaLog.quarantine`."""
        total = 0
        more = True
        while more:
            batch = await self._bind.perform(reopening.quarantine_batch(note=note, actor=actor))
            total, more = total + batch.moved, batch.more
        return total

    async def close(self) -> None:
        """Close what the log opened itself. Calling it again does nothing."""
        await self._bind.close()

    async def __aenter__(self) -> AsyncSagaLog:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
