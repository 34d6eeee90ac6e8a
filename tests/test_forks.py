"""A coordinator that was used before a fork, as a server that loads the application first does, and after it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sagalog import Command, CommandBus, LeaseLost, SagaContext, SagaCoordinator, SagaLog, UnusableBind
from tests.processes import LONGEST, Child, forked, records


class Work(Command[None]):
    number: int


class Step:
    """What the saga's only step does, changed by each test."""

    def __init__(self) -> None:
        self.work: Any = lambda: None


@pytest.fixture
def step() -> Step:
    return Step()


@pytest.fixture
def coordinator(own_log: SagaLog, step: Step) -> Iterator[SagaCoordinator]:
    with built(own_log, step) as made:
        yield made


def built(log: SagaLog, step: Step) -> SagaCoordinator:
    """A coordinator with a saga "one", whose step does what the test says."""
    bus = CommandBus()

    @bus.handler(pivot=True)
    def work(cmd: Work) -> None:
        step.work()

    made = SagaCoordinator(log, bus)

    @made.saga("one")
    def one(ctx: SagaContext, number: int) -> int:
        ctx.dispatch(Work(number=number))
        return number

    return made


def one(coordinator: SagaCoordinator) -> Any:
    """The saga's function."""
    return coordinator._core.definitions["one"].function


def answer_of(child: Child) -> Any:
    [answer] = child.answers()
    return answer


def test_a_child_is_another_executor(own_log: SagaLog, coordinator: SagaCoordinator) -> None:
    coordinator.run(one(coordinator), 1)

    def child(say: Any) -> tuple[str, int]:
        before = coordinator.executor_id
        result = coordinator.run(one(coordinator), 2)
        assert coordinator.executor_id == before
        return before, result

    other, result = answer_of(Child(child))
    assert result == 2
    assert other != coordinator.executor_id
    assert [saga.executor_id for saga in records(own_log)] == [coordinator.executor_id, other]


def test_children_and_parent_use_the_log_at_the_same_time(own_log: SagaLog, coordinator: SagaCoordinator) -> None:
    coordinator.run(one(coordinator), 0)

    def child(say: Any) -> list[int]:
        return [coordinator.run(one(coordinator), n) for n in range(10)]

    children = [Child(child) for _ in range(4)]
    assert [coordinator.run(one(coordinator), n) for n in range(10)] == list(range(10))
    assert [answer_of(each) for each in children] == [list(range(10))] * 4
    assert own_log.counts() == {"completed": 51}


def test_a_childs_recovery_leaves_the_parents_sagas_alone(
    own_log: SagaLog, coordinator: SagaCoordinator, step: Step
) -> None:
    reports: list[Any] = []
    step.work = lambda: reports.append(answer_of(Child(lambda say: coordinator.recover())))
    assert coordinator.run(one(coordinator), 1) == 1
    assert reports[0].resolved == 0
    assert not reports[0].left
    assert [(saga.state, saga.recoveries) for saga in records(own_log)] == [("completed", 0)]


def test_a_child_that_exits_in_a_handler_does_not_give_the_parents_saga_away(
    own_log: SagaLog, coordinator: SagaCoordinator, step: Step
) -> None:
    def fork() -> None:
        # Not `Child`: the exit passes through all that the child inherited of the saga.
        pid = forked()
        if pid == 0:
            sys.exit(0)
        os.waitpid(pid, 0)
        [saga] = records(own_log)
        seen.append((saga.state, saga.executor_id))

    seen: list[Any] = []
    step.work = fork
    parent = os.getpid()
    try:
        assert coordinator.run(one(coordinator), 1) == 1
    finally:
        if os.getpid() != parent:
            os._exit(0)
    assert seen == [("running", coordinator.executor_id)]


def test_a_child_that_returns_from_a_handler_has_lost_the_saga(
    own_log: SagaLog, coordinator: SagaCoordinator, step: Step
) -> None:
    reading, writing = os.pipe()
    parent = os.getpid()
    children: list[int] = []

    def fork() -> None:
        pid = forked()
        if pid:
            children.append(pid)

    step.work = fork
    try:
        result: Any = coordinator.run(one(coordinator), 1)
    except LeaseLost as lost:
        result = lost
    finally:
        if os.getpid() != parent:
            os.write(writing, type(result).__name__.encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(children[0], 0)
    assert os.read(reading, 100) == b"LeaseLost"
    os.close(reading)
    assert result == 1
    assert own_log.counts() == {"completed": 1}


def test_a_worker_starts_in_the_child_though_it_ran_in_the_parent(
    own_log: SagaLog, coordinator: SagaCoordinator
) -> None:
    worker = coordinator.worker(poll=0.05)
    worker.start()
    assert coordinator.wait(coordinator.submit("one", 1), timeout=LONGEST) == 1

    def child(say: Any) -> tuple[str, bool]:
        worker.shutdown()  # the parent's, in which nothing is to be done here
        worker.start()
        ran = {coordinator.submit("one", n): n for n in range(5)}
        assert {saga_id: coordinator.wait(saga_id, timeout=LONGEST) for saga_id in ran} == ran
        alive = any(thread.name == "sagalog-worker" for thread in threading.enumerate())
        executor_id = coordinator.executor_id
        worker.shutdown()
        return executor_id, alive

    here = coordinator.executor_id
    other, alive = answer_of(Child(child))
    assert alive
    assert coordinator.wait(coordinator.submit("one", 2), timeout=LONGEST) == 2
    worker.shutdown()
    assert own_log.counts() == {"completed": 7}
    assert other != here
    owners = {saga.executor_id for saga in records(own_log)}
    assert owners <= {other, here}


def test_a_child_may_be_closed_whatever_the_parents_threads_held_at_the_fork(coordinator: SagaCoordinator) -> None:
    coordinator.run(one(coordinator), 1)
    lease = coordinator._core.executor
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with lease.owed._changed:
            held.set()
            forked.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = Child(lambda say: coordinator.close())
    forked.set()
    thread.join()
    assert answer_of(child) is None
    assert coordinator.run(one(coordinator), 2) == 2


FORKING_AT_ONCE = """
import os, sys, threading
from sagalog import SagaLog

def fork():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)

forking = [threading.Thread(target=fork) for _ in range(2)]
log = SagaLog.open(sys.argv[1])
with log.unit_of_work():
    for thread in forking:
        thread.start()
    forking[1].join(0.5)  # one waits for the unit's end, and the other for that or for its turn
for thread in forking:
    thread.join()
log.create_saga("s", None)
print(log.counts())
os._exit(0)
"""


def test_a_log_works_on_after_two_threads_forked_at_once(sqlite_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKING_AT_ONCE, str(sqlite_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
    assert (ended.stdout, ended.stderr) == ("{'running': 1}\n", "")


def test_a_unit_of_work_that_is_open_at_a_fork_is_the_parents(sqlite_path: Path) -> None:
    with SagaLog.open(sqlite_path) as log, ExitStack() as unit:
        saga_id = unit.enter_context(log.unit_of_work()).create_saga("one", None)
        child = forked()
        if child == 0:
            try:
                unit.close()
            except UnusableBind:
                os._exit(7)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        unit.close()
        assert os.waitstatus_to_exitcode(status) == 7
        assert log.get(saga_id).name == "one"
