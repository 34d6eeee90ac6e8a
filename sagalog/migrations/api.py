"""`upgrade`, `downgrade`, `current`, `check`: for an Engine or a Connection, sync or async.

`upgrade` and `downgrade` also take a host's Alembic `op`; see `host`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias, TypeVar, cast, overload

from alembic.operations import AbstractOperations
from sqlalchemy import Connection, Engine

from sagalog.errors import SchemaTooNew
from sagalog.log.bind import name_of
from sagalog.migrations import host
from sagalog.migrations.environment import Way, found_in, run, told, transaction
from sagalog.placement import Placement
from sagalog.schema import HEAD, REVISIONS, Found, is_newer, verify

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    SyncBind: TypeAlias = Engine | Connection
    AsyncBind: TypeAlias = AsyncEngine | AsyncConnection
    HostsOp: TypeAlias = AbstractOperations | ModuleType

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
        with told(bind.engine):
            return work(bind, *args, **kwargs)
    from sqlalchemy.util import greenlet_spawn

    def spawned() -> R:
        with told(counterpart.engine):
            return work(counterpart, *args, **kwargs)

    return greenlet_spawn(spawned)


@overload
def upgrade(bind: SyncBind, to: str = ..., *, schema: str | None = ..., prefix: str = ...) -> None: ...
@overload
def upgrade(bind: AsyncBind, to: str = ..., *, schema: str | None = ..., prefix: str = ...) -> Awaitable[None]: ...
@overload
def upgrade(bind: HostsOp, to: str, *, from_: str, schema: str | None = ..., prefix: str = ...) -> None: ...
def upgrade(
    bind: SyncBind | AsyncBind | HostsOp,
    to: str = "head",
    *,
    from_: str | None = None,
    schema: str | None = None,
    prefix: str = "",
) -> Awaitable[None] | None:
    """Bring the saga log's tables to a revision; tables of the earlier program are adopted.

    All or nothing. Several processes may do it at once. A database that a newer
    library upgraded is left as it is, if it allows this library.

    Inside a host's own Alembic revision it takes the host's `op` and two ends,
    ``upgrade(op, from_="base", to="sagalog_0004")``: it joins the host's
    transaction, or prints SQL in the host's offline mode. There a database that
    is not between these ends is refused, a newer one too.

    Args:
        bind: An Engine, or a Connection whose transaction is joined, or a host's `alembic.op`.
        to: "head", or a revision such as "sagalog_0002". In a host's revision always one by its name.
        from_: With a host's `op` only: where the host's revisions left off, "base" for the first.
        schema: The schema of the tables (Postgres), if not the default one.
        prefix: What the tables' names begin with.

    Raises:
        SchemaTooNew: A newer library upgraded it, and it does not allow this one.
        NotASagaLog: Tables of these names are somebody else's; they are untouched.
        SchemaMissing, SchemaOutOfDate: With a host's `op`: the database is not at `from_` yet.
        LogUnavailable: The database could not do it; nothing is left behind.
        ValueError: There is no such revision, or a host's step does not lead upwards.
    """
    if isinstance(bind, AbstractOperations | ModuleType):
        host.run_step(bind, host.upwards(from_, to), Placement(schema, prefix))
        return None
    _only_for_hosts(from_)
    return cast("Awaitable[None] | None", _either(_upgrade, bind, _known(to), Placement(schema, prefix)))


def _upgrade(bind: Engine | Connection, to: str, placement: Placement) -> None:
    with transaction(bind, placement) as connection:
        found = found_in(connection, placement)
        if is_newer(found):
            verify(found, name_of(connection.engine))
            return
        # A revision behind the current one is reached already.
        if found.revision is None or REVISIONS.index(found.revision) < REVISIONS.index(to):
            run(connection, placement, Way(to, up=True))


@overload
def downgrade(bind: SyncBind, to: str, *, schema: str | None = ..., prefix: str = ...) -> None: ...
@overload
def downgrade(bind: AsyncBind, to: str, *, schema: str | None = ..., prefix: str = ...) -> Awaitable[None]: ...
@overload
def downgrade(bind: HostsOp, to: str, *, from_: str, schema: str | None = ..., prefix: str = ...) -> None: ...
def downgrade(
    bind: SyncBind | AsyncBind | HostsOp,
    to: str,
    *,
    from_: str | None = None,
    schema: str | None = None,
    prefix: str = "",
) -> Awaitable[None] | None:
    """Take the saga log's tables back to a revision. What only later revisions can hold is lost.

    Args:
        bind: An Engine, or a Connection whose transaction is joined, or a host's `alembic.op`.
        to: A revision such as "sagalog_0002", or "base", which drops the tables.
        from_: With a host's `op` only: the revision that the host's upgrade leads to.
        schema: The schema of the tables (Postgres), if not the default one.
        prefix: What the tables' names begin with.

    Raises:
        SchemaTooNew: A newer library upgraded it: downgrade it with that one.
        LogUnavailable: The database could not do it; nothing is left behind.
        ValueError: There is no such revision, or a host's step does not lead downwards.
    """
    if isinstance(bind, AbstractOperations | ModuleType):
        host.run_step(bind, host.downwards(from_, to), Placement(schema, prefix))
        return None
    _only_for_hosts(from_)
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
            run(connection, placement, Way(to, up=False))


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


def _only_for_hosts(from_: str | None) -> None:
    if from_ is not None:
        raise ValueError("from_ is for a step inside a host's Alembic revision: upgrade(op, from_=..., to=...)")


def _known(revision: str) -> str:
    if revision == "head":
        return HEAD
    if revision in REVISIONS:
        return revision
    raise ValueError(f"there is no revision {revision!r}; known: {', '.join(REVISIONS)}, head")
