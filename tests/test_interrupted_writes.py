"""A signal's exception anywhere of a write to a file: nobody waits for ever, and nothing that was told is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from sagalog import LogUnavailable, SagaLog
from tests.processes import LONGEST
from tests.signals import interrupted_at


def create(log: SagaLog, name: str) -> int:
    return log.create_saga(name, None)


def create_in_a_unit(log: SagaLog, name: str) -> int:
    with log.unit_of_work() as work:
        return work.create_saga(name, None)


@pytest.mark.parametrize("write", [create, create_in_a_unit])
def test_a_write_that_is_interrupted_anywhere_takes_nobody_along(
    sqlite_path: Path, write: Callable[[SagaLog, str], int]
) -> None:
    number, interrupted = 0, True
    told: list[int | BaseException] = []
    with SagaLog.open(sqlite_path, durability="normal") as log:
        queue = log._bind._turns  # type: ignore[attr-defined]

        def follow() -> None:
            try:
                told.append(create(log, "follows"))
            except BaseException as error:
                told.append(error)

        def let_another_wait() -> None:
            if queue.leader is None or queue.mutex.locked() or follower.ident is not None:
                return
            follower.start()
            until = time.monotonic() + LONGEST
            while not queue.waiting and not queue.taken and follower.is_alive():
                assert time.monotonic() < until
                time.sleep(0)

        while interrupted:
            number += 1
            follower = threading.Thread(target=follow, daemon=True)
            with suppress(KeyboardInterrupt), interrupted_at(number, "log", look=let_another_wait):
                write(log, "leads")
                interrupted = False
            if follower.ident is None:
                follower.start()
            follower.join(LONGEST)
            assert (number, follower.is_alive(), queue.leader) == (number, False, None)
            outcome = told.pop()
            if isinstance(outcome, int):
                assert log.get(outcome).name == "follows"
            else:
                assert isinstance(outcome, LogUnavailable)
                assert outcome.unknown
        assert log.counts() == {"running": log.max_saga_id()}
        log.create_saga("goes on", None)
    assert number > 30
