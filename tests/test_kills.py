"""Real processes are killed, or stopped and woken late: a slice of `kill_matrix`, and many processes at one log."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.kill_matrix import SLOW, kills, zombies
from tests.many_processes import keys_together, recovered_together, workers_together
from tests.many_tasks import tasks_killed, tasks_woken
from tests.processes import World
from tests.scenarios import Scenario

_warm: set[str] = set()


@pytest.fixture(params=["sqlite-full", "sqlite-normal", "postgres"])
def world(request: pytest.FixtureRequest, tmp_path: Path, sqlite_template: bytes) -> World:
    """A database and an account of the outside, which processes share."""
    if request.param == "postgres":
        made = World(tmp_path, request.param, request.getfixturevalue("postgres_url"))
    else:
        durability = "full" if request.param == "sqlite-full" else "normal"
        made = World(tmp_path, request.param, None, sqlite_template, durability)
    if request.param not in _warm:
        made.warm()
        _warm.add(request.param)
    return made


UNDONE = Scenario(2, "raises", 1, "compensate", "stop", retried=False)
IN_DOUBT = Scenario(1, "timeout", 0, "compensate", "compensate", retried=False)
GONE_ON_WITH = Scenario(2, "after", 0, "resume", "compensate", retried=True)


@pytest.mark.parametrize("scenario", [UNDONE, GONE_ON_WITH], ids=["undone", "gone on with"])
def test_a_saga_killed_at_any_point_is_brought_to_its_end(world: World, scenario: Scenario) -> None:
    cases = list(kills(world, scenario))
    assert len(cases) > 15
    assert [str(case) for case in cases if case.problems] == []


def test_what_a_killed_process_had_sent_is_not_undone_while_it_may_be_under_way(world: World) -> None:
    cases = list(kills(world, IN_DOUBT, manners=SLOW))
    assert len(cases) > 10
    assert [str(case) for case in cases if case.problems] == []


def test_a_recovery_that_is_killed_too_is_recovered(world: World) -> None:
    scenario = Scenario(1, "raises", 0, "compensate", "compensate", retried=False)
    cases = [case for case in itertools.islice(kills(world, scenario, again=True), 30) if len(case.points) == 2]
    assert len(cases) > 10
    assert [str(case) for case in cases if case.problems] == []


@pytest.mark.parametrize("scenario", [UNDONE, IN_DOUBT], ids=["undone", "in doubt"])
def test_a_process_that_sleeps_through_a_take_over_writes_nothing_afterwards(world: World, scenario: Scenario) -> None:
    cases = list(zombies(world, scenario))
    assert len(cases) > 10
    assert [str(case) for case in cases if case.problems] == []


@pytest.mark.parametrize("world", ["sqlite-normal", "postgres"], indirect=True)
def test_a_process_that_wakes_up_while_another_recovers_its_saga_writes_nothing(world: World) -> None:
    """The saga is open still, and only the epoch keeps its former owner out."""
    cases = list(zombies(world, Scenario(1, "raises", 0, "compensate", "stop", retried=False), within=True))
    assert len(cases) > 40
    assert [str(case) for case in cases if case.problems] == []


def test_many_processes_recover_each_saga_once(world: World) -> None:
    assert recovered_together(world, sagas=100, processes=4) == []


def test_many_processes_run_each_key_once(world: World) -> None:
    assert keys_together(world, keys=50, processes=4) == []


def test_many_workers_run_each_submitted_saga_once_and_outlive_one_that_is_killed(world: World) -> None:
    assert workers_together(world, sagas=120, processes=3, least_share=0.02) == []


def test_a_process_killed_at_any_statement_of_its_tasks_has_lost_nothing_that_they_were_told(world: World) -> None:
    for at in itertools.count(3, 9):
        killed, problems = tasks_killed(world, 6, at)
        assert (at, problems) == (at, [])
        if not killed:
            break
    assert at > 40


@pytest.mark.parametrize("world", ["postgres"], indirect=True)  # stopped in a transaction, on SQLite it locks the file
@pytest.mark.parametrize("at", [2, 40, 61])
def test_a_process_that_sleeps_through_the_take_over_of_its_tasks_writes_nothing_afterwards(
    world: World, at: int
) -> None:
    assert tasks_woken(world, 6, at) == (True, [])
