"""Commands, answers and inputs are, from the first try on, what the log gives back of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Annotated, Any, Literal, NewType

import pytest
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    SecretStr,
    field_serializer,
    field_validator,
)

from sagalog import CommandBus, Retry, SagaCoordinator, SagaFailed, SagaLog
from tests.coordinating import Killed, Stage
from tests.payloads import (
    Bytes,
    Card,
    Counted,
    Holds,
    Line,
    Marked,
    Open,
    Order,
    Page,
    Pays,
    ReadElsewhere,
    Receipt,
    Red,
    Shelf,
    Undo,
    asking,
    returning,
)
from tests.troubled import Ask, One, answering


class Partly(BaseModel):
    kept: int = 1
    left_out: int = Field(default=0, exclude=True)


MOMENT = datetime(2026, 1, 2, tzinfo=UTC)


class SetBack(tzinfo):
    """In the hour in which clocks are set back."""

    def utcoffset(self, moment: datetime | None) -> timedelta:
        return timedelta(hours=1 if moment is not None and moment.fold else 2)

    def dst(self, moment: datetime | None) -> timedelta:
        return timedelta(hours=1)


turned = datetime(2026, 10, 25, 2, 30, tzinfo=SetBack())


@dataclass
class Tagged:
    tags: list[str] = field(default_factory=list)


class Plain(Card):
    """Of a class that nothing names, and that holds no more than the one that is named."""


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
        (7, Annotated[int, {"of": "a box"}], 7),
        (MOMENT, datetime, MOMENT),
        *((turned.replace(fold=fold), datetime, turned.replace(fold=fold).astimezone(UTC)) for fold in (0, 1)),
        (Tagged(tags=()), Tagged, Tagged(tags=[])),  # type: ignore[arg-type]
        (Plain(number="1"), Card, Card(number="1")),
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


class Approved(BaseModel):
    number: int


class Declined(BaseModel):
    number: int


def test_of_classes_that_look_alike_the_first_that_is_named_is_read_whatever_was_read_before() -> None:
    bus, answers = CommandBus(), list[Any]()
    first, second = Approved(number=1), Declined(number=2)
    bus.handler(pivot=True)(answering(first, Approved | Declined))

    def other(cmd: Undo) -> Declined | Approved:
        return second

    bus.handler(pivot=True)(other)
    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:

        @coordinator.saga("asks")
        def asks(ctx: Any) -> None:
            answers.extend([ctx.dispatch(Ask()), ctx.dispatch(Undo())])

        coordinator.run(asks)
    assert answers == [first, second]


class Word(StrEnum):
    ONE = "one"


class Number(IntEnum):
    ONE = 1


class Lowered(BaseModel):
    word: str

    @field_validator("word")
    @classmethod
    def lower(cls, word: str) -> str:
        return word.lower()


class Rounded(BaseModel):
    total: Annotated[Decimal, PlainSerializer(lambda total: f"{total:.2f}", when_used="json")]


class Unique(BaseModel):
    lines: Annotated[list[int], AfterValidator(lambda lines: sorted(set(lines)))]


class Token:
    """It says nothing of when two are equal."""

    def __init__(self, word: str) -> None:
        self.word = word

    def __repr__(self) -> str:
        return f"Token({self.word})"


def token_of(given: Any) -> Token:
    return given if isinstance(given, Token) else Token(given)


class HoldsToken(BaseModel):
    token: Annotated[Token, PlainValidator(token_of), PlainSerializer(lambda token: token.word)]


class LeavesOut(BaseModel):
    number: int
    cache: str = Field(default="", exclude=True)


class HoldsOne(BaseModel):
    one: One
    more: dict[str, Any] = {}


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
    Lowered(word="A"),
    Lowered.model_construct(word="A"),
    Rounded(total=Decimal("11.8881")),
    Unique.model_construct(lines=[2, 1, 1]),
    HoldsToken(token=Token("a")),
    LeavesOut(number=1, cache="b"),
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


class Told(BaseModel):
    """Its secret is written in clear."""

    writeOnly: SecretStr = SecretStr("")

    @field_serializer("writeOnly", when_used="json")
    def tell(self, secret: SecretStr) -> Any:
        return secret.get_secret_value()


class Named(BaseModel):
    kind: Literal["card"] = "card"
    number: str


class Other(BaseModel):
    kind: Literal["giro"] = "giro"
    number: str


class PaysClearly(BaseModel):
    by: Named | Other = Field(discriminator="kind")


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


class Kept(BaseModel):
    number: int
    hint: int = Field(default=0, exclude=True)


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
