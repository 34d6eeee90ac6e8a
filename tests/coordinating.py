"""A stage for coordinators: each behaviour is written once, and plays on both coordinators and every road to a log."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

from sagalog import (
    AsyncSagaCoordinator,
    AsyncSagaLog,
    Command,
    CommandBus,
    SagaCoordinator,
    SagaLog,
    StepInfo,
    StepRejected,
)
from sagalog.log.sharing import SharingBind

STAGES = ("file", "engine-sqlite", "postgres", "async-file", "async-sqlite", "async-postgres", "carried-postgres")
"""The last: on psycopg, where each write of the log goes the way of those that share a transaction."""
ON_SQLITE = tuple(name for name in STAGES if not name.endswith("postgres"))
ON_POSTGRES = tuple(name for name in STAGES if name.endswith("postgres"))


class Reserved(BaseModel):
    sku: str


class Charged(BaseModel):
    amount: int


class Order(BaseModel):
    sku: str = "book"
    amount: int = 7


class Reserve(Command[Reserved]):
    sku: str


class Release(Command[None]):
    sku: str


class Charge(Command[Charged]):
    amount: int


class Refund(Command[None]):
    amount: int


class Keep(Command[int]):
    """Commits a row with its step."""


class Unkeep(Command[None]):
    """Undoes it."""


class Killed(BaseException):
    """What stops a process: no Exception, so nothing is undone."""


class Shop:
    """The outside: what was asked of it, in order, with keys; and what it is told to do about it."""

    def __init__(self, bus: CommandBus, **charging: Any) -> None:
        self.calls: list[str] = []
        self.keys: dict[str, set[str]] = {}
        self.infos: list[StepInfo] = []
        self.trouble: dict[str, list[BaseException | None]] = {}
        bus.handler(self.reserve)
        bus.handler(self.release)
        bus.handler(**charging)(self.charge)
        bus.handler(self.refund)
        bus.compensation(Reserve)(self.release_of)
        if not (charging.get("pivot") or charging.get("read_only")):
            bus.compensation(Charge)(self.refund_of)

    def _called(self, verb: str, info: StepInfo) -> None:
        self.calls.append(verb)
        self.infos.append(info)
        self.keys.setdefault(verb, set()).add(info.idempotency_key)
        trouble = self.trouble.get(verb)
        if trouble:
            error = trouble.pop(0)
            if error is not None:
                raise error

    def fails(self, verb: str, *errors: BaseException | None) -> None:
        """The next calls of `verb` raise these, None for one that succeeds."""
        self.trouble[verb] = list(errors)

    def reserve(self, cmd: Reserve, step: StepInfo) -> Reserved:
        self._called("reserve", step)
        return Reserved(sku=cmd.sku)

    def release(self, cmd: Release, step: StepInfo) -> None:
        self._called("release", step)

    def charge(self, cmd: Charge, step: StepInfo) -> Charged:
        self._called("charge", step)
        return Charged(amount=cmd.amount)

    def refund(self, cmd: Refund, step: StepInfo) -> None:
        self._called("refund", step)

    def release_of(self, cmd: Reserve, output: Reserved | None) -> Release:
        return Release(sku=cmd.sku)

    def refund_of(self, cmd: Charge, output: Charged | None) -> Refund:
        return Refund(amount=cmd.amount)


NO_STOCK = StepRejected("no stock")


class Waiting:
    """An object whose async methods are waited for, on a loop in a thread of its own."""

    def __init__(self, target: Any, wait: Callable[[Any], Any]) -> None:
        self.target = target
        self._wait = wait

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.target, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = found(*args, **kwargs)
            return self._wait(answer) if asyncio.iscoroutine(answer) else answer

        return call

    @contextmanager
    def worker(self, **options: Any) -> Iterator[Any]:
        worker = self.target.worker(**options)
        self._wait(worker.start())
        try:
            yield worker
        finally:
            self._wait(worker.shutdown())

    def saga(self, name: str, **options: Any) -> Callable[[Any], Any]:
        def register(function: Any) -> Any:
            @functools.wraps(function)
            async def asaga(ctx: Any, *input: Any) -> Any:
                return await asyncio.to_thread(function, Waiting(ctx, self._wait), *input)

            return self.target.saga(name, **options)(asaga)

        return register


class Stage:
    """A log, a bus, and coordinators over them."""

    def __init__(self, url: str, engine: Any, log: Any, loop: asyncio.AbstractEventLoop | None) -> None:
        self.url = url
        self.engine = engine
        self.bus = CommandBus()
        self._loop = loop
        self._log = log
        self.log: Any = log if loop is None else Waiting(log, self.wait)
        self._open: list[Any] = []

    @property
    def asynchronous(self) -> bool:
        return self._loop is not None

    def wait(self, work: Any) -> Any:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def coordinator(self, bus: CommandBus | None = None, **options: Any) -> Any:
        made: Any
        if self._loop is None:
            made = SagaCoordinator(self._log, bus or self.bus, **options)
        else:
            made = Waiting(AsyncSagaCoordinator(self._log, bus or self.bus, **options), self.wait)
        self._open.append(made)
        return made

    def sql(self, statement: str, **values: Any) -> list[Any]:
        """Look at, or change, the tables from outside."""
        engine = create_engine(self.url)
        try:
            with engine.begin() as connection:
                result = connection.execute(text(statement), values)
                return list(result) if result.returns_rows else []
        finally:
            engine.dispose()

    def states(self, saga_id: int = 1) -> list[tuple[str, str]]:
        """A saga's rows: the command and the state of each."""
        return [(step.name, step.state) for step in self.log.get(saga_id).steps]

    def close(self) -> None:
        for coordinator in self._open:
            coordinator.close()
        self.log.close()


@contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@contextmanager
def row_held(url: str, saga_id: int) -> Iterator[None]:
    """Another connection's transaction holds a saga's row."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("SELECT 1 FROM saga WHERE saga_id = :id FOR UPDATE"), {"id": saga_id})
        yield
    engine.dispose()


def carry_all(log: Any) -> None:
    """No write of an AsyncSagaLog on psycopg goes alone."""
    log._bind = SharingBind(log._bind.bind, alone=0)


@contextmanager
def staged(name: str, path: Path, postgres_url: str | None) -> Iterator[Stage]:
    url = postgres_url or f"sqlite:///{path}"
    if not name.startswith(("async", "carried")):
        engine: Engine | None = None if name == "file" else create_engine(url)
        stage = Stage(url, engine, SagaLog.open(path) if engine is None else SagaLog(engine), None)
        try:
            yield stage
        finally:
            stage.close()
            if engine is not None:
                engine.dispose()
        return
    with running_loop() as loop:
        other: AsyncEngine | None = None
        if name == "async-file":
            log = asyncio.run_coroutine_threadsafe(AsyncSagaLog.open(path), loop).result(30)
        else:
            drivers = {"async-sqlite": ("sqlite", "sqlite+aiosqlite"), "async-postgres": ("+psycopg", "+asyncpg")}
            other = create_async_engine(url.replace(*drivers.get(name, ("", "")), 1))
            log = AsyncSagaLog(other)
            if name.startswith("carried"):
                carry_all(log)
        stage = Stage(url, other, log, loop)
        try:
            yield stage
        finally:
            stage.close()
            if other is not None:
                stage.wait(other.dispose())


def stage_of(request: pytest.FixtureRequest, name: str) -> Iterator[Stage]:
    postgres = request.getfixturevalue("postgres_url") if name.endswith("postgres") else None
    with staged(name, request.getfixturevalue("sqlite_path"), postgres) as stage:
        yield stage


# A saga of two steps, and what a dead process left of it


def dies(ctx: Any) -> None:
    raise Killed


def placing(coordinator: Any, then: Any = None, **options: Any) -> None:
    @coordinator.saga("place_order", **options)
    def place_order(ctx: Any, order: Order) -> int:
        ctx.dispatch(Reserve(sku=order.sku))
        charged = ctx.dispatch(Charge(amount=order.amount))
        if then is not None:
            then(ctx)
        return int(charged.amount)


def left_behind(stage: Stage) -> int:
    """A saga whose process died after its two steps, or where the shop's trouble was."""
    coordinator = stage.coordinator()
    placing(coordinator, dies)
    with pytest.raises(Killed):
        coordinator.run("place_order", Order())
    saga_id: int = stage.log.max_saga_id()
    return saga_id


def recoverer(stage: Stage, then: Any = None, bus: CommandBus | None = None, **options: Any) -> Any:
    version = options.pop("version", 1)
    resumes = options.pop("resumes", ())
    coordinator = stage.coordinator(bus, **options)
    placing(coordinator, then, version=version, resumes=resumes)
    return coordinator


def notes(stage: Stage) -> list[str]:
    """The rows of a host's table `note`."""
    return [row[0] for row in stage.sql("SELECT body FROM note")]


def by_the_driver(session: Session, statement: str) -> None:
    """Past SQLAlchemy."""
    cursor = session.connection().connection.cursor()
    cursor.execute(statement)
    cursor.close()
