"""What operators look at and do, on every bind and both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sagalog import InvalidTransition, PayloadError, SagaOutcome

HOUR = 3_600_000


def test_states_are_counted_with_the_start_of_the_oldest(road: Any) -> None:
    log = road.log
    for saga_id in (1, 2, 3):
        log.start_saga(saga_id, "order", None)
    log.terminate(2, SagaOutcome.completed())
    road.sql("UPDATE saga SET started_at = 5000 WHERE saga_id = 3")
    found = {row.state: row for row in log.state_counts()}
    assert {state: row.count for state, row in found.items()} == {"running": 2, "completed": 1} == log.counts()
    assert found["running"].oldest_started_at == datetime(1970, 1, 1, 0, 0, 5, tzinfo=UTC)


def test_executors_are_listed_with_their_leases_and_what_they_hold(road: Any) -> None:
    log = road.log
    assert log.executors() == []
    now = int(datetime.now(UTC).timestamp() * 1000)
    rows = [("alive", "web-1", now + HOUR), ("dead", None, now - HOUR)]
    for executor_id, label, until in rows:
        road.sql(
            "INSERT INTO saga_executor (executor_id, label, started_at, lease_until) "
            "VALUES (:id, :label, :now, :until)",
            id=executor_id, label=label, now=now, until=until,
        )  # fmt: skip
    for saga_id in (1, 2):
        log.start_saga(saga_id, "order", None)
    log.terminate(2, SagaOutcome.completed())
    road.commit()
    road.sql("UPDATE saga SET executor_id = 'alive'")
    alive, dead = log.executors()
    assert (alive.executor_id, alive.label, alive.open_sagas, alive.is_alive) == ("alive", "web-1", 1, True)
    assert (dead.executor_id, dead.open_sagas, dead.is_alive) == ("dead", 0, False)
    assert abs(alive.read_at - datetime.now(UTC)) < timedelta(minutes=1)


def test_the_size_grows_with_what_is_stored(road: Any) -> None:
    before = road.log.size()
    assert before > 0
    road.log.start_saga(1, "order", {"text": "".join(chr(97 + (n * n) % 26) for n in range(500_000))})
    assert road.log.size() > before


def test_prunable_counts_what_prune_deletes(road: Any) -> None:
    log = road.log
    for saga_id in range(1, 8):
        log.start_saga(saga_id, "order", None)
        if saga_id != 2:
            log.terminate(saga_id, SagaOutcome.completed())
    limits: dict[str, Any] = {"keep_last": 2, "older_than": timedelta(0)}
    assert log.prunable(**limits) == 4
    assert log.prunable(keep_last=2, older_than=timedelta(days=1)) == 0
    assert log.prunable() == 0
    assert log.prune(**limits, limit=3) == 3
    assert log.prunable(**limits) == 1
    assert log.prune(**limits, limit=0) == 0
    assert log.prune(**limits) == 1
    assert log.prunable(**limits) == 0
    assert [saga.saga_id for saga in log.find()] == [7, 6, 2]
    with pytest.raises(PayloadError):
        log.prunable(keep_last=-1)
    with pytest.raises(PayloadError):
        log.prune(limit=-1)


def test_a_cancel_by_an_actor_is_audited_in_the_same_transaction(road: Any) -> None:
    log = road.log
    log.start_saga(1, "order", None)
    log.request_cancel(1, "the customer called", actor="grace")
    log.request_cancel(1, "the customer called", actor="grace")
    log.request_cancel(1, "the customer called")
    (row,) = log.audit(1)
    assert (row.action, row.actor, row.note) == ("cancel", "grace", "the customer called")
    assert (row.state_before, row.state_after, row.step_index) == ("running", "running", None)
    assert log.get(1).cancel_reason == "the customer called"


def test_cancelling_a_saga_that_did_not_run_audits_its_end(road: Any) -> None:
    log = road.log
    log.start_saga(1, "order", None)
    road.commit()
    road.sql("UPDATE saga SET state = 'submitted'")
    log.request_cancel(1, "not wanted", actor="grace")
    (row,) = log.audit(1)
    assert (row.state_before, row.state_after) == ("submitted", "compensated")
    assert log.get(1).state == "compensated"


def test_a_refused_cancel_leaves_no_audit(road: Any) -> None:
    log = road.log
    for saga_id in (1, 2):
        log.start_saga(saga_id, "order", None)
    log.terminate(1, SagaOutcome.completed())
    with pytest.raises(InvalidTransition):
        log.request_cancel(1, "too late", actor="grace")
    log.request_cancel(2, "first", actor="grace")
    for reason, actor in (("second", "grace"), ("first", "ada")):
        with pytest.raises(InvalidTransition, match="asked to cancel already"):
            log.request_cancel(2, reason, actor=actor)
    for reason, actor in ((" ", "grace"), ("why", "")):
        with pytest.raises(PayloadError):
            log.request_cancel(2, reason, actor=actor)
    assert log.audit(1) == []
    assert len(log.audit(2)) == 1


def test_a_program_cancels_without_an_audit_row(log: Any) -> None:
    log.start_saga(1, "order", None)
    log.request_cancel(1, "deadline")
    assert log.audit(1) == []
