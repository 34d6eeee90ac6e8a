"""A way to a log's database with connections of its own, for a thread beside those that work.

A process's lease is renewed through it: the host's pool may be empty, and an
event loop may be busy, for longer than the lease.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol, TypeVar

from sqlalchemy import Engine
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from sagalog.log.connections import CHECKPOINT_BESIDE
from sagalog.log.database import Operation
from sagalog.log.engine import EngineBind
from sagalog.log.file import FileBind

R = TypeVar("R")


class Apart(Protocol):
    """Runs operations, from one thread."""

    def perform(self, operation: Operation[R]) -> R:
        """Run one operation in a transaction of its own."""
        ...

    def close(self) -> None:
        """Give back its connections."""
        ...


def apart_of(bind: object) -> Apart | None:
    """Another way to the database of a bind.

    Returns:
        None for an in-memory database of one connection: no other thread may use it.
    """
    inner = inner_bind(bind)
    if isinstance(inner, FileBind):
        # In memory the log itself may be used by any thread; it is not this one's to close.
        if inner.path is None:
            return _Shared(inner)
        return FileBind(inner.path, inner.sql, durability=inner.durability, checkpoint_after=CHECKPOINT_BESIDE)
    if not isinstance(inner, EngineBind) or isinstance(inner.engine.pool, StaticPool | SingletonThreadPool):
        return None
    own = own_engine(inner.engine)
    return _InOwnLoop(own, inner) if own.dialect.is_async else EngineBind(own, inner.sql, owned=True)


def own_engine(engine: Engine) -> Engine:
    """The same database by connections that are not the host's."""
    return Engine(engine.pool.recreate(), engine.dialect, engine.url, hide_parameters=True)


def like_engine(engine: Engine) -> Engine:
    """The same for what the host does on its engine: with the engine's options, and heard by its listeners."""
    own = own_engine(engine)
    own.update_execution_options(**engine.get_execution_options())
    # As SQLAlchemy makes an engine of another one, in `Engine.execution_options`; only the pool is not the same.
    own.dispatch = own.dispatch._join(engine.dispatch)
    own._has_events = engine._has_events
    return own


def inner_bind(bind: object) -> object:
    """The sync bind of an async one; a sync bind itself."""
    return getattr(bind, "file", None) or getattr(bind, "bind", None) or bind


class _Shared:
    """The log's own bind, which is safe across threads."""

    def __init__(self, file: FileBind) -> None:
        self.perform = file.perform

    def close(self) -> None:
        """See `Apart`."""


class _InOwnLoop:
    """Over an async driver: its connections belong to the loop that opened them."""

    def __init__(self, engine: Engine, like: EngineBind) -> None:
        from sagalog.log.asynchronous import GreenletBind, sleep_in_greenlet

        self._bind = GreenletBind(EngineBind(engine, like.sql, owned=True, sleep=sleep_in_greenlet))
        self._runner: asyncio.Runner | None = None

    def _run(self, work: Any) -> Any:
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(work)

    def perform(self, operation: Operation[R]) -> R:
        """See `Apart`."""
        answer: R = self._run(self._bind.perform(operation))
        return answer

    def close(self) -> None:
        """See `Apart`."""
        self._run(self._bind.close())
        assert self._runner is not None
        self._runner.close()
