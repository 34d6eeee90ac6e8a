"""Handlers and compensations are checked when they are registered, in words; and typed for mypy."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy.orm import Session

from sagalog import (
    Command,
    CommandBus,
    PayloadError,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaLog,
    StepInfo,
    UnusableHandler,
)


class Charged(BaseModel):
    amount: int


class Charge(BaseModel):
    amount: int


class Typed(Command[Charged]):
    amount: int


class Refund(BaseModel):
    amount: int


def refund_of(cmd: Charge, output: Charged) -> Refund:
    return Refund(amount=output.amount)


def refund_of_any(cmd: Charge, output: Charged | None) -> Refund:
    return Refund(amount=cmd.amount)


def charge(cmd: Charge) -> Charged:
    return Charged(amount=cmd.amount)


def test_decorators_return_the_function_unchanged() -> None:
    bus = CommandBus()
    assert bus.handler(charge) is charge
    assert bus.compensation(Charge)(refund_of) is refund_of


def test_bound_methods_and_callable_objects_and_dataclasses_register() -> None:
    @dataclass
    class Ship:
        to: str

    class Courier:
        def ship(self, cmd: Ship, step: StepInfo) -> None: ...

        def __call__(self, cmd: Refund) -> None: ...

    bus = CommandBus()
    bus.handler(Courier().ship)
    bus.handler(Courier())
    bus.handler(functools.partial(charge))
    assert bus.handler_of(Ship("here")).name == "Ship"
    assert bus.handler_of(Refund(amount=1)).name == "Refund"
    assert bus.handler_of(Charge(amount=1)).name == "Charge"


@pytest.mark.parametrize(
    ("options", "function", "words"),
    [
        ({}, lambda cmd: None, "nothing says what its parameter 'cmd' is"),
        ({"retry": Retry()}, charge, "does not take the idempotency key"),
        ({"transactional": True}, charge, "takes no Session"),
        ({"read_only": True, "pivot": True}, charge, "read_only and pivot"),
        ({"on_unknown": "compensate", "pivot": True}, charge, "nothing undoes it"),
        ({"on_unknown": "guess"}, charge, "on_unknown='guess'"),
        ({"timeout": 0}, charge, "timeout=0"),
        ({"name": "sagalog.now"}, charge, "the coordinator's own"),
    ],
)
def test_a_handler_that_does_not_fit_is_refused_in_words(options: Any, function: Any, words: str) -> None:
    with pytest.raises(UnusableHandler, match=words):
        CommandBus().handler(**options)(function)


def test_a_session_without_a_transaction_is_refused() -> None:
    def charge_in(cmd: Charge, session: Session) -> Charged:
        raise AssertionError

    with pytest.raises(UnusableHandler, match="is not transactional"):
        CommandBus().handler(charge_in)
    CommandBus().handler(transactional=True)(charge_in)


def test_a_return_that_is_not_the_commands_event_is_refused() -> None:
    def wrong(cmd: Typed) -> Refund:
        raise AssertionError

    with pytest.raises(UnusableHandler, match="it returns Refund, and Typed says Charged"):
        CommandBus().handler(wrong)


def test_retry_needs_the_key_or_a_promise() -> None:
    def keyed(cmd: Charge, step: StepInfo) -> Charged:
        raise AssertionError

    CommandBus().handler(retry=Retry())(keyed)
    CommandBus().handler(retry=Retry(), idempotent=True)(charge)


def test_two_commands_of_one_name_are_refused() -> None:
    bus = CommandBus()
    bus.handler(charge)
    with pytest.raises(UnusableHandler, match="handles the command 'Charge' already"):
        bus.handler(name="Charge")(lambda_of_refund)
    bus.handler(name="Other")(lambda_of_refund)


def lambda_of_refund(cmd: Refund) -> None: ...


def test_a_compensation_that_does_not_fit_is_refused_whichever_comes_first() -> None:
    def of_refund(cmd: Charge, output: Refund) -> Refund:
        raise AssertionError

    bus = CommandBus()
    bus.handler(charge)
    with pytest.raises(UnusableHandler, match="its output parameter is Refund, and the handler returns Charged"):
        bus.compensation(Charge)(of_refund)
    other = CommandBus()
    other.compensation(Charge)(of_refund)
    with pytest.raises(UnusableHandler, match="its output parameter is Refund"):
        other.handler(charge)


def test_what_is_undone_as_if_it_had_happened_must_do_without_output() -> None:
    bus = CommandBus()
    bus.handler(on_unknown="compensate")(charge)
    with pytest.raises(UnusableHandler, match="does not admit None"):
        bus.compensation(Charge)(refund_of)
    bus.compensation(Charge)(refund_of_any)


def test_a_command_has_one_compensation_and_a_pivot_none() -> None:
    bus = CommandBus()
    bus.compensation(Charge)(refund_of)
    with pytest.raises(UnusableHandler, match="it has one already"):
        bus.compensation(Charge)(refund_of_any)
    with pytest.raises(UnusableHandler, match="its handler says pivot"):
        bus.handler(pivot=True)(charge)


def test_an_undo_that_would_itself_be_undone_is_refused() -> None:
    bus = CommandBus()
    bus.compensation(Charge)(refund_of)

    def refund(cmd: Refund) -> None: ...

    with pytest.raises(UnusableHandler, match="it undoes another command"):
        bus.handler(on_unknown="compensate")(refund)
    bus.handler(refund)


def test_a_coordinators_on_unknown_is_held_against_its_compensations_at_dispatch() -> None:
    bus = CommandBus()
    bus.handler(charge)
    bus.compensation(Charge)(refund_of)
    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus, on_unknown="compensate") as coordinator:

        @coordinator.saga("pay")
        def pay(ctx: SagaContext) -> None:
            ctx.dispatch(Charge(amount=1))

        with pytest.raises(Exception, match="does not admit an output of None") as failure:
            coordinator.run(pay)
        assert isinstance(failure.value.__cause__, UnusableHandler)
        assert log.get(1).steps == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"attempts": "3"},
        {"attempts": 2.5},
        {"jitter": 2},
        {"initial": -1},
        {"initial": float("nan")},
        {"within": timedelta(0)},
        {"within": 3},
    ],
    ids=str,
)
def test_a_retry_that_makes_no_sense_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"Retry|waits"):
        Retry(**wrong)


def test_the_waits_of_a_retry_grow_to_their_maximum() -> None:
    assert [Retry(jitter=0, initial=1).wait_before(attempt) for attempt in (2, 3, 9)] == [1, 2, 30]


def test_an_async_handler_is_no_use_to_a_synchronous_coordinator() -> None:
    bus = CommandBus()

    @bus.handler(read_only=True)
    async def look(cmd: Charge) -> None: ...

    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:

        @coordinator.saga("look")
        def looking(ctx: SagaContext) -> None:
            ctx.dispatch(Charge(amount=1))

        with pytest.raises(Exception, match="its handler is async"):
            coordinator.run(looking)
        with pytest.raises(UnusableHandler, match="it is async"):

            @coordinator.saga("other")
            async def other(ctx: SagaContext) -> None: ...


class Plain:
    pass


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), "3", True])
def test_a_time_that_has_no_end_or_is_none_is_refused(seconds: Any) -> None:
    bus = CommandBus()
    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:
        with pytest.raises(UnusableHandler, match="timeout="):
            coordinator.saga("order", timeout=seconds)(lambda ctx: None)
        with pytest.raises(UnusableHandler, match="timeout="):
            bus.handler(timeout=seconds)(refund)
        with pytest.raises(UnusableHandler, match="lease="):
            SagaCoordinator(log, bus, lease=seconds)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"max_recoveries": "3"}, UnusableHandler),
        ({"max_recoveries": -1}, UnusableHandler),
        ({"max_recoveries": True}, UnusableHandler),
        ({"bus": None}, UnusableHandler),
        ({"environment": 5}, PayloadError),
        ({"environment": ""}, PayloadError),
        ({"label": "a\x00b"}, PayloadError),
        ({"label": "a\ud800b"}, PayloadError),
    ],
    ids=str,
)
def test_a_setting_that_is_none_is_refused_in_words(wrong: dict[str, Any], error: type[Exception]) -> None:
    with SagaLog.open_in_memory() as log, pytest.raises(error):
        SagaCoordinator(log, **{"bus": CommandBus(), **wrong})


@pytest.mark.parametrize(
    "call",
    [
        lambda coordinator: coordinator.run([]),
        lambda coordinator: coordinator.run({}, 1),
        lambda coordinator: coordinator.submit([]),
        lambda coordinator: coordinator.recover(limit="1"),
        lambda coordinator: coordinator.recover(limit=-1),
        lambda coordinator: coordinator.wait(1, timeout="1"),
        lambda coordinator: coordinator.wait(1, timeout=float("nan")),
        lambda coordinator: coordinator.wait("1"),
        lambda coordinator: coordinator.worker().shutdown(grace="1"),
    ],
)
def test_an_argument_of_no_sense_is_refused_in_words(call: Any) -> None:
    with (
        SagaLog.open_in_memory() as log,
        SagaCoordinator(log, CommandBus()) as coordinator,
        pytest.raises((UnusableHandler, PayloadError), match=r"\."),
    ):
        call(coordinator)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, ctx: SagaContext) -> None: ...


def test_a_saga_that_could_not_be_looked_up_is_refused() -> None:
    with (
        SagaLog.open_in_memory() as log,
        SagaCoordinator(log, CommandBus()) as coordinator,
        pytest.raises(UnusableHandler, match="not hashable"),
    ):
        coordinator.saga("odd")(Unhashable())


def test_what_no_log_could_give_back_is_refused() -> None:
    bus = CommandBus()
    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:
        with pytest.raises(UnusableHandler, match="its input, a Plain"):

            @coordinator.saga("plain")
            def plain(ctx: SagaContext, order: Plain) -> None:
                pass

        with pytest.raises(UnusableHandler, match="its command, a Plain"):

            @bus.handler
            def do(cmd: Plain) -> None:
                pass


def test_versions_are_named_as_several() -> None:
    with (
        SagaLog.open_in_memory() as log,
        SagaCoordinator(log, CommandBus()) as coordinator,
        pytest.raises(UnusableHandler, match=r"resumes=\(1, 2\)"),
    ):
        coordinator.saga("order", resumes=1)(lambda ctx: None)  # type: ignore[arg-type]


def test_what_a_context_cannot_use_is_told_in_words() -> None:
    bus = CommandBus()
    bus.handler(refund)
    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:

        @coordinator.saga("order")
        def order(ctx: SagaContext) -> None:
            with pytest.raises(UnusableHandler, match=r"Refund\(\.\.\.\)"):
                ctx.dispatch(Refund)
            with pytest.raises(UnusableHandler, match="undoes= is a Refund"):
                ctx.compensate(Refund(amount=1), undoes=Refund(amount=1))  # type: ignore[arg-type]
            with pytest.raises(UnusableHandler, match="given a set"):
                ctx.dispatch_all({Plain()})  # type: ignore[arg-type]

        coordinator.run(order)


def test_commands_side_by_side_may_come_from_a_generator() -> None:
    bus = CommandBus()
    bus.handler(pivot=True)(refund)
    with SagaLog.open_in_memory() as log, SagaCoordinator(log, bus) as coordinator:

        @coordinator.saga("order")
        def order(ctx: SagaContext) -> int:
            return len(ctx.dispatch_all(Refund(amount=amount) for amount in (1, 2)))  # type: ignore[arg-type]

        assert coordinator.run(order) == 2


def refund(cmd: Refund) -> None:
    pass


TYPED = """
    from typing import assert_type

    from pydantic import BaseModel
    from sagalog import (
        AsyncSagaContext, AsyncSagaCoordinator, Command, CommandBus, SagaContext, SagaCoordinator, SagaLog,
    )

    class StockReserved(BaseModel):
        sku: str

    class ReserveStock(Command[StockReserved]):
        sku: str

    class Order(BaseModel):
        sku: str

    bus = CommandBus()

    @bus.handler
    def reserve(cmd: ReserveStock) -> StockReserved:
        return StockReserved(sku=cmd.sku)

    assert_type(reserve(ReserveStock(sku="tea")), StockReserved)

    async def asize() -> int:
        return 1

    def word() -> str:
        return "tea"

    def use(coordinator: SagaCoordinator, other: AsyncSagaCoordinator) -> None:
        @coordinator.saga("place_order")
        def place_order(ctx: SagaContext, order: Order) -> int:
            assert_type(ctx.dispatch(ReserveStock(sku=order.sku)), StockReserved)
            return 1

        assert_type(coordinator.run(place_order, Order(sku="tea"), key="1"), int)

        @other.saga("place_order")
        async def aplace_order(ctx: AsyncSagaContext, order: Order) -> int:
            assert_type(await ctx.dispatch(ReserveStock(sku=order.sku)), StockReserved)
            assert_type(await ctx.record("size", asize), int)
            assert_type(await ctx.record("word", word), str)
            return 1

        async def arun() -> None:
            assert_type(await other.run(aplace_order, Order(sku="tea")), int)
"""


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_dispatch_and_run_are_typed(tmp_path: Path, checker: str) -> None:
    pytest.importorskip(checker)
    source = tmp_path / "typed.py"
    source.write_text(textwrap.dedent(TYPED))
    strict = ["--strict", "--no-error-summary", "--cache-dir", str(tmp_path)] if checker == "mypy" else []
    done = subprocess.run([sys.executable, "-m", checker, *strict, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_input_is_a_type_error_to_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    source = tmp_path / "typed.py"
    wrong = textwrap.dedent(TYPED).replace('Order(sku="tea"), key="1"', 'ReserveStock(sku="tea"), key="1"')
    source.write_text(wrong)
    call = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(source)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert "incompatible type" in done.stdout or "No overload" in done.stdout
