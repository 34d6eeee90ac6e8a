"""Commands, answers and inputs are, from the first try on, what the log gives back of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum, IntEnum, StrEnum
from typing import Annotated, Any, Generic, Literal, NewType, TypeVar

import pytest
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Json,
    PrivateAttr,
    SecretStr,
    computed_field,
    field_serializer,
    field_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from sagalog import CommandBus, PayloadError, Retry, SagaCoordinator, SagaFailed, SagaLog
from tests.coordinating import Killed, Stage
from tests.troubled import Ask, One, answering

T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    items: list[T]


class Undo(BaseModel):
    word: str = "hello"


class Partly(BaseModel):
    kept: int = 1
    left_out: int = Field(default=0, exclude=True)


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


class Pair(Enum):
    ONE = (1, 2)


class Secret(BaseModel):
    password: SecretStr


def asking(stage: Stage, handler: Any, then: Any = None, undone: list[Any] | None = None) -> Any:
    stage.bus.handler(handler)

    @stage.bus.compensation(Ask)
    def undoes(cmd: Ask, output: Any) -> Undo:
        if undone is not None:
            undone.append(output)
        return Undo()

    @stage.bus.handler
    def undo(cmd: Undo) -> None:
        """Nothing."""

    coordinator = stage.coordinator()

    @coordinator.saga("asks")
    def asks(ctx: Any) -> None:
        answered = ctx.dispatch(Ask())
        if then is not None:
            then(answered)

    return coordinator


MOMENT = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("answer", "returns", "held"),
    [
        ({"at": MOMENT}, dict, {"at": "2026-01-02T00:00:00Z"}),
        ({1: "one"}, dict[Any, Any], {"1": "one"}),
        (Partly(kept=5, left_out=7), Partly, Partly(kept=5)),
        ((One(number=1), One(number=2)), Sequence[One], [One(number=1), One(number=2)]),
        ([One(number=1), One(number=2)], Sequence[One], [One(number=1), One(number=2)]),
        ([One(number=1)], list[One], [One(number=1)]),
        ([], list[One] | None, []),
        (None, list[One] | None, []),
        (Page(items=[1]), Page[int], Page[int](items=[1])),
        (7, int, 7),
        (MOMENT, datetime, MOMENT),
    ],
    ids=str,
)
def test_an_answer_is_from_the_first_try_on_what_the_log_gives_back(
    stage: Stage, answer: Any, returns: Any, held: Any
) -> None:
    answers: list[Any] = []
    undone: list[Any] = []

    def then(answered: Any) -> None:
        answers.append(answered)
        raise ValueError("undo it")

    coordinator = asking(stage, answering(answer, returns), then, undone)
    with pytest.raises(SagaFailed, match="undo it") as failure:
        coordinator.run("asks")
    assert failure.value.outcome == "compensated"
    assert (answers, undone) == ([held], [held])


@pytest.mark.parametrize(
    ("answer", "returns"),
    [
        ([One(number=1), One(number=2)], One),
        (Required(left_out=1), Required),
        (Renamed(word="hello"), Renamed),
        (Computed(), Computed),
        (Pair.ONE, Pair),
    ],
    ids=["two where one is said", "excluded", "renamed", "computed", "enum of tuples"],
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


class Word(StrEnum):
    ONE = "one"


class Number(IntEnum):
    ONE = 1


class Doubling(BaseModel):
    number: int

    @field_validator("number")
    @classmethod
    def double(cls, number: int) -> int:
        return number * 2


class Holds(BaseModel):
    value: Any


class HoldsOne(BaseModel):
    one: One
    more: dict[str, Any] = {}


class HoldsJson(BaseModel):
    value: Json[Any]


class Hides(BaseModel):
    number: int
    _secret: int = PrivateAttr(default=0)


class Exact(BaseModel):
    number: float
    words: list[str] | None = None
    more: dict[str, Any] = {}


hides = Hides(number=1)
hides._secret = 5

COMMANDS = [
    Partly(kept=2, left_out=9),
    *(Holds(value=value) for value in (Word.ONE, Number.ONE, (1, 2), {1: 2}, MOMENT, [Word.ONE], {"a": [None, 1.0]})),
    HoldsOne(one=One(number=1), more={"a": True}),
    HoldsOne(one=One.model_construct(number="1")),
    Doubling(number=1),
    hides,
    Exact(number=1, words=["a"]),
    Exact.model_construct(number=1),
    Exact(number=1.5, more={"b": {"c": [1, "2", None, True]}}),
    {"a": 1, "b": [1.5]},
    {"a": MOMENT},
]


@pytest.mark.parametrize("cmd", COMMANDS, ids=repr)
def test_a_command_is_sent_at_first_as_recovery_would_send_it(cmd: Any) -> None:
    sent: list[Any] = []

    def do(given: Any) -> None:
        sent.append(given)

    do.__annotations__["given"] = type(cmd)
    bus = CommandBus()
    bus.handler(pivot=True)(do)
    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:

        @coordinator.saga("sends")
        def sends(ctx: Any) -> None:
            ctx.dispatch(cmd)

        coordinator.run(sends)
        held = log.get(1).steps[0].decode_cmd(type(cmd))
    assert [repr(one) for one in sent] == [repr(held)]


@pytest.mark.parametrize("answer", COMMANDS, ids=repr)
def test_an_answer_is_at_first_what_a_resume_answers(answer: Any) -> None:
    bus = CommandBus()
    bus.handler(pivot=True)(answering(answer, type(answer)))
    answers: list[Any] = []
    with SagaLog.open_in_memory() as log:
        for life in (1, 2):
            with SagaCoordinator(log, bus) as coordinator:

                def asks(ctx: Any, life: int = life) -> None:
                    answers.append(ctx.dispatch(Ask()))
                    if life == 1:
                        raise Killed

                coordinator.saga("asks")(lambda ctx: asks(ctx))
                with suppress(Killed):
                    coordinator.run("asks") if life == 1 else coordinator.recover()
    assert len(answers) == 2
    assert repr(answers[0]) == repr(answers[1])


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


@pytest.mark.parametrize("derived", [Undo, None], ids=["a class", "None"])
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


class Order(BaseModel):
    amount: int
    note: str = Field(default="", exclude=True)


def test_an_input_is_at_first_what_a_resume_reads(stage: Stage) -> None:
    coordinator = stage.coordinator(on_crash="resume")
    seen: list[Any] = []
    deaths = [Killed()]

    @coordinator.saga("takes")
    def takes(ctx: Any, order: Order) -> None:
        seen.append(order)
        if deaths:
            raise deaths.pop()

    with pytest.raises(Killed):
        coordinator.run("takes", Order(amount=7, note="gone"))
    assert coordinator.recover().completed == [1]
    assert seen == [Order(amount=7), Order(amount=7)]


def test_an_input_that_does_not_fit_is_refused_before_anything_is_written(stage: Stage) -> None:
    coordinator = stage.coordinator()

    @coordinator.saga("takes")
    def takes(ctx: Any, order: Order) -> None:
        """Nothing."""

    with pytest.raises(PayloadError, match="run of takes"):
        coordinator.run("takes", {"amount": "many"})
    assert stage.log.max_saga_id() == 0


class Told(BaseModel):
    """Its secret is written in clear."""

    writeOnly: SecretStr = SecretStr("")

    @field_serializer("writeOnly", when_used="json")
    def tell(self, secret: SecretStr) -> Any:
        return secret.get_secret_value()


class Card(BaseModel):
    number: str


class Giro(BaseModel):
    number: str


class Pays(BaseModel):
    by: Card | Giro


class Named(BaseModel):
    kind: Literal["card"] = "card"
    number: str


class Other(BaseModel):
    kind: Literal["giro"] = "giro"
    number: str


class PaysClearly(BaseModel):
    by: Named | Other = Field(discriminator="kind")


@dataclass
class Pair2:
    by: Card | Giro


class ReadElsewhere(BaseModel):
    pence: int = Field(default=0, validation_alias="amount")


class WrittenElsewhere(BaseModel):
    pence: int = Field(default=0, serialization_alias="amount")


class Special(Card):
    """Of a field that says Card, what is its own is not written."""

    owner: str = ""


class Holder(BaseModel):
    by: Card


class Bytes(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64")
    body: bytes


@dataclass
class Counted:
    count: int = field(default=0, init=False)


@pydantic_dataclass
class Cents:
    cents: int = Field(default=0, serialization_alias="amount")


class ByName(BaseModel):
    model_config = ConfigDict(validate_by_alias=False, validate_by_name=True)
    pence: int = Field(default=0, alias="amount")


class Line(BaseModel):
    model_config = ConfigDict(frozen=True)
    pence: int = Field(default=0, validation_alias="amount")


class Shelf(BaseModel):
    lines: frozenset[Line] = frozenset()
    secrets: set[SecretStr] = set()


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Red(Enum):
    ONE = "one"


class Blue(Enum):
    ONE = "one"


class Marked(BaseModel):
    mark: Red | Blue


def counted(count: int) -> Counted:
    made = Counted()
    made.count = count
    return made


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


@pytest.mark.parametrize(
    "payload",
    [
        Told(writeOnly=SecretStr("x")),
        PaysClearly(by=Other(number="1")),
        Pays(by=Card(number="1")),
        ReadElsewhere(),
        Bytes(body=b""),
        Counted(),
        Shelf(lines=frozenset({Line()})),
        Open.model_validate({"words": ["a"], "more": {"b": None}}),
        Marked(mark=Red.ONE),
        Page[int](items=[1]),
    ],
    ids=repr,
)
def test_what_is_told_apart_is_sent_as_it_is(payload: Any) -> None:
    sent: list[Any] = []

    def do(cmd: Any) -> None:
        sent.append(cmd)

    do.__annotations__["cmd"] = type(payload)
    bus = CommandBus()
    bus.handler(pivot=True)(do)
    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:
        coordinator.saga("sends")(lambda ctx: ctx.dispatch(payload))
        coordinator.run("sends")
    assert sent == [payload]


class Listing(BaseModel):
    number: int
    seen: list = []  # type: ignore[type-arg]


def test_a_command_that_its_handler_changes_is_no_other_one_for_the_next_step() -> None:
    sent: list[tuple[int, list[str]]] = []
    bus = CommandBus()

    @bus.handler(pivot=True)
    def list_it(cmd: Listing) -> None:
        sent.append((cmd.number, list(cmd.seen)))
        cmd.number += 1
        cmd.seen.append("seen")

    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:
        cmd = Listing(number=1)

        @coordinator.saga("lists")
        def lists(ctx: Any) -> None:
            ctx.dispatch(cmd)
            ctx.dispatch(cmd)

        coordinator.run(lists)
        assert (sent, cmd) == ([(1, []), (1, [])], Listing(number=1))


def test_a_command_says_at_first_what_it_says_later_of_the_fields_that_are_set() -> None:
    sent: list[set[str]] = []

    class Priced(BaseModel):
        model_config = ConfigDict(frozen=True)
        pence: int
        currency: str = "GBP"

    bus = CommandBus()

    @bus.handler(pivot=True, idempotent=True, retry=Retry(attempts=2, initial=0.0))
    def price(cmd: Priced) -> None:
        sent.append(cmd.model_fields_set)
        if len(sent) == 1:
            raise OSError("no answer")

    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:
        coordinator.saga("prices")(lambda ctx: ctx.dispatch(Priced(pence=1)))
        coordinator.run("prices")
    assert sent == [{"pence", "currency"}] * 2


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


Events = NewType("Events", list[One])


@pytest.mark.parametrize(
    "returns", [Annotated[list[One], "several"], Events, Annotated[list[One] | None, "perhaps"]], ids=str
)
def test_a_list_by_another_name_is_one(stage: Stage, returns: Any) -> None:
    answers: list[Any] = []
    both = [One(number=1), One(number=2)]
    coordinator = asking(stage, answering(both, returns), answers.append)
    coordinator.run("asks")
    assert answers == [both]


def test_every_try_gets_the_command_as_it_is_in_the_log() -> None:
    seen: list[Any] = []
    bus = CommandBus()

    @bus.handler(pivot=True, retry=Retry(attempts=3, initial=0.0), settle=0.0, idempotent=True)
    def do(cmd: Exact) -> None:
        seen.append(cmd.more.copy())
        cmd.more["mine"] = 1
        if len(seen) < 3:
            raise OSError("no answer")

    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:
        coordinator.saga("sends")(lambda ctx: ctx.dispatch(Exact(number=1, more={"a": 1})))
        coordinator.run("sends")
    assert seen == [{"a": 1}] * 3


# Results


class Receipt(BaseModel):
    number: int


class Kept(BaseModel):
    number: int
    hint: int = Field(default=0, exclude=True)


class Sealed(BaseModel):
    code: SecretStr


def returning(stage: Stage, result: Any, returns: Any) -> Any:
    def gives(ctx: Any) -> Any:
        return result

    gives.__annotations__["return"] = returns
    coordinator = stage.coordinator()
    coordinator.saga("gives")(gives)
    return coordinator


@pytest.mark.parametrize(
    ("result", "returns", "held"),
    [
        ({"number": 1}, Receipt, Receipt(number=1)),
        (Kept(number=1, hint=5), Kept, Kept(number=1)),
        (None, Receipt | None, None),
        (None, None, None),
    ],
    ids=repr,
)
def test_a_result_is_at_first_what_its_key_gives_later(stage: Stage, result: Any, returns: Any, held: Any) -> None:
    coordinator = returning(stage, result, returns)
    assert [coordinator.run("gives", key="k") for _ in range(2)] == [held, held]


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
