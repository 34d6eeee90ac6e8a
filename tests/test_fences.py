"""An owner's write that meets a take-over: it waits for it, is refused, and changes nothing. Each write there is."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text

from sagalog import LeaseLost, SagaLog
from sagalog.log import owned_steps, owning
from sagalog.log.database import Operation
from sagalog.log.fencing import Fence
from tests.processes import LONGEST

DONE, DOUBT, UNDONE, UNDO, NEW = range(5)
"""The steps of the saga: one succeeded, one pending, one that is being undone, its undo; and the next index."""


def started(log: SagaLog, *, with_steps: bool) -> Fence:
    """A saga that runs under an executor "old"."""

    def write(operation: Operation[Any]) -> Any:
        return log._bind.perform(operation)

    drawn = write(owning.begin_saga("s", "null", key=None, version=1, executor_id="old"))
    fence = Fence(drawn.saga_id, 1)
    if with_steps:
        for index in (DONE, DOUBT, UNDONE):
            write(owned_steps.begin_step(fence, index, "do", "null", 0, cancellable=True))
        for index in (DONE, UNDONE):
            write(owned_steps.finish_step(fence, index, "[]"))
        write(owned_steps.begin_undo(fence, UNDO, "undo", "null", 0, [UNDONE]))
    return fence


WRITES: dict[str, Callable[[Fence], Operation[Any]]] = {
    "begin_step": lambda fence: owned_steps.begin_step(fence, NEW, "do", "null", 0, cancellable=True),
    "record_step": lambda fence: owned_steps.record_step(fence, NEW, "sagalog.now", "1", cancellable=False),
    "finish_step": lambda fence: owned_steps.finish_step(fence, DOUBT, "[]"),
    "finish_step_once": lambda fence: owned_steps.finish_step_once(fence, DOUBT, "[]"),
    "fail_step": lambda fence: owned_steps.fail_step(fence, DOUBT, "no"),
    "doubt_step": lambda fence: owned_steps.doubt_step(fence, DOUBT, "lost", 7, None),
    "begin_undo": lambda fence: owned_steps.begin_undo(fence, NEW, "undo", "null", 0, [DONE]),
    "end_undo": lambda fence: owned_steps.end_undo(fence, UNDO, "[]"),
    "end_undo_once": lambda fence: owned_steps.end_undo_once(fence, UNDO, "[]"),
    "mark_step_compensated": lambda fence: owned_steps.mark_step_compensated(fence, DONE),
    "mark_compensating": lambda fence: owning.mark_compensating(fence, "why"),
    "failed": lambda fence: owning.failed(fence, "why"),
    "fail_compensation": lambda fence: owning.fail_compensation(fence, "why"),
    "give_up": lambda fence: owning.give_up(fence, DOUBT, "late", 7),
    "complete": lambda fence: owning.complete(fence, "1", cancellable=True),
    "compensated": lambda fence: owning.compensated(fence, "why"),
    # They take back what somebody else may have by now; then there is nothing to be told.
    "release": lambda fence: owning.release(fence, "old", counted=True),
    "give_up without a step": lambda fence: owning.give_up(fence),
}
WITHOUT_STEPS = ("complete", "compensated")
SILENT = ("release", "give_up without a step")


@pytest.fixture
def stranger(migrated_url: str) -> Iterator[Engine]:
    engine = create_engine(migrated_url)
    yield engine
    engine.dispose()


def await_its_wait(writing: Future[Any], engine: Engine) -> None:
    """Until the write waits for a lock, or has ended; SQLite shows nothing of who waits."""
    if engine.dialect.name == "sqlite":
        concurrent.futures.wait([writing], timeout=0.05)
        return
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    deadline = time.monotonic() + LONGEST
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not writing.done() and not connection.execute(waiting).scalar_one():
            assert time.monotonic() < deadline


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_meets_a_take_over_waits_for_it_and_changes_nothing(
    write: str, own_log: SagaLog, stranger: Engine
) -> None:
    fence = started(own_log, with_steps=write not in WITHOUT_STEPS)
    before = own_log.get(fence.saga_id)
    with ThreadPoolExecutor(1) as pool, stranger.begin() as takes_over:
        takes_over.execute(text("UPDATE saga SET epoch = 2, executor_id = 'new', recoveries = 1"))
        writing = pool.submit(own_log._bind.perform, WRITES[write](fence))
        await_its_wait(writing, stranger)
        takes_over.commit()
        refusal = writing.exception(LONGEST)
    assert own_log.get(fence.saga_id) == before.model_copy(update={"epoch": 2, "executor_id": "new", "recoveries": 1})
    assert refusal is None if write in SILENT else isinstance(refusal, LeaseLost)


@pytest.mark.parametrize("write", WRITES)
def test_a_write_by_the_owner_takes_effect(write: str, own_log: SagaLog) -> None:
    fence = started(own_log, with_steps=write not in WITHOUT_STEPS)
    before = own_log.get(fence.saga_id)
    own_log._bind.perform(WRITES[write](fence))
    assert own_log.get(fence.saga_id) != before


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_waits_for_the_sagas_row_holds_none_of_its_steps(write: str, postgres_url: str) -> None:
    """Otherwise one that holds the saga's row and comes to a step would wait for it, and it for that one."""
    stranger = create_engine(postgres_url)
    with SagaLog.open(postgres_url) as own_log:
        fence = started(own_log, with_steps=write not in WITHOUT_STEPS)
        with ThreadPoolExecutor(1) as pool, stranger.begin() as holds:
            holds.execute(text("SELECT 1 FROM saga FOR UPDATE"))
            writing = pool.submit(own_log._bind.perform, WRITES[write](fence))
            await_its_wait(writing, stranger)
            assert not writing.done()
            holds.execute(text("SELECT 1 FROM saga_step FOR UPDATE NOWAIT"))
            holds.rollback()
            assert writing.exception(LONGEST) is None
    stranger.dispose()
