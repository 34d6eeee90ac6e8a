"""What the log could not give back as it was given is refused."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, NamedTuple

import pytest
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    SecretStr,
    computed_field,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from sagalog import CommandBus, PayloadError, Retry, SagaCoordinator, SagaFailed, SagaLog
from tests.coordinating import Stage
from tests.payloads import (
    Blue,
    Bytes,
    Card,
    Counted,
    Giro,
    Holds,
    Line,
    Marked,
    Open,
    Order,
    Page,
    Pays,
    ReadElsewhere,
    Receipt,
    Shelf,
    Undo,
    asking,
    returning,
)
from tests.troubled import Ask, One, answering


class Required(BaseModel):
    left_out: int = Field(exclude=True)


class Renamed(BaseModel):
    word: str = Field(serialization_alias="another")


class Computed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    one: int = 1

    @computed_field  # type: ignore[prop-decorator]
    @property
    def two(self) -> int:
        return 2


class Euros(NamedTuple):
    amount: int


class Pence(NamedTuple):
    amount: int


class Pair(Enum):
    ONE = (1, 2)


class Secret(BaseModel):
    password: SecretStr


@pytest.mark.parametrize(
    ("answer", "returns"),
    [
        ([One(number=1), One(number=2)], One),
        (Required(left_out=1), Required),
        (Renamed(word="hello"), Renamed),
        (Computed(), Computed),
        (Pair.ONE, Pair),
        (Page[Giro](items=[]), Page[Card] | Page[Giro]),
    ],
    ids=["two where one is said", "excluded", "renamed", "computed", "enum of tuples", "generic of another"],
)
def test_an_answer_that_the_log_cannot_give_back_is_in_doubt_and_nothing_goes_on(
    stage: Stage, answer: Any, returns: Any
) -> None:
    went_on: list[Any] = []
    coordinator = asking(stage, answering(answer, returns), went_on.append)
    with pytest.raises(SagaFailed, match="in doubt: PayloadError") as failure:
        coordinator.run("asks")
    assert failure.value.outcome == "failed_compensation"
    assert went_on == []


@pytest.mark.parametrize("cmd", [Required(left_out=1), Renamed(word="hello"), Computed()], ids=repr)
def test_a_command_that_the_log_cannot_give_back_is_refused_before_anything_is_written(stage: Stage, cmd: Any) -> None:
    called: list[Any] = []

    def do(given: Any) -> None:
        called.append(given)

    do.__annotations__["given"] = type(cmd)
    stage.bus.handler(pivot=True)(do)
    coordinator = stage.coordinator()

    @coordinator.saga("sends")
    def sends(ctx: Any) -> None:
        ctx.dispatch(cmd)

    with pytest.raises(SagaFailed, match="cannot be read back from what the log would hold of it"):
        coordinator.run("sends")
    assert called == []
    assert stage.states() == []


class HoldsJson(BaseModel):
    value: Json[Any]


def test_a_command_that_could_not_be_read_back_as_it_is_annotated_is_refused() -> None:
    """Its field wants JSON in a text, and the log holds what that text said."""

    def do(cmd: HoldsJson) -> None:
        """Nothing."""

    bus = CommandBus()
    bus.handler(pivot=True)(do)
    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:

        @coordinator.saga("sends")
        def sends(ctx: Any) -> None:
            ctx.dispatch(HoldsJson(value='{"a": 1}'))

        with pytest.raises(SagaFailed, match="cannot be read back"):
            coordinator.run(sends)


def test_an_undo_that_the_log_cannot_give_back_is_left_to_a_person(stage: Stage) -> None:
    @stage.bus.handler
    def ask(cmd: Ask) -> None:
        """Nothing."""

    @stage.bus.compensation(Ask)
    def undoes(cmd: Ask, output: Any) -> Required:
        return Required(left_out=1)

    @stage.bus.handler
    def undo(cmd: Required) -> None:
        raise AssertionError("it was sent")

    coordinator = stage.coordinator()

    @coordinator.saga("asks")
    def asks(ctx: Any) -> None:
        ctx.dispatch(Ask())
        raise ValueError("undo it")

    with pytest.raises(SagaFailed, match="cannot be read back") as failure:
        coordinator.run("asks")
    assert failure.value.outcome == "failed_compensation"


@pytest.mark.parametrize("derived", [Undo, None, [Undo()]], ids=["a class", "None", "a list"])
def test_a_compensation_that_gives_no_command_leaves_the_saga_to_a_person(stage: Stage, derived: Any) -> None:
    @stage.bus.handler
    def ask(cmd: Ask) -> None:
        """Nothing."""

    @stage.bus.compensation(Ask)
    def undoes(cmd: Ask, output: Any) -> Any:
        return derived

    coordinator = stage.coordinator()

    @coordinator.saga("asks")
    def asks(ctx: Any) -> None:
        ctx.dispatch(Ask())
        raise ValueError("undo it")

    with pytest.raises(SagaFailed, match="its compensation returned") as failure:
        coordinator.run("asks")
    assert failure.value.outcome == "failed_compensation"


def test_an_input_that_reads_back_as_another_named_tuple_is_refused(stage: Stage) -> None:
    coordinator = stage.coordinator()

    @coordinator.saga("pays")
    def pays(ctx: Any, price: Euros | Pence) -> None:
        raise AssertionError

    with pytest.raises(PayloadError, match="a Pence reads back as a Euros"):
        coordinator.run("pays", Pence(7))
    assert stage.log.max_saga_id() == 0


def test_an_input_that_does_not_fit_is_refused_before_anything_is_written(stage: Stage) -> None:
    coordinator = stage.coordinator()

    @coordinator.saga("takes")
    def takes(ctx: Any, order: Order) -> None:
        """Nothing."""

    with pytest.raises(PayloadError, match="run of takes"):
        coordinator.run("takes", {"amount": "many"})
    assert stage.log.max_saga_id() == 0


@dataclass
class Pair2:
    by: Card | Giro


class WrittenElsewhere(BaseModel):
    pence: int = Field(default=0, serialization_alias="amount")


class Special(Card):
    """Of a field that says Card, what is its own is not written."""

    owner: str = ""


class Holder(BaseModel):
    by: Card


@pydantic_dataclass
class Cents:
    cents: int = Field(default=0, serialization_alias="amount")


class ByName(BaseModel):
    model_config = ConfigDict(validate_by_alias=False, validate_by_name=True)
    pence: int = Field(default=0, alias="amount")


def counted(count: int) -> Counted:
    made = Counted()
    made.count = count
    return made


class Unit(Enum):
    NUMBER = Decimal(1)
    TEXT = "1"


class Weighed(BaseModel):
    unit: Unit


class Paid(BaseModel):
    number: int


class Declined(Paid):
    """Looks like what it derives from."""


class Settled(BaseModel):
    by: Paid | Declined


@dataclass
class Aliased:
    pence: Annotated[int, Field(alias="amount")] = 0


class Exactly(BaseModel):
    number: float


class Holding(BaseModel):
    at: datetime


class Doubling(BaseModel):
    number: Annotated[int, BeforeValidator(lambda number: number * 2)]


class Shortened(BaseModel):
    lines: Annotated[list[int], AfterValidator(lambda lines: lines[:-1])]


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (Secret(password=SecretStr("x")), "only a mask"),
        (Holds(value=[SecretStr("x")]), "only a mask"),
        (Pays(by=Giro(number="1")), "a Giro reads back as a Card"),
        (Pair2(by=Giro(number="1")), "a Giro reads back as a Card"),
        (ReadElsewhere(amount=500), "the 'pence' of a ReadElsewhere is not read back"),
        (WrittenElsewhere(pence=500), "the 'pence' of a WrittenElsewhere is not read back"),
        (Holder(by=Special(number="1", owner="ann")), "the 'owner' of a Special is not read back"),
        (Bytes(body=b"abc"), "written in one way, and read in another"),
        (counted(3), "the 'count' of a Counted is not read back"),
        (Cents(cents=500), "the 'cents' of a Cents is not read back"),
        (ByName(pence=500), "the 'pence' of a ByName is not read back"),
        (Shelf(lines=frozenset({Line(amount=500)})), "what a frozenset holds"),
        (Shelf(secrets={SecretStr("x")}), "what a set holds"),
        (Open.model_validate({"password": SecretStr("x")}), "only a mask"),
        (Marked(mark=Blue.ONE), "a Blue reads back as a Red"),
        (Weighed(unit=Unit.NUMBER), "a Unit reads back as another one"),
        (Settled(by=Declined(number=1)), "a Declined reads back as a Paid"),
        (Aliased(pence=500), "the 'pence' of a Aliased is not read back"),
        pytest.param(Exactly.model_construct(number=10**400), "a number is too large for a float", id="no float"),
        (Doubling(number=1), "a int reads back as another one"),
        (Shortened.model_construct(lines=[1, 2, 3]), "a list reads back as one of another length"),
        (Holding(at=datetime(2026, 1, 2, tzinfo=timezone(timedelta(seconds=15)))), "a datetime reads back as another"),
    ],
    ids=repr,
)
def test_what_would_be_read_back_as_something_else_is_refused(payload: Any, words: str) -> None:
    def do(cmd: Any) -> None:
        raise AssertionError("it was sent")

    def take(ctx: Any, order: Any) -> None:
        if order is not None:
            ctx.dispatch(payload)

    do.__annotations__["cmd"] = type(payload)
    bus = CommandBus()
    bus.handler(pivot=True)(do)
    bus.handler(pivot=True)(answering(payload, type(payload)))
    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:
        coordinator.saga("sends")(take)
        with pytest.raises(SagaFailed, match=words):
            coordinator.run("sends", 1)
        coordinator.saga("asks")(lambda ctx: ctx.dispatch(Ask()))
        with pytest.raises(SagaFailed, match=words):
            coordinator.run("asks")
        take.__annotations__["order"] = type(payload)
        coordinator.saga("takes")(take)
        for start in (coordinator.run, coordinator.submit):
            with pytest.raises(PayloadError, match=words):
                start("takes", payload)


class Absent(BaseModel):
    tags: list[str] = None  # type: ignore[assignment]


class AbsentToo(BaseModel):
    tags: dict = None  # type: ignore[assignment, type-arg]


@pytest.mark.parametrize("cmd", [Absent(), AbsentToo(), Absent.model_construct(tags=None)], ids=repr)
def test_a_command_without_the_list_that_it_says_it_has_is_refused(stage: Stage, cmd: Any) -> None:
    test_a_command_that_the_log_cannot_give_back_is_refused_before_anything_is_written(stage, cmd)


def test_an_answer_that_cannot_be_stored_is_not_asked_for_again(stage: Stage) -> None:
    asked: list[int] = []

    def ask(cmd: Ask) -> float:
        asked.append(1)
        return float("nan")

    stage.bus.handler(pivot=True, idempotent=True, retry=Retry(attempts=3, initial=0.0))(ask)
    coordinator = stage.coordinator()

    @coordinator.saga("asks")
    def asks(ctx: Any) -> None:
        ctx.dispatch(Ask())

    with pytest.raises(SagaFailed, match="in doubt"):
        coordinator.run("asks")
    assert asked == [1]


class Sealed(BaseModel):
    code: SecretStr


@pytest.mark.parametrize(
    ("result", "returns", "words"),
    [(None, Receipt, "a NoneType is no result of it"), (Sealed(code=SecretStr("x")), Sealed, "it holds a secret")],
    ids=repr,
)
def test_a_result_that_nobody_could_read_later_fails_its_saga(
    stage: Stage, result: Any, returns: Any, words: str
) -> None:
    with pytest.raises(SagaFailed, match=words) as raised:
        returning(stage, result, returns).run("gives")
    assert raised.value.outcome == "compensated"
