"""What a person settles by hand, and how the saga comes to its end then."""

from __future__ import annotations

from typing import Any

import pytest

from sagalog import (
    InvalidTransition,
    LeaseLost,
    Retry,
    SagaFailed,
    StepRejected,
)
from tests.coordinating import (
    Charge,
    Order,
    Reserve,
    Shop,
    Stage,
    placing,
    recoverer,
)


def refund_in_doubt(stage: Stage, word: str) -> tuple[Shop, int]:
    """A saga whose undo an operator has settled so, and how often it was tried."""
    shop = Shop(stage.bus)
    shop.fails("refund", *[ConnectionError("no answer")] * 5)
    coordinator = stage.coordinator()
    placing(coordinator, lambda ctx: ctx.dispatch("nonsense"))
    with pytest.raises(SagaFailed) as failed:
        coordinator.run("place_order", Order())
    assert failed.value.outcome == "failed_compensation"
    stage.sql("UPDATE saga_step SET deadline_at = 1")
    stage.log.resolve_step(1, 2, word, note="the bank shows it", actor="ann")
    return shop, shop.calls.count("refund")


@pytest.mark.parametrize("word", ["succeeded", "compensated"])
def test_an_undo_in_doubt_that_an_operator_knows_to_be_done_is_not_done_again(stage: Stage, word: str) -> None:
    shop, tries = refund_in_doubt(stage, word)
    assert recoverer(stage).retry(1, note="go on", actor="ann").state == "compensated"
    assert [step.state for step in stage.log.get(1).steps] == ["compensated"] * 4
    assert (shop.calls.count("refund"), shop.calls[-1]) == (tries, "release")


def test_an_undo_in_doubt_that_an_operator_knows_to_have_failed_is_done_anew_under_its_key(stage: Stage) -> None:
    shop, tries = refund_in_doubt(stage, "failed")
    assert recoverer(stage).retry(1, note="go on", actor="ann").state == "compensated"
    assert [(step.name, step.state) for step in stage.log.get(1).steps] == [
        ("Reserve", "compensated"), ("Charge", "compensated"), ("Refund", "failed"), ("Refund", "compensated"),
        ("Release", "compensated"),
    ]  # fmt: skip
    assert (shop.calls.count("refund"), len(shop.keys["refund"])) == (tries + 1, 1)


def in_doubt(stage: Stage, **charging: Any) -> tuple[Shop, Any]:
    """A saga whose second step is in doubt, with a person."""
    shop = Shop(stage.bus, **charging)
    shop.fails("charge", ConnectionError("no answer"))
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any, order: Order) -> str:
        ctx.dispatch(Reserve(sku=order.sku))
        return "charged" if ctx.dispatch(Charge(amount=order.amount)) is None else "with an answer"

    with pytest.raises(SagaFailed):
        coordinator.run("order", Order())
    stage.sql("UPDATE saga_step SET deadline_at = 1")
    return shop, coordinator


def test_a_step_that_a_person_calls_succeeded_is_undone_without_an_output(stage: Stage) -> None:
    shop, coordinator = in_doubt(stage)
    stage.log.resolve_step(1, 1, "succeeded", note="the bank shows it", actor="ann")
    assert stage.log.get(1).executor_id is None  # anybody may take it
    assert coordinator.retry(1, note="undo it", actor="ann").state == "compensated"
    assert shop.calls == ["reserve", "charge", "refund", "release"]


def test_a_pivot_that_a_person_calls_succeeded_is_gone_on_with(stage: Stage) -> None:
    _, coordinator = in_doubt(stage, pivot=True)
    stage.log.resolve_step(1, 1, "succeeded", note="the bank shows it", actor="ann")
    record = coordinator.retry(1, note="go on", actor="ann")
    assert (record.state, record.result) == ("completed", "charged")


def test_a_step_that_succeeded_may_be_called_undone_at_once(stage: Stage) -> None:
    in_doubt(stage)
    stage.sql("UPDATE saga_step SET deadline_at = 9999999999999 WHERE step_index = 0")
    stage.log.resolve_step(1, 0, "compensated", note="by hand", actor="ann")
    assert stage.states()[0] == ("Reserve", "compensated")


def test_what_a_person_settles_on_both_sides_of_an_undo_comes_to_an_end(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("refund", *[ConnectionError("no answer")] * 5)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Reserve(sku="book"))
        ctx.dispatch(Charge(amount=7))
        raise ValueError("no")

    with pytest.raises(SagaFailed):
        coordinator.run("order")
    stage.sql("UPDATE saga_step SET deadline_at = 1")
    stage.log.resolve_step(1, 2, "succeeded", note="the bank shows it", actor="ann")
    stage.log.resolve_step(1, 1, "compensated", note="and it is undone", actor="ann")
    assert coordinator.retry(1, note="go on", actor="ann").state == "compensated"
    assert [state for _, state in stage.states()] == ["compensated"] * 4
    assert (shop.calls.count("refund"), shop.calls[-1]) == (5, "release")


def test_a_person_may_give_a_saga_back_however_few_take_overs_are_allowed(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("charge", ConnectionError("no answer"))
    coordinator = stage.coordinator(max_recoveries=0)

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Charge(amount=7))

    with pytest.raises(SagaFailed):
        coordinator.run("order")
    stage.sql("UPDATE saga_step SET deadline_at = 1")
    stage.log.resolve_step(1, 0, "failed", note="the bank never saw it", actor="ann")
    assert coordinator.retry(1, note="undo it", actor="ann").state == "compensated"


def test_a_saga_of_the_log_alone_stays_one_when_a_person_settles_its_step(stage: Stage) -> None:
    stage.log.start_saga(1, "order", None)
    stage.log.start_step(1, 0, "Charge", Charge(amount=7))
    stage.log.resolve_step(1, 0, "failed", note="the bank never saw it", actor="ann")
    Shop(stage.bus)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        raise AssertionError

    (left,) = coordinator.recover().left
    assert (left.saga_id, "adopt=True" in left.reason) == (1, True)


def test_a_saga_that_somebody_gives_to_a_person_is_not_undone_by_the_process_that_runs_it(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Reserve(sku="book"))
        for _ in range(2):  # what may be repeated
            stage.log.mark_failed_compensation(ctx.saga_id, "a person looks at it")
        raise ValueError("undo it")

    with pytest.raises(LeaseLost):
        coordinator.run("order")
    record = stage.log.get(1)
    assert (record.state, record.failure_reason) == ("failed_compensation", "a person looks at it")
    assert shop.calls == ["reserve"]
    assert coordinator.retry(1, note="undo it", actor="ann").state == "compensated"
    assert shop.calls == ["reserve", "release"]


def test_nobody_but_its_coordinator_begins_a_step_of_a_saga_that_it_works_on(stage: Stage) -> None:
    Shop(stage.bus)
    coordinator = stage.coordinator()
    executors: list[str] = []

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Reserve(sku="book"))
        executors.append(stage.log.get(ctx.saga_id).executor_id)
        with pytest.raises(InvalidTransition, match="works on the saga") as refused:
            stage.log.start_step(ctx.saga_id, 1, "Charge", Charge(amount=7))
        assert (refused.value.step_index, refused.value.found) == (1, executors[0])
        ctx.dispatch(Charge(amount=7))

    coordinator.run("order")
    assert [step.state for step in stage.log.get(1).steps] == ["succeeded"] * 2


def test_a_retry_that_meets_the_same_trouble_does_not_say_it_again(stage: Stage) -> None:
    shop = Shop(stage.bus, retry=Retry(attempts=1))
    shop.fails("refund", *[ConnectionError("no answer")] * 20)
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        ctx.dispatch(Charge(amount=7))
        raise ValueError("no")

    with pytest.raises(SagaFailed):
        coordinator.run("order")
    reason = stage.log.get(1).failure_reason
    stage.sql("UPDATE saga_step SET deadline_at = 1")
    assert coordinator.retry(1, note="once more", actor="ann", again=True).failure_reason == reason


def test_retry_by_an_operator_refuses_while_a_step_is_in_doubt_unless_told_again(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("charge", OSError("no answer"))
    coordinator = stage.coordinator()
    placing(coordinator)
    with pytest.raises(SagaFailed) as failure:
        coordinator.run("place_order", Order())
    saga_id = failure.value.saga_id
    with pytest.raises(InvalidTransition, match="resolve-step"):
        coordinator.retry(saga_id, note="the bank is back", actor="ann")
    assert stage.log.get(saga_id).state == "failed_compensation"
    record = coordinator.retry(saga_id, note="the bank is back", actor="ann", again=True)
    assert record.state == "compensated"
    assert shop.calls == ["reserve", "charge", "charge", "refund", "release"]
    assert len(shop.keys["charge"]) == 1
    assert [(row.action, row.actor, row.state_after) for row in stage.log.audit(saga_id)] == [
        ("retry", "ann", "compensating")
    ]


def test_retry_by_an_operator_undoes_what_an_undo_refused_before(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("refund", StepRejected("the account is closed"))
    coordinator = stage.coordinator()
    placing(coordinator, lambda ctx: ctx.dispatch("nonsense"))
    with pytest.raises(SagaFailed) as failure:
        coordinator.run("place_order", Order())
    record = coordinator.retry(failure.value.saga_id, note="it is open again", actor="ann")
    assert record.state == "compensated"
    assert shop.calls == ["reserve", "charge", "refund", "refund", "release"]
    assert len(shop.keys["refund"]) == 1
