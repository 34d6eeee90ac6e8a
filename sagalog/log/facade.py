"""`SagaLog` and `AsyncSagaLog`: the public faces, each method one operation through a bind."""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias, TypeVar, cast

from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.pool import NullPool

from sagalog.errors import UnusableBind
from sagalog.log import operating, pruning, reading, writing
from sagalog.log.bind import Bind, read_found
from sagalog.log.caller import CallerBind
from sagalog.log.database import Call, Kind, Operation
from sagalog.log.engine import EngineBind
from sagalog.log.faults import driver_error, translate
from sagalog.log.file import Durability, FileBind, file_uri
from sagalog.log.statements import statements_at
from sagalog.placement import Placement
from sagalog.schema import HEAD, verify

if TYPE_CHECKING:
    import sqlite3

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

    return cast("Callable[Concatenate[SagaLog, P], R]", method)


def _awaits(prepare: Callable[P, Operation[R]]) -> Callable[Concatenate[AsyncSagaLog, P], Awaitable[R]]:
    """The async method of an operation."""

    @functools.wraps(prepare)
    async def method(self: AsyncSagaLog, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._bind.perform(prepare(*args, **kwargs))

    return cast("Callable[Concatenate[AsyncSagaLog, P], Awaitable[R]]", method)


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
        self._bind = _sync_bind(bind, self._placement)

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
            LogUnavailable: It cannot be opened.
        """
        path, url = _located(path_or_url)
        if path is not None:
            return cls._over(_open_file(path, _checked(durability), migrate=migrate))
        assert url is not None
        engine = create_engine(url)
        _prepare(engine, migrate=migrate, name=url.render_as_string())
        return cls._over(EngineBind(engine, statements_at(Placement()), owned=True))

    @classmethod
    def open_in_memory(cls) -> SagaLog:
        """A log in a private in-memory database, migrated, safe across threads; gone when closed."""
        return cls._over(_open_memory())

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
    start_saga = _performs(writing.start_saga)
    create_saga = _performs(writing.create_saga)
    start_step = _performs(writing.start_step)
    finish_step = _performs(writing.finish_step)
    fail_step = _performs(writing.fail_step)
    compensate_step = _performs(writing.compensate_step)
    next_step_index = _performs(reading.next_step_index)
    append_recovery_step = _performs(writing.append_recovery_step)
    mark_compensating = _performs(writing.mark_compensating)
    mark_all_succeeded_steps_compensated = _performs(writing.mark_all_succeeded_steps_compensated)
    mark_step_compensated = _performs(writing.mark_step_compensated)
    mark_failed_compensation = _performs(writing.mark_failed_compensation)
    terminate = _performs(writing.terminate)
    unresolved_sagas = _performs(reading.unresolved_sagas)
    snapshot_recent = _performs(reading.snapshot_recent)
    get = _performs(reading.get)
    find = _performs(reading.find)
    counts = _performs(reading.counts)
    audit = _performs(reading.audit)
    request_cancel = _performs(writing.request_cancel)
    resolve = _performs(operating.resolve)
    resolve_step = _performs(operating.resolve_step)

    def prune(self, *, keep_last: int = 1000, older_than: timedelta = timedelta(days=7)) -> int:
        """Delete sagas that ended, outside both limits, in batches; the newest saga always stays.

        Their steps, audit rows and keys go with them; their ids are never used again.

        Args:
            keep_last: So many of the most recent sagas stay, whatever their age.
            older_than: What ended, or started, more recently than this stays.

        Returns:
            How many sagas were deleted.
        """
        total = 0
        while (deleted := self._bind.perform(pruning.prune_batch(keep_last=keep_last, older_than=older_than))) > 0:
            total += deleted
            if deleted < pruning.BATCH:
                break
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
        from sagalog.log.asynchronous import GreenletBind, sleep_in_greenlet

        self._bind = GreenletBind(_sync_bind(_sync_counterpart(bind), Placement(schema, prefix), sleep_in_greenlet))

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

        from sagalog.log.asynchronous import GreenletBind, ThreadBind, sleep_in_greenlet

        path, url = _located(path_or_url)
        if path is not None:
            open_file = functools.partial(_open_file, path, _checked(durability), migrate=migrate)
            return cls._over(ThreadBind(await asyncio.to_thread(open_file)))
        assert url is not None
        from sqlalchemy.ext.asyncio import create_async_engine

        engine = create_async_engine(url)
        try:
            from sqlalchemy.util import greenlet_spawn

            await greenlet_spawn(_prepare, engine.sync_engine, migrate=migrate, name=url.render_as_string())
        except BaseException:
            await engine.dispose()
            raise
        bind = EngineBind(engine.sync_engine, statements_at(Placement()), owned=True, sleep=sleep_in_greenlet)
        return cls._over(GreenletBind(bind, engine.dispose))

    @classmethod
    async def open_in_memory(cls) -> AsyncSagaLog:
        """See `SagaLog.open_in_memory`."""
        import asyncio

        from sagalog.log.asynchronous import ThreadBind

        return cls._over(ThreadBind(await asyncio.to_thread(_open_memory)))

    @asynccontextmanager
    async def unit_of_work(self) -> AsyncIterator[AsyncSagaLog]:
        """See `SagaLog.unit_of_work`."""
        async with self._bind.unit_of_work() as held:
            yield AsyncSagaLog._over(held)

    max_saga_id = _awaits(reading.max_saga_id)
    start_saga = _awaits(writing.start_saga)
    create_saga = _awaits(writing.create_saga)
    start_step = _awaits(writing.start_step)
    finish_step = _awaits(writing.finish_step)
    fail_step = _awaits(writing.fail_step)
    compensate_step = _awaits(writing.compensate_step)
    next_step_index = _awaits(reading.next_step_index)
    append_recovery_step = _awaits(writing.append_recovery_step)
    mark_compensating = _awaits(writing.mark_compensating)
    mark_all_succeeded_steps_compensated = _awaits(writing.mark_all_succeeded_steps_compensated)
    mark_step_compensated = _awaits(writing.mark_step_compensated)
    mark_failed_compensation = _awaits(writing.mark_failed_compensation)
    terminate = _awaits(writing.terminate)
    unresolved_sagas = _awaits(reading.unresolved_sagas)
    snapshot_recent = _awaits(reading.snapshot_recent)
    get = _awaits(reading.get)
    find = _awaits(reading.find)
    counts = _awaits(reading.counts)
    audit = _awaits(reading.audit)
    request_cancel = _awaits(writing.request_cancel)
    resolve = _awaits(operating.resolve)
    resolve_step = _awaits(operating.resolve_step)

    async def prune(self, *, keep_last: int = 1000, older_than: timedelta = timedelta(days=7)) -> int:
        """See `SagaLog.prune`."""
        total = 0
        while (
            deleted := await self._bind.perform(pruning.prune_batch(keep_last=keep_last, older_than=older_than))
        ) > 0:
            total += deleted
            if deleted < pruning.BATCH:
                break
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


def _sync_bind(bind: object, placement: Placement, sleep: Callable[[float], Any] | None = None) -> Bind:
    waiting: dict[str, Any] = {} if sleep is None else {"sleep": sleep}
    if isinstance(bind, scoped_session):
        bind = bind()
    if isinstance(bind, Engine):
        return EngineBind(bind, statements_at(placement), **waiting)
    if isinstance(bind, Session | Connection):
        return CallerBind(bind, statements_at(placement), **waiting)
    kind = type(bind).__name__
    is_async = hasattr(bind, "sync_engine") or hasattr(bind, "sync_session") or kind == "async_scoped_session"
    raise UnusableBind(
        "SagaLog",
        f"a {kind} is no bind",
        found=kind,
        hint="Use AsyncSagaLog for it." if is_async else "Give an Engine, a Session or a Connection; or use open().",
    )


def _sync_counterpart(bind: object) -> object:
    if type(bind).__name__ == "async_scoped_session":
        bind = bind()  # type: ignore[operator]
    for name in ("sync_session", "sync_connection", "sync_engine"):
        counterpart = getattr(bind, name, None)
        if counterpart is not None:
            return counterpart
    if hasattr(bind, "sync_engine"):
        raise UnusableBind(
            "AsyncSagaLog", "the AsyncConnection is not started", hint="Use it inside `async with engine.connect()`."
        )
    kind = type(bind).__name__
    raise UnusableBind(
        "AsyncSagaLog",
        f"a {kind} is no async bind",
        found=kind,
        hint="Give an AsyncEngine, an AsyncSession or an AsyncConnection; or use open().",
    )


def _located(path_or_url: str | os.PathLike[str]) -> tuple[str | None, URL | None]:
    """A SQLite file's path, or another database's URL."""
    text = os.fspath(path_or_url)
    if "://" not in text:
        return text, None
    try:
        url = make_url(text)
    except (SQLAlchemyError, ValueError):
        raise UnusableBind(
            "open", "the URL cannot be read", hint="For example postgresql+psycopg://host/name."
        ) from None
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            raise UnusableBind("open", "a URL without a file", hint="Use open_in_memory().")
        return url.database, None
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() != "postgresql":
        raise UnusableBind(
            "open", f"a URL of {url.get_backend_name()}", hint="sagalog works on SQLite and on Postgres."
        )
    return None, url


def _checked(durability: str) -> Durability:
    if durability == "full":
        return "full"
    if durability == "normal":
        return "normal"
    raise UnusableBind("open", f"durability {durability!r}", hint='Use "full" or "normal".')


_OPENING: Operation[None] = Call("open", Kind.READ, lambda database: None)


def _prepare(engine: Engine, *, migrate: bool, name: str) -> None:
    """Bring the schema to this library's revision, or see that it is; Alembic is loaded only if there is work."""
    try:
        with engine.connect() as connection:
            found = read_found(connection, Placement())
        if migrate and found.revision != HEAD:
            from sagalog import migrations

            migrations.upgrade(engine)
        else:
            verify(found, name)
    except SQLAlchemyError as error:
        raise translate(error, _OPENING, name, committing=False) from driver_error(error)


def _open_file(path: str, durability: Durability, *, migrate: bool) -> FileBind:
    existing = Path(path).exists()
    if not existing and migrate:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            pass  # another process created it just now
        except OSError as error:
            raise translate(error, _OPENING, path, committing=False) from error
    file = file_uri(path)
    engine = create_engine("sqlite://", creator=lambda: _connect(file), poolclass=NullPool)
    try:
        _prepare(engine, migrate=migrate, name=path)
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL").fetchall()
    except SQLAlchemyError as error:
        raise translate(error, _OPENING, path, committing=False) from driver_error(error)
    return FileBind(path, statements_at(Placement()), durability=durability)


def _connect(file: str) -> sqlite3.Connection:
    import sqlite3

    return sqlite3.connect(file, uri=True, timeout=5.0, check_same_thread=False)


def _open_memory() -> FileBind:
    from sagalog.log.memory import fill_migrated

    return FileBind(None, statements_at(Placement()), fill=fill_migrated)
