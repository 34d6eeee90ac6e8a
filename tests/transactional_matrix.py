"""Sagas whose steps and undos commit with their handlers' own rows, stopped at every point, held against those rows.

A slice of it runs in `test_crash_points.py`; all of it by::

    python -m tests.transactional_matrix [--again] [--asynchronous] [--postgres URL] [--steps N]

A failing case prints its scenario and stops, with which it is replayed:
``python -m tests.transactional_matrix --scenario "..." --only 7,3``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sagalog import (
    AsyncSagaContext,
    AsyncSagaCoordinator,
    AsyncSagaLog,
    Command,
    CommandBus,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaLog,
    StepRejected,
    migrations,
)
from sagalog.testing import Crash, crash_points
from tests.tally import Tally, add_replay

TROUBLES = ("", "raises", "rejects", "unreadable", "function")
UNDOS = ("", "raises", "rejects")
_AGAIN = Retry(attempts=2, initial=0)
"""An undo that raises is tried again; at once."""
_WRITE = text("INSERT INTO effect (place, verb) VALUES (:place, :verb)")


class Scenario(NamedTuple):
    """What a saga of transactional steps meets.

    Attributes:
        steps: How many steps.
        trouble: Of the step `at`: its handler raises, rejects, or answers what the log cannot hold, each after it
            wrote; or the function raises after it.
        at: Which step.
        undo: What every undo does after it wrote.
        on_crash: What recovery does.
    """

    steps: int
    trouble: str
    at: int
    undo: str
    on_crash: Any

    @property
    def words(self) -> str:
        return ",".join(map(str, self))

    @classmethod
    def read(cls, words: str) -> Scenario:
        steps, trouble, at, undo, on_crash = words.split(",")
        return cls(int(steps), trouble, int(at), undo, on_crash)


def scenarios(steps: int) -> Iterator[Scenario]:
    """All, of at most so many steps."""
    for count in range(1, steps + 1):
        for trouble, at, undo, on_crash in itertools.product(TROUBLES, range(count), UNDOS, ("compensate", "resume")):
            if trouble or not at:
                yield Scenario(count, trouble, at, undo, on_crash)


class Do(Command[int]):
    place: int


class Undo(Command[None]):
    place: int


class Stage:
    """A database with a table of the host's, and what a new process makes over it.

    Args:
        url: Of the database, for a sync driver.
        asynchronous: Whether the coordinator is async.
    """

    def __init__(self, url: str, *, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self.engine = _hurried(create_engine(url))
        migrations.upgrade(self.engine)
        with self.engine.begin() as connection:
            connection.execute(text("CREATE TABLE effect (place INTEGER, verb VARCHAR)"))
        self._own: Any = self.engine
        if asynchronous:
            backend = make_url(url).get_backend_name()
            driver = "sqlite+aiosqlite" if backend == "sqlite" else "postgresql+psycopg"
            self._own = create_async_engine(make_url(url).set(drivername=driver))
            _hurried(self._own.sync_engine)

    def open_log(self) -> Any:
        """An empty log, and nothing done."""
        with self.engine.begin() as connection:
            for table in ("saga_step", "saga", "effect"):
                connection.execute(text(f"DELETE FROM {table}"))
        return AsyncSagaLog(self._own) if self.asynchronous else SagaLog(self._own)

    def crashes(self, scenario: Scenario, **how: Any) -> Iterator[tuple[Crash, list[str]]]:
        """Each run of a scenario, and what is wrong with it."""
        for crash in crash_points(lambda log: _sync(log, scenario), _start, open_log=self.open_log, **how):
            yield crash, self._problems(scenario, crash)

    async def acrashes(self, scenario: Scenario, **how: Any) -> AsyncIterator[tuple[Crash, list[str]]]:
        """The same through the async coordinator."""
        async for crash in crash_points(lambda log: _async(log, scenario), _start, open_log=self.open_log, **how):
            yield crash, self._problems(scenario, crash)

    def _problems(self, scenario: Scenario, crash: Crash) -> list[str]:
        with self.engine.connect() as connection:
            rows = connection.execute(text("SELECT place, verb FROM effect")).all()
        times = Counter((place, verb) for place, verb in rows)
        done = {place for place, verb in times if verb == "do"}
        undone = {place for place, verb in times if verb == "undo"}
        found = [f"{verb} {place} is there {many} times" for (place, verb), many in times.items() if many > 1]
        if undone - done:
            found.append(f"{undone - done} are undone, and were not done")
        saga = crash.saga
        if saga is None:
            return found + (["rows without a saga"] if rows else [])
        if saga.state == "completed" and (done != set(range(scenario.steps)) or undone):
            found.append(f"completed, with {done} done and {undone} undone")
        elif saga.state == "compensated" and done != undone:
            found.append(f"compensated, with {done} done and {undone} undone")
        elif saga.state == "failed_compensation" and not scenario.undo:
            found.append(f"a person is asked without need: {saga.failure_reason}")
        elif saga.state not in ("completed", "compensated", "failed_compensation"):
            found.append(f"unresolved: {saga.state}")
        return found + [f"recovery raised {error}" for report in crash.reports for error in report.errors.values()]

    async def close(self) -> None:
        """Give the connections back."""
        if self.asynchronous:
            await self._own.dispose()
        self.engine.dispose()


def _hurried(engine: Engine) -> Engine:
    """It waits for no disk: nothing here pulls the plug."""
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA synchronous = OFF"))
    return engine


def _start(coordinator: Any) -> Any:
    return coordinator.run("transactional")


def _after_do(scenario: Scenario, place: int) -> Any:
    if place == scenario.at and scenario.trouble == "raises":
        raise OSError("lost")
    if place == scenario.at and scenario.trouble == "rejects":
        raise StepRejected("no")
    return object() if place == scenario.at and scenario.trouble == "unreadable" else place


def _after_undo(scenario: Scenario) -> None:
    if scenario.undo == "raises":
        raise OSError("lost")
    if scenario.undo == "rejects":
        raise StepRejected("it cannot be undone")


def _after_step(scenario: Scenario, place: int) -> None:
    if place == scenario.at and scenario.trouble == "function":
        raise ValueError("the function gives up")


def _sync(log: Any, scenario: Scenario) -> SagaCoordinator:
    bus = CommandBus()

    @bus.handler(transactional=True, settle=0)
    def do(cmd: Do, session: Session) -> int:
        session.execute(_WRITE, {"place": cmd.place, "verb": "do"})
        answer: int = _after_do(scenario, cmd.place)
        return answer

    @bus.handler(transactional=True, settle=0, retry=_AGAIN)
    def undo(cmd: Undo, session: Session) -> None:
        session.execute(_WRITE, {"place": cmd.place, "verb": "undo"})
        _after_undo(scenario)

    bus.compensation(Do)(_undone)
    coordinator = SagaCoordinator(log, bus, on_crash=scenario.on_crash)

    @coordinator.saga("transactional")
    def transactional(ctx: SagaContext) -> None:
        for place in range(scenario.steps):
            ctx.dispatch(Do(place=place))
            _after_step(scenario, place)

    return coordinator


def _async(log: Any, scenario: Scenario) -> AsyncSagaCoordinator:
    bus = CommandBus()

    @bus.handler(transactional=True, settle=0)
    async def do(cmd: Do, session: AsyncSession) -> int:
        await session.execute(_WRITE, {"place": cmd.place, "verb": "do"})
        answer: int = _after_do(scenario, cmd.place)
        return answer

    @bus.handler(transactional=True, settle=0, retry=_AGAIN)
    async def undo(cmd: Undo, session: AsyncSession) -> None:
        await session.execute(_WRITE, {"place": cmd.place, "verb": "undo"})
        _after_undo(scenario)

    bus.compensation(Do)(_undone)
    coordinator = AsyncSagaCoordinator(log, bus, on_crash=scenario.on_crash)

    @coordinator.saga("transactional")
    async def transactional(ctx: AsyncSagaContext) -> None:
        for place in range(scenario.steps):
            await ctx.dispatch(Do(place=place))
            _after_step(scenario, place)

    return coordinator


def _undone(cmd: Do, output: int | None) -> Undo:
    return Undo(place=cmd.place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="stop the recovery as well")
    parser.add_argument("--asynchronous", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--postgres", metavar="URL")
    add_replay(parser)
    given = parser.parse_args()
    how: dict[str, Any] = {"again": given.again, "only": given.only}
    chosen = [Scenario.read(given.scenario)] if given.scenario else list(scenarios(given.steps))
    tally = Tally(len(chosen))

    async def every(url: str) -> None:
        stage = Stage(url, asynchronous=given.asynchronous)
        for scenario in chosen:
            if given.asynchronous:
                async for crash, problems in stage.acrashes(scenario, **how):
                    tally.judge(scenario.words, crash, problems)
            else:
                for crash, problems in stage.crashes(scenario, **how):
                    tally.judge(scenario.words, crash, problems)
        await stage.close()

    with tempfile.TemporaryDirectory() as folder:
        url = given.postgres or f"sqlite:///{Path(folder) / 'sagas.db'}"
        asyncio.run(every(url))
    return tally.told()


if __name__ == "__main__":
    raise SystemExit(main())
