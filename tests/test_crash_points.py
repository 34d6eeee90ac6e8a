"""A slice of the crash matrix, on every road, and what `crash_points` gives to a user's own tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from sagalog import AsyncSagaLog, CommandBus, SagaContext, SagaCoordinator, SagaLog, StepRejected
from sagalog.testing import crash_points
from tests.crash_matrix import Shop, acrashes, crashes
from tests.outside import LANDS_LATE, Manners
from tests.scenarios import Scenario, scenarios, varied
from tests.transactional_matrix import Stage as Transactional
from tests.transactional_matrix import scenarios as transactional

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
