"""What stands in the way of others, or cannot be brought to an end here, is left as it is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from sagalog import (
    CommandBus,
    SagaCoordinator,
    SagaFailed,
    SagaLog,
    StepInfo,
    UnusableHandler,
)
from sagalog.coordinator.effects import Write
from sagalog.errors import PayloadError
from tests.troubled import (
    Killed,
    Release,
    Reserve,
    Shop,
    beginning_elsewhere,
    reserving,
)


def test_recovery_passes_a_thousand_unknown_sagas(sqlite_path: Any) -> None:
    with SagaLog.open(sqlite_path, durability="normal") as own_log:
        elsewhere = SagaCoordinator(own_log, CommandBus())

        @elsewhere.saga("unknown")
        def unknown(ctx: Any, order: int) -> None:
            raise Killed

        for number in range(1000):
            with pytest.raises(Killed):
                elsewhere.run(unknown, number)
        elsewhere.close()
        last = beginning_elsewhere(own_log, "reserving")
        with SagaCoordinator(own_log, Shop().bus) as coordinator:
            reserving(coordinator)
            report = coordinator.recover()
        assert report.compensated == [last]
        assert len(report.left) == 1000


@pytest.mark.parametrize("submitted", [True, False])
def test_a_worker_passes_unknown_sagas(own_log: SagaLog, submitted: bool) -> None:
    for _ in range(9):
        beginning_elsewhere(own_log, "unknown", submitted=submitted)
    known = beginning_elsewhere(own_log, "reserving", submitted=submitted)
    coordinator = SagaCoordinator(own_log, Shop().bus)
    reserving(coordinator)
    with coordinator.worker(concurrency=1):
        if submitted:
            assert coordinator.wait(known, timeout=30) == 1
        else:
            with pytest.raises(SagaFailed):
                coordinator.wait(known, timeout=30)


def test_sagas_that_a_worker_does_not_know_are_passed_over_in_few_looks(own_log: SagaLog) -> None:
    elsewhere, looks = SagaCoordinator(own_log, CommandBus()), list[str]()

    @elsewhere.saga("elsewhere")
    def left(ctx: Any) -> None:
        raise Killed

    for _ in range(300):
        with pytest.raises(Killed):
            elsewhere.run(left)
    elsewhere.close()
    shop = Shop()
    with SagaCoordinator(own_log, shop.bus) as coordinator:
        saga_id = coordinator.submit(reserving(coordinator), 1)

        def counting(effect: Any, answer: Callable[[Any], Any]) -> Any:
            if isinstance(effect, Write) and effect.operation.asked == "recover":
                looks.append("recover")
            return answer(effect)

        coordinator.interpose = counting
        with coordinator.worker(concurrency=1, poll=60):
            assert coordinator.wait(saga_id, timeout=30) == 1
        assert len(looks) < 30


@pytest.mark.parametrize("ends", ["refused", "raising"])
def test_a_worker_does_not_take_a_saga_again_and_again_that_it_cannot_undo(own_log: SagaLog, ends: str) -> None:
    shop = Shop(releases=False)
    if ends == "raising":

        @shop.bus.handler(idempotent=True)
        def do_release(cmd: Release) -> None:
            raise Killed

    with SagaCoordinator(own_log, shop.bus) as here, pytest.raises((SagaFailed, Killed)):
        here.run(reserving(here, fails=True), 1)
    before = own_log.get(1).epoch
    coordinator = SagaCoordinator(own_log, shop.bus)
    reserving(coordinator)
    looks: list[str] = []
    enough = threading.Event()

    def counting(effect: Any, answer: Callable[[Any], Any]) -> Any:
        if isinstance(effect, Write) and effect.operation.asked == "recover":
            looks.append("recover")
            if len(looks) == 20:
                enough.set()
        return answer(effect)

    coordinator.interpose = counting
    with coordinator.worker(poll=0.01):
        assert enough.wait(30)
    assert own_log.get(1).epoch == before + 1


def left_with_a_step(log: SagaLog, shop: Shop) -> int:
    with SagaCoordinator(log, shop.bus) as elsewhere:

        @elsewhere.saga("reserving")
        def dies(ctx: Any, order: int) -> None:
            ctx.dispatch(Reserve())
            raise Killed

        with pytest.raises(Killed):
            elsewhere.run(dies, 1)
    return log.max_saga_id()


def test_a_saga_that_waits_does_not_use_up_the_limit_of_a_recovery(own_log: SagaLog) -> None:
    knows_less = Shop(releases=False)
    waits = left_with_a_step(own_log, Shop())
    ends = beginning_elsewhere(own_log, "reserving")
    with SagaCoordinator(own_log, knows_less.bus) as coordinator:
        reserving(coordinator)
        report = coordinator.recover(limit=1)
    assert ([left.saga_id for left in report.left], report.compensated) == ([waits], [ends])


# What cannot be undone, or run, here


def test_an_undo_that_cannot_be_stored_leaves_its_saga_to_a_person(own_log: SagaLog) -> None:
    shop = Shop(derive=lambda: Release(amount=float("nan")))
    with SagaCoordinator(own_log, shop.bus) as coordinator, pytest.raises(SagaFailed) as failed:
        coordinator.run(reserving(coordinator, fails=True), 1)
    assert failed.value.outcome == "failed_compensation"
    assert "0 (Reserve, succeeded)" in str(failed.value)


def test_a_saga_whose_undo_is_async_is_left_to_an_async_coordinator(own_log: SagaLog) -> None:
    shop = Shop(releases=False)

    @shop.bus.handler
    async def do_release(cmd: Release, step: StepInfo) -> None:
        """Not called here."""

    with SagaCoordinator(own_log, shop.bus) as coordinator:
        with pytest.raises(SagaFailed) as failed:
            coordinator.run(reserving(coordinator, fails=True), 1)
        assert failed.value.outcome == "failed"
        report = coordinator.recover()
    assert [left.saga_id for left in report.left] == [1]
    assert "async" in report.left[0].reason
    assert own_log.get(1).recoveries == 0


def test_a_retry_by_a_coordinator_that_cannot_undo_the_saga_changes_nothing(own_log: SagaLog) -> None:
    saga_id = left_with_a_step(own_log, Shop())
    own_log.quarantine(note="a copy", actor="ann")
    with SagaCoordinator(own_log, CommandBus()) as knows_nothing:
        reserving(knows_nothing)
        with pytest.raises(UnusableHandler, match="Reserve"):
            knows_nothing.retry(saga_id, note="again", actor="ann")
    assert own_log.get(saga_id).state == "failed_compensation"
    with SagaCoordinator(own_log, Shop().bus) as knows_all:
        reserving(knows_all)
        assert knows_all.retry(saga_id, note="again", actor="ann").state == "compensated"


def test_an_input_that_no_worker_could_read_is_not_submitted(own_log: SagaLog) -> None:
    coordinator = SagaCoordinator(own_log, Shop().bus)
    saga = reserving(coordinator)
    with pytest.raises(PayloadError, match="a str is no input of it"):
        coordinator.submit(saga, "a lamp")
    with pytest.raises(PayloadError, match="a NoneType is no input of it"):
        coordinator.submit(saga)
    assert own_log.max_saga_id() == 0


def test_a_copy_of_a_log_whose_process_never_recovered_knows_its_environment(own_log: SagaLog) -> None:
    from sagalog.errors import WrongEnvironment

    with SagaCoordinator(own_log, Shop().bus, environment="production") as production:
        production.run(reserving(production), 1)
    with SagaCoordinator(own_log, Shop().bus, environment="staging") as staging, pytest.raises(WrongEnvironment):
        staging.recover()
