"""A saga that is gone on with: what is the same as in the first run, and what is never guessed over."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import BaseModel, model_validator

from sagalog import CommandBus, Retry, SagaCoordinator, SagaFailed, SagaLog, StepRejected
from tests.coordinating import (
    Charge,
    Killed,
    Order,
    Reserve,
    Shop,
    Stage,
    left_behind,
    recoverer,
)


def test_resume_answers_what_is_recorded_and_goes_on(stage: Stage) -> None:
    shop = Shop(stage.bus)
    saga_id = left_behind(stage)
    report = recoverer(stage, on_crash="resume").recover()
    assert report.completed == [saga_id]
    assert shop.calls == ["reserve", "charge"]
    assert stage.log.get(saga_id).result == 7


def test_resume_raises_a_recorded_refusal_again(stage: Stage) -> None:
    shop = Shop(stage.bus)
    shop.fails("charge", StepRejected("declined"))
    reasons: list[str] = []
    lives = iter([Killed(), None])

    def careful(coordinator: Any) -> None:
        @coordinator.saga("place_order")
        def place_order(ctx: Any, order: Order) -> str:
            ctx.dispatch(Reserve(sku=order.sku))
            try:
                ctx.dispatch(Charge(amount=1))
            except Exception as error:
                reasons.append(f"{error.kind} {error.reason}")  # type: ignore[attr-defined]
            died = next(lives)
            if died is not None:
                raise died
            return "without paying"

    first = stage.coordinator()
    careful(first)
    with pytest.raises(Killed):
        first.run("place_order", Order())
    second = stage.coordinator(on_crash="resume")
    careful(second)
    assert len(second.recover().completed) == 1
    assert reasons == ["failed declined"] * 2
    assert shop.calls == ["reserve", "charge"]


def test_a_function_that_differs_from_the_log_is_undone_and_never_guessed_over(stage: Stage) -> None:
    shop = Shop(stage.bus)
    saga_id = left_behind(stage)
    coordinator = stage.coordinator(on_crash="resume")

    @coordinator.saga("place_order")
    def place_order(ctx: Any, order: Order) -> None:
        ctx.dispatch(Reserve(sku="another"))

    assert coordinator.recover().compensated == [saga_id]
    assert "holds another command" in stage.log.get(saga_id).failure_reason
    assert shop.calls == ["reserve", "charge", "refund", "release"]


def test_a_function_that_asks_for_less_than_the_log_holds_is_undone(stage: Stage) -> None:
    Shop(stage.bus)
    saga_id = left_behind(stage)
    coordinator = stage.coordinator(on_crash="resume")

    @coordinator.saga("place_order")
    def place_order(ctx: Any, order: Order) -> None:
        ctx.dispatch(Reserve(sku=order.sku))

    assert coordinator.recover().compensated == [saga_id]
    assert "did not ask for again" in stage.log.get(saga_id).failure_reason


@pytest.mark.parametrize(("resumes", "outcome"), [((), "compensated"), ((1,), "completed")])
def test_only_named_versions_are_resumed_and_all_are_undone(stage: Stage, resumes: Any, outcome: str) -> None:
    Shop(stage.bus)
    saga_id = left_behind(stage)
    recoverer(stage, on_crash="resume", version=2, resumes=resumes).recover()
    assert stage.log.get(saga_id).state == outcome


def test_after_a_pivot_recovery_goes_forward_whatever_on_crash_says(stage: Stage) -> None:
    shop = Shop(stage.bus, pivot=True)
    saga_id = left_behind(stage)
    assert recoverer(stage, on_crash="compensate").recover().completed == [saga_id]
    assert shop.calls == ["reserve", "charge"]


def test_after_a_pivot_a_difference_goes_to_a_person(stage: Stage) -> None:
    shop = Shop(stage.bus, pivot=True)
    saga_id = left_behind(stage)
    coordinator = stage.coordinator()

    @coordinator.saga("place_order")
    def place_order(ctx: Any, order: Order) -> None:
        ctx.dispatch(Reserve(sku="another"))

    assert list(coordinator.recover().failed_compensation) == [saga_id]
    assert shop.calls == ["reserve", "charge"]


class Red(BaseModel):
    name: str


class Blue(BaseModel):
    name: str


class Paint(BaseModel):
    pass


class Tag(BaseModel):
    words: frozenset[str]


def resumed(stage: Stage, command: BaseModel) -> tuple[Any, Any]:
    """What a step answers at first, and once its saga is gone on with."""
    answers: list[Any] = []
    coordinator = stage.coordinator(on_crash="resume")

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        answers.append(ctx.dispatch(command))
        if len(answers) == 1:
            raise Killed

    with pytest.raises(Killed):
        coordinator.run("order")
    [(held,)] = stage.sql("SELECT cmd_json FROM saga_step")
    if '"words"' in held:
        words = json.loads(held)["words"]
        stage.sql("UPDATE saga_step SET cmd_json = :text", text=json.dumps({"words": words[::-1]}))
    assert coordinator.recover().completed == [1]
    first, second = answers
    return first, second


def test_an_answer_of_another_class_than_the_log_will_give_is_never_seen(stage: Stage) -> None:
    @stage.bus.handler(read_only=True)
    def paint(cmd: Paint) -> Red | Blue:
        return Blue(name="sky")

    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any) -> None:
        raise AssertionError(ctx.dispatch(Paint()))

    with pytest.raises(SagaFailed, match="a Blue reads back as a Red"):
        coordinator.run("order")


def test_an_answer_without_any_annotation_is_what_the_log_holds(stage: Stage) -> None:
    @stage.bus.handler(read_only=True)
    def paint(cmd: Paint):  # type: ignore[no-untyped-def]
        return [Blue(name="sky")]

    assert resumed(stage, Paint()) == ({"name": "sky"}, {"name": "sky"})


def test_a_command_with_a_set_is_the_same_in_whichever_order_another_process_wrote_it(stage: Stage) -> None:
    @stage.bus.handler(read_only=True)
    def tag(cmd: Tag) -> str:
        return "tagged"

    assert resumed(stage, Tag(words=frozenset("ab"))) == ("tagged", "tagged")


@dataclass(frozen=True)
class Charged:
    pence: int
    memo: str = field(default="", compare=False)


def test_what_is_sent_again_is_what_the_log_holds_and_not_what_only_equals_it(migrated_url: str) -> None:
    sent: list[Charged] = []
    memos, errors = ["by another", "by one"], [OSError("no answer"), Killed()]
    bus = CommandBus()

    @bus.handler(pivot=True, idempotent=True, retry=Retry(attempts=2, initial=0.0), settle=0.0)
    def charge(cmd: Charged) -> None:
        sent.append(cmd)
        if errors:
            raise errors.pop()

    def process(log: SagaLog) -> SagaCoordinator:
        coordinator = SagaCoordinator(log, bus, on_crash="resume")
        coordinator.saga("charges")(lambda ctx: ctx.dispatch(Charged(7, memos.pop())))
        return coordinator

    with SagaLog.open(migrated_url) as log:
        with process(log) as first, suppress(Killed):
            first.run("charges")
        with process(log) as second:
            assert second.recover().completed == [1]
    assert [one.memo for one in sent] == ["by one"] * 3


class Thing(BaseModel):
    pence: int


def test_an_input_without_an_annotation_is_at_first_what_a_resume_reads(stage: Stage) -> None:
    coordinator = stage.coordinator(on_crash="resume")
    inputs: list[Any] = []

    @coordinator.saga("takes")
    def takes(ctx: Any, order):  # type: ignore[no-untyped-def]
        inputs.append(order)
        if len(inputs) == 1:
            raise Killed
        return Thing(pence=order["pence"])

    with pytest.raises(Killed):
        coordinator.run("takes", Thing(pence=5), key="k")
    assert coordinator.recover().completed == [1]
    assert inputs == [{"pence": 5}] * 2
    assert [coordinator.run("takes", Thing(pence=5), key=key) for key in ("k", "l")] == [{"pence": 5}] * 2


def test_an_input_whose_keys_come_in_another_order_is_the_same(stage: Stage) -> None:
    coordinator = stage.coordinator()

    @coordinator.saga("order")
    def order(ctx: Any, order: dict[str, int]) -> int:
        return sum(order.values())

    assert coordinator.run("order", {"a": 1, "b": 2}, key="k") == 3
    assert coordinator.run("order", {"b": 2, "a": 1}, key="k") == 3
    assert stage.log.max_saga_id() == 1


class Other(BaseModel):
    """Another way."""


class Old(BaseModel):
    ok: bool = True


class New(BaseModel):
    ok: bool = True
    since: int


class Breaking(BaseModel):
    """As its class was changed, reading what the log holds raises something that Pydantic does not wrap."""

    ok: bool = True

    @model_validator(mode="before")
    @classmethod
    def look_up(cls, data: Any) -> Any:
        return data if "since" in data else data["since"]


@pytest.mark.parametrize(
    ("changed", "to"), [("command", New), ("answer", New), ("command", Breaking), ("answer", Breaking)]
)
def test_what_a_resume_cannot_read_is_a_difference_and_no_reason_to_take_another_way(
    migrated_url: str, changed: str, to: type[BaseModel]
) -> None:
    called = []
    log = SagaLog.open(migrated_url)

    def process(command: Any, answer: Any, *, dies: bool) -> SagaCoordinator:
        bus = CommandBus()

        def first(cmd: Any) -> Any:
            called.append("first")
            return answer(since=1)

        first.__annotations__ = {"cmd": command, "return": answer}
        bus.handler(name="first", pivot=True)(first)

        @bus.handler(pivot=True)
        def other(cmd: Other) -> None:
            called.append("other")

        coordinator = SagaCoordinator(log, bus, on_crash="resume")

        @coordinator.saga("reads", resumes=(1,))
        def reads(ctx: Any) -> None:
            try:
                ctx.dispatch(command(since=1))
            except Exception:
                ctx.dispatch(Other())
            if dies:
                raise Killed

        return coordinator

    with process(Old, Old, dies=True) as old, pytest.raises(Killed):
        old.run("reads")
    with process(to if changed == "command" else Old, to if changed == "answer" else Old, dies=False) as new:
        report = new.recover()
    assert (list(report.failed_compensation), called) == ([1], ["first"])
    log.close()
