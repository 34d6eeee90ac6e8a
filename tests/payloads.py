"""Commands, answers and inputs that are hard to hold in a log, and sagas that pass them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
)

from tests.coordinating import Stage
from tests.troubled import Ask

T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    items: list[T]


class Undo(BaseModel):
    word: str = "hello"


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


class Holds(BaseModel):
    value: Any


class Order(BaseModel):
    amount: int
    note: str = Field(default="", exclude=True)


class Card(BaseModel):
    number: str


class Giro(BaseModel):
    number: str


class Pays(BaseModel):
    by: Card | Giro


class ReadElsewhere(BaseModel):
    pence: int = Field(default=0, validation_alias="amount")


class Bytes(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64")
    body: bytes


@dataclass
class Counted:
    count: int = field(default=0, init=False)


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


class Receipt(BaseModel):
    number: int


def returning(stage: Stage, result: Any, returns: Any) -> Any:
    def gives(ctx: Any) -> Any:
        return result

    gives.__annotations__["return"] = returns
    coordinator = stage.coordinator()
    coordinator.saga("gives")(gives)
    return coordinator
