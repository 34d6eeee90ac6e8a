"""Whose a saga is: what a process begins, claims, and gives back when it is interrupted."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from sagalog import (
    AsyncSagaCoordinator,
    AsyncSagaLog,
    CommandBus,
    SagaCoordinator,
    SagaFailed,
    SagaLog,
    StepInfo,
)
from sagalog.coordinator.effects import Write
from sagalog.errors import LogUnavailable
from sagalog.log import claiming as claiming_in_the_log
from sagalog.log.database import Call, Kind
from tests.processes import LONGEST, until
from tests.signals import interrupted_at
from tests.troubled import (
    Done,
    Shop,
    beginning_elsewhere,
    claiming,
    reserving,
    until_one_ends,
)


def test_a_saga_that_has_just_begun_is_not_recovered_by_its_own_process(own_log: SagaLog) -> None:
    shop = Shop()
    with SagaCoordinator(own_log, shop.bus) as coordinator:
        saga = reserving(coordinator)

        def recovering(effect: Any, answer: Callable[[Any], Any]) -> Any:
            given = answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "run":
                coordinator.interpose = None
                beside = threading.Thread(target=coordinator.recover)
                beside.start()
                beside.join()
            return given

        coordinator.interpose = recovering
        assert coordinator.run(saga, 5) == 5
    assert shop.verbs == ["reserve"]


def test_a_saga_that_its_process_could_not_undo_is_recovered_by_another_one(own_log: SagaLog) -> None:
    knows_less, knows_all = Shop(releases=False), Shop()
    with SagaCoordinator(own_log, knows_less.bus) as here, SagaCoordinator(own_log, knows_all.bus) as there:
        with pytest.raises(SagaFailed) as failed:
            here.run(reserving(here, fails=True), 1)
        assert failed.value.outcome == "failed"
        reserving(there)
        assert there.recover().compensated == [1]
    assert knows_all.verbs == ["release"]


def test_a_child_that_exits_inside_a_handler_does_not_give_its_parents_saga_away(own_log: SagaLog) -> None:
    owners: list[str | None] = []

    def forking(step: StepInfo) -> Done:
        child = os.fork()
        if child == 0:
            sys.exit(0)
        os.waitpid(child, 0)
        owners.append(own_log.get(step.saga_id).executor_id)
        return Done()

    shop = Shop(reserve=forking)
    with SagaCoordinator(own_log, shop.bus) as coordinator:
        saga = reserving(coordinator)
        here = os.getpid()
        try:
            assert coordinator.run(saga, 5) == 5
        finally:
            if os.getpid() != here:
                os._exit(0)
        assert owners == [coordinator.executor_id]


def test_a_saga_whose_handler_hangs_is_recovered_by_its_own_process(own_log: SagaLog) -> None:
    hangs, woken = threading.Event(), threading.Event()

    def hanging(step: StepInfo) -> Done:
        hangs.set()
        woken.wait()
        return Done()

    shop = Shop(reserve=hanging, timeout=0.1, settle=0.0, on_unknown="compensate")
    with SagaCoordinator(own_log, shop.bus) as coordinator:
        saga = reserving(coordinator)
        raised: list[BaseException] = []

        def run() -> None:
            try:
                coordinator.run(saga, 1)
            except BaseException as error:
                raised.append(error)

        hung = threading.Thread(target=run)
        hung.start()
        hangs.wait()
        compensated: list[int] = []
        while not compensated:
            compensated = coordinator.recover().compensated
        woken.set()
        hung.join()
    assert compensated == [1]
    assert type(raised[0]).__name__ == "LeaseLost"
    assert shop.verbs == ["reserve", "release"]


# Starts


def test_a_start_whose_answer_was_lost_is_recognised(own_log: SagaLog) -> None:
    shop = Shop()
    with SagaCoordinator(own_log, shop.bus) as coordinator:
        saga = reserving(coordinator)
        lost: list[int] = []

        def losing(effect: Any, answer: Callable[[Any], Any]) -> Any:
            given = answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "run" and not lost:
                lost.append(1)
                raise LogUnavailable("run", "the connection ended before the answer")
            return given

        coordinator.interpose = losing
        assert coordinator.run(saga, 5, key="order-5") == 5
    assert lost == [1]
    assert shop.verbs == ["reserve"]
    assert own_log.max_saga_id() == 1


def test_a_start_that_was_lost_is_told_as_unknown_and_given_back_once_the_log_answers(own_log: SagaLog) -> None:
    shop, is_known = Shop(), iter([False])
    with SagaCoordinator(own_log, shop.bus) as coordinator, SagaCoordinator(own_log, shop.bus) as another:
        reserving(another)
        saga = reserving(coordinator)

        def losing(effect: Any, answer: Callable[[Any], Any]) -> Any:
            if isinstance(effect, Write) and effect.operation.asked == "release":
                raise LogUnavailable("release", "the connection is gone")
            given = answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "run":
                known = next(is_known, True)  # of the last tries it is known that they wrote nothing
                raise LogUnavailable("run", "the connection ended before the answer", unknown=not known)
            return given

        coordinator.interpose = losing
        with pytest.raises(LogUnavailable) as lost:
            coordinator.run(saga, 5)
        assert lost.value.unknown
        assert until(lambda: another.recover().compensated) == [1]
    assert shop.verbs == []


@pytest.mark.parametrize("what", ["run", "claim"])
def test_what_comes_to_be_in_the_log_after_its_process_gave_up_is_given_back(own_log: SagaLog, what: str) -> None:
    """As a request does that was held back on its way to a server."""
    shop, sent = Shop(), list[Any]()
    with SagaCoordinator(own_log, shop.bus, lease=0.6) as here, SagaCoordinator(own_log, shop.bus) as there:
        saga = reserving(here)
        reserving(there)
        here.run(saga, 1)
        if what == "claim":
            beginning_elsewhere(own_log, "reserving")

        def holding_back(effect: Any, answer: Callable[[Any], Any]) -> Any:
            if isinstance(effect, Write) and effect.operation.asked == what:
                sent.append(effect.operation)
                raise LogUnavailable(what, "the connection is gone")
            return answer(effect)

        here.interpose = holding_back
        if what == "run":
            with pytest.raises(LogUnavailable):
                here.run(saga, 2)
        else:
            assert list(here.recover().errors) == [2]
        own_log._bind.perform(sent[0])
        assert own_log.get(2).executor_id == here.executor_id
        assert until(lambda: there.recover().compensated) == [2]
    assert shop.verbs == ["reserve"]


def test_a_start_that_comes_to_be_in_the_log_while_its_process_looks_there_stays_its_own(
    own_log: SagaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, owners, held = list[int](), list[str | None](), claiming_in_the_log.held
    looking, written = threading.Event(), threading.Event()

    def slowly(executor_id: str) -> Any:
        def look(db: Any) -> Any:
            looks.append(1)
            looking.set()
            written.wait(LONGEST)
            return held(executor_id).run(db)

        return Call("held", Kind.READ, look)

    def reserve(step: StepInfo) -> Done:
        owners.append(own_log.get(step.saga_id).executor_id)
        return Done()

    with SagaCoordinator(own_log, Shop(reserve=reserve).bus, lease=1.0) as coordinator:
        saga, me = reserving(coordinator), coordinator.executor_id

        def late(effect: Any, answer: Callable[[Any], Any]) -> Any:
            given = answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "run":
                written.set()
                until(lambda: len(looks) > 2 or own_log.get(2).executor_id is None)
            return given

        coordinator.run(saga, 1)
        monkeypatch.setattr(claiming_in_the_log, "held", slowly)
        coordinator._core.executor.look_for_orphans()
        assert looking.wait(LONGEST)
        coordinator.interpose = late
        assert coordinator.run(saga, 2) == 2
    assert owners == [me, me]


def test_a_start_that_is_cancelled_is_recovered_by_another_process(sqlite_path: Any) -> None:
    bus = CommandBus()

    async def main() -> list[int]:
        async with (
            await AsyncSagaLog.open(sqlite_path) as own_log,
            AsyncSagaCoordinator(own_log, bus) as here,
            AsyncSagaCoordinator(own_log, bus) as there,
        ):

            async def empty(ctx: Any, order: int) -> None:
                """Never begun."""

            here.saga("empty")(empty)
            there.saga("empty")(empty)

            async def cancelling(effect: Any, answer: Callable[[Any], Any]) -> Any:
                given = await answer(effect)
                if isinstance(effect, Write) and effect.operation.asked == "run":
                    raise asyncio.CancelledError
                return given

            here.interpose = cancelling
            with pytest.raises(asyncio.CancelledError):
                await here.run(empty, 1)
            async with asyncio.timeout(LONGEST):
                recovered: list[int] = []
                while not recovered:  # until the lease's thread has given it back
                    recovered = (await there.recover()).compensated
            return recovered

    assert asyncio.run(main()) == [1]


# Claims


def test_a_claim_whose_answer_was_lost_knows_itself_when_it_is_made_again(own_log: SagaLog) -> None:
    """As a log over an Engine does once its connection is gone."""
    shop = Shop()
    with SagaCoordinator(own_log, shop.bus) as coordinator:
        saga_id = coordinator.submit(reserving(coordinator), 7)
        claiming(coordinator, lambda claim: (claim(), claim())[1])
        with coordinator.worker(poll=0.05):
            assert coordinator.wait(saga_id, timeout=30) == 7
    assert shop.verbs == ["reserve"]


def test_a_claim_that_fails_is_not_made_again_at_once(own_log: SagaLog) -> None:
    shop, moments, enough = Shop(), list[float](), threading.Event()

    def failing(claim: Callable[[], Any]) -> Any:
        moments.append(time.monotonic())
        if len(moments) > 1:
            enough.set()
        raise LogUnavailable("claim", "the disk is full")

    with SagaCoordinator(own_log, shop.bus) as coordinator:
        coordinator.submit(reserving(coordinator), 1)
        claiming(coordinator, failing)
        with coordinator.worker(poll=0.01):
            assert enough.wait(30)
    assert moments[1] - moments[0] > 0.4


def test_a_recovery_that_is_cancelled_while_it_claims_leaves_the_saga_to_others(sqlite_path: Path) -> None:
    async def main() -> None:
        log = await AsyncSagaLog.open(sqlite_path)
        coordinator = AsyncSagaCoordinator(log, CommandBus())

        @coordinator.saga("reserving")
        async def empty(ctx: Any, order: int) -> int:
            return order

        async def cancelled(effect: Any, answer: Callable[[Any], Any]) -> Any:
            given = await answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "claim":
                raise asyncio.CancelledError
            return given

        coordinator.interpose = cancelled
        with pytest.raises(asyncio.CancelledError):
            await coordinator.recover()
        with SagaLog.open(sqlite_path) as others, SagaCoordinator(others, Shop().bus) as another:
            reserving(another)
            assert await asyncio.wait_for(asyncio.to_thread(until_one_ends, another), timeout=30) == 1
        await coordinator.close()
        await log.close()

    with SagaLog.open(sqlite_path) as log:
        beginning_elsewhere(log, "reserving")
    asyncio.run(main())


def test_a_quarantine_does_not_miss_a_saga_that_is_being_claimed(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    with SagaLog.open(postgres_url) as own_log, engine.connect() as claiming:
        saga_id = beginning_elsewhere(own_log, "reserving")
        claiming.execute(text("UPDATE saga SET epoch = epoch + 1, executor_id = 'another'"))
        moved: list[int] = []
        acting = threading.Thread(target=lambda: moved.append(own_log.quarantine(note="a copy", actor="ann")))
        acting.start()
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as looking:
            until = time.monotonic() + 30
            while not looking.execute(text(waits)).scalar_one() and time.monotonic() < until:
                """Until it waits for the row."""
        claiming.commit()
        acting.join()
        assert (moved, own_log.get(saga_id).state) == ([1], "failed_compensation")
    engine.dispose()


# Interruptions


def test_a_saga_whose_loop_is_gone_is_given_back(sqlite_path: Path) -> None:
    begun = threading.Event()
    bus, loop = Shop().bus, asyncio.new_event_loop()

    async def hangs(ctx: Any, order: int) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def begin() -> AsyncSagaCoordinator:
        coordinator = AsyncSagaCoordinator(await AsyncSagaLog.open(sqlite_path), bus)
        worker = coordinator.worker()
        await worker.start()
        await coordinator.submit(coordinator.saga("reserving")(hangs), 1)
        await asyncio.to_thread(begun.wait, LONGEST)
        return coordinator

    here = loop.run_until_complete(begin())
    loop.close()
    with SagaLog.open(sqlite_path) as own_log, SagaCoordinator(own_log, bus) as another:
        reserving(another)
        del loop
        gc.collect()
        assert until(lambda: another.recover().compensated) == [1]
    assert here.executor_id


INTERRUPTED = ("coordinator/core.py", "coordinator/taking.py", "coordinator/run.py")


@pytest.mark.parametrize("what", ["run", "recover", "retry"])
def test_a_process_interrupted_anywhere_keeps_no_saga(sqlite_path: Path, what: str) -> None:
    """In a notebook the process lives on, and so does its lease."""
    shop, number = Shop(), 0
    with SagaLog.open(sqlite_path, durability="normal") as own_log:
        while True:
            number += 1
            coordinator = SagaCoordinator(own_log, shop.bus, lease=1.0)
            saga, here = reserving(coordinator), coordinator.executor_id
            left = 0 if what == "run" else beginning_elsewhere(own_log, "reserving")
            if what == "retry":
                own_log.mark_failed_compensation(left, "by hand")
            calls: dict[str, Callable[[], Any]] = {
                "run": lambda: coordinator.run(saga, 1),  # noqa: B023
                "recover": lambda: coordinator.recover(),  # noqa: B023
                "retry": lambda: coordinator.retry(left, note="again", actor="ann"),  # noqa: B023
            }
            ended = False
            with suppress(KeyboardInterrupt), interrupted_at(number, *INTERRUPTED):
                calls[what]()
                ended = True
            if ended:
                break
            until(lambda: here not in [own_log.get(left.saga_id).executor_id for left in own_log.unresolved_sagas()])  # noqa: B023
            coordinator.recover()
            assert own_log.unresolved_sagas() == []
            coordinator.close()
            assert own_log.executors() == []
    assert number > 50
