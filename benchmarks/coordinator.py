"""What the coordinator costs: sagas of four steps that do nothing, against the ten bare writes of one.

The baseline is that of `log.py`: ten writes in autocommit over one bare
connection, the JSON ready and no guards, on a file as sqlite3 makes it. All run in turns within one round, each
first unmeasured; a ratio is the median, over the rounds, of the time of a saga to the baseline's. On Postgres a
saga takes up to a quarter longer for some 50 sagas after something else ran, until the machine waits in its rhythm.
Recovery is compared with the bare writes that it has to make: the claim, the
move to `compensating`, a row and its end with a mark for each undo, and the end.

    python benchmarks/coordinator.py
    python benchmarks/coordinator.py --only full --rounds 20
    python benchmarks/coordinator.py --only recovery --recovered 10000
"""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

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
    postgres_database,
    postgres_server,
    print_table,
    verdict,
)
from log import BARE, bare_saga
from pydantic import BaseModel
from sqlalchemy import URL, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from sagalog import (
    AsyncSagaContext,
    AsyncSagaCoordinator,
    AsyncSagaLog,
    CommandBus,
    SagaContext,
    SagaCoordinator,
    SagaLog,
    StepInfo,
)
from sagalog.migrations import upgrade

Figure = tuple[str, list[float], float | None, bool]
"""A name, the ratio of each round, the limit if there is one, and whether it is a lower one."""

_TURN = 500
"""So many sagas are recovered between two measurements of the bare writes."""


class Do(BaseModel):
    payload: dict[str, Any]


class Done(BaseModel):
    payload: dict[str, Any]


class Undo(BaseModel):
    payload: dict[str, Any]


def make_bus(*, asynchronous: bool = False) -> CommandBus:
    """Handlers that do nothing."""
    bus = CommandBus()
    done = Done(payload=PAYLOAD)
    if asynchronous:

        @bus.handler
        async def ado(cmd: Do) -> Done:
            return done
    else:

        @bus.handler
        def do(cmd: Do) -> Done:
            return done

    @bus.handler
    def undo(cmd: Undo, step: StepInfo) -> None:
        return None

    @bus.compensation(Do)
    def undo_of(cmd: Do, output: Done | None) -> Undo:
        return Undo(payload=cmd.payload)

    return bus


class Dies(BaseException):
    """The process is gone."""


def sync_coordinator(log: SagaLog, *, dies: bool = False) -> SagaCoordinator:
    """A coordinator with the saga `four`."""
    coordinator = SagaCoordinator(log, make_bus())

    @coordinator.saga("four")
    def four(ctx: SagaContext, input: dict[str, Any]) -> None:
        for _ in range(STEPS):
            ctx.dispatch(Do(payload=PAYLOAD))
        if dies:
            raise Dies

    return coordinator


def warmed(run: Callable[[], object], count: int) -> float:
    """Seconds of one, after as many that are not measured: how a machine waits follows what it did just before."""
    many(run, count)
    return many(run, count)


def many(run: Callable[[], object], count: int) -> float:
    """Seconds of one."""
    began = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - began) / count


def on_file(where: Path, durability: Durability, rounds: int, sagas: int) -> Iterator[Figure]:
    """A saga through the coordinator on a SQLite file."""
    with ExitStack() as stack:
        bare = stack.enter_context(closing(bare_connection(host_file(where / f"{durability}-bare.db"), durability)))
        log = stack.enter_context(SagaLog.open(where / f"{durability}-ours.db", durability=durability))
        coordinator = stack.enter_context(sync_coordinator(log))
        ids = itertools.count(1)
        ratios = []
        for _ in range(rounds):
            base = warmed(lambda: bare_saga(bare.execute, BARE, next(ids)), sagas)
            ours = warmed(lambda: coordinator.run("four", PAYLOAD), sagas)
            ratios.append(ours / base)
        yield f"a saga on a SQLite file, {durability.upper()}", ratios, 1.5, False


def on_postgres(where: Path, rounds: int, sagas: int) -> Iterator[Figure]:
    """A saga through the coordinator on Postgres, and many at once from one async process."""
    with ExitStack() as stack:
        server = stack.enter_context(postgres_server(where))
        url = stack.enter_context(postgres_database(server, "bench_coordinator"))
        engine = stack.enter_context(disposing(create_engine(url)))
        upgrade(engine)
        # A database of its own: its explicit ids would be in the way of those that ours draws.
        raw_url = stack.enter_context(postgres_database(server, "bench_bare"))
        upgrade(stack.enter_context(disposing(create_engine(raw_url))))
        raw = stack.enter_context(closing(connect(raw_url)))
        coordinator = stack.enter_context(sync_coordinator(SagaLog(engine)))
        sql = tuple(statement.replace("?", "%s") for statement in BARE)
        ratios = []
        raw_ids = itertools.count(1)
        with raw.cursor() as cursor:
            for _ in range(rounds):
                base = warmed(lambda: bare_saga(cursor.execute, sql, next(raw_ids)), sagas)
                ours = warmed(lambda: coordinator.run("four", PAYLOAD), sagas)
                ratios.append(ours / base)
        yield "a saga on Postgres", ratios, 1.4, False
        for driver, limit in (("psycopg", 4.0), ("asyncpg", None)):
            yield asyncio.run(_many_at_once(url.set(drivername=f"postgresql+{driver}"), limit, rounds, sagas))


async def _many_at_once(url: URL, limit: float | None, rounds: int, sagas: int) -> Figure:
    engine = create_async_engine(url, pool_size=64)
    log = AsyncSagaLog(engine)
    coordinator = AsyncSagaCoordinator(log, make_bus(asynchronous=True))

    @coordinator.saga("four")
    async def four(ctx: AsyncSagaContext, input: dict[str, Any]) -> None:
        for _ in range(STEPS):
            await ctx.dispatch(Do(payload=PAYLOAD))

    async def several(count: int) -> None:
        for _ in range(count):
            await coordinator.run(four, PAYLOAD)

    await asyncio.gather(*(several(1) for _ in range(64)))
    gains = []
    for _ in range(rounds):
        began = time.perf_counter()
        await several(sagas)
        alone = (time.perf_counter() - began) / sagas
        began = time.perf_counter()
        each = max(1, sagas // 16)
        await asyncio.gather(*(several(each) for _ in range(64)))
        gains.append(alone / ((time.perf_counter() - began) / (64 * each)))
    await coordinator.close()
    await engine.dispose()
    return f"64 sagas at once on Postgres, {url.drivername}, throughput of one at a time", gains, limit, True


def recovery(where: Path, count: int) -> Iterator[Figure]:
    """Recovery of interrupted sagas on a SQLite file, in turns with the bare writes that it must make."""
    turns = max(1, count // _TURN)
    with ExitStack() as stack:
        bare = stack.enter_context(closing(bare_connection(host_file(where / "recovery-bare.db"), "normal")))
        log = stack.enter_context(SagaLog.open(where / "recovery.db", durability="normal"))
        dying = sync_coordinator(log, dies=True)
        for saga_id in range(1, turns * _TURN + 1):
            with suppress(Dies):
                dying.run("four", PAYLOAD)
            bare.execute("BEGIN")
            bare_saga(bare.execute, BARE, saga_id)
            bare.execute("COMMIT")
        dying.close()
        coordinator = stack.enter_context(sync_coordinator(log))
        ids = itertools.count(1)
        ratios = []
        for _ in range(turns):
            base = many(lambda: _bare_recovery(bare, next(ids)), _TURN)
            began = time.perf_counter()
            report = coordinator.recover(limit=_TURN)
            ratios.append((time.perf_counter() - began) / _TURN / base)
            assert len(report.compensated) == _TURN, report
    yield f"recovery of {turns * _TURN} sagas, NORMAL", ratios, 2.0, False


def _bare_recovery(bare: sqlite3.Connection, saga_id: int) -> None:
    """The writes of one recovery: the claim, the move, four undos of two transactions each, the end."""
    execute = bare.execute
    execute("UPDATE saga SET executor_id = 'me', epoch = 2, recoveries = 1 WHERE saga_id = ?", (saga_id,))
    execute("UPDATE saga SET state = 'compensating' WHERE saga_id = ?", (saga_id,))
    for index in range(STEPS):
        undo = STEPS + index
        execute("BEGIN")
        execute(BARE[1], (saga_id, undo, "Undo", TEXT, time.time_ns() // 1_000_000))
        execute("UPDATE saga_step SET compensated_by = ? WHERE saga_id = ? AND step_index = ?", (undo, saga_id, index))
        execute("COMMIT")
        execute("BEGIN")
        for each in (undo, index):
            execute(
                "UPDATE saga_step SET state = 'compensated', output_json = '[]', ended_at = ? "
                "WHERE saga_id = ? AND step_index = ?",
                (time.time_ns() // 1_000_000, saga_id, each),
            )
        execute("COMMIT")
    execute("UPDATE saga SET state = 'compensated', terminal_at = ? WHERE saga_id = ?", (1, saga_id))


def main() -> None:
    """Run what was asked for and print the ratios."""
    parser = ArgumentParser(description=__doc__)
    add_directory(parser)
    parser.add_argument("--only", choices=("full", "normal", "postgres", "recovery"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--sagas", type=int, default=64, help="in a round")
    parser.add_argument("--recovered", type=int, default=10_000)
    given = parser.parse_args()
    wanted: list[Any] = [given.only] if given.only else ["full", "normal", "postgres", "recovery"]
    figures: list[Figure] = []
    with directory(given.dir) as where:
        for part in wanted:
            if part == "postgres":
                figures += on_postgres(where, given.rounds, given.sagas)
            elif part == "recovery":
                figures += recovery(where, given.recovered)
            else:
                figures += on_file(where, part, given.rounds, given.sagas)
    rows = []
    for name, ratios, limit, at_least in figures:
        ratio = statistics.median(ratios)
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        if limit is None:
            rows.append((name, f"{ratio:.2f}", spread, "", ""))
            continue
        kept = verdict(limit, ratio) if at_least else verdict(ratio, limit)
        rows.append((name, f"{ratio:.2f}", spread, f"{'>=' if at_least else '<='} {limit}", kept))
    print_table(("", "ratio", "range", "limit", ""), rows)


if __name__ == "__main__":
    main()
