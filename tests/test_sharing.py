"""Tasks on one AsyncEngine share transactions; each is told of its own write only, and waits for no other's lock."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from sagalog import (
    AsyncSagaLog,
    InvalidTransition,
    KeyConflict,
    LogUnavailable,
    SagaLog,
    SagaOutcome,
    StepExists,
)
from tests.coordinating import row_held
from tests.proxies import Proxy

TASKS = 40


def sql(url: str, statement: str) -> list[Any]:
    engine = create_engine(url)
    with engine.begin() as connection:
        result = connection.execute(text(statement))
        rows = list(result) if result.returns_rows else []
    engine.dispose()
    return rows


async def one_saga(log: AsyncSagaLog, number: int) -> int:
    saga = await log.create_saga("s", number, key=f"k{number // 2}-{number}")
    for index in range(3):
        await log.start_step(saga, index, "c", None)
        await log.finish_step(saga, index, [number])
    await log.terminate(saga, SagaOutcome.completed())
    return saga


def play(engine: AsyncEngine, main: Any) -> None:
    """Run `main` with a log on the engine."""

    async def playing() -> None:
        try:
            await main(AsyncSagaLog(engine))
        finally:
            await engine.dispose()

    asyncio.run(playing())


def test_every_saga_is_whole_and_its_writes_are_in_shared_transactions(postgres_url: str) -> None:
    async def main(log: AsyncSagaLog) -> None:
        sagas = await asyncio.gather(*(one_saga(log, number) for number in range(TASKS)))
        assert len(set(sagas)) == TASKS
        for number, saga in enumerate(sagas):
            record = await log.get(saga)
            assert (record.input, record.state) == (number, "completed")
            assert [(step.state, step.output) for step in record.steps] == [("succeeded", [number])] * 3

    play(create_async_engine(postgres_url), main)
    ((transactions, written),) = sql(postgres_url, "SELECT count(DISTINCT xmin::text), count(*) FROM saga_step")
    assert transactions * 4 < written


def test_a_refused_write_is_told_to_its_caller_alone(postgres_url: str) -> None:
    async def main(log: AsyncSagaLog) -> None:
        for saga in range(1, TASKS + 1):
            await log.start_saga(saga, "s", None)
        await log.start_step(2, 0, "c", None)
        await log.terminate(3, SagaOutcome.completed())
        await log.create_saga("s", 1, key="k")
        asked = [log.start_step(saga, 0, "c", None) for saga in range(1, TASKS + 1)]
        again = [log.create_saga("s", input, key="k") for input in (1, 2)]
        told = await asyncio.gather(*asked, log.terminate(2, SagaOutcome.completed()), *again, return_exceptions=True)
        assert [type(each) for each in told[1:3]] == [StepExists, InvalidTransition]
        assert told[0] is None
        assert told[3:TASKS] == [None] * (TASKS - 3)
        assert [type(each) for each in told[TASKS:]] == [InvalidTransition, int, KeyConflict]

    play(create_async_engine(postgres_url), main)


def test_a_write_at_which_the_database_gives_up_is_told_to_its_caller_alone(postgres_url: str) -> None:
    sql(
        postgres_url,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF NEW.name = 'bad' THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW; END $$",
    )
    sql(postgres_url, "CREATE TRIGGER refuse BEFORE INSERT ON saga FOR EACH ROW EXECUTE FUNCTION refuse()")

    async def main(log: AsyncSagaLog) -> None:
        names = ["bad" if number % 10 == 5 else "s" for number in range(TASKS)]
        creating = (log.create_saga(name, number) for number, name in enumerate(names))
        told = await asyncio.gather(*creating, return_exceptions=True)
        for name, each in zip(names, told, strict=True):
            if name == "bad":
                assert isinstance(each, LogUnavailable)
                assert (each.found, each.unknown) == ("P0001", False)
            else:
                assert isinstance(each, int)
        assert await log.counts() == {"running": names.count("s")}

    play(create_async_engine(postgres_url), main)


def test_a_write_that_waits_for_a_row_holds_up_no_other(postgres_url: str) -> None:
    async def main(log: AsyncSagaLog) -> None:
        for saga in range(1, TASKS + 1):
            await log.start_saga(saga, "s", None)
        with row_held(postgres_url, 7):
            writing = [asyncio.create_task(log.start_step(saga, 0, "c", None)) for saga in range(1, TASKS + 1)]
            waiting = writing.pop(6)
            await asyncio.wait_for(asyncio.gather(*writing), 20)
            assert not waiting.done()
        await waiting
        assert [step.state for step in (await log.get(7)).steps] == ["pending"]

    play(create_async_engine(postgres_url), main)


def test_a_unit_of_work_may_wait_for_writes_that_are_shared(postgres_url: str) -> None:
    async def main(log: AsyncSagaLog) -> None:
        for saga in range(1, TASKS + 1):
            await log.start_saga(saga, "s", None)
        async with log.unit_of_work() as work:
            await work.start_step(1, 0, "c", None)
            others = [asyncio.create_task(log.start_step(saga, 1, "c", None)) for saga in range(1, TASKS + 1)]
            await asyncio.wait_for(asyncio.gather(*others[1:]), 20)
        await others[0]
        assert [step.step_index for step in (await log.get(1)).steps] == [0, 1]

    play(create_async_engine(postgres_url), main)


def test_writes_whose_answer_was_lost_are_told_as_unknown_and_can_be_repeated(postgres_url: str) -> None:
    with closing(Proxy(postgres_url)) as proxy:

        async def main(log: AsyncSagaLog) -> None:
            for saga in range(1, TASKS + 1):
                await log.start_saga(saga, "s", None)
            proxy.cuts_answers = True
            starting = (log.start_step(saga, 0, "c", {"n": saga}) for saga in range(1, TASKS + 1))
            for told in await asyncio.gather(*starting, return_exceptions=True):
                assert isinstance(told, LogUnavailable)
            proxy.cuts_answers = False
            again = [log.start_step(saga, 0, "c", {"n": saga}) for saga in range(1, TASKS + 1)]
            found = [told for told in await asyncio.gather(*again, return_exceptions=True) if told is not None]
            assert found
            assert all(isinstance(told, StepExists) and told.identical for told in found)
            ending = (log.finish_step(saga, 0, saga) for saga in range(1, TASKS + 1))
            await asyncio.gather(*ending)

        play(create_async_engine(proxy.url), main)
    assert sql(postgres_url, "SELECT state, count(*) FROM saga_step GROUP BY state") == [("succeeded", TASKS)]


def test_a_process_that_stops_in_the_middle_of_sending_holds_no_rows_for_long(postgres_url: str) -> None:
    ((version,),) = sql(postgres_url, "SELECT current_setting('server_version_num')::int")
    if version < 170_000:
        pytest.skip("only later servers can end such a transaction")
    with closing(Proxy(postgres_url)) as proxy:

        async def main(log: AsyncSagaLog) -> None:
            for saga in range(1, TASKS + 1):
                await log.start_saga(saga, "s", None)
            payload = "x" * 1000
            for index in range(2):  # by the second time the statements are prepared, and only values are sent
                proxy.stop_after(16_000 if index else 10**9)
                asked = (log.start_step(saga, index, "c", payload) for saga in range(1, TASKS + 1))
                writing = asyncio.gather(*asked)
                if index:
                    assert await asyncio.to_thread(proxy.has_stopped)
                    async with await AsyncSagaLog.open(postgres_url) as elsewhere:
                        assert not writing.done()
                        for saga in range(1, TASKS + 1):
                            await elsewhere.start_step(saga, 2, "c", None)
                    proxy.go_on()
                await writing

        play(create_async_engine(proxy.url), main)
    assert sql(postgres_url, "SELECT step_index, count(*) FROM saga_step GROUP BY 1 ORDER BY 1") == [
        (0, TASKS),
        (1, TASKS),
        (2, TASKS),
    ]


def test_a_cancelled_tasks_write_is_decided_and_the_others_are_written(postgres_url: str) -> None:
    async def main(log: AsyncSagaLog) -> None:
        await log.start_saga(1, "s", None)
        decided: dict[int, bool] = {}

        async def write(index: int) -> None:
            try:
                await log.start_step(1, index, "c", None)
            except asyncio.CancelledError:
                decided[index] = index in {step.step_index for step in (await log.get(1)).steps}
                raise

        cancelled = 0
        for number in range(12):
            writing = [asyncio.create_task(write(number * 10 + index)) for index in range(10)]
            for _ in range(number):
                await asyncio.sleep(0)
            for task in writing[::3]:
                cancelled += task.cancel()
            told = await asyncio.gather(*writing, return_exceptions=True)
            assert [each for index, each in enumerate(told) if index % 3] == [None] * 6
        written = {step.step_index for step in (await log.get(1)).steps}
        assert {index: index in written for index in decided} == decided
        assert cancelled > 12

    play(create_async_engine(postgres_url), main)


def test_a_loop_that_ends_while_tasks_write_leaves_a_log_that_works(postgres_url: str) -> None:
    engine = create_async_engine(postgres_url, poolclass=NullPool)
    log = AsyncSagaLog(engine)
    with row_held_after_setup(postgres_url), asyncio.Runner() as runner:

        async def begin() -> None:
            for saga in range(1, TASKS + 1):
                asyncio.create_task(log.start_step(saga, 0, "c", None)).add_done_callback(lambda done: done.cancelled())
            await asyncio.sleep(0)
            await asyncio.sleep(0)

        runner.run(begin())

    async def again() -> None:
        saga = await one_saga(log, 1)
        assert (await log.get(saga)).state == "completed"

    asyncio.run(again())


@contextmanager
def row_held_after_setup(url: str) -> Iterator[None]:
    with SagaLog.open(url) as log:
        for saga in range(1, TASKS + 1):
            log.start_saga(saga, "s", None)
    with row_held(url, 1):
        yield
