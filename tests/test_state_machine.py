"""Hypothesis holds the log against plain dictionaries: any order of calls, with any arguments."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sagalog import SagaLog, SagaLogError, SagaOutcome
from sagalog.payload import decode, encode

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(json_values)
def test_a_json_value_reads_back_equal(value: Any) -> None:
    assert decode(encode(value, "storing"), "input_json", 1) == value


SAGAS = st.integers(1, 4)
STEPS = st.integers(0, 3)
EVENTS = st.sampled_from([[], [1], {"a": None}])
REASONS = st.sampled_from(["no", "never"])
OPEN = ("running", "compensating")
NOT_FINAL = (*OPEN, "failed", "failed_compensation")


class LogAgainstDictionaries(RuleBasedStateMachine):
    """`sagas`: id -> [state, reason, {index: [state, output]}], by the contract's words alone."""

    def __init__(self) -> None:
        super().__init__()
        self.log = SagaLog.open_in_memory()
        self.sagas: dict[int, list[Any]] = {}

    def expect(self, allowed: bool, call: Any, change: Any) -> None:
        if allowed:
            call()
            change()
            return
        with pytest.raises(SagaLogError):
            call()

    def step(self, saga: int, index: int) -> list[Any] | None:
        found: list[Any] | None = self.sagas[saga][2].get(index) if saga in self.sagas else None
        return found

    @rule(saga=SAGAS)
    def start_saga(self, saga: int) -> None:
        def change() -> None:
            self.sagas[saga] = ["running", None, {}]

        self.expect(saga not in self.sagas, lambda: self.log.start_saga(saga, "s", None), change)

    @rule(saga=SAGAS, index=STEPS)
    def start_step(self, saga: int, index: int) -> None:
        allowed = saga in self.sagas and self.sagas[saga][0] in OPEN and index not in self.sagas[saga][2]

        def change() -> None:
            self.sagas[saga][2][index] = ["pending", None]

        self.expect(allowed, lambda: self.log.start_step(saga, index, "c", None), change)

    @rule(saga=SAGAS, index=STEPS, events=EVENTS)
    def finish_step(self, saga: int, index: int, events: Any) -> None:
        step = self.step(saga, index)
        allowed = step is not None and (step[0] == "pending" or step == ["succeeded", events])

        def change() -> None:
            self.sagas[saga][2][index] = ["succeeded", events]

        self.expect(allowed, lambda: self.log.finish_step(saga, index, events), change)

    @rule(saga=SAGAS, index=STEPS, reason=REASONS)
    def fail_step(self, saga: int, index: int, reason: str) -> None:
        step = self.step(saga, index)
        allowed = step is not None and (step[0] == "pending" or step == ["failed", {"error": reason}])

        def change() -> None:
            self.sagas[saga][2][index] = ["failed", {"error": reason}]

        self.expect(allowed, lambda: self.log.fail_step(saga, index, reason), change)

    @rule(saga=SAGAS, index=STEPS, events=EVENTS)
    def compensate_step(self, saga: int, index: int, events: Any) -> None:
        step = self.step(saga, index)
        moves = saga in self.sagas and self.sagas[saga][0] in NOT_FINAL and (
            step is None or step[0] in ("pending", "succeeded")
        )  # fmt: skip
        allowed = moves or step == ["compensated", events]

        def change() -> None:
            self.sagas[saga][2][index] = ["compensated", events]

        self.expect(allowed, lambda: self.log.compensate_step(saga, index, events), change)

    @rule(saga=SAGAS, index=STEPS)
    def mark_step_compensated(self, saga: int, index: int) -> None:
        step = self.step(saga, index)
        allowed = step is not None and (
            step[0] == "compensated" or (step[0] in ("pending", "succeeded") and self.sagas[saga][0] in NOT_FINAL)
        )

        def change() -> None:
            self.sagas[saga][2][index][0] = "compensated"

        self.expect(allowed, lambda: self.log.mark_step_compensated(saga, index), change)

    @rule(saga=SAGAS)
    def mark_all(self, saga: int) -> None:
        steps = self.sagas[saga][2] if saga in self.sagas else {}
        succeeded = [index for index, step in steps.items() if step[0] == "succeeded"]
        allowed = saga in self.sagas and (self.sagas[saga][0] in NOT_FINAL or not succeeded)

        def change() -> None:
            for index in succeeded:
                steps[index][0] = "compensated"

        self.expect(allowed, lambda: self.log.mark_all_succeeded_steps_compensated(saga), change)

    @rule(saga=SAGAS)
    def mark_compensating(self, saga: int) -> None:
        allowed = saga in self.sagas and self.sagas[saga][0] in NOT_FINAL

        def change() -> None:
            self.sagas[saga][0] = "compensating"

        self.expect(allowed, lambda: self.log.mark_compensating(saga), change)

    @rule(saga=SAGAS, reason=REASONS)
    def mark_failed_compensation(self, saga: int, reason: str) -> None:
        now = self.sagas.get(saga, [None])[:2]
        allowed = now[0] in ("running", "compensating", "failed") or now == ["failed_compensation", reason]

        def change() -> None:
            self.sagas[saga][:2] = ["failed_compensation", reason]

        self.expect(allowed, lambda: self.log.mark_failed_compensation(saga, reason), change)

    @rule(saga=SAGAS, state=st.sampled_from(["completed", "failed", "compensated"]), reason=REASONS)
    def terminate(self, saga: int, state: str, reason: str) -> None:
        outcome = {
            "completed": SagaOutcome.completed(),
            "failed": SagaOutcome.failed(reason),
            "compensated": SagaOutcome.compensated(reason),
        }[state]
        now, why, steps = self.sagas.get(saga, [None, None, {}])
        states = {step[0] for step in steps.values()}
        moves = {
            "completed": now == "running" and "pending" not in states,
            "failed": now in OPEN,
            "compensated": now in (*OPEN, "failed") and not states & {"pending", "succeeded"},
        }[state]
        allowed = moves or (now == state and (state == "completed" or why == reason))

        def change() -> None:
            self.sagas[saga][:2] = [state, outcome.reason]

        self.expect(allowed, lambda: self.log.terminate(saga, outcome), change)

    @rule(saga=SAGAS, state=st.sampled_from(["completed", "compensated", "abandoned"]), note=st.uuids())
    def resolve(self, saga: int, state: str, note: Any) -> None:
        now, _why, steps = self.sagas.get(saga, [None, None, {}])
        states = {step[0] for step in steps.values()}
        barred = {"completed": {"pending"}, "compensated": {"pending", "succeeded"}, "abandoned": set()}[state]
        allowed = now == "failed_compensation" and not states & barred

        def change() -> None:
            self.sagas[saga][0] = state

        self.expect(allowed, lambda: self.log.resolve(saga, state, note=str(note), actor="a"), change)

    @precondition(lambda self: self.sagas)
    @invariant()
    def the_log_holds_what_the_dictionaries_hold(self) -> None:
        for saga, (state, reason, steps) in self.sagas.items():
            record = self.log.get(saga)
            assert record.state == state
            if state in ("failed", "failed_compensation", "compensated"):
                assert record.failure_reason == reason
            assert {s.step_index: [s.state, s.output] for s in record.steps} == steps
        assert [s.saga_id for s in self.log.unresolved_sagas()] == sorted(
            saga for saga, (state, *_) in self.sagas.items() if state in (*OPEN, "failed")
        )

    def teardown(self) -> None:
        self.log.close()


LogAgainstDictionaries.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLogAgainstDictionaries = LogAgainstDictionaries.TestCase
