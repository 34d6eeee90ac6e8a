"""Many processes at one log: they recover what others left, or run the same keys; each effect is asked for once.

`test_kills.py` has a smaller size of it, `kill_matrix.py` the whole.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sagalog import CommandBus, SagaContext, SagaCoordinator, SagaFailed, SagaInProgress, SagaLog, SagaRecord, StepInfo
from sagalog.coordinator.effects import Effect
from sagalog.testing.lives import label_of
from tests.crash_matrix import Do, Done, Undo
from tests.processes import LONGEST, Child, World, records, time_passes

STEPS = 3
POINTS = 6 * STEPS + 2
"""A saga can be interrupted at so many: after its start, around each write and call, before its end."""


def noting(ledger: Path) -> Callable[[str, str], None]:
    """Writes a line of a verb and a key."""
    account = os.open(ledger, os.O_WRONLY | os.O_APPEND)

    def note(verb: str, key: str) -> None:
        os.write(account, f"{verb} {key} {os.getpid()}\n".encode())

    return note


def many_bus(note: Callable[[str, str], None], timeout: float | None = None) -> CommandBus:
    """Handlers that note each call; the outside knows no keys, so that nothing is hidden."""
    bus = CommandBus()

    @bus.handler(on_unknown="compensate", timeout=timeout)
    def do(cmd: Do, step: StepInfo) -> Done:
        note("do", step.idempotency_key)
        return Done(place=cmd.place)

    @bus.handler
    def undo(cmd: Undo, step: StepInfo) -> None:
        note("undo", step.idempotency_key)

    @bus.compensation(Do)
    def undone(cmd: Do, output: Done | None) -> Undo:
        return Undo(place=cmd.place)

    return bus


def build(
    log: SagaLog, note: Callable[[str, str], None], timeout: float | None = None, **options: Any
) -> tuple[SagaCoordinator, Any]:
    """A coordinator, and a saga of several steps."""
    coordinator = SagaCoordinator(log, many_bus(note, timeout), **options)

    @coordinator.saga("many")
    def many(ctx: SagaContext, number: int) -> int:
        for place in range(STEPS):
            ctx.dispatch(Do(place=place))
        return number

    return coordinator, many


def asked(ledger: Path) -> dict[str, Counter[str]]:
    """How often each key was noted, by verb."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for line in ledger.read_text().splitlines():
        verb, key, _ = line.split()
        found[verb][key] += 1
    return found


# Interrupted sagas


class _Interrupting:
    """Each thread's saga stays at a point of its own, until the process is killed."""

    def __init__(self) -> None:
        self.here = threading.local()
        self.arrived = threading.Semaphore(0)
        self._never = threading.Event()

    def __call__(self, effect: Effect[Any], answer: Callable[[Effect[Any]], Any]) -> Any:
        if label_of(effect) is None:
            return answer(effect)
        self._pass()
        given = answer(effect)
        self._pass()
        return given

    def _pass(self) -> None:
        number, self.here.passed = self.here.passed, self.here.passed + 1
        if number == self.here.stays_at:
            self.arrived.release()
            self._never.wait()


def _leave_interrupted(world: World, numbers: range) -> Child:
    """A process that is killed in the middle of many sagas."""

    def live(say: Callable[[Any], None]) -> None:
        log = world.open()
        coordinator, many = build(log, noting(world.ledger))
        failures: list[str] = []
        interrupting = _Interrupting()
        coordinator.interpose = interrupting

        def run(number: int) -> None:
            interrupting.here.passed, interrupting.here.stays_at = 0, 1 + number % POINTS
            try:
                coordinator.run(many, number)
            except BaseException:
                failures.append(traceback.format_exc())
            interrupting.arrived.release()

        for number in numbers:
            threading.Thread(target=run, args=(number,), daemon=True).start()
        for _ in numbers:
            interrupting.arrived.acquire()
        assert not failures, failures[0]
        os.kill(os.getpid(), signal.SIGKILL)

    return Child(live)


def leave_interrupted(world: World, sagas: int, processes: int) -> None:
    """So many sagas, of processes that are dead, at all points of a saga."""
    world.begin_anew()
    [_] = Child(lambda say: world.open(empty=True).close()).answers()
    each = sagas // processes
    for n in range(processes):
        # One after the other, for their pools together would take every connection of a server.
        child = _leave_interrupted(world, range(n * each, (n + 1) * each))
        child.answers()
        assert child.was_killed
    [_] = Child(lambda say: time_passes(world.open())).answers()


# Together


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """What each returns, in a process of its own; all begin at one moment.

    Args:
        works: Called once to make ready; what that returns is called at the moment.
    """

    def ready(work: Callable[[], Any]) -> Callable[[Callable[[Any], None]], Any]:
        def live(say: Callable[[Any], None]) -> Any:
            begin = work()
            os.kill(os.getpid(), signal.SIGSTOP)
            return begin()

        return live

    children = [Child(ready(work)) for work in works]
    try:
        for child in children:
            if not child.wait_stopped():
                child.answers()
        for child in children:
            child.send(signal.SIGCONT)
        return [child.answers()[-1] for child in children]
    finally:
        for child in children:
            child.end()


def recovered_together(world: World, sagas: int, processes: int) -> list[str]:
    """Interrupt many sagas and let processes recover them at once; what is wrong with how that went."""
    leave_interrupted(world, sagas, processes=10)

    def recoverer() -> Callable[[], list[int]]:
        log = world.open()
        coordinator, _ = build(log, noting(world.ledger))

        def recover() -> list[int]:
            resolved: list[int] = []
            while log.unresolved_sagas(limit=1):
                report = coordinator.recover()
                assert not report.errors, report.errors
                resolved += report.compensated + report.completed + list(report.failed_compensation)
            return resolved

        return recover

    shares = together([recoverer] * processes)
    [found] = Child(lambda say: records(world.open())).answers()
    calls = asked(world.ledger)
    problems = []
    ids = [saga_id for share in shares for saga_id in share]
    if sorted(ids) != [saga.saga_id for saga in found] or len(ids) != sagas:
        problems.append(f"{len(ids)} ends were reported, of {len(set(ids))} sagas; there are {len(found)}")
    problems += [f"saga {saga.saga_id} is {saga.state}" for saga in found if saga.state != "compensated"]
    problems += [f"saga {s.saga_id} was taken over {s.recoveries} times" for s in found if s.recoveries != 1]
    problems += [f"{key} was asked for {times} times" for key, times in calls["undo"].items() if times != 1]
    problems += [f"{key} was done {times} times" for key, times in calls["do"].items() if times != 1]
    problems += [f"{key} was not undone" for key in calls["do"] if f"{key}:undo" not in calls["undo"]]
    forward = sum(len([step for step in saga.steps if step.compensated_by is not None]) for saga in found)
    if forward != len(calls["undo"]):
        problems.append(f"{len(calls['undo'])} undos were asked for, of {forward} steps")
    return problems


def keys_together(world: World, keys: int, processes: int) -> list[str]:
    """Each process runs all the keys, half of them backwards; what is wrong with how that went."""
    world.begin_anew()
    [_] = Child(lambda say: world.open(empty=True).close()).answers()

    def runner(backwards: bool) -> Callable[[], Callable[[], dict[str, int]]]:
        def ready() -> Callable[[], dict[str, int]]:
            coordinator, many = build(world.open(), noting(world.ledger))

            def run() -> dict[str, int]:
                results: dict[str, int] = {}
                left = deque(range(keys - 1, -1, -1) if backwards else range(keys))
                while left:
                    number = left.popleft()
                    try:
                        results[f"key-{number}"] = coordinator.run(many, number, key=f"key-{number}")
                    except SagaInProgress:
                        left.append(number)
                return results

            return run

        return ready

    answers = together([runner(backwards=n % 2 == 1) for n in range(processes)])
    [found] = Child(lambda say: records(world.open())).answers()
    calls = asked(world.ledger)
    right = {f"key-{number}": number for number in range(keys)}
    problems = ["a process has other results" for answer in answers if answer != right]
    problems += [f"saga {saga.saga_id} is {saga.state}" for saga in found if saga.state != "completed"]
    if sorted(str(saga.key) for saga in found) != sorted(right):
        problems.append(f"{len(found)} sagas for {keys} keys")
    problems += [f"{key} was asked for {times} times" for key, times in calls["do"].items() if times != 1]
    if len(calls["do"]) != keys * STEPS or calls["undo"]:
        problems.append(f"{len(calls['do'])} effects and {len(calls['undo'])} undos of {keys * STEPS} steps")
    return problems


# Workers

_CONCURRENCY = 4
_LEASE = 2.0


def workers_together(world: World, sagas: int, processes: int, least_share: float = 0.25) -> list[str]:
    """Let workers run what was submitted before they looked and while they did, and kill one of them; what is wrong.

    Args:
        world: The database.
        sagas: How many.
        processes: How many workers.
        least_share: What each of them does at least of an even share.
    """
    world.begin_anew()
    [_] = Child(lambda say: world.open(empty=True).close()).answers()
    half = sagas // 2
    [early] = Child(lambda say: _submitted(world, half)).answers()
    dies_at = max(STEPS, int(least_share * sagas * STEPS / processes))  # so much it surely does, if it is served fairly
    workers = [_worker(world, dies_at if n == 0 else None) for n in range(processes)]
    try:
        for worker in workers:
            worker.next_answer()
        [late] = Child(lambda say: _submitted(world, sagas - half)).answers()
        [found] = Child(lambda say: _ended(world, early + late)).answers()
        victim, *others = workers
        victim.answers()
        for worker in others:
            worker.send(signal.SIGTERM)
            worker.answers()
    finally:
        for worker in workers:
            worker.end()
    problems = [] if victim.was_killed else ["the one that was to die did not"]
    if sorted(saga.saga_id for saga in found) != sorted(early + late):
        problems.append(f"{len(found)} sagas of {sagas} that were submitted")
    undone = [saga for saga in found if saga.state == "compensated"]
    problems += [f"saga {saga.saga_id} is {saga.state}" for saga in found if saga.state not in _ENDS]
    problems += [f"saga {saga.saga_id} was run by no dead process" for saga in undone if saga.recoveries != 1]
    if len(undone) > _CONCURRENCY:
        problems.append(f"{len(undone)} sagas were left by a process that runs {_CONCURRENCY}")
    calls = asked(world.ledger)
    problems += [f"{key} was asked for {n} times" for verb in calls.values() for key, n in verb.items() if n != 1]
    steps = sum(len(saga.steps) for saga in found if saga.state == "completed")
    if steps != (sagas - len(undone)) * STEPS:
        problems.append(f"{steps} steps of {sagas - len(undone)} completed sagas")
    shares = Counter(int(line.split()[2]) for line in world.ledger.read_text().splitlines() if line.startswith("do "))
    least = least_share * sagas * STEPS / processes
    problems += [f"a worker did {shares[worker.pid]} steps" for worker in others if shares[worker.pid] < least]
    return problems


_ENDS = ("completed", "compensated")


def _submitted(world: World, sagas: int) -> list[int]:
    coordinator, many = build(world.open(), noting(world.ledger))
    return [coordinator.submit(many, number) for number in range(sagas)]


def _ended(world: World, ids: list[int]) -> list[SagaRecord]:
    log = world.open()
    coordinator, _ = build(log, noting(world.ledger))
    for saga_id in ids:
        with suppress(SagaFailed):
            coordinator.wait(saga_id, timeout=LONGEST)
    return records(log)


def _worker(world: World, dies_at: int | None) -> Child:
    """A process with a worker, until SIGTERM; or until it dies, as it does the n-th step."""

    def live(say: Callable[[Any], None]) -> None:
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
        note = noting(world.ledger)
        done = itertools.count(1)

        def noted(verb: str, key: str) -> None:
            note(verb, key)
            if verb == "do" and next(done) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

        coordinator, _ = build(world.open(), noted, timeout=_LEASE, lease=_LEASE)
        say("looking")  # before it may die
        with coordinator.worker(concurrency=_CONCURRENCY, poll=0.1):
            stop.wait()

    return Child(live)
