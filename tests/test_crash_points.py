"""A slice of the crash matrix, on every road, and what `crash_points` gives to a user's own tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from sagalog import (
    AsyncSagaLog,
    CommandBus,
    SagaContext,
    SagaCoordinator,
    SagaLog,
    StepRejected,
    UnusableBind,
    UnusableHandler,
)
from sagalog.testing import MemoryDatabase, crash_points
from tests.crash_matrix import Shop, acrashes, crashes
from tests.outside import LANDS_LATE, Manners
from tests.scenarios import Scenario, scenarios, varied
from tests.transactional_matrix import Stage as Transactional
from tests.transactional_matrix import scenarios as transactional
from tests.troubled import Ask

SLICE = list(scenarios(3))[::23]
VARIED = list(varied(2))[::67]
TRANSACTIONAL = list(transactional(2))[::8]
LATE = [scenario for scenario in scenarios(2) if scenario.trouble in LANDS_LATE][::7]
HARSH = Manners(knows_keys=False, refuses=False)
SHORT = [
    Scenario(2, "", 0, "resume", "compensate", retried=True),
    Scenario(2, "after", 1, "compensate", "compensate", retried=False),
    Scenario(2, "raises", 1, "resume", "stop", retried=True),
    Scenario(2, "undo_raises", 0, "compensate", "stop", retried=True),
    Scenario(2, "timeout", 1, "resume", "compensate", retried=True),
]


def named(scenario: Scenario) -> str:
    return "-".join(str(getattr(scenario, word)) for word in scenario.__dataclass_fields__)


def judge(cases: list[tuple[Any, list[str]]]) -> None:
    assert len(cases) > 3
    bad = [f"{crash} (only={crash.stops}): {problems}" for crash, problems in cases if problems]
    assert bad == []


async def agathered(scenario: Scenario, open_log: Callable[[], Any] | None = None, **how: Any) -> list[Any]:
    return [case async for case in acrashes(scenario, open_log, **how)]


@pytest.mark.parametrize("manners", [Manners(), HARSH], ids=["outside that knows keys", "outside that knows none"])
@pytest.mark.parametrize("scenario", SLICE, ids=named)
def test_a_saga_stopped_anywhere_is_recovered_as_promised(scenario: Scenario, manners: Manners) -> None:
    judge(list(crashes(scenario, manners=manners)))


@pytest.mark.parametrize("scenario", SLICE[::4], ids=named)
def test_a_saga_stopped_anywhere_is_recovered_as_promised_async(scenario: Scenario) -> None:
    judge(asyncio.run(agathered(scenario, manners=HARSH)))


@pytest.mark.parametrize("scenario", VARIED, ids=named)
def test_pivots_reads_steps_side_by_side_and_undos_by_hand_are_recovered_as_promised(scenario: Scenario) -> None:
    judge(list(crashes(scenario, manners=HARSH)))
    judge(asyncio.run(agathered(scenario, manners=HARSH)))


@pytest.mark.parametrize("scenario", LATE, ids=named)
def test_what_got_no_answer_and_lands_late_is_undone_after_it_landed(scenario: Scenario) -> None:
    judge(list(crashes(scenario, manners=Manners(refuses=False, late=True))))
    judge(asyncio.run(agathered(scenario, manners=Manners(refuses=False, late=True))))


@pytest.mark.parametrize("how", ["zombie", "repeat"])
@pytest.mark.parametrize("scenario", SHORT, ids=named)
def test_zombies_and_repeated_requests_change_nothing(scenario: Scenario, how: str) -> None:
    judge(list(crashes(scenario, **{how: True})))
    judge(asyncio.run(agathered(scenario, **{how: True})))


@pytest.mark.parametrize("scenario", SHORT[:3], ids=named)
def test_a_recovery_that_is_stopped_anywhere_is_recovered_too(scenario: Scenario) -> None:
    small = Scenario(1, scenario.trouble, 0, scenario.on_crash, scenario.on_unknown, scenario.retried)
    judge(list(crashes(small, again=True)))


@pytest.mark.parametrize("scenario", SHORT, ids=named)
def test_a_saga_on_postgres_stopped_anywhere_is_recovered_as_promised(scenario: Scenario, postgres_url: str) -> None:
    engine = create_engine(postgres_url)

    def open_log() -> SagaLog:
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM saga_step"))
            connection.execute(text("DELETE FROM saga"))
        return SagaLog(engine)

    judge(list(crashes(scenario, open_log)))
    engine.dispose()


def test_a_saga_on_asyncpg_stopped_anywhere_is_recovered_as_promised(postgres_url: str) -> None:
    async def go() -> None:
        engine = create_async_engine(postgres_url.replace("+psycopg", "+asyncpg"))

        async def open_log() -> AsyncSagaLog:
            async with engine.begin() as connection:
                await connection.execute(text("DELETE FROM saga_step"))
                await connection.execute(text("DELETE FROM saga"))
            return AsyncSagaLog(engine)

        judge(await agathered(SHORT[1], open_log))
        await engine.dispose()

    asyncio.run(go())


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_transactional_steps_stopped_anywhere_commit_with_their_rows_or_not_at_all(
    migrated_url: str, asynchronous: bool
) -> None:
    async def go() -> None:
        stage = Transactional(migrated_url, asynchronous=asynchronous)
        for scenario in TRANSACTIONAL:
            if asynchronous:
                judge([case async for case in stage.acrashes(scenario)])
            else:
                judge(list(stage.crashes(scenario)))
        await stage.close()

    asyncio.run(go())


# The kit


def test_crash_points_stops_before_and_after_every_write_and_every_call() -> None:
    shop = Shop(Scenario(1, "", 0, "compensate", "compensate", retried=False))
    points = [crash.points for crash in crash_points(shop.build, shop.start)]
    assert points == [
        ("before writing run",), ("after writing run",),
        ("before writing dispatch of step 0",), ("after writing dispatch of step 0",),
        ("before calling Do of step 0",), ("after calling Do of step 0",),
        ("before writing finish_step of step 0",), ("after writing finish_step of step 0",),
        ("before writing complete",), ("after writing complete",),
        (),
    ]  # fmt: skip


def test_a_case_is_replayed_by_its_stops() -> None:
    shop = Shop(Scenario(1, "", 0, "compensate", "compensate", retried=False))
    crash = list(crash_points(shop.build, shop.start, again=True))[-3]
    (same,) = crash_points(shop.build, shop.start, only=crash.stops)
    assert (same.points, same.saga.state) == (crash.points, crash.saga.state)  # type: ignore[union-attr]


def test_crash_points_finds_a_handler_that_is_not_what_it_says() -> None:
    """An outside that forgets keys does what is repeated twice: the account shows it."""
    shop = Shop(Scenario(1, "raises", 0, "compensate", "stop", retried=True), manners=Manners(knows_keys=False))
    effects = []
    for _ in crash_points(shop.build, shop.start):
        effects.append([line.verb for line in shop.outside.account() if line.what == "done"].count("do"))
    assert max(effects) == 2


def test_what_start_raised_is_handed_over() -> None:
    shop = Shop(Scenario(1, "rejects", 0, "compensate", "stop", retried=False))
    last = list(crash_points(shop.build, shop.start))[-1]
    assert isinstance(last.result, Exception)
    assert isinstance(last.result.__cause__.__cause__, StepRejected)  # type: ignore[union-attr]


def test_a_start_that_waits_for_its_worker_is_stopped_everywhere() -> None:
    def build(log: SagaLog) -> SagaCoordinator:
        coordinator = SagaCoordinator(log, CommandBus())

        @coordinator.saga("works")
        def works(ctx: SagaContext) -> int:
            ctx.now()
            return 1

        return coordinator

    def start(coordinator: SagaCoordinator) -> int:
        saga_id = coordinator.submit("works")
        with coordinator.worker(poll=0.01):
            return int(coordinator.wait(saga_id))

    for crash in crash_points(build, start):
        assert crash.saga is None or crash.saga.state in ("submitted", "completed", "compensated"), crash


def test_what_ends_a_test_in_start_ends_it() -> None:
    def start(coordinator: SagaCoordinator) -> None:
        pytest.fail("the order is wrong")

    with pytest.raises(pytest.fail.Exception, match="the order is wrong"):
        list(crash_points(lambda log: SagaCoordinator(log, CommandBus()), start))


def building(bus: CommandBus | None = None) -> Callable[[SagaLog], SagaCoordinator]:
    def build(log: SagaLog) -> SagaCoordinator:
        coordinator = SagaCoordinator(log, bus or CommandBus())
        coordinator.saga("empty")(lambda ctx: None)
        coordinator.saga("asks")(lambda ctx: ctx.dispatch(Ask()))
        return coordinator

    return build


def test_a_build_that_returns_no_coordinator_is_told() -> None:
    async def over(points: Any) -> None:
        async for _ in points:
            raise AssertionError

    for nothing in (lambda log: None, lambda log: log):
        with pytest.raises(UnusableHandler, match="Return the coordinator"):
            list(crash_points(nothing, lambda coordinator: coordinator.run("empty")))
        with pytest.raises(UnusableHandler, match="Return the coordinator"):
            asyncio.run(over(crash_points(nothing, lambda coordinator: coordinator.run("empty"))))


def test_a_transactional_handler_is_not_stopped_in_a_log_that_cannot_carry_it() -> None:
    bus = CommandBus()

    @bus.handler(transactional=True, pivot=True)
    def do(cmd: Ask, session: Session) -> None:
        session.execute(text("SELECT 1"))

    def start(coordinator: SagaCoordinator) -> Any:
        return coordinator.run("asks")

    for open_log in (None, SagaLog.open_in_memory):
        with pytest.raises(UnusableBind, match="Give open_log="):
            list(crash_points(building(bus), start, open_log=open_log))
    assert len(list(crash_points(building(bus), lambda coordinator: coordinator.run("empty")))) == 5  # asks nothing
    kept: list[MemoryDatabase] = []

    def open_kept() -> SagaLog:
        kept.append(MemoryDatabase())
        return SagaLog(kept[-1].engine())

    crashes = list(crash_points(building(bus), start, open_log=open_kept))
    assert {crash.saga.state for crash in crashes if crash.saga is not None} == {"completed", "compensated"}


def test_the_run_that_was_not_stopped_is_repeated_by_its_stops_too() -> None:
    *_, last = crash_points(building(), lambda coordinator: coordinator.run("empty"))
    (same,) = crash_points(building(), lambda coordinator: coordinator.run("empty"), only=last.stops)
    assert (last.stops, same.points, same.saga.state) == ((), (), "completed")  # type: ignore[union-attr]


def test_a_stop_that_the_run_does_not_come_to_is_told() -> None:
    with pytest.raises(UnusableHandler, match="came to 0 of the stops"):
        next(iter(crash_points(building(), lambda coordinator: coordinator.run("empty"), only=(99,))))
