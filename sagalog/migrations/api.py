"""`upgrade`, `downgrade`, `current`, `check`: for an Engine or a Connection, sync or async."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias, TypeVar, cast, overload

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from sagalog.errors import SchemaTooNew
from sagalog.log.bind import name_of
from sagalog.log.database import Call, Kind, Operation
from sagalog.log.faults import driver_error, translate
from sagalog.migrations.environment import found_in, run, transaction
from sagalog.placement import Placement
from sagalog.schema import HEAD, REVISIONS, Found, is_newer, verify

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    SyncBind: TypeAlias = Engine | Connection
    AsyncBind: TypeAlias = AsyncEngine | AsyncConnection

P = ParamSpec("P")
R = TypeVar("R")


def _either(
    work: Callable[Concatenate[Engine | Connection, P], R],
    bind: Any,
    *args: P.args,
    **kwargs: P.kwargs,
) -> Any:
    """Do the work on a sync bind, or return what does it on an async one when awaited."""
    counterpart = getattr(bind, "sync_connection", None) or getattr(bind, "sync_engine", None)
    if counterpart is None:
        return _told(work, bind, *args, **kwargs)
    from sqlalchemy.util import greenlet_spawn

    return greenlet_spawn(lambda: _told(work, counterpart, *args, **kwargs))


def _told(work: Callable[Concatenate[Engine | Connection, P], R], bind: Any, *args: P.args, **kwargs: P.kwargs) -> R:
    try:
        return work(bind, *args, **kwargs)
    except (SQLAlchemyError, OSError) as error:
        asked: Operation[None] = Call("migrating", Kind.SEVERAL, lambda database: None)
        engine: Engine = bind.engine
        raise translate(error, asked, name_of(engine), committing=False) from driver_error(error)


@overload
def upgrade(bind: SyncBind, to: str = ..., *, schema: str | None = ..., prefix: str = ...) -> None: ...
@overload
def upgrade(bind: AsyncBind, to: str = ..., *, schema: str | None = ..., prefix: str = ...) -> Awaitable[None]: ...
def upgrade(
    bind: SyncBind | AsyncBind, to: str = "head", *, schema: str | None = None, prefix: str = ""
) -> Awaitable[None] | None:
    """Bring the saga log's tables to a revision; tables of the earlier program are adopted.

    All or nothing. Several processes may do it at once. A database that a newer
    library upgraded is left as it is, if it allows this library.

    Args:
        bind: An Engine, or a Connection whose transaction is joined.
        to: "head", or a revision such as "sagalog_0002".
        schema: The schema of the tables (Postgres), if not the default one.
        prefix: What the tables' names begin with.

    Raises:
        SchemaTooNew: A newer library upgraded it, and it does not allow this one.
        NotASagaLog: Tables of these names are somebody else's; they are untouched.
        LogUnavailable: The database could not do it; nothing is left behind.
        ValueError: There is no such revision.
    """
    return cast("Awaitable[None] | None", _either(_upgrade, bind, _known(to), Placement(schema, prefix)))


def _upgrade(bind: Engine | Connection, to: str, placement: Placement) -> None:
    with transaction(bind, placement) as connection:
        found = found_in(connection, placement)
        if is_newer(found):
            verify(found, name_of(connection.engine))
            return
        # A revision behind the current one is reached already.
        if found.revision is None or REVISIONS.index(found.revision) < REVISIONS.index(to):
            run(connection, placement, lambda scripts, revision: scripts._upgrade_revs(to, revision))


@overload
def downgrade(bind: SyncBind, to: str, *, schema: str | None = ..., prefix: str = ...) -> None: ...
@overload
def downgrade(bind: AsyncBind, to: str, *, schema: str | None = ..., prefix: str = ...) -> Awaitable[None]: ...
def downgrade(
    bind: SyncBind | AsyncBind, to: str, *, schema: str | None = None, prefix: str = ""
) -> Awaitable[None] | None:
    """Take the saga log's tables back to a revision. What only later revisions can hold is lost.

    Args:
        bind: An Engine, or a Connection whose transaction is joined.
        to: A revision such as "sagalog_0002", or "base", which drops the tables.
        schema: The schema of the tables (Postgres), if not the default one.
        prefix: What the tables' names begin with.

    Raises:
        SchemaTooNew: A newer library upgraded it: downgrade it with that one.
        LogUnavailable: The database could not do it; nothing is left behind.
        ValueError: There is no such revision.
    """
    target = to if to == "base" else _known(to)
    return cast("Awaitable[None] | None", _either(_downgrade, bind, target, Placement(schema, prefix)))


def _downgrade(bind: Engine | Connection, to: str, placement: Placement) -> None:
    with transaction(bind, placement) as connection:
        found = found_in(connection, placement)
        if found.revision is None:
            return
        if is_newer(found):
            raise SchemaTooNew(name_of(connection.engine), found=found.revision, known=HEAD)
        if to == "base" or REVISIONS.index(found.revision) > REVISIONS.index(to):
            run(connection, placement, lambda scripts, revision: scripts._downgrade_revs(to, revision))


@overload
def current(bind: SyncBind, *, schema: str | None = ..., prefix: str = ...) -> str | None: ...
@overload
def current(bind: AsyncBind, *, schema: str | None = ..., prefix: str = ...) -> Awaitable[str | None]: ...
def current(
    bind: SyncBind | AsyncBind, *, schema: str | None = None, prefix: str = ""
) -> Awaitable[str | None] | str | None:
    """The revision that a database records, or None; nothing is written.

    Args:
        bind: An Engine or a Connection.
        schema: The schema of the tables (Postgres), if not the default one.
        prefix: What the tables' names begin with.
    """
    return cast("Awaitable[str | None] | str | None", _either(_current, bind, Placement(schema, prefix)))


def _current(bind: Engine | Connection, placement: Placement) -> str | None:
    return found_in(bind, placement).revision


@overload
def check(bind: SyncBind, *, schema: str | None = ..., prefix: str = ...) -> None: ...
@overload
def check(bind: AsyncBind, *, schema: str | None = ..., prefix: str = ...) -> Awaitable[None]: ...
def check(bind: SyncBind | AsyncBind, *, schema: str | None = None, prefix: str = "") -> Awaitable[None] | None:
    """See that a database is one this library can work on; an application calls it at start-up.

    Args:
        bind: An Engine or a Connection.
        schema: The schema of the tables (Postgres), if not the default one.
        prefix: What the tables' names begin with.

    Raises:
        SchemaMissing: No saga log in it.
        SchemaOutOfDate: It needs `upgrade` first.
        SchemaTooNew: A newer library upgraded it, and it does not allow this one.
        LogUnavailable: The database cannot be reached.
    """
    return cast("Awaitable[None] | None", _either(_check, bind, Placement(schema, prefix)))


def _check(bind: Engine | Connection, placement: Placement) -> None:
    found: Found = found_in(bind, placement)
    verify(found, name_of(bind.engine))


def _known(revision: str) -> str:
    if revision == "head":
        return HEAD
    if revision in REVISIONS:
        return revision
    raise ValueError(f"there is no revision {revision!r}; known: {', '.join(REVISIONS)}, head")
