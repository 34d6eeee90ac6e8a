"""Handlers that take too long, and processes that are told to end: what is given up, what is kept, what is undone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from sagalog import (
    Command,
    CommandBus,
    LeaseLost,
    RecoveryReport,
    SagaContext,
    SagaCoordinator,
    SagaLog,
    SagaRecord,
    StepInfo,
)
from tests.coordinating import row_held
from tests.processes import LONGEST, Child, Life, records, until


class Hold(Command[None]):
    number: int


class LetGo(Command[None]):
    number: int


class Stage:
    """A saga of two steps over one log; a handler waits until it is let go, and the other side notes what it is asked.

    Attributes:
        asked: The verbs and keys, in order.
        entered: Set when the second step's handler has begun.
        let_go: What it waits for.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[tuple[str, str]] = []
        self.entered = threading.Event()
        self.let_go = threading.Event()
        self.interpose: Any = None

    def open(self) -> SagaLog:
        """The log, for one process."""
        return SagaLog.open(self.url.removeprefix("sqlite:///"))

    def coordinator(self, log: SagaLog, *, timeout: float = 300.0, lease: float = 30.0) -> SagaCoordinator:
        """A process's; its handlers give up after `timeout` seconds."""
        bus = CommandBus()

        @bus.handler(timeout=timeout, settle=0, on_unknown="compensate")
        def hold(cmd: Hold, step: StepInfo) -> None:
            self.asked.append(("hold", step.idempotency_key))
            if cmd.number == 1:
                self.entered.set()
                # Not one long wait: Python would see a signal that comes as it begins only at its end.
                until(self.let_go.is_set)

        @bus.handler
        def let_go(cmd: LetGo, step: StepInfo) -> None:
            self.asked.append(("let go", step.idempotency_key))

        @bus.compensation(Hold)
        def undone(cmd: Hold, output: None) -> LetGo:
            return LetGo(number=cmd.number)

        made = SagaCoordinator(log, bus, lease=lease)
        made.interpose = self.interpose

        @made.saga("holding")
        def holding(ctx: SagaContext) -> str:
            for number in range(2):
                ctx.dispatch(Hold(number=number))
            return "held"

        return made

    def sql(self, statement: str) -> list[Any]:
        """What a stranger sees."""
        engine = create_engine(self.url)
        try:
            with engine.begin() as connection:
                result = connection.execute(text(statement))
                return [tuple(row) for row in result] if result.returns_rows else []
        finally:
            engine.dispose()


def held(coordinator: SagaCoordinator) -> Any:
    """Run the saga."""
    return coordinator.run(coordinator._core.definitions["holding"].function)


@pytest.fixture
def stage(migrated_url: str) -> Iterator[Stage]:
    """On both databases."""
    made = Stage(migrated_url)
    yield made
    made.let_go.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def recovered(coordinator: SagaCoordinator) -> RecoveryReport:
    """The first report in which something was brought to an end."""

    def recover() -> RecoveryReport | None:
        report = coordinator.recover()
        return report if report.resolved else None

    return until(recover)  # type: ignore[no-any-return]


# A handler that hangs


def test_a_saga_whose_handler_hangs_is_recovered_by_others_and_lost_to_its_process(
    stage: Stage, pool: ThreadPoolExecutor
) -> None:
    with stage.open() as log, stage.open() as other_log:
        first, other = stage.coordinator(log, timeout=0.3), stage.coordinator(other_log)
        running = pool.submit(held, first)
        assert stage.entered.wait(LONGEST)
        report = recovered(other)
        assert report.compensated == [1]
        assert not running.done()
        before = records(log)
        stage.let_go.set()
        assert isinstance(running.exception(LONGEST), LeaseLost)
        assert records(log) == before
        [saga] = before
        assert (saga.state, saga.recoveries) == ("compensated", 1)
        assert saga.steps[1].error is not None
        assert "timeout" in saga.steps[1].error
        assert [verb for verb, _ in stage.asked] == ["hold", "hold", "let go", "let go"]
        assert held(first) == "held"
        first.close()
        other.close()


def test_a_handler_in_time_is_not_given_up(stage: Stage) -> None:
    stage.let_go.set()
    with stage.open() as log, stage.coordinator(log, timeout=60) as coordinator:
        assert held(coordinator) == "held"
        [saga] = records(log)
        assert (saga.state, saga.epoch) == ("completed", 1)


# A lease that is shorter than a handler


def test_a_lease_is_kept_while_a_handler_runs_longer_than_it(stage: Stage, pool: ThreadPoolExecutor) -> None:
    with (
        stage.open() as log,
        stage.open() as other_log,
        stage.coordinator(log, lease=1.0) as first,
        stage.coordinator(other_log) as other,
    ):
        running = pool.submit(held, first)
        assert stage.entered.wait(LONGEST)
        lease = f"SELECT lease_until FROM saga_executor WHERE executor_id = '{first.executor_id}'"
        [(began,)] = stage.sql(lease)
        until(lambda: stage.sql(lease)[0][0] > began + 1500)
        assert other.recover().resolved == 0
        stage.let_go.set()
        assert running.result(LONGEST) == "held"
        assert [(saga.state, saga.recoveries) for saga in records(log)] == [("completed", 0)]


def test_a_lease_is_kept_while_another_transaction_holds_the_row_of_a_saga_that_is_to_be_given_up(
    postgres_url: str, pool: ThreadPoolExecutor
) -> None:
    stage = Stage(postgres_url)
    with stage.open() as log, stage.coordinator(log, timeout=0.3, lease=3.0) as coordinator:
        running = pool.submit(held, coordinator)
        assert stage.entered.wait(LONGEST)
        lease = f"SELECT lease_until FROM saga_executor WHERE executor_id = '{coordinator.executor_id}'"
        with row_held(postgres_url, 1):
            [(began,)] = stage.sql(lease)
            until(lambda: stage.sql(lease)[0][0] > began + 3000)
            assert stage.sql("SELECT epoch FROM saga") == [(1,)]
        until(lambda: stage.sql("SELECT epoch FROM saga") == [(2,)])
        stage.let_go.set()
        assert isinstance(running.exception(LONGEST), LeaseLost)


def test_a_lease_that_ran_out_is_renewed_late_and_keeps_what_nobody_took(
    stage: Stage, pool: ThreadPoolExecutor
) -> None:
    with stage.open() as log, stage.coordinator(log) as first:
        running = pool.submit(held, first)
        assert stage.entered.wait(LONGEST)
        stage.sql("UPDATE saga_executor SET lease_until = 0")
        stage.let_go.set()
        assert running.result(LONGEST) == "held"


# A worker that is shut down


def test_what_runs_longer_than_the_grace_is_recovered_at_once_and_its_thread_writes_nothing(stage: Stage) -> None:
    with stage.open() as log, stage.open() as other_log:
        first, other = stage.coordinator(log), stage.coordinator(other_log)
        worker = first.worker(poll=0.05)
        worker.start()
        saga_id = first.submit("holding")
        assert stage.entered.wait(LONGEST)
        [hanging] = [thread for thread in threading.enumerate() if thread.name == "sagalog-saga"]
        worker.shutdown(grace=0.1)
        # Its lease is not waited for; only what may still be under way is.
        stage.sql("UPDATE saga_step SET deadline_at = 0 WHERE state = 'pending'")
        report = other.recover()
        assert report.compensated == [saga_id]
        before = records(log)
        stage.let_go.set()
        hanging.join(LONGEST)
        assert not hanging.is_alive()
        assert records(log) == before
        assert [verb for verb, _ in stage.asked] == ["hold", "hold", "let go", "let go"]
        other.close()


def test_a_shutdown_waits_for_what_ends_within_its_grace(stage: Stage, pool: ThreadPoolExecutor) -> None:
    with stage.open() as log:
        coordinator = stage.coordinator(log)
        worker = coordinator.worker(poll=0.05)
        worker.start()
        saga_id = coordinator.submit("holding")
        assert stage.entered.wait(LONGEST)
        ending: Future[None] = pool.submit(worker.shutdown, LONGEST)
        with pytest.raises(TimeoutError):
            ending.result(0.2)
        stage.let_go.set()
        ending.result(LONGEST)
        assert log.get(saga_id).state == "completed"
        assert stage.sql("SELECT count(*) FROM saga_executor") == [(0,)]


# A process that is told to end


def interrupted(stage: Stage, number: signal.Signals, handle: Any) -> tuple[str, list[SagaRecord]]:
    """A process that is sent a signal while its handler runs: what its `run` raised, and the log afterwards."""

    def live(say: Callable[[Any], None]) -> str:
        if handle is not None:
            signal.signal(number, handle)
        log = stage.open()
        coordinator = stage.coordinator(log)
        threading.Thread(target=lambda: (stage.entered.wait(), say("entered"))).start()
        try:
            held(coordinator)
        except BaseException as error:
            return type(error).__name__
        return "nothing"

    child = Child(live)
    assert child.next_answer() == "entered"
    child.send(number)
    said = child.answers()
    with stage.open() as log:
        return said[0] if said else f"ended by {signal.Signals(os.WTERMSIG(child.status or 0)).name}", records(log)


def _exit(*_: Any) -> None:
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("number", "handle", "raised"),
    [(signal.SIGINT, None, "KeyboardInterrupt"), (signal.SIGTERM, _exit, "SystemExit")],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_process_that_is_told_to_end_undoes_nothing_and_gives_its_saga_back(
    stage: Stage, number: signal.Signals, handle: Any, raised: str
) -> None:
    told, [saga] = interrupted(stage, number, handle)
    assert told == raised
    assert (saga.state, saga.executor_id, saga.recoveries) == ("running", None, 0)
    assert [step.state for step in saga.steps] == ["succeeded", "pending"]
    assert recovery_of(stage).compensated == [saga.saga_id]
    assert [verb for verb, _ in stage.asked] == ["let go", "let go"]


def test_a_process_that_is_ended_by_a_signal_leaves_its_saga_to_its_leases_end(stage: Stage) -> None:
    told, [saga] = interrupted(stage, signal.SIGTERM, None)
    assert told == "ended by SIGTERM"
    assert (saga.state, saga.executor_id is None) == ("running", False)
    assert recovery_of(stage).resolved == 0
    stage.sql("UPDATE saga_executor SET lease_until = 0")
    assert recovery_of(stage).compensated == [saga.saga_id]


def recovery_of(stage: Stage) -> RecoveryReport:
    """Another process recovers, after the time in which something of a step may still be under way."""
    stage.sql("UPDATE saga_step SET deadline_at = 0 WHERE state = 'pending'")
    with stage.open() as log, stage.coordinator(log) as coordinator:
        return coordinator.recover()


def test_a_process_interrupted_at_any_point_leaves_a_saga_that_others_recover_at_once(stage: Stage) -> None:
    stage.let_go.set()
    points = 0
    while True:
        at = points

        def live(say: Callable[[Any], None], at: int = at) -> str:
            stage.interpose = Life(at, "interrupt", say)
            with stage.open() as log, stage.coordinator(log) as coordinator, suppress(KeyboardInterrupt):
                held(coordinator)
            return "ended"

        said = Child(live).answers()
        if len(said) == 1:
            break
        points += 1
        recovery_of(stage)
        with stage.open() as log:
            assert log.unresolved_sagas() == [], said[0]
    assert points > 10
    assert set(stage.sql("SELECT DISTINCT state FROM saga")) == {("completed",), ("compensated",)}
