"""What every operation does and refuses, on every bind and both databases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from sagalog import (
    InvalidTransition,
    KeyConflict,
    PayloadError,
    SagaExists,
    SagaLog,
    SagaNotFound,
    SagaOutcome,
    StepExists,
    StepNotFound,
)


class Reserve(BaseModel):
    sku: str
    count: int
    at: datetime | None = None


@dataclass
class Plain:
    text: str
    number: float


def test_a_saga_that_completes_is_read_back_as_it_was_written(log: Any) -> None:
    log.start_saga(7, "place_order", {"order": "Ünïcode \u2028 \"'\\"})
    log.start_step(7, 0, "reserve", Reserve(sku="a", count=2))
    log.finish_step(7, 0, [Plain("x", 1.5)])
    log.terminate(7, SagaOutcome.completed())
    record = log.get(7)
    assert (record.name, record.state, record.failure_reason) == ("place_order", "completed", None)
    assert record.input == {"order": "Ünïcode \u2028 \"'\\"}
    (step,) = record.steps
    assert (step.step_index, step.name, step.state) == (0, "reserve", "succeeded")
    assert step.decode_cmd(Reserve) == Reserve(sku="a", count=2)
    assert step.output == [{"text": "x", "number": 1.5}]
    assert step.decode_output(list[Plain]) == [Plain("x", 1.5)]
    now = datetime.now(UTC)
    for moment in (record.started_at, record.terminal_at, step.started_at, step.ended_at):
        assert timedelta() <= now - moment < timedelta(minutes=1)


def test_a_saga_that_is_unwound_ends_compensated(log: Any) -> None:
    saga = log.create_saga("place_order", 1)
    log.start_step(saga, 0, "reserve", None)
    log.finish_step(saga, 0, ["reserved"])
    log.start_step(saga, 1, "charge", None)
    log.fail_step(saga, 1, "declined")
    log.mark_compensating(saga)
    log.start_step(saga, 2, "release", None)
    log.compensate_step(saga, 2, ["released"])
    log.mark_step_compensated(saga, 0)
    log.terminate(saga, SagaOutcome.compensated("declined"))
    record = log.get(saga)
    assert (record.state, record.failure_reason) == ("compensated", "declined")
    assert [(s.state, s.output) for s in record.steps] == [
        ("compensated", ["reserved"]),
        ("failed", {"error": "declined"}),
        ("compensated", ["released"]),
    ]


def test_max_saga_id_is_zero_when_empty(log: Any) -> None:
    assert log.max_saga_id() == 0
    log.start_saga(41, "s", None)
    assert log.max_saga_id() == 41


def test_next_step_index_is_the_highest_plus_one(log: Any) -> None:
    log.start_saga(1, "s", None)
    assert log.next_step_index(1) == 0
    log.start_step(1, 4, "c", None)
    assert log.next_step_index(1) == 5


def test_start_saga_on_a_taken_id_raises_and_says_whether_it_is_identical(log: Any) -> None:
    log.start_saga(1, "s", {"a": 1})
    with pytest.raises(SagaExists) as same:
        log.start_saga(1, "s", {"a": 1})
    with pytest.raises(SagaExists) as other:
        log.start_saga(1, "s", {"a": 2})
    assert (same.value.identical, other.value.identical) == (True, False)
    assert (same.value.saga_id, same.value.found, same.value.code) == (1, "running", "saga_exists")
    assert log.get(1).input == {"a": 1}


def test_start_step_on_a_taken_index_raises_and_says_whether_it_is_identical(log: Any) -> None:
    log.start_saga(1, "s", None)
    log.start_step(1, 0, "c", {"a": 1})
    with pytest.raises(StepExists) as same:
        log.start_step(1, 0, "c", {"a": 1})
    with pytest.raises(StepExists) as other:
        log.start_step(1, 0, "d", {"a": 1})
    assert (same.value.identical, other.value.identical) == (True, False)
    assert (same.value.saga_id, same.value.step_index) == (1, 0)


def test_a_step_of_a_missing_saga_is_refused(log: Any) -> None:
    with pytest.raises(SagaNotFound):
        log.start_step(5, 0, "c", None)
    for call in (
        lambda: log.finish_step(5, 0, []),
        lambda: log.fail_step(5, 0, "r"),
        lambda: log.compensate_step(5, 0, []),
        lambda: log.append_recovery_step(5, 0, "n", None, []),
        lambda: log.mark_compensating(5),
        lambda: log.mark_step_compensated(5, 0),
        lambda: log.mark_all_succeeded_steps_compensated(5),
        lambda: log.mark_failed_compensation(5, "r"),
        lambda: log.terminate(5, SagaOutcome.completed()),
        lambda: log.request_cancel(5, "r"),
        lambda: log.resolve(5, "abandoned", note="n", actor="a"),
        lambda: log.resolve_step(5, 0, "failed", note="n", actor="a"),
        lambda: log.get(5),
    ):
        with pytest.raises(SagaNotFound) as refused:
            call()
        assert refused.value.saga_id == 5
    assert log.counts() == {}


def test_a_missing_step_is_refused(log: Any) -> None:
    log.start_saga(1, "s", None)
    for call in (
        lambda: log.finish_step(1, 3, []),
        lambda: log.fail_step(1, 3, "r"),
        lambda: log.mark_step_compensated(1, 3),
        lambda: log.resolve_step(1, 3, "failed", note="n", actor="a"),
    ):
        with pytest.raises(StepNotFound) as refused:
            call()
        assert (refused.value.saga_id, refused.value.step_index) == (1, 3)


def test_updates_may_be_repeated(log: Any) -> None:
    log.start_saga(1, "s", None)
    for index in range(3):
        log.start_step(1, index, "c", None)
    for call in (
        lambda: log.finish_step(1, 0, [1]),
        lambda: log.fail_step(1, 1, "r"),
        lambda: log.compensate_step(1, 2, ["u"]),
        lambda: log.mark_compensating(1),
        lambda: log.mark_step_compensated(1, 0),
        lambda: log.mark_failed_compensation(1, "stuck"),
        lambda: log.resolve(1, "abandoned", note="n", actor="a"),
    ):
        call()
        before = log.get(1)
        call()
        assert log.get(1) == before
    assert len(log.audit(1)) == 1
    assert log.get(1).epoch == 1


def test_terminate_may_be_repeated_with_the_same_outcome_only(log: Any) -> None:
    for saga, outcome in enumerate(
        (SagaOutcome.completed(), SagaOutcome.failed("f"), SagaOutcome.compensated("c")), start=1
    ):
        log.start_saga(saga, "s", None)
        log.terminate(saga, outcome)
        before = log.get(saga)
        log.terminate(saga, outcome)
        assert log.get(saga) == before
    for saga in (1, 2, 3):
        with pytest.raises(InvalidTransition):
            log.terminate(saga, SagaOutcome.failed("another"))


def test_finishing_a_finished_step_with_other_events_is_refused(log: Any) -> None:
    log.start_saga(1, "s", None)
    log.start_step(1, 0, "c", None)
    log.finish_step(1, 0, [1])
    with pytest.raises(InvalidTransition) as refused:
        log.finish_step(1, 0, [2])
    assert (refused.value.saga_id, refused.value.step_index, refused.value.found) == (1, 0, "succeeded")
    assert log.get(1).steps[0].output == [1]


def test_a_failed_step_can_neither_succeed_nor_be_compensated(log: Any) -> None:
    log.start_saga(1, "s", None)
    log.start_step(1, 0, "c", None)
    log.fail_step(1, 0, "no")
    for call in (
        lambda: log.finish_step(1, 0, []),
        lambda: log.compensate_step(1, 0, []),
        lambda: log.mark_step_compensated(1, 0),
        lambda: log.fail_step(1, 0, "another reason"),
    ):
        with pytest.raises(InvalidTransition):
            call()
    assert log.get(1).steps[0].output == {"error": "no"}


def test_completed_is_refused_while_a_step_is_pending(log: Any) -> None:
    log.start_saga(1, "s", None)
    log.start_step(1, 0, "c", None)
    with pytest.raises(InvalidTransition) as refused:
        log.terminate(1, SagaOutcome.completed())
    assert refused.value.step_index == 0
    assert log.get(1).state == "running"


@pytest.mark.parametrize("finish", [False, True])
def test_compensated_is_refused_while_a_step_is_pending_or_succeeded(log: Any, finish: bool) -> None:
    log.start_saga(1, "s", None)
    log.start_step(1, 0, "c", None)
    if finish:
        log.finish_step(1, 0, [])
    with pytest.raises(InvalidTransition):
        log.terminate(1, SagaOutcome.compensated("r"))
    log.compensate_step(1, 0, [])
    log.terminate(1, SagaOutcome.compensated("r"))
    assert log.get(1).state == "compensated"


def test_nothing_is_started_or_undone_in_a_saga_that_ended(log: Any) -> None:
    log.start_saga(1, "s", None)
    log.start_step(1, 0, "c", None)
    log.finish_step(1, 0, [])
    log.terminate(1, SagaOutcome.completed())
    before = log.get(1)
    for call in (
        lambda: log.start_step(1, 1, "c", None),
        lambda: log.compensate_step(1, 0, []),
        lambda: log.compensate_step(1, 9, []),
        lambda: log.append_recovery_step(1, 1, "n", None, []),
        lambda: log.mark_step_compensated(1, 0),
        lambda: log.mark_all_succeeded_steps_compensated(1),
        lambda: log.mark_compensating(1),
        lambda: log.mark_failed_compensation(1, "r"),
        lambda: log.request_cancel(1, "r"),
        lambda: log.resolve(1, "abandoned", note="n", actor="a"),
        lambda: log.resolve_step(1, 0, "compensated", note="n", actor="a"),
    ):
        with pytest.raises(InvalidTransition):
            call()
    assert log.get(1) == before


def test_compensate_step_inserts_a_missing_row(log: Any) -> None:
    log.start_saga(1, "s", None)
    log.compensate_step(1, 3, ["u"])
    (step,) = log.get(1).steps
    assert (step.step_index, step.name, step.state, step.cmd, step.output) == (
        3,
        "compensate",
        "compensated",
        None,
        ["u"],
    )


def test_recovery_steps_are_appended_as_compensated_or_failed(log: Any) -> None:
    log.start_saga(1, "s", None)
    log.append_recovery_step(1, 0, "refund", {"a": 1}, ["done"])
    log.append_recovery_step(1, 1, "release", None, [], "unreachable\x00")
    with pytest.raises(StepExists) as taken:
        log.append_recovery_step(1, 0, "refund", {"a": 1}, ["done"])
    assert taken.value.identical
    first, second = log.get(1).steps
    assert (first.state, first.cmd, first.output) == ("compensated", {"a": 1}, ["done"])
    assert (second.state, second.output) == ("failed", {"error": "unreachable\ufffd"})


def test_all_succeeded_steps_are_marked_at_once(log: Any) -> None:
    log.start_saga(1, "s", None)
    for index in range(4):
        log.start_step(1, index, "c", None)
    log.finish_step(1, 0, [])
    log.finish_step(1, 2, [])
    log.fail_step(1, 3, "r")
    assert log.mark_all_succeeded_steps_compensated(1) == 2
    assert log.mark_all_succeeded_steps_compensated(1) == 0
    assert [s.state for s in log.get(1).steps] == ["compensated", "pending", "compensated", "failed"]


def test_a_failed_saga_is_recoverys_and_a_stuck_one_an_operators(log: Any) -> None:
    log.start_saga(1, "s", None)
    log.terminate(1, SagaOutcome.failed("first"))
    assert log.get(1).terminal_at is not None
    with pytest.raises(InvalidTransition):
        log.start_step(1, 0, "c", None)
    log.mark_compensating(1)
    assert log.get(1).terminal_at is None
    log.mark_failed_compensation(1, "stuck")
    for outcome in (SagaOutcome.completed(), SagaOutcome.compensated("r"), SagaOutcome.failed("r")):
        with pytest.raises(InvalidTransition):
            log.terminate(1, outcome)
    log.mark_compensating(1)
    log.terminate(1, SagaOutcome.compensated("after all"))
    assert log.get(1).state == "compensated"


def test_create_saga_never_reuses_an_id(road: Any) -> None:
    log = road.log
    first = log.create_saga("s", None)
    log.start_saga(first + 100, "s", None)
    second = log.create_saga("s", None)
    assert second == first + 101
    for saga in (first + 100, second):
        log.terminate(saga, SagaOutcome.completed())
    road.sql("DELETE FROM saga WHERE saga_id > :first", first=first)
    assert log.create_saga("s", None) > second


def test_the_same_key_returns_the_same_saga(log: Any) -> None:
    first = log.create_saga("s", {"a": 1}, key="k")
    assert log.create_saga("s", {"a": 1}, key="k") == first
    other = log.create_saga("other", {"a": 1}, key="k")
    assert other != first
    with pytest.raises(KeyConflict) as conflict:
        log.create_saga("s", {"a": 2}, key="k")
    assert conflict.value.saga_id == first
    assert log.counts() == {"running": 2}
    assert log.get(first).token != log.get(other).token


def test_create_saga_refuses_after_the_largest_id(log: Any) -> None:
    log.start_saga(2**63 - 1, "s", None)
    with pytest.raises(PayloadError):
        log.create_saga("s", None)
    assert log.max_saga_id() == 2**63 - 1
    assert log.counts() == {"running": 1}


@pytest.mark.parametrize(
    "call",
    [
        lambda log, bad: log.start_saga(bad, "s", None),
        lambda log, bad: log.start_step(bad, 0, "c", None),
        lambda log, bad: log.finish_step(bad, 0, None),
        lambda log, bad: log.get(bad),
        lambda log, bad: log.next_step_index(bad),
        lambda log, bad: log.terminate(bad, SagaOutcome.completed()),
        lambda log, bad: log.resolve(bad, "abandoned", note="n", actor="a"),
    ],
    ids=["start_saga", "start_step", "finish_step", "get", "next_step_index", "terminate", "resolve"],
)
def test_a_saga_id_out_of_range_is_refused_before_any_sql(call: Any) -> None:
    log = SagaLog.open_in_memory()
    for bad in (0, -1, 2**63, True, "1", 1.0, None):
        with pytest.raises(PayloadError):
            call(log, bad)
    assert log.counts() == {}


def test_a_step_index_out_of_range_is_refused_before_any_sql(log: Any) -> None:
    log.start_saga(1, "s", None)
    bad: Any
    for bad in (-1, 2**31, True, "0", None):
        with pytest.raises(PayloadError):
            log.start_step(1, bad, "c", None)
        with pytest.raises(PayloadError):
            log.compensate_step(1, bad, None)
        with pytest.raises(PayloadError):
            log.mark_step_compensated(1, bad)
    log.start_step(1, 2**31 - 1, "c", None)


class Holds(BaseModel):
    number: float
    note: str | None = None


class Loose(BaseModel):
    anything: Any


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


UNSTORABLE = {
    "nan": math.nan,
    "infinity": {"a": [math.inf]},
    "a model's nan": Holds(number=math.nan),
    "nan where a model holds anything": Loose(anything=math.nan),
    "infinity deep in a model": {"a": [Loose(anything={"b": [math.inf]})]},
    "infinity of a model in a list": [Holds(number=-math.inf)],
    "lone surrogate": "\ud800",
    "lone surrogate in a key": {"\udfff": 1},
    "U+0000": "a\x00b",
    "U+0000 in a key": {"\x00": 1},
    "unknown object": object(),
    "unknown object inside": {"a": object()},
    "integer that cannot be read back": 10**5000,
    "nesting too deep": _nested(400),
    "keys that become one": {1: "a", "1": None},
    "bytes that are no text": b"\xff",
}


def test_a_payload_that_cannot_be_stored_is_refused_before_anything_is_written(log: Any) -> None:
    log.start_saga(1, "s", None)
    log.start_step(1, 0, "c", None)
    for name, bad in UNSTORABLE.items():
        for start in (
            lambda bad=bad: log.start_saga(2, "s", bad),
            lambda bad=bad: log.create_saga("s", bad),
            lambda bad=bad: log.start_step(1, 1, "c", bad),
            lambda bad=bad: log.append_recovery_step(1, 1, "c", bad, []),
            lambda bad=bad: log.append_recovery_step(1, 1, "c", None, bad),
        ):
            with pytest.raises(PayloadError):
                start()
                pytest.fail(name)
        for call in (log.finish_step, log.compensate_step):
            with pytest.raises(PayloadError) as refused:
                call(1, 0, bad)
            assert (refused.value.saga_id, refused.value.step_index) == (1, 0)
    assert log.counts() == {"running": 1}
    assert [s.state for s in log.get(1).steps] == ["pending"]


def test_what_only_looks_unstorable_is_stored(log: Any) -> None:
    for index, value in enumerate(
        ["NaN", "Infinity", "\\u0000", None, {"a": None}, Holds(number=1), [1] * 5000, _nested(100), 2**100, -0.0, ""],
        1,
    ):
        log.start_saga(index, "s", value)
        expected = value.model_dump() if isinstance(value, Holds) else value
        assert log.get(index).input == expected


def test_a_name_or_key_that_cannot_be_stored_is_refused(log: Any) -> None:
    bad: Any
    for bad in ("", " ", "a\x00", "\ud800", 5):
        with pytest.raises(PayloadError):
            log.start_saga(1, bad, None)
        with pytest.raises(PayloadError):
            log.create_saga("s", None, key=bad)
    assert log.counts() == {}


def test_a_reason_is_stored_whatever_it_holds(log: Any) -> None:
    log.start_saga(1, "s", None)
    log.start_step(1, 0, "c", None)
    log.fail_step(1, 0, "a\x00b\ud800c")
    log.terminate(1, SagaOutcome.failed("x\x00"))
    record = log.get(1)
    assert record.steps[0].output == {"error": "a\ufffdb\ufffdc"}
    assert record.failure_reason == "x\ufffd"


def test_unresolved_sagas_come_by_id_with_their_steps(log: Any) -> None:
    for saga in (5, 3, 9, 1):
        log.start_saga(saga, "s", {"n": saga})
    for index in (1, 0):
        log.start_step(3, index, "c", index)
    log.terminate(9, SagaOutcome.failed("f"))
    log.terminate(1, SagaOutcome.completed())
    found = log.unresolved_sagas()
    assert [(s.saga_id, s.state, [t.step_index for t in s.steps]) for s in found] == [
        (3, "running", [0, 1]),
        (5, "running", []),
        (9, "failed", []),
    ]
    assert [s.saga_id for s in log.unresolved_sagas(limit=2)] == [3, 5]
    assert log.unresolved_sagas(limit=0) == []


def test_recent_sagas_come_by_when_something_happened(road: Any) -> None:
    log = road.log
    for saga in (1, 2, 3, 4):
        log.start_saga(saga, "s", None)
    for index in range(4):
        log.start_step(2, index, "c", None)
    log.finish_step(2, 0, [])
    log.compensate_step(2, 1, [])
    log.fail_step(2, 2, "r")
    for saga, started, ended in ((1, 100, 900), (2, 200, None), (3, 900, None), (4, 50, 60)):
        road.sql("UPDATE saga SET started_at = :s, terminal_at = :t WHERE saga_id = :i", s=started, t=ended, i=saga)
    assert [(s.saga_id, s.step_count) for s in log.snapshot_recent(3)] == [(3, 0), (1, 0), (2, 2)]
    assert log.snapshot_recent(0) == []


def test_find_filters_and_pages(log: Any) -> None:
    ids = [log.create_saga("even" if n % 2 == 0 else "odd", n, key=f"k{n}") for n in range(6)]
    log.terminate(ids[0], SagaOutcome.completed())
    log.terminate(ids[1], SagaOutcome.failed("f"))
    log.mark_failed_compensation(ids[2], "stuck")
    assert [s.saga_id for s in log.find(name="even")] == [ids[4], ids[2], ids[0]]
    assert [s.saga_id for s in log.find(key="k3")] == [ids[3]]
    for state, saga in (("completed", ids[0]), ("failed", ids[1]), ("failed_compensation", ids[2])):
        assert [s.saga_id for s in log.find(state=state)] == [saga]
    page = log.find(limit=4)
    assert [s.saga_id for s in page + log.find(limit=4, before=page[-1].saga_id)] == ids[::-1]
    now = datetime.now(UTC)
    assert log.find(since=now + timedelta(hours=1)) == []
    assert len(log.find(since=now - timedelta(hours=1), until=now + timedelta(hours=1))) == 6
    assert log.find(open_longer_than=timedelta(hours=1)) == []
    assert len(log.find(open_longer_than=timedelta(hours=-1))) == 4
    with pytest.raises(PayloadError):
        log.find(state="nonsense")
    with pytest.raises(PayloadError):
        log.find(since=datetime(2026, 1, 1))  # noqa: DTZ001 - the naive datetime is the point


def test_prune_deletes_what_ended_outside_both_limits(road: Any) -> None:
    log = road.log
    for saga in range(1, 9):
        log.start_saga(saga, "s", None)
        log.start_step(saga, 0, "c", None)
        log.finish_step(saga, 0, [])
        if saga != 3:
            log.terminate(saga, SagaOutcome.completed())
    road.sql("UPDATE saga SET started_at = saga_id, terminal_at = CASE WHEN saga_id = 3 THEN NULL ELSE saga_id END")
    assert log.prune(keep_last=0, older_than=timedelta(days=365 * 1000)) == 0
    assert log.prune(keep_last=4) == 3
    assert sorted(s.saga_id for s in log.snapshot_recent(99)) == [3, 5, 6, 7, 8]
    assert log.prune(keep_last=0) == 3
    assert sorted(s.saga_id for s in log.snapshot_recent(99)) == [3, 8]
    assert road.sql("SELECT saga_id FROM saga_step ORDER BY saga_id") == [(3,), (8,)]


def test_a_pruned_sagas_key_is_forgotten_and_its_id_is_not(road: Any) -> None:
    log = road.log
    first = log.create_saga("s", None, key="k")
    log.terminate(first, SagaOutcome.completed())
    log.create_saga("s", None)
    road.sql("UPDATE saga SET started_at = 1, terminal_at = 1 WHERE saga_id = :i", i=first)
    assert log.prune(keep_last=0) == 1
    again = log.create_saga("s", {"other": True}, key="k")
    assert again > first + 1


def test_cancelling_marks_a_running_saga_and_ends_a_submitted_one(road: Any) -> None:
    log = road.log
    log.start_saga(1, "s", None)
    log.start_saga(2, "s", None)
    road.sql("UPDATE saga SET state = 'submitted' WHERE saga_id = 2")
    for saga in (1, 1, 2, 2):
        log.request_cancel(saga, "changed my mind")
    assert (log.get(1).state, log.get(1).cancel_reason) == ("running", "changed my mind")
    assert (log.get(2).state, log.get(2).failure_reason) == ("compensated", "changed my mind")
    with pytest.raises(InvalidTransition):
        log.request_cancel(1, "another reason")


def test_an_operator_settles_a_saga_with_a_note(log: Any) -> None:
    for saga, state in enumerate(("compensated", "completed", "abandoned"), 1):
        log.start_saga(saga, "s", None)
        with pytest.raises(InvalidTransition):
            log.resolve(saga, state, note="n", actor="a")
        log.mark_failed_compensation(saga, "stuck")
        log.resolve(saga, state, note="looked at the bank", actor="kim")
        record = log.get(saga)
        assert (record.state, record.epoch, record.failure_reason) == (state, 1, "stuck")
        (entry,) = log.audit(saga)
        assert (entry.action, entry.actor, entry.note) == ("resolve", "kim", "looked at the bank")
        assert (entry.state_before, entry.state_after) == ("failed_compensation", state)
    for note, actor in (("", "a"), ("n", " ")):
        with pytest.raises(PayloadError):
            log.resolve(1, "abandoned", note=note, actor=actor)
    with pytest.raises(PayloadError):
        log.resolve(1, "running", note="n", actor="a")


def test_an_operator_cannot_call_done_what_is_in_doubt(log: Any) -> None:
    log.start_saga(1, "s", None)
    log.start_step(1, 0, "c", None)
    log.start_step(1, 1, "c", None)
    log.finish_step(1, 1, [])
    log.mark_failed_compensation(1, "stuck")
    for state in ("completed", "compensated"):
        with pytest.raises(InvalidTransition):
            log.resolve(1, state, note="n", actor="a")
    assert log.audit(1) == []
    log.resolve_step(1, 0, "failed", note="the bank never saw it", actor="kim")
    with pytest.raises(InvalidTransition):
        log.resolve(1, "compensated", note="n", actor="a")
    log.resolve_step(1, 1, "compensated", note="by hand", actor="kim")
    log.resolve(1, "compensated", note="n", actor="a")
    record = log.get(1)
    assert (record.state, record.epoch) == ("compensated", 1)  # a step of the log alone has no owner to fence
    assert record.steps[0].output == {"error": "the bank never saw it"}
    assert [(a.action, a.step_index, a.state_before, a.state_after) for a in log.audit(1)] == [
        ("resolve_step", 0, "pending", "failed"),
        ("resolve_step", 1, "succeeded", "compensated"),
        ("resolve", None, "failed_compensation", "compensated"),
    ]


def test_a_step_is_not_settled_before_its_deadline_or_while_a_process_runs_it(road: Any) -> None:
    log = road.log
    log.start_saga(1, "s", None)
    log.start_step(1, 0, "c", None)
    road.sql("UPDATE saga_step SET deadline_at = 99999999999999")
    with pytest.raises(InvalidTransition, match="under way"):
        log.resolve_step(1, 0, "succeeded", note="n", actor="a")
    road.sql("UPDATE saga_step SET deadline_at = 1")
    road.sql("UPDATE saga SET executor_id = 'worker-1'")
    with pytest.raises(InvalidTransition, match="worker-1"):
        log.resolve_step(1, 0, "succeeded", note="n", actor="a")
    road.sql("UPDATE saga SET executor_id = NULL")
    log.resolve_step(1, 0, "succeeded", note="n", actor="a")
    assert log.get(1).steps[0].state == "succeeded"


def test_a_row_with_broken_json_does_not_hide_the_others(road: Any) -> None:
    log = road.log
    for saga in (1, 2, 3):
        log.start_saga(saga, "s", {"n": saga})
        log.start_step(saga, 0, "c", None)
    road.sql("UPDATE saga SET input_json = '{broken' WHERE saga_id = 2")
    road.sql("UPDATE saga_step SET cmd_json = 'also broken' WHERE saga_id = 2")
    road.sql("UPDATE saga SET state = 'from the future' WHERE saga_id = 3")
    good, bad = log.unresolved_sagas()
    assert good.input == {"n": 1}
    with pytest.raises(PayloadError) as named:
        _ = bad.input
    assert named.value.saga_id == 2
    assert "broken" not in str(named.value)
    with pytest.raises(PayloadError) as step_named:
        _ = bad.steps[0].cmd
    assert (step_named.value.saga_id, step_named.value.step_index) == (2, 0)
    assert log.get(3).state == "from the future"
    with pytest.raises(InvalidTransition, match="from the future"):
        log.terminate(3, SagaOutcome.completed())
    assert log.counts() == {"running": 2, "from the future": 1}


def test_a_unit_of_work_is_all_or_nothing(road: Any) -> None:
    log = road.log
    with log.unit_of_work() as work:
        work.start_saga(1, "s", None)
        work.start_step(1, 0, "c", None)
        assert work.next_step_index(1) == 1
    assert log.get(1).steps[0].state == "pending"
    if road.joins:
        return
    with pytest.raises(RuntimeError, match="mine"), log.unit_of_work() as work:
        work.finish_step(1, 0, [])
        work.start_saga(2, "s", None)
        raise RuntimeError("mine")
    assert log.get(1).steps[0].state == "pending"
    assert log.counts() == {"running": 1}
    with log.unit_of_work() as work:
        with pytest.raises(StepNotFound):
            work.finish_step(1, 5, [])
        work.finish_step(1, 0, [])
    assert log.get(1).steps[0].state == "succeeded"
    with pytest.raises(Exception, match="closed"):
        work.start_saga(3, "s", None)
