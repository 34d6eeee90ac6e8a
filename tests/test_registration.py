"""What is refused when a handler or a compensation is registered, and what is not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Generic, NoReturn, TypeVar

import pytest

from sagalog import (
    AsyncSagaContext,
    AsyncSagaCoordinator,
    AsyncSagaLog,
    Command,
    CommandBus,
    SagaContext,
    SagaCoordinator,
    SagaFailed,
    SagaLog,
    UnusableHandler,
)
from tests.troubled import Ask, One, answering

T = TypeVar("T")


class Alien:
    """Nothing that Pydantic knows."""


@pytest.mark.parametrize(
    ("returns", "words"),
    [
        (Alien, "cannot be read back"),
        (list[Alien], "cannot be read back"),
        (Iterable[One], "can be read once"),
        (One | list[One], "one event from a list"),
    ],
    ids=str,
)
def test_a_handler_whose_answer_the_log_could_not_give_back_is_refused(returns: Any, words: str) -> None:
    with pytest.raises(UnusableHandler, match=words):
        CommandBus().handler(pivot=True)(answering(None, returns))


def test_a_handler_that_never_returns_may_say_so() -> None:
    bus = CommandBus()
    bus.handler(pivot=True)(answering(None, NoReturn))
    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:

        @coordinator.saga("never")
        def never(ctx: Any) -> NoReturn:
            raise ValueError("never")

        with pytest.raises(SagaFailed, match="never"):
            coordinator.run(never)


class Mid(Command[T], Generic[T]):
    """A base of the application's own."""


class MidList(Command[list[T]], Generic[T]):
    """Another."""


class OfMid(Mid[One]):
    """A command."""


class OfList(MidList[One]):
    """A command."""


def test_a_generic_base_between_says_what_its_handler_returns() -> None:
    def one(cmd: OfMid) -> One:
        return One(number=1)

    def several(cmd: OfList) -> list[One]:
        return []

    def wrong(cmd: OfMid) -> str:
        return ""

    CommandBus().handler(pivot=True)(one)
    CommandBus().handler(pivot=True)(several)
    with pytest.raises(UnusableHandler, match="OfMid says One"):
        CommandBus().handler(pivot=True)(wrong)


def test_functions_that_nothing_would_run_are_refused() -> None:
    def yields(cmd: Ask) -> Any:
        yield 1

    async def ayields(cmd: Ask) -> Any:
        yield 1

    def by_keyword(cmd: Ask, *, output: Any = None) -> Any:
        """Nothing."""

    for function in (yields, ayields):
        with pytest.raises(UnusableHandler, match="it yields"):
            CommandBus().handler(pivot=True)(function)
        with SagaLog.open_in_memory() as log, pytest.raises(UnusableHandler, match="it yields"):
            SagaCoordinator(log, CommandBus()).saga("yields")(function)
    with pytest.raises(UnusableHandler, match="keyword-only"):
        CommandBus().compensation(Ask)(by_keyword)
    with SagaLog.open_in_memory() as log, pytest.raises(UnusableHandler, match="keyword-only"):
        SagaCoordinator(log, CommandBus()).saga("by keyword")(by_keyword)


@pytest.mark.parametrize("named", ["Ask", None, answering, Ask()], ids=["a name", "None", "a function", "a command"])
def test_a_compensation_of_no_class_is_refused(named: Any) -> None:
    with pytest.raises(UnusableHandler, match="no command's class"):
        CommandBus().compensation(named)


def test_a_saga_without_a_name_is_refused_where_it_is_written() -> None:
    with (
        SagaLog.open_in_memory() as log,
        pytest.raises(UnusableHandler, match=r"""Give it a name.*saga\("place_order"\)"""),
    ):

        @SagaCoordinator(log, CommandBus()).saga  # type: ignore[arg-type]
        def order(ctx: SagaContext) -> None: ...


def test_a_context_of_the_other_kind_is_refused() -> None:
    def order(ctx: AsyncSagaContext) -> None: ...

    async def aorder(ctx: SagaContext) -> None: ...

    with SagaLog.open_in_memory() as log, pytest.raises(UnusableHandler, match="It is given a SagaContext"):
        SagaCoordinator(log, CommandBus()).saga("order")(order)

    async def main() -> None:
        async with await AsyncSagaLog.open_in_memory() as log:
            with pytest.raises(UnusableHandler, match="It is given an AsyncSagaContext"):
                AsyncSagaCoordinator(log, CommandBus()).saga("order")(aorder)

    asyncio.run(main())
