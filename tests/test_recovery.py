"""After a crash: what recovery takes, what it leaves and says, and what it never guesses."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from sagalog import (
    CommandBus,
    InvalidTransition,
    PayloadError,
    Retry,
    SagaFailed,
    StepInfo,
    WrongEnvironment,
)
from sagalog.coordinator.effects import Write
from tests.coordinating import (
    NO_STOCK,
    ON_POSTGRES,
    Charge,
    Killed,
    Order,
    Refund,
    Reserve,
    Shop,
    Stage,
    left_behind,
    placing,
    recoverer,
    row_held,
)

NO_WAIT = Retry(attempts=1, initial=0)


def test_what_stops_a_process_undoes_nothing_and_recovery_does(stage: Stage) -> None:
    shop = Shop(stage.bus)
    saga_id = left_behind(stage)
    assert stage.log.get(saga_id).state == "running"
    assert shop.calls == ["reserve", "charge"]
    report = recoverer(stage).recover()
    assert (report.compensated, report.left, report.errors) == ([saga_id], [], {})
    assert shop.calls == ["reserve", "charge", "refund", "release"]
    record = stage.log.get(saga_id)
    assert (record.state, record.recoveries, record.epoch) == ("compensated", 1, 2)
    assert recoverer(stage).recover().resolved == 0


@pytest.mark.parametrize("stage", ON_POSTGRES, indirect=True)
def test_a_saga_whose_row_another_transaction_holds_is_left_and_the_others_are_recovered(stage: Stage) -> None:
    Shop(stage.bus)
    held, free = left_behind(stage), left_behind(stage)
    with row_held(stage.url, held):
        report = recoverer(stage).recover()
    assert (report.compensated, report.errors) == ([free], {})
    assert [(left.saga_id, left.reason) for left in report.left] == [(held, "another transaction holds its row")]
    assert recoverer(stage).recover().compensated == [held]


def test_recovery_keeps_the_reason_of_an_unwinding_that_was_cut_off(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("refund", Killed())
    coordinator = stage.coordinator()
    placing(coordinator, lambda ctx: ctx.dispatch("nonsense"))
    with pytest.raises(Killed):
        coordinator.run("place_order", Order())
    recoverer(stage).recover()
    record = stage.log.get(stage.log.max_saga_id())
    assert record.state == "compensated"
    assert "no handler takes it" in record.failure_reason
    assert shop.calls == ["reserve", "charge", "refund", "refund", "release"]
    assert len(shop.keys["refund"]) == 1


def test_an_undo_that_is_done_stays_done_when_the_next_is_refused(stage: Stage) -> None:
    class Meddled(Shop):
        def refund(self, cmd: Refund, step: StepInfo) -> None:
            super().refund(cmd, step)
            stage.sql("UPDATE saga_step SET state = 'compensated' WHERE step_index = 0")

    shop = Meddled(stage.bus)
    coordinator = stage.coordinator()
    placing(coordinator, lambda ctx: ctx.dispatch("nonsense"))
    with pytest.raises(InvalidTransition, match="step 0"):
        coordinator.run("place_order", Order())
    record = stage.log.get(stage.log.max_saga_id())
    assert [(step.name, step.state) for step in record.steps] == [
        ("Reserve", "compensated"), ("Charge", "compensated"), ("Refund", "compensated"),
    ]  # fmt: skip
    assert recoverer(stage).recover().compensated == [record.saga_id]
    assert shop.calls == ["reserve", "charge", "refund"]


def test_an_undo_that_its_handler_itself_calls_done_is_done(stage: Stage) -> None:
    class Eager(Shop):
        def refund(self, cmd: Refund, step: StepInfo) -> None:
            super().refund(cmd, step)
            stage.sql("UPDATE saga_step SET state = 'succeeded' WHERE step_index = 2")

    shop = Eager(stage.bus)
    coordinator = stage.coordinator()
    placing(coordinator, lambda ctx: ctx.dispatch("nonsense"))
    with pytest.raises(SagaFailed) as failed:
        coordinator.run("place_order", Order())
    assert failed.value.outcome == "compensated"
    assert shop.calls == ["reserve", "charge", "refund", "release"]


def test_a_step_in_doubt_whose_handler_is_not_repeatable_goes_to_a_person(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("charge", Killed())
    saga_id = left_behind(stage)
    report = recoverer(stage).recover()
    assert "step 1 (Charge) is in doubt" in report.failed_compensation[saga_id]
    assert shop.calls == ["reserve", "charge"]


def test_a_step_in_doubt_is_tried_again_under_its_key_before_it_is_undone(stage: Stage) -> None:
    shop = Shop(stage.bus, retry=NO_WAIT)
    shop.fails("charge", Killed())
    saga_id = left_behind(stage)
    assert recoverer(stage).recover().compensated == [saga_id]
    assert shop.calls == ["reserve", "charge", "charge", "refund", "release"]
    assert len(shop.keys["charge"]) == 1


def test_a_step_whose_first_try_is_too_old_is_not_tried_again(stage: Stage) -> None:
    shop = Shop(stage.bus, retry=Retry(attempts=3, initial=0, within=timedelta(hours=1)))
    shop.fails("charge", Killed())
    saga_id = left_behind(stage)
    stage.sql("UPDATE saga_step SET started_at = started_at - 3700000")
    assert list(recoverer(stage).recover().failed_compensation) == [saga_id]
    assert shop.calls == ["reserve", "charge"]


def test_a_step_in_doubt_is_not_undone_before_its_deadline(stage: Stage) -> None:
    shop = Shop(stage.bus, on_unknown="compensate", timeout=60)
    shop.fails("charge", Killed())
    saga_id = left_behind(stage)
    coordinator = recoverer(stage)
    (left,) = coordinator.recover().left
    assert (left.saga_id, left.reason) == (saga_id, "step 1 (Charge) may still be under way")
    assert left.until is not None
    assert left.until > datetime.now(UTC).timestamp() * 1000 + 50_000
    assert shop.calls == ["reserve", "charge"]
    assert stage.log.get(saga_id).recoveries == 0
    stage.sql("UPDATE saga_step SET deadline_at = 0 WHERE state = 'pending'")
    assert recoverer(stage).recover().compensated == [saga_id]
    assert shop.calls == ["reserve", "charge", "refund", "release"]


def test_a_step_that_a_recovery_tried_again_in_vain_is_undone_by_the_next_one(stage: Stage) -> None:
    """The outside answers nobody: to try again each time would put off its undo each time."""
    shop = Shop(stage.bus, on_unknown="compensate", retry=Retry(attempts=2, initial=0), timeout=60)
    shop.fails("charge", Killed(), *[OSError("no answer")] * 2)
    saga_id = left_behind(stage)
    (left,) = recoverer(stage).recover().left
    assert (left.saga_id, left.reason) == (saga_id, "step 1 (Charge) may still be under way")
    stage.sql("UPDATE saga_step SET deadline_at = 0 WHERE state = 'pending'")
    assert recoverer(stage).recover().compensated == [saga_id]
    assert shop.calls == ["reserve", *["charge"] * 3, "refund", "release"]
    assert [len(keys) for keys in shop.keys.values()] == [1] * 4


def test_a_saga_that_nobody_here_knows_is_left_and_reported(stage: Stage) -> None:
    Shop(stage.bus)
    saga_id = left_behind(stage)
    stranger = stage.coordinator(CommandBus())
    (left,) = stranger.recover().left
    assert (left.saga_id, left.name) == (saga_id, "place_order")
    assert stage.log.get(saga_id).epoch == 1
    assert recoverer(stage).recover().compensated == [saga_id]


def test_a_command_that_nobody_here_knows_is_left_before_anything_is_undone(stage: Stage) -> None:
    shop = Shop(stage.bus)
    saga_id = left_behind(stage)
    partial = CommandBus()
    partial.handler(shop.charge)
    partial.handler(shop.refund)
    partial.compensation(Charge)(shop.refund_of)
    (left,) = recoverer(stage, bus=partial).recover().left
    assert "no handler here takes the command 'Reserve'" in left.reason
    assert shop.calls == ["reserve", "charge"]
    assert recoverer(stage).recover().compensated == [saga_id]


def test_a_saga_of_the_log_alone_is_left_unless_it_is_adopted(stage: Stage) -> None:
    shop = Shop(stage.bus)
    stage.log.start_saga(9, "place_order", Order())
    stage.log.start_step(9, 0, "Reserve", Reserve(sku="book"))
    stage.log.finish_step(9, 0, [{"sku": "book"}])
    coordinator = recoverer(stage)
    (left,) = coordinator.recover().left
    assert (left.saga_id, stage.log.get(9).state) == (9, "running")
    assert coordinator.recover(adopt=True).compensated == [9]
    assert shop.calls == ["release"]


def test_a_saga_that_is_taken_over_too_often_goes_to_a_person(stage: Stage) -> None:
    Shop(stage.bus)
    saga_id = left_behind(stage)
    stage.sql("UPDATE saga SET recoveries = 3")
    report = recoverer(stage, max_recoveries=3).recover()
    assert "taken over 4 times" in report.failed_compensation[saga_id]


def test_one_saga_that_breaks_recovery_does_not_hold_up_the_others(stage: Stage) -> None:
    Shop(stage.bus)
    first, second = left_behind(stage), left_behind(stage)
    stage.sql("UPDATE saga_step SET cmd_json = '{broken' WHERE saga_id = :id AND step_index = 1", id=first)
    report = recoverer(stage).recover()
    assert report.compensated == [second]
    assert first in {**report.errors, **report.failed_compensation}
    assert first not in report.completed


def test_a_limit_takes_the_sagas_with_the_fewest_take_overs_first(stage: Stage) -> None:
    Shop(stage.bus)
    often, seldom = left_behind(stage), left_behind(stage)
    stage.sql("UPDATE saga SET recoveries = 2 WHERE saga_id = :id", id=often)
    assert recoverer(stage).recover(limit=1).compensated == [seldom]
    assert stage.log.get(often).state == "running"


def test_a_cancel_that_was_asked_for_before_the_crash_is_heard(stage: Stage) -> None:
    Shop(stage.bus)
    saga_id = left_behind(stage)
    stage.log.request_cancel(saga_id, "the customer left")
    assert recoverer(stage, on_crash="resume").recover().compensated == [saga_id]
    assert "the customer left" in stage.log.get(saga_id).failure_reason


def test_the_sagas_of_a_living_process_are_not_taken(stage: Stage) -> None:
    Shop(stage.bus)
    taken: list[Any] = []
    other = recoverer(stage)
    coordinator = stage.coordinator()
    placing(coordinator, lambda ctx: taken.append(other.recover()))
    assert coordinator.run("place_order", Order()) == 7
    assert taken[0].resolved == 0
    assert taken[0].left == []


def test_a_lease_that_ran_out_is_taken_over_and_the_old_owner_writes_nothing_more(stage: Stage) -> None:
    shop = Shop(stage.bus)
    other = recoverer(stage)
    coordinator = stage.coordinator()
    states: list[str] = []

    def overtaken(ctx: Any) -> None:
        stage.sql("UPDATE saga_executor SET lease_until = 0")
        states.extend(stage.log.get(saga_id).state for saga_id in other.recover().compensated)
        ctx.dispatch(Reserve(sku="late"))

    placing(coordinator, overtaken)
    with pytest.raises(Exception, match="taken over") as lost:
        coordinator.run("place_order", Order())
    assert lost.value.code == "lease_lost"  # type: ignore[attr-defined]
    assert states == ["compensated"]
    assert shop.calls == ["reserve", "charge", "refund", "release"]
    assert len(stage.log.get(stage.log.max_saga_id()).steps) == 4


def test_a_lease_that_lapsed_and_was_not_taken_is_kept(stage: Stage) -> None:
    Shop(stage.bus)
    coordinator = stage.coordinator()
    placing(coordinator, lambda ctx: stage.sql("UPDATE saga_executor SET lease_until = 0"))
    assert coordinator.run("place_order", Order()) == 7


def test_a_coordinator_of_another_environment_does_not_recover(stage: Stage) -> None:
    shop = Shop(stage.bus)
    saga_id = left_behind(stage)
    production = recoverer(stage, environment="production")
    assert production.recover(limit=0).resolved == 0
    for environment in ("staging", None):
        with pytest.raises(WrongEnvironment, match="production"):
            recoverer(stage, environment=environment).recover()
    assert (stage.log.get(saga_id).state, shop.calls) == ("running", ["reserve", "charge"])
    assert production.recover().compensated == [saga_id]


def test_a_quarantined_log_leaves_every_open_saga_to_a_person(stage: Stage) -> None:
    shop = Shop(stage.bus)
    saga_id = left_behind(stage)
    waiting = recoverer(stage).submit("place_order", Order())
    assert stage.log.quarantine(note="restored backup", actor="ann") == 2
    assert recoverer(stage).recover().resolved == 0
    for each in (saga_id, waiting):
        record = stage.log.get(each)
        assert (record.state, record.failure_reason) == ("failed_compensation", "quarantine: restored backup")
        assert [row.action for row in stage.log.audit(each)] == ["quarantine"]
    assert shop.calls == ["reserve", "charge"]


def test_a_failed_saga_is_undone_by_the_next_recovery(stage: Stage) -> None:
    Shop(stage.bus)
    saga_id = left_behind(stage)
    stage.sql("UPDATE saga SET state = 'failed', failure_reason = 'an earlier program gave up'")
    assert recoverer(stage).recover().compensated == [saga_id]
    assert stage.log.get(saga_id).failure_reason == "an earlier program gave up"


class Stored(BaseModel):
    amount: int


def test_what_a_key_recorded_is_read_back_as_the_function_returned_it(stage: Stage) -> None:
    Shop(stage.bus)
    coordinator = stage.coordinator()

    @coordinator.saga("place_order")
    def place_order(ctx: Any, order: Order) -> Stored:
        return Stored(amount=order.amount)

    assert coordinator.run("place_order", Order(), key="k") == Stored(amount=7)
    assert coordinator.run("place_order", Order(), key="k") == Stored(amount=7)


def test_a_saga_that_failed_is_told_to_who_waits_for_it(stage: Stage) -> None:
    Shop(stage.bus)
    saga_id = left_behind(stage)
    coordinator = recoverer(stage)
    with pytest.raises(TimeoutError):
        coordinator.wait(saga_id, timeout=0.01)
    coordinator.recover()
    with pytest.raises(SagaFailed) as failure:
        coordinator.wait(saga_id, timeout=10)
    assert failure.value.outcome == "compensated"


def test_a_row_in_a_state_that_nobody_knows_is_a_persons_business(stage: Stage) -> None:
    shop = Shop(stage.bus)
    saga_id = left_behind(stage)
    stage.sql("UPDATE saga_step SET state = 'unheard_of' WHERE step_index = 1")
    report = recoverer(stage).recover()
    assert "unheard_of" in report.failed_compensation[saga_id]
    assert shop.calls == ["reserve", "charge"]
    with pytest.raises(PayloadError, match="unheard_of") as refused:
        recoverer(stage).retry(saga_id, note="try", actor="ann")
    assert (refused.value.saga_id, refused.value.step_index, refused.value.found) == (saga_id, 1, "unheard_of")
    assert stage.log.get(saga_id).state == "failed_compensation"


def test_one_recovery_takes_all_however_many_pages_they_fill(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    Shop(stage.bus)
    monkeypatch.setattr("sagalog.coordinator.taking._PAGE", 2)
    sagas = [left_behind(stage) for _ in range(9)]
    assert sorted(recoverer(stage).recover().compensated) == sagas


@pytest.mark.parametrize("charging", [{"retry": NO_WAIT}, {"read_only": True}], ids=["retried", "read only"])
def test_a_failed_saga_with_a_step_in_doubt_is_settled_and_undone(stage: Stage, charging: Any) -> None:
    shop = Shop(stage.bus, **charging)
    shop.fails("charge", Killed())
    saga_id = left_behind(stage)
    stage.sql("UPDATE saga SET state = 'failed', failure_reason = 'no handler there'")
    report = recoverer(stage).recover()
    assert (report.compensated, report.errors) == ([saga_id], {})
    assert shop.calls[-1] == "release"


def test_a_saga_that_a_person_gives_back_is_recovered_though_its_process_lives(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("refund", NO_STOCK)
    living = stage.coordinator()
    placing(living, refuses)
    with pytest.raises(SagaFailed) as failure:
        living.run("place_order", Order())
    assert failure.value.outcome == "failed_compensation"
    saga_id = failure.value.saga_id
    stage.log.mark_compensating(saga_id)
    stage.log.mark_compensating(saga_id)
    record = stage.log.get(saga_id)
    assert (record.state, record.executor_id, record.epoch) == ("compensating", None, 2)
    assert recoverer(stage).recover().compensated == [saga_id]
    assert shop.calls[-2:] == ["refund", "release"]


def refuses(ctx: Any) -> None:
    raise ValueError("after all")


def test_a_retry_is_not_lost_to_another_process_that_recovers_meanwhile(stage: Stage) -> None:
    """A person's word to send it again reaches the outside."""
    shop = Shop(stage.bus, pivot=True)
    shop.fails("charge", ConnectionError("no answer"))
    here, elsewhere = stage.coordinator(), stage.coordinator()
    for coordinator in (here, elsewhere):

        @coordinator.saga("pays", resumes=(1,))
        def pays(ctx: Any) -> int:
            ctx.dispatch(Charge(amount=1))
            return 1

    with pytest.raises(SagaFailed):
        here.run("pays")
    asked: list[str] = []

    def recovering(effect: Any, given: Any) -> Any:
        asked.append(effect.operation.asked)
        if asked.count("retry") == 1 and asked[-1] == "retry":
            elsewhere.recover()
        return given

    bare = here.target if stage.asynchronous else here
    if stage.asynchronous:

        async def interpose(effect: Any, answer: Any) -> Any:
            given = await answer(effect)
            return await asyncio.to_thread(recovering, effect, given) if _writes_retry(effect) else given
    else:

        def interpose(effect: Any, answer: Any) -> Any:  # type: ignore[misc]
            given = answer(effect)
            return recovering(effect, given) if _writes_retry(effect) else given

    bare.interpose = interpose
    assert here.retry(1, note="the bank answers", actor="Ada", again=True).state == "completed"
    assert shop.calls == ["charge", "charge"]


def _writes_retry(effect: Any) -> bool:
    return isinstance(effect, Write) and effect.operation.asked == "retry" and not effect.operation.kind.reads


def test_a_step_in_doubt_is_sent_again_once_by_one_word_of_a_person(stage: Stage) -> None:
    shop = Shop(stage.bus, pivot=True)
    shop.fails("charge", *[ConnectionError("no answer") for _ in range(5)])
    coordinator = stage.coordinator()

    @coordinator.saga("pays")
    def pays(ctx: Any) -> None:
        ctx.dispatch(Charge(amount=1))

    with pytest.raises(SagaFailed):
        coordinator.run("pays")
    for asked in (2, 3):
        record = coordinator.retry(1, note="the bank answers", actor="Ada", again=True)
        assert record.state == "failed_compensation"
        assert shop.calls == ["charge"] * asked
