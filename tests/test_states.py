"""The moves table, the guards inside the SQL, and the README's diagram are the same thing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sagalog import InvalidTransition, SagaLog, SagaOutcome, SagaState, StepState
from sagalog.states import FINAL, SAGA_MOVES, STEP_MOVES, Actor

README = Path(__file__).parent.parent / "README.md"


def diagram() -> dict[str, set[tuple[str, str]]]:
    found: dict[str, set[tuple[str, str]]] = {"saga": set(), "step": set()}
    for block in re.findall(r"```text\n(.*?)```", README.read_text(), flags=re.DOTALL):
        heading = None
        for line in block.splitlines():
            if line.strip() in found:
                heading = line.strip()
            move = re.match(r"\s*(\w+) -> (\w+)", line)
            if move and heading:
                found[heading].add((move[1], move[2]))
    return found


def test_the_readmes_diagram_is_the_table() -> None:
    drawn = diagram()
    assert drawn["saga"] == {(move.source.value, move.target.value) for move in SAGA_MOVES}
    assert drawn["step"] == {(source.value, target.value) for source, target in STEP_MOVES}


def test_nothing_leads_out_of_a_final_state() -> None:
    assert not [move for move in SAGA_MOVES if move.source in FINAL]


def saga_in(log: SagaLog, state: SagaState) -> int:
    saga = log.create_saga("s", None)
    log._bind._connections.writer.execute("UPDATE saga SET state = ? WHERE saga_id = ?", (state.value, saga))  # type: ignore[attr-defined]
    return saga


@pytest.mark.parametrize("source", SagaState)
@pytest.mark.parametrize("target", SagaState)
def test_the_guards_allow_exactly_the_moves_of_the_table(source: SagaState, target: SagaState) -> None:
    log = SagaLog.open_in_memory()
    calls: dict[SagaState, list[tuple[Any, set[Actor]]]] = {
        SagaState.COMPLETED: [(lambda s: log.terminate(s, SagaOutcome.completed()), {Actor.SAGA, Actor.RECOVERY})],
        SagaState.COMPENSATED: [
            (lambda s: log.terminate(s, SagaOutcome.compensated("r")), {Actor.SAGA, Actor.RECOVERY})
        ],
        SagaState.FAILED: [(lambda s: log.terminate(s, SagaOutcome.failed("r")), {Actor.SAGA, Actor.RECOVERY})],
        SagaState.COMPENSATING: [(log.mark_compensating, {Actor.SAGA, Actor.RECOVERY, Actor.RETRY})],
        SagaState.FAILED_COMPENSATION: [(lambda s: log.mark_failed_compensation(s, "r"), {Actor.SAGA, Actor.RECOVERY})],
    }
    for state in ("completed", "compensated", "abandoned"):
        settle = (lambda s, to=state: log.resolve(s, to, note="n", actor="a"), {Actor.OPERATOR})
        calls.setdefault(SagaState(state), []).append(settle)
    for call, actors in calls.get(target, []):
        saga = saga_in(log, source)
        allowed = any((m.source, m.target) == (source, target) and m.by in actors for m in SAGA_MOVES)
        if allowed:
            call(saga)
            assert log.get(saga).state == target
        else:
            before = log.get(saga)
            try:
                call(saga)
            except InvalidTransition:
                pass
            else:
                assert source is target, "only what took effect already may be repeated"
            assert log.get(saga) == before
    log.close()


@pytest.mark.parametrize("source", StepState)
@pytest.mark.parametrize("target", StepState)
def test_the_steps_guards_allow_exactly_the_moves_of_the_table(source: StepState, target: StepState) -> None:
    log = SagaLog.open_in_memory()
    calls: dict[StepState, list[Any]] = {
        StepState.SUCCEEDED: [lambda s: log.finish_step(s, 0, ["new"])],
        StepState.FAILED: [lambda s: log.fail_step(s, 0, "new")],
        StepState.COMPENSATED: [
            lambda s: log.compensate_step(s, 0, ["new"]),
            lambda s: log.mark_step_compensated(s, 0),
            lambda s: log.resolve_step(s, 0, "compensated", note="n", actor="a"),
        ],
    }
    for call in calls.get(target, []):
        saga = log.create_saga("s", None)
        log.start_step(saga, 0, "c", None)
        log._bind._connections.writer.execute("UPDATE saga_step SET state = ? WHERE saga_id = ?", (source.value, saga))  # type: ignore[attr-defined]
        before = log.get(saga)
        if (source, target) in STEP_MOVES:
            call(saga)
            assert log.get(saga).steps[0].state == target
        else:
            try:
                call(saga)
            except InvalidTransition:
                pass
            else:
                assert source is target
            assert log.get(saga) == before
    log.close()
