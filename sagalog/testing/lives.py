"""One process of `crash_points`: what its points are, where it dies or falls asleep, and how time passes after it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from sqlalchemy import literal_column, select, update

from sagalog.coordinator.effects import Effect, Invoke, Write
from sagalog.coordinator.transacting import IN_MEMORY
from sagalog.errors import UnusableBind
from sagalog.log.bind import refuse_finished
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.statements import Statement, Statements
from sagalog.states import StepState

_NOT_THE_SAGAS = ("renew", "retire", "forget_dead", "environment")


class Stopped(BaseException):
    """The process is dead here. Not an Exception, so that no handler or saga catches it by accident."""


class Life:
    """One process: it counts the points that it passes, and dies, or falls asleep, at one of them."""

    def __init__(self, stop_at: int | None, *, repeat: bool, sleeps: bool, refused: list[UnusableBind]) -> None:
        self._refused = refused
        self.stop_at = stop_at
        self.repeat = repeat
        self.sleeps = sleeps
        self.point: str | None = None
        self.asleep = threading.Event()
        self.awake = threading.Event()
        self.asleep_in_loop = asyncio.Event()
        self.awake_in_loop = asyncio.Event()
        self._count = 0
        self.is_dead = False
        self._lock = threading.Lock()

    def _is_stop(self, label: str) -> bool:
        with self._lock:
            if self.is_dead:
                raise Stopped
            number, self._count = self._count, self._count + 1
            if number != self.stop_at:
                return False
            self.point = label
            self.is_dead = not self.sleeps
            return True

    def __call__(self, effect: Effect[Any], answer: Callable[[Effect[Any]], Any]) -> Any:
        label = label_of(effect)
        if label is None:
            self._refuse_dead(effect)
            return answer(effect)
        self._pass(f"before {label}")
        with self._noting(effect):
            given = answer(effect)
        if self._repeats(effect):
            given = answer(effect)
        self._pass(f"after {label}")
        return given

    async def in_loop(self, effect: Effect[Any], answer: Callable[[Effect[Any]], Awaitable[Any]]) -> Any:
        """The same for an async coordinator."""
        label = label_of(effect)
        if label is None:
            self._refuse_dead(effect)
            return await answer(effect)
        await self._apass(f"before {label}")
        with self._noting(effect):
            given = await answer(effect)
        if self._repeats(effect):
            given = await answer(effect)
        await self._apass(f"after {label}")
        return given

    @contextmanager
    def _noting(self, effect: Effect[Any]) -> Iterator[None]:
        """Note that a log cannot carry transactional handlers: the coordinator takes it for a step that failed."""
        try:
            yield
        except UnusableBind as error:
            if isinstance(effect, Invoke) and effect.handler.transactional and error.found == IN_MEMORY:
                self._refused.append(error)
            raise

    def _refuse_dead(self, effect: Effect[Any]) -> None:
        """A dead process reads nothing either: whoever waits in it, or a worker, ends as on a closed log."""
        if self.is_dead:
            assert isinstance(effect, Write)
            raise refuse_finished(effect.operation.asked)

    def _repeats(self, effect: Effect[Any]) -> bool:
        return self.repeat and isinstance(effect, Invoke) and not effect.handler.transactional

    def _pass(self, label: str) -> None:
        if self._is_stop(label):
            self.asleep.set()
            if not self.sleeps:
                raise Stopped
            self.awake.wait()

    async def _apass(self, label: str) -> None:
        if self._is_stop(label):
            self.asleep_in_loop.set()
            if not self.sleeps:
                raise Stopped
            await self.awake_in_loop.wait()


def label_of(effect: Effect[Any]) -> str | None:
    """What a point is called; None for what is none: a read, or the lease."""
    if isinstance(effect, Invoke):
        undo = "" if effect.info.compensates is None else " (an undo)"
        return f"calling {effect.handler.name} of step {effect.info.step_index}{undo}"
    assert isinstance(effect, Write)
    operation = effect.operation
    if operation.kind.reads or operation.asked in _NOT_THE_SAGAS:
        return None
    step = "" if operation.step_index is None else f" of step {operation.step_index}"
    return f"writing {operation.asked}{step}"


@lru_cache
def _ids_of(sql: Statements) -> Statement:
    return Statement(select(sql.saga.c.saga_id).order_by(sql.saga.c.saga_id))


@lru_cache
def _passing(sql: Statements) -> tuple[Statement, Statement]:
    zero: Any = literal_column("0")
    pending = sql.step.c.state == literal_column(f"'{StepState.PENDING}'")
    return (
        Statement(update(sql.executor).values(lease_until=zero)),
        Statement(update(sql.step).where(pending).values(deadline_at=zero)),
    )


def all_ids() -> Operation[list[int]]:
    def run(db: Database) -> list[int]:
        return [row[0] for row in db.fetch(_ids_of(db.sql))]

    return Call("crash_points", Kind.READ, run)


def time_passes() -> Operation[None]:
    """Every lease has run out, and nothing of what was tried can be under way any more."""

    def run(db: Database) -> None:
        for statement in _passing(db.sql):
            db.write(statement, {})

    return Call("crash_points", Kind.SEVERAL, run)
