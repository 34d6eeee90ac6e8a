"""A signal's exception anywhere in a write to a file: nobody waits for ever, and nothing that was told is lost."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from sagalog import AsyncSagaLog, LogUnavailable, SagaLog
from tests.processes import LONGEST
from tests.signals import Limit, interrupted_at


def create(log: SagaLog, name: str) -> int:
    return log.create_saga(name, None)


def create_in_a_unit(log: SagaLog, name: str) -> int:
    with log.unit_of_work() as work:
        return work.create_saga(name, None)


def fail_in_a_unit(log: SagaLog, name: str) -> int:
    with log.unit_of_work() as work:
        work.create_saga(name, None)
        raise ValueError("not at all")


@pytest.mark.parametrize("write", [create, create_in_a_unit, fail_in_a_unit])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Limit])
@pytest.mark.parametrize("followed", [True, False])
def test_a_write_that_is_interrupted_anywhere_takes_nobody_along(
    sqlite_path: Path, write: Callable[[SagaLog, str], int], error: type[BaseException], followed: bool
) -> None:
    number = 0
    told: list[int | BaseException] = []
    with SagaLog.open(sqlite_path, durability="normal") as log, closing(sqlite3.connect(sqlite_path)) as stranger:
        stranger.execute("PRAGMA busy_timeout = 0").fetchall()
        queue = log._bind._turns  # type: ignore[attr-defined]

        def follow() -> None:
            try:
                told.append(create(log, "follows"))
            except BaseException as raised:
                told.append(raised)

        def let_another_wait() -> None:
            if not followed or queue.leader is None or queue.mutex.locked() or follower.ident is not None:
                return
            follower.start()
            until = time.monotonic() + LONGEST
            while not queue.waiting and not queue.taken and follower.is_alive():
                assert time.monotonic() < until
                time.sleep(0)

        while True:
            number += 1
            follower = threading.Thread(target=follow, daemon=True)
            with (
                suppress(KeyboardInterrupt, Exception),
                interrupted_at(number, "log", error=error, look=let_another_wait) as fired,
            ):
                write(log, "leads")
            if follower.ident is None:
                follower.start()
            follower.join(LONGEST)
            assert (number, fired, follower.is_alive(), queue.leader) == (number, fired, False, None)
            outcome = told.pop()
            if isinstance(outcome, int):
                assert log.get(outcome).name == "follows"
            else:
                assert isinstance(outcome, LogUnavailable)
                assert outcome.unknown
            stranger.execute("BEGIN IMMEDIATE")  # the file is nobody's
            stranger.execute("ROLLBACK")
            if not fired:
                break
        assert log.counts() == {"running": log.max_saga_id()}
    assert number > 15


def test_a_task_whose_write_is_interrupted_keeps_no_others_waiting(sqlite_path: Path) -> None:
    async def main() -> int:
        number, fired = 0, [""]
        async with await AsyncSagaLog.open(sqlite_path) as log:
            while fired:
                number += 1
                with (
                    suppress(Limit),
                    interrupted_at(number, "log/asynchronous.py", error=Limit, function="perform") as fired,
                ):
                    await log.create_saga("interrupted", None)
                saga_id = await asyncio.wait_for(log.create_saga("goes on", None), LONGEST)
                assert (await log.get(saga_id)).name == "goes on"
        return number

    assert asyncio.run(main()) > 4
