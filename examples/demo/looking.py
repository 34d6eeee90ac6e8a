"""What the log holds: the recent sagas, and one that was undone, step by step."""

from __future__ import annotations

from collections.abc import Mapping

from examples.demo.outside import Outside
from examples.demo.showing import Observer
from sagalog import SagaLog, SagaRecord, SagaSnapshot, StepState


def show_log(see: Observer, log: SagaLog, outside: Outside) -> None:
    """Show it, and compare the keys with those that the outside knows.

    Args:
        see: Who tells of it.
        log: The shop's.
        outside: What the shop reached.
    """
    see.say("log.snapshot_recent(8):")
    recent = [_row(saga) for saga in log.snapshot_recent(8)]
    see.table(("saga", "key", "state", "steps", "take-overs", "reason"), recent)
    (found,) = log.find(name="place_order", key="order-7")
    saga = log.get(found.saga_id)
    see.say(f"log.get({saga.saga_id}), the order that no courier took; its process died during the refund:")
    undoes = {step.compensated_by: step.step_index for step in saga.steps if step.compensated_by is not None}
    keys = {step.step_index: _key_of(saga, step.step_index, undoes) for step in saga.steps}
    rows = [
        (str(step.step_index), step.name, step.state, _of(undoes.get(step.step_index)), _of(step.compensated_by))
        for step in saga.steps
    ]
    with_keys = [(*row, _short(key)) for row, key in zip(rows, keys.values(), strict=True)]
    see.table(("step", "name", "state", "undoes", "undone by", "idempotency key"), with_keys)
    sent = [deed.key for deed in outside.count().deeds if deed.order == 7]
    did = [keys[step.step_index] for step in saga.steps if step.state != StepState.FAILED]
    see.expect("what was done has these keys in the outside, and no others", sent, did)


def _row(saga: SagaSnapshot) -> tuple[str, ...]:
    counted = (str(saga.step_count), str(saga.recoveries))
    return (str(saga.saga_id), saga.key or "", saga.state, *counted, saga.failure_reason or "")


def _key_of(saga: SagaRecord, index: int, undoes: Mapping[int, int]) -> str:
    """The key that a step's request carried: an undo's is that of the step that it undoes, with `:undo`."""
    return f"{saga.token}:{undoes[index]}:undo" if index in undoes else f"{saga.token}:{index}"


def _short(key: str) -> str:
    token, _, place = key.partition(":")
    return f"{token[:6]}...:{place}"


def _of(index: int | None) -> str:
    return "" if index is None else str(index)
