"""A coordinator runs sagas and undoes them: what a user notices, on both coordinators and every road to a log."""

from __future__ import annotations

import threading
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from sagalog import (
    KeyConflict,
    PayloadError,
    Retry,
    SagaFailed,
    SagaInProgress,
    StepFailed,
    StepRejected,
    UnusableHandler,
)
from tests.coordinating import NO_STOCK, Charge, Killed, Order, Refund, Release, Reserve, Shop, Stage, placing


class Look(BaseModel):
    at: str


SOON = Retry(attempts=3, initial=0.001)


def states(record: Any) -> list[str]:
    return [f"{step.name} {step.state}" for step in record.steps]


def boom(ctx: Any) -> None:
    raise ValueError("boom")


# Running


def test_run_returns_what_the_function_returned_and_the_log_holds_every_step(stage: Stage) -> None:
    Shop(stage.bus)
    coordinator = stage.coordinator()
    placing(coordinator)
    assert coordinator.run("place_order", Order(amount=3)) == 3
    record = stage.log.get(stage.log.max_saga_id())
    assert (record.state, record.result, record.version) == ("completed", 3, 1)
    assert states(record) == ["Reserve succeeded", "Charge succeeded"]
    assert record.steps[1].output == [{"amount": 3}]
    assert (record.input, record.epoch) == ({"sku": "book", "amount": 3}, 1)


def test_a_key_that_completed_returns_the_recorded_result_and_runs_nothing(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()
    placing(coordinator)
    first = coordinator.run("place_order", Order(), key="order-1")
    assert coordinator.run("place_order", Order(), key="order-1") == first
    assert shop.calls == ["reserve", "charge"]


def test_a_key_with_another_input_is_refused(stage: Stage) -> None:
    Shop(stage.bus)
    coordinator = stage.coordinator()
    placing(coordinator)
    coordinator.run("place_order", Order(), key="order-1")
    with pytest.raises(KeyConflict):
        coordinator.run("place_order", Order(amount=8), key="order-1")


class Tagged(BaseModel):
    tags: set[str]


def test_an_input_that_another_process_writes_otherwise_is_the_same_under_its_key(stage: Stage) -> None:
    """The order of a set of strings differs by process."""
    coordinator = stage.coordinator()

    @coordinator.saga("tags")
    def tags(ctx: Any, input: Tagged) -> int:
        return len(input.tags)

    given = Tagged(tags={"a", "b", "c"})
    assert coordinator.run("tags", given, key="k") == 3
    for order in ('["a","b","c"]', '["c","b","a"]', '["b","a","c"]'):
        stage.sql("UPDATE saga SET input_json = :text", text=f'{{"tags":{order}}}')
        assert coordinator.run("tags", given, key="k") == 3
        assert coordinator.submit("tags", given, key="k") == 1
    with pytest.raises(KeyConflict):
        coordinator.run("tags", Tagged(tags={"a"}), key="k")


def test_a_key_that_was_undone_raises_the_recorded_failure(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()
    placing(coordinator, boom)
    for _ in range(2):
        with pytest.raises(SagaFailed, match="boom") as failure:
            coordinator.run("place_order", Order(), key="order-1")
        assert failure.value.outcome == "compensated"
    assert shop.calls == ["reserve", "charge", "refund", "release"]


def test_a_key_that_runs_elsewhere_is_in_progress(stage: Stage) -> None:
    Shop(stage.bus)
    coordinator = stage.coordinator()
    found: list[BaseException] = []

    def meanwhile(ctx: Any) -> None:
        try:
            coordinator.run("place_order", Order(), key="order-1")
        except SagaInProgress as error:
            found.append(error)

    placing(coordinator, meanwhile)
    coordinator.run("place_order", Order(), key="order-1")
    assert [error.found for error in found] == ["running"]  # type: ignore[attr-defined]


def test_what_cannot_be_stored_is_refused_before_anything_is_written(stage: Stage) -> None:
    Shop(stage.bus)
    coordinator = stage.coordinator()
    placing(coordinator)
    with pytest.raises(PayloadError):
        coordinator.run("place_order", object())
    assert stage.log.max_saga_id() == 0


def test_a_result_that_cannot_be_stored_undoes_the_saga(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()

    @coordinator.saga("place_order")
    def place_order(ctx: Any, order: Order) -> object:
        ctx.dispatch(Reserve(sku="book"))
        return object()

    with pytest.raises(SagaFailed, match="cannot be stored"):
        coordinator.run("place_order", Order())
    assert shop.calls == ["reserve", "release"]


# Failing and undoing


def test_a_function_that_raises_is_undone_newest_step_first(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()
    placing(coordinator, boom)
    with pytest.raises(SagaFailed) as failure:
        coordinator.run("place_order", Order())
    assert isinstance(failure.value.cause, ValueError)
    assert (failure.value.outcome, failure.value.name) == ("compensated", "place_order")
    assert shop.calls == ["reserve", "charge", "refund", "release"]
    record = stage.log.get(failure.value.saga_id)
    assert (record.state, record.failure_reason) == ("compensated", "ValueError: boom")
    assert states(record) == [
        "Reserve compensated", "Charge compensated", "Refund compensated", "Release compensated",
    ]  # fmt: skip
    assert [step.compensated_by for step in record.steps] == [3, 2, None, None]


def test_every_try_of_a_step_has_one_key_and_its_undo_names_it(stage: Stage) -> None:
    shop = Shop(stage.bus, retry=SOON)
    shop.fails("charge", OSError("lost"), None)
    shop.fails("refund", OSError("lost"), None)
    coordinator = stage.coordinator()
    placing(coordinator, boom)
    with pytest.raises(SagaFailed):
        coordinator.run("place_order", Order())
    assert shop.calls == ["reserve", "charge", "charge", "refund", "refund", "release"]
    (charge,), (refund,) = shop.keys["charge"], shop.keys["refund"]
    assert refund == f"{charge}:undo"
    undo = next(info for info in shop.infos if info.idempotency_key == refund)
    assert undo.compensates is not None
    assert (undo.compensates.step_index, undo.compensates.idempotency_key) == (1, charge)
    assert [info.attempt for info in shop.infos] == [1, 1, 2, 1, 2, 1]
    assert len({key for keys in shop.keys.values() for key in keys}) == 4


def test_a_rejected_step_did_nothing_and_the_function_may_take_another_way(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("charge", StepRejected("card declined"))
    coordinator = stage.coordinator()

    @coordinator.saga("place_order")
    def place_order(ctx: Any, order: Order) -> str:
        ctx.dispatch(Reserve(sku=order.sku))
        try:
            ctx.dispatch(Charge(amount=order.amount))
        except StepFailed as failed:
            ctx.dispatch(Charge(amount=1))
            return f"{failed.kind}: {failed.reason}"
        return "paid"

    assert coordinator.run("place_order", Order()) == "failed: card declined"
    record = stage.log.get(stage.log.max_saga_id())
    assert states(record) == ["Reserve succeeded", "Charge failed", "Charge succeeded"]
    assert record.steps[1].output == {"error": "card declined"}
    assert shop.calls == ["reserve", "charge", "charge"]


def test_a_type_in_rejects_did_nothing_and_needs_no_undo(stage: Stage) -> None:
    shop = Shop(stage.bus, rejects=ArithmeticError)
    shop.fails("charge", ZeroDivisionError("nothing to charge"))
    coordinator = stage.coordinator()
    placing(coordinator)
    with pytest.raises(SagaFailed, match="ZeroDivisionError: nothing to charge") as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "compensated"
    assert shop.calls == ["reserve", "charge", "release"]


def test_any_other_exception_leaves_the_step_in_doubt_and_the_saga_to_a_person(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("charge", OSError("no answer"))
    coordinator = stage.coordinator()
    placing(coordinator)
    with pytest.raises(SagaFailed, match=r"step 1 \(Charge\) is in doubt: OSError: no answer") as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "failed_compensation"
    record = stage.log.get(failure.value.saga_id)
    assert states(record) == ["Reserve succeeded", "Charge pending"]
    assert record.steps[1].error == "OSError: no answer"
    assert "Not undone: 0 (Reserve, succeeded), 1 (Charge, pending)" in record.failure_reason
    assert shop.calls == ["reserve", "charge"]


def test_a_doubt_that_the_function_swallows_stops_the_saga_all_the_same(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("charge", OSError("no answer"))
    coordinator = stage.coordinator()

    @coordinator.saga("place_order")
    def place_order(ctx: Any, order: Order) -> str:
        for _ in range(3):
            try:
                ctx.dispatch(Charge(amount=1))
            except Exception:
                continue
        return "all is well"

    with pytest.raises(SagaFailed) as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "failed_compensation"
    assert shop.calls == ["charge"]


def test_a_step_in_doubt_is_undone_without_output_where_its_handler_says_so(stage: Stage) -> None:
    shop = Shop(stage.bus, on_unknown="compensate", settle=0.01)
    shop.fails("charge", OSError("no answer"))
    outputs: list[Any] = []
    stage.bus._compensations.clear()

    @stage.bus.compensation(Reserve)
    def release_of(cmd: Reserve, output: Any) -> Release:
        return Release(sku=cmd.sku)

    @stage.bus.compensation(Charge)
    def refund_of(cmd: Charge, output: Any) -> Refund:
        outputs.append(output)
        return Refund(amount=cmd.amount)

    coordinator = stage.coordinator()
    placing(coordinator)
    with pytest.raises(SagaFailed) as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "compensated"
    assert shop.calls == ["reserve", "charge", "refund", "release"]
    assert outputs == [None]


def test_a_step_in_doubt_is_tried_again_until_its_outcome_is_known(stage: Stage) -> None:
    shop = Shop(stage.bus, retry=SOON)
    shop.fails("charge", OSError("1"), OSError("2"), None)
    coordinator = stage.coordinator()
    placing(coordinator)
    assert coordinator.run("place_order", Order()) == 7
    assert shop.calls == ["reserve", "charge", "charge", "charge"]
    assert stage.log.get(stage.log.max_saga_id()).steps[1].error == "OSError: 2"


def test_an_undo_that_is_refused_stops_the_unwinding_and_names_what_is_left(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("refund", StepRejected("the account is closed"))
    coordinator = stage.coordinator()
    placing(coordinator, boom)
    with pytest.raises(SagaFailed, match="the account is closed") as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "failed_compensation"
    assert "Not undone: 0 (Reserve, succeeded), 1 (Charge, succeeded)" in str(failure.value.reason)
    assert shop.calls == ["reserve", "charge", "refund"]


def test_a_compensation_that_derives_nothing_is_a_persons_business(stage: Stage) -> None:
    shop = Shop(stage.bus)
    stage.bus._compensations.pop(Charge)
    stage.bus.compensation(Charge)(lambda cmd, output: None)
    coordinator = stage.coordinator()
    placing(coordinator, boom)
    with pytest.raises(SagaFailed, match="returned None") as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "failed_compensation"
    assert shop.calls == ["reserve", "charge"]


def test_a_read_only_command_has_nothing_to_undo(stage: Stage) -> None:
    shop = Shop(stage.bus, read_only=True)
    coordinator = stage.coordinator()
    placing(coordinator, boom)
    with pytest.raises(SagaFailed) as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "compensated"
    assert shop.calls == ["reserve", "charge", "release"]


def test_a_read_only_command_that_raises_has_failed_and_is_in_no_doubt(stage: Stage) -> None:
    shop = Shop(stage.bus, read_only=True)
    shop.fails("charge", OSError("no answer"))
    coordinator = stage.coordinator()
    placing(coordinator)
    with pytest.raises(SagaFailed) as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "compensated"


def test_after_a_pivot_nothing_is_undone(stage: Stage) -> None:
    shop = Shop(stage.bus, pivot=True)
    coordinator = stage.coordinator()
    placing(coordinator, boom)
    with pytest.raises(SagaFailed, match="cannot be undone") as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "failed_compensation"
    assert shop.calls == ["reserve", "charge"]


def test_a_pivot_that_is_refused_leaves_the_saga_free_to_be_undone(stage: Stage) -> None:
    shop = Shop(stage.bus, pivot=True)
    shop.fails("charge", NO_STOCK)
    coordinator = stage.coordinator()
    placing(coordinator)
    with pytest.raises(SagaFailed) as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "compensated"
    assert shop.calls == ["reserve", "charge", "release"]


def test_a_command_that_does_not_say_how_it_is_undone_is_not_dispatched(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()

    @coordinator.saga("place_order")
    def place_order(ctx: Any, order: Order) -> None:
        ctx.dispatch(Refund(amount=1))

    with pytest.raises(SagaFailed, match="nothing says how it is undone") as failure:
        coordinator.run("place_order", Order())
    assert isinstance(failure.value.cause, UnusableHandler)
    assert stage.log.get(failure.value.saga_id).steps == ()
    assert shop.calls == []


# Side by side, by hand, and what is the same on a resume


def test_parallel_steps_keep_their_order_and_overlap(stage: Stage) -> None:
    together = threading.Barrier(2, timeout=30)

    @stage.bus.handler(read_only=True)
    def look(cmd: Look) -> str:
        together.wait()
        return cmd.at

    coordinator = stage.coordinator()

    @coordinator.saga("place_order")
    def place_order(ctx: Any, order: Order) -> list[str]:
        return list(ctx.dispatch_all([Look(at="a"), Look(at="b")]))

    assert coordinator.run("place_order", Order()) == ["a", "b"]
    record = stage.log.get(stage.log.max_saga_id())
    assert [(step.step_index, step.output) for step in record.steps] == [(0, ["a"]), (1, ["b"])]


def test_the_failure_of_a_parallel_step_waits_for_the_others_and_undoes_them(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("charge", StepRejected("declined"))
    coordinator = stage.coordinator()

    @coordinator.saga("place_order")
    def place_order(ctx: Any, order: Order) -> None:
        ctx.dispatch_all([Charge(amount=1), Reserve(sku="a"), Reserve(sku="b")])

    with pytest.raises(SagaFailed, match=r"step 0 \(Charge\) failed: declined") as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "compensated"
    assert sorted(shop.calls) == ["charge", "release", "release", "reserve", "reserve"]


def test_what_is_undone_by_hand_is_not_undone_again(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()

    def by_hand(ctx: Any) -> None:
        ctx.compensate(Refund(amount=7))
        raise ValueError("and then it fails")

    placing(coordinator, by_hand)
    with pytest.raises(SagaFailed) as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "compensated"
    assert shop.calls == ["reserve", "charge", "refund", "release"]


def test_one_command_undoes_several_by_hand(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()

    @coordinator.saga("place_order")
    def place_order(ctx: Any, order: Order) -> str:
        first, second = Charge(amount=1), Charge(amount=2)
        ctx.dispatch(first)
        ctx.dispatch(Reserve(sku="book"))
        ctx.dispatch(second)
        ctx.compensate(Refund(amount=3), undoes=[first, second])
        return "undone"

    assert coordinator.run("place_order", Order()) == "undone"
    record = stage.log.get(stage.log.max_saga_id())
    assert states(record) == [
        "Charge compensated", "Reserve succeeded", "Charge compensated", "Refund compensated",
    ]  # fmt: skip
    assert [step.compensated_by for step in record.steps] == [3, None, 3, None]
    assert shop.calls == ["charge", "reserve", "charge", "refund"]


def test_undoing_by_hand_what_was_not_dispatched_is_refused(stage: Stage) -> None:
    Shop(stage.bus)
    coordinator = stage.coordinator()
    placing(coordinator, lambda ctx: ctx.compensate(Refund(amount=1), undoes=[Charge(amount=99)]))
    with pytest.raises(SagaFailed, match="was not dispatched by this saga"):
        coordinator.run("place_order", Order())


def test_moments_uuids_and_records_are_the_same_on_a_resume(stage: Stage) -> None:
    shop = Shop(stage.bus)
    seen: list[tuple[datetime, uuid.UUID, Any]] = []
    drawn = iter(range(100))
    lives = iter([Killed(), None])
    coordinator = stage.coordinator(on_crash="resume")

    def remember(ctx: Any) -> None:
        seen.append((ctx.now(), ctx.uuid(), ctx.record("lot", lambda: next(drawn))))
        error = next(lives)
        if error is not None:
            raise error

    placing(coordinator, remember)
    with pytest.raises(Killed):
        coordinator.run("place_order", Order())
    report = coordinator.recover()
    assert len(report.completed) == 1
    assert seen[0] == seen[1]
    assert seen[0][0].tzinfo is UTC
    assert next(drawn) == 1
    assert shop.calls == ["reserve", "charge"]
    record = stage.log.get(report.completed[0])
    assert (record.state, record.result, record.recoveries) == ("completed", 7, 1)


# Time and cancelling


def test_a_saga_whose_time_is_up_is_undone(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()
    passed = threading.Event()

    def until_the_deadline(ctx: Any) -> None:
        deadline = stage.log.get(ctx.saga_id).deadline_at
        while datetime.now(UTC) < deadline:
            passed.wait(0.005)
        ctx.dispatch(Reserve(sku="late"))

    placing(coordinator, until_the_deadline, timeout=0.5)
    with pytest.raises(SagaFailed, match="its time is up") as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "compensated"
    assert shop.calls == ["reserve", "charge", "refund", "release"]


def test_a_cancel_undoes_the_saga_at_its_next_step(stage: Stage) -> None:
    shop = Shop(stage.bus)
    coordinator = stage.coordinator()

    def cancelled(ctx: Any) -> None:
        stage.log.request_cancel(ctx.saga_id, "the customer left")
        ctx.dispatch(Reserve(sku="another"))

    placing(coordinator, cancelled)
    with pytest.raises(SagaFailed, match="the customer left") as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "compensated"
    assert shop.calls == ["reserve", "charge", "refund", "release"]


def test_a_cancel_that_comes_after_the_last_step_undoes_the_saga_too(stage: Stage) -> None:
    Shop(stage.bus)
    coordinator = stage.coordinator()
    placing(coordinator, lambda ctx: stage.log.request_cancel(ctx.saga_id, "the customer left"))
    with pytest.raises(SagaFailed, match="the customer left") as failure:
        coordinator.run("place_order", Order())
    assert failure.value.outcome == "compensated"


def test_a_cancel_after_a_pivot_is_too_late(stage: Stage) -> None:
    Shop(stage.bus, pivot=True)
    coordinator = stage.coordinator()

    def cancelled(ctx: Any) -> None:
        stage.log.request_cancel(ctx.saga_id, "the customer left")
        ctx.dispatch(Reserve(sku="another"))

    placing(coordinator, cancelled)
    assert coordinator.run("place_order", Order()) == 7


def test_a_handler_is_told_its_deadline(stage: Stage) -> None:
    shop = Shop(stage.bus, timeout=20)
    coordinator = stage.coordinator()
    placing(coordinator)
    before = datetime.now(UTC)
    coordinator.run("place_order", Order())
    left = shop.infos[1].deadline - before
    assert timedelta(seconds=19) < left < timedelta(seconds=40)


# Settings


def test_a_context_is_of_no_use_after_its_saga(stage: Stage) -> None:
    Shop(stage.bus)
    coordinator = stage.coordinator()
    kept: list[Any] = []
    placing(coordinator, kept.append)
    coordinator.run("place_order", Order())
    with pytest.raises(UnusableHandler, match="has returned"):
        kept[0].dispatch(Reserve(sku="late"))


def test_a_function_under_two_names_is_started_by_its_name_only(stage: Stage) -> None:
    coordinator = stage.coordinator()
    bare = coordinator.target if stage.asynchronous else coordinator

    if stage.asynchronous:

        async def works(ctx: Any) -> int:
            return 1
    else:

        def works(ctx: Any) -> int:  # type: ignore[misc]
            return 1

    for name in ("new_name", "old_name"):
        bare.saga(name)(works)
    with pytest.raises(UnusableHandler, match="registered as 'new_name' and 'old_name'"):
        coordinator.run(works)
    assert coordinator.run("old_name") == 1
