"""Troubles that a coordinator meets: each was once a defect."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from sagalog import (
    AsyncSagaCoordinator,
    AsyncSagaLog,
    CommandBus,
    Retry,
    SagaCoordinator,
    SagaFailed,
    SagaLog,
    StepFailed,
    StepInfo,
    StepRejected,
)
from sagalog.coordinator.effects import Write
from sagalog.errors import LogUnavailable, PayloadError, UnusableHandler


class Reserve(BaseModel):
    sku: str = "lamp"


class Release(BaseModel):
    sku: str = "lamp"
    amount: float = 1


class Charge(BaseModel):
    amount: int = 1


class Refund(BaseModel):
    amount: int = 1


class Done(BaseModel):
    ok: bool = True


class Killed(BaseException):
    """The process is gone here."""


class Shop:
    """A bus whose handlers note what was asked for, and then do what the test says."""

    def __init__(
        self,
        *,
        reserve: Callable[[StepInfo], Any] = lambda step: Done(),
        derive: Callable[[], Release] = Release,
        releases: bool = True,
        **arguments: Any,
    ) -> None:
        self.asked: list[tuple[str, str]] = []
        self.bus = CommandBus()

        @self.bus.handler(**arguments)
        def do_reserve(cmd: Reserve, step: StepInfo) -> Done:
            self.asked.append(("reserve", step.idempotency_key))
            return reserve(step)  # type: ignore[no-any-return]

        @self.bus.compensation(Reserve)
        def undo_reserve(cmd: Reserve, output: Done | None) -> Release:
            return derive()

        @self.bus.handler
        def do_charge(cmd: Charge, step: StepInfo) -> Done:
            self.asked.append(("charge", step.idempotency_key))
            return Done()

        @self.bus.compensation(Charge)
        def undo_charge(cmd: Charge, output: Done | None) -> Refund:
            return Refund()

        @self.bus.handler
        def do_refund(cmd: Refund, step: StepInfo) -> None:
            self.asked.append(("refund", step.idempotency_key))

        if releases:

            @self.bus.handler
            def do_release(cmd: Release, step: StepInfo) -> None:
                self.asked.append(("release", step.idempotency_key))

    @property
    def verbs(self) -> list[str]:
        return [verb for verb, _ in self.asked]


@pytest.fixture
def log(migrated_url: str) -> Iterator[SagaLog]:
    with SagaLog.open(migrated_url) as opened:
        yield opened


def reserving(coordinator: SagaCoordinator, *, fails: bool = False) -> Callable[..., Any]:
    """Register a saga of one step."""

    @coordinator.saga("reserving")
    def reserving(ctx: Any, order: int) -> int:
        ctx.dispatch(Reserve())
        if fails:
            raise ValueError("no lamp fits")
        return order

    return reserving


def beginning_elsewhere(log: SagaLog, name: str, *, input: object = 1, submitted: bool = False) -> int:
    """A saga that a process left that is gone; or one that it submitted."""
    elsewhere = SagaCoordinator(log, CommandBus())

    @elsewhere.saga(name)
    def left(ctx: Any, order: Any) -> None:
        raise Killed

    if submitted:
        return elsewhere.submit(left, input)
    with pytest.raises(Killed):
        elsewhere.run(left, input)
    elsewhere.close()
    return log.max_saga_id()


# Whose a saga is


def test_a_saga_that_has_just_begun_is_not_recovered_by_its_own_process(log: SagaLog) -> None:
    shop = Shop()
    with SagaCoordinator(log, shop.bus) as coordinator:
        saga = reserving(coordinator)

        def recovering(effect: Any, answer: Callable[[Any], Any]) -> Any:
            given = answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "run":
                coordinator.interpose = None
                beside = threading.Thread(target=coordinator.recover)
                beside.start()
                beside.join()
            return given

        coordinator.interpose = recovering
        assert coordinator.run(saga, 5) == 5
    assert shop.verbs == ["reserve"]


def test_a_saga_that_its_process_could_not_undo_is_recovered_by_another_one(log: SagaLog) -> None:
    knows_less, knows_all = Shop(releases=False), Shop()
    with SagaCoordinator(log, knows_less.bus) as here, SagaCoordinator(log, knows_all.bus) as there:
        with pytest.raises(SagaFailed) as failed:
            here.run(reserving(here, fails=True), 1)
        assert failed.value.outcome == "failed"
        reserving(there)
        assert there.recover().compensated == [1]
    assert knows_all.verbs == ["release"]


def test_a_child_that_exits_inside_a_handler_does_not_give_its_parents_saga_away(log: SagaLog) -> None:
    owners: list[str | None] = []

    def forking(step: StepInfo) -> Done:
        child = os.fork()
        if child == 0:
            sys.exit(0)
        os.waitpid(child, 0)
        owners.append(log.get(step.saga_id).executor_id)
        return Done()

    shop = Shop(reserve=forking)
    with SagaCoordinator(log, shop.bus) as coordinator:
        saga = reserving(coordinator)
        here = os.getpid()
        try:
            assert coordinator.run(saga, 5) == 5
        finally:
            if os.getpid() != here:
                os._exit(0)
        assert owners == [coordinator.executor_id]


def test_a_saga_whose_handler_hangs_is_recovered_by_its_own_process(log: SagaLog) -> None:
    hangs, woken = threading.Event(), threading.Event()

    def hanging(step: StepInfo) -> Done:
        hangs.set()
        woken.wait()
        return Done()

    shop = Shop(reserve=hanging, timeout=0.1, settle=0.0, on_unknown="compensate")
    with SagaCoordinator(log, shop.bus) as coordinator:
        saga = reserving(coordinator)
        raised: list[BaseException] = []

        def run() -> None:
            try:
                coordinator.run(saga, 1)
            except BaseException as error:
                raised.append(error)

        hung = threading.Thread(target=run)
        hung.start()
        hangs.wait()
        compensated: list[int] = []
        while not compensated:
            compensated = coordinator.recover().compensated
        woken.set()
        hung.join()
    assert compensated == [1]
    assert type(raised[0]).__name__ == "LeaseLost"
    assert shop.verbs == ["reserve", "release"]


# Sagas that stand in the way of others


def test_recovery_passes_a_thousand_unknown_sagas(sqlite_path: Any) -> None:
    with SagaLog.open(sqlite_path, durability="normal") as log:
        elsewhere = SagaCoordinator(log, CommandBus())

        @elsewhere.saga("unknown")
        def unknown(ctx: Any, order: int) -> None:
            raise Killed

        for number in range(1000):
            with pytest.raises(Killed):
                elsewhere.run(unknown, number)
        elsewhere.close()
        last = beginning_elsewhere(log, "reserving")
        with SagaCoordinator(log, Shop().bus) as coordinator:
            reserving(coordinator)
            report = coordinator.recover()
        assert report.compensated == [last]
        assert len(report.left) == 1000


@pytest.mark.parametrize("submitted", [True, False])
def test_a_worker_passes_unknown_sagas(log: SagaLog, submitted: bool) -> None:
    for _ in range(9):
        beginning_elsewhere(log, "unknown", submitted=submitted)
    known = beginning_elsewhere(log, "reserving", submitted=submitted)
    coordinator = SagaCoordinator(log, Shop().bus)
    reserving(coordinator)
    with coordinator.worker(concurrency=1):
        if submitted:
            assert coordinator.wait(known, timeout=30) == 1
        else:
            with pytest.raises(SagaFailed):
                coordinator.wait(known, timeout=30)


def test_a_worker_does_not_take_a_saga_again_and_again_that_it_cannot_undo(log: SagaLog) -> None:
    shop = Shop(releases=False)
    with SagaCoordinator(log, shop.bus) as here, pytest.raises(SagaFailed):
        here.run(reserving(here, fails=True), 1)
    before = log.get(1).epoch
    coordinator = SagaCoordinator(log, shop.bus)
    reserving(coordinator)
    looks: list[str] = []
    enough = threading.Event()

    def counting(effect: Any, answer: Callable[[Any], Any]) -> Any:
        if isinstance(effect, Write) and effect.operation.asked == "recover":
            looks.append("recover")
            if len(looks) == 20:
                enough.set()
        return answer(effect)

    coordinator.interpose = counting
    with coordinator.worker(poll=0.01):
        assert enough.wait(30)
    assert log.get(1).epoch == before + 1


# What cannot be undone here


def test_an_undo_that_cannot_be_stored_leaves_its_saga_to_a_person(log: SagaLog) -> None:
    shop = Shop(derive=lambda: Release(amount=float("nan")))
    with SagaCoordinator(log, shop.bus) as coordinator, pytest.raises(SagaFailed) as failed:
        coordinator.run(reserving(coordinator, fails=True), 1)
    assert failed.value.outcome == "failed_compensation"
    assert "0 (Reserve, succeeded)" in str(failed.value)


def test_a_saga_whose_undo_is_async_is_left_to_an_async_coordinator(log: SagaLog) -> None:
    shop = Shop(releases=False)

    @shop.bus.handler
    async def do_release(cmd: Release, step: StepInfo) -> None:
        """Not called here."""

    with SagaCoordinator(log, shop.bus) as coordinator:
        with pytest.raises(SagaFailed) as failed:
            coordinator.run(reserving(coordinator, fails=True), 1)
        assert failed.value.outcome == "failed"
        report = coordinator.recover()
    assert [left.saga_id for left in report.left] == [1]
    assert "async" in report.left[0].reason
    assert log.get(1).recoveries == 0


# What is known of a step


def test_a_timeout_is_no_rejection_whatever_the_handler_rejects_with(sqlite_path: Any) -> None:
    """The request may have landed, so the step is undone."""
    bus, asked = CommandBus(), []

    @bus.handler(rejects=(OSError,), timeout=0.05, settle=0.0, on_unknown="compensate")
    async def do_reserve(cmd: Reserve) -> Done:
        asked.append("reserve")
        await asyncio.Event().wait()
        return Done()

    @bus.compensation(Reserve)
    def undo_reserve(cmd: Reserve, output: Done | None) -> Release:
        return Release()

    @bus.handler
    async def do_release(cmd: Release) -> None:
        asked.append("release")

    async def main() -> None:
        async with await AsyncSagaLog.open(sqlite_path) as log, AsyncSagaCoordinator(log, bus) as coordinator:

            @coordinator.saga("reserving")
            async def reserving(ctx: Any, order: int) -> None:
                await ctx.dispatch(Reserve())

            with pytest.raises(SagaFailed, match="is in doubt"):
                await coordinator.run(reserving, 1)

    asyncio.run(main())
    assert asked == ["reserve", "release"]


def test_an_async_handler_behind_a_plain_decorator_is_awaited(sqlite_path: Any) -> None:
    bus = CommandBus()

    def plain(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function(*args)

        return wrapper

    @bus.handler(read_only=True)
    @plain
    async def do_reserve(cmd: Reserve) -> Done:
        return Done()

    async def main() -> Done:
        async with await AsyncSagaLog.open(sqlite_path) as log, AsyncSagaCoordinator(log, bus) as coordinator:

            @coordinator.saga("reserving")
            async def reserving(ctx: Any, order: int) -> Done:
                done: Done = await ctx.dispatch(Reserve())
                return done

            answer: Done = await coordinator.run(reserving, 1)
            return answer

    assert asyncio.run(main()) == Done()


def test_a_step_is_tried_as_often_as_its_handler_says_and_no_more(log: SagaLog) -> None:
    def failing(step: StepInfo) -> Done:
        raise RuntimeError("no answer")

    shop = Shop(reserve=failing, retry=Retry(attempts=3, initial=0.0), settle=0.0)
    with SagaCoordinator(log, shop.bus) as coordinator, pytest.raises(SagaFailed):
        coordinator.run(reserving(coordinator), 1)
    assert shop.verbs == ["reserve"] * 3


def test_a_slow_write_before_a_step_does_not_end_its_saga(sqlite_path: Any) -> None:
    shop = Shop(timeout=0.05, settle=0.0)
    with SagaLog.open(sqlite_path) as log, SagaCoordinator(log, shop.bus) as coordinator:
        saga = reserving(coordinator)

        def waiting(effect: Any, answer: Callable[[Any], Any]) -> Any:
            given = answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "dispatch":
                late = time.monotonic() + 0.1
                while time.monotonic() < late:
                    """The disk is slow."""
            return given

        coordinator.interpose = waiting
        assert coordinator.run(saga, 5) == 5
    assert shop.verbs == ["reserve"]


def test_the_reason_of_a_rejection_is_the_same_on_a_resume(log: SagaLog) -> None:
    def rejecting(step: StepInfo) -> Done:
        raise StepRejected("sold \x00 out")

    reasons: list[str] = []
    shop = Shop(reserve=rejecting)
    with SagaCoordinator(log, shop.bus, on_crash="resume") as coordinator:

        @coordinator.saga("asking")
        def asking(ctx: Any, order: int) -> None:
            try:
                ctx.dispatch(Reserve())
            except StepFailed as failure:
                reasons.append(failure.reason)
            if len(reasons) == 1:
                raise Killed

        with pytest.raises(Killed):
            coordinator.run(asking, 1)
        assert coordinator.recover().completed == [1]
    assert reasons[0] == reasons[1] == "sold \ufffd out"


# Going on, and undoing by hand


def test_a_resumed_function_that_undoes_before_it_did_what_the_log_holds_is_undone(log: SagaLog) -> None:
    shop = Shop()
    lives: list[int] = []
    with SagaCoordinator(log, shop.bus, on_crash="resume") as coordinator:

        @coordinator.saga("wavering")
        def wavering(ctx: Any, order: int) -> None:
            lives.append(1)
            ctx.dispatch(Reserve())
            if len(lives) == 1:
                ctx.dispatch(Charge())
                raise Killed
            ctx.compensate(Release())

        with pytest.raises(Killed):
            coordinator.run(wavering, 1)
        assert coordinator.recover().compensated == [1]
    assert shop.verbs == ["reserve", "charge", "refund", "release"]


def test_a_deadline_does_not_stop_an_undo_by_hand(log: SagaLog) -> None:
    shop = Shop()
    with SagaCoordinator(log, shop.bus) as coordinator:
        undone_by_hand: list[int] = []

        @coordinator.saga("late", timeout=0.2)
        def late(ctx: Any, order: int) -> None:
            ctx.dispatch(Reserve())
            deadline = log.get(ctx.saga_id).deadline_at
            assert deadline is not None
            while time.time() < deadline.timestamp():
                """Time passes."""
            ctx.compensate(Release())
            undone_by_hand.append(ctx.saga_id)

        with pytest.raises(SagaFailed, match="its time is up") as failed:
            coordinator.run(late, 1)
    assert failed.value.outcome == "compensated"
    assert undone_by_hand == [1]
    assert shop.asked[1:] == [("release", f"{shop.asked[0][1]}:undo")]


# Registration


@pytest.mark.parametrize(
    "arguments",
    [
        {"rejects": "CardDeclined"},
        {"rejects": (KeyboardInterrupt,)},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"settle": float("nan")},
        {"retry": 5},
    ],
)
def test_what_would_only_fail_while_a_step_is_done_is_refused_at_registration(arguments: dict[str, Any]) -> None:
    with pytest.raises(UnusableHandler):
        Shop(**arguments)


def test_rejections_may_be_listed(log: SagaLog) -> None:
    def rejecting(step: StepInfo) -> Done:
        raise ValueError("sold out")

    shop = Shop(reserve=rejecting, rejects=[ValueError])
    with SagaCoordinator(log, shop.bus) as coordinator, pytest.raises(SagaFailed, match="failed: ValueError: sold out"):
        coordinator.run(reserving(coordinator), 1)
    assert log.get(1).state == "compensated"


def test_a_handler_is_never_given_the_key_in_place_of_its_own_parameter() -> None:
    bus = CommandBus()
    with pytest.raises(UnusableHandler, match="comes after 'loud'"):

        @bus.handler
        def do_reserve(cmd: Reserve, loud: bool = False, step: StepInfo | None = None) -> Done:
            return Done()


def test_a_handler_may_take_its_info_optionally(log: SagaLog) -> None:
    bus, keys = CommandBus(), []

    @bus.handler(read_only=True, retry=Retry())
    def do_reserve(cmd: Reserve, step: StepInfo | None = None) -> Done:
        keys.append(None if step is None else step.idempotency_key)
        return Done()

    with SagaCoordinator(log, bus) as coordinator:
        coordinator.run(reserving(coordinator), 1)
    assert keys[0] is not None


def test_an_async_compensation_is_refused() -> None:
    bus = CommandBus()
    with pytest.raises(UnusableHandler, match="async"):

        @bus.compensation(Reserve)
        async def undo_reserve(cmd: Reserve, output: Done) -> Release:
            return Release()


# Transactional handlers


@pytest.fixture
def engine(migrated_url: str) -> Iterator[Engine]:
    engine = create_engine(migrated_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE stock (amount INTEGER)"))
    yield engine
    engine.dispose()


def test_a_transactional_handler_cannot_commit_without_its_step(engine: Engine) -> None:
    bus, undone = CommandBus(), []

    @bus.handler(transactional=True)
    def do_reserve(cmd: Reserve, session: Session) -> Done:
        session.execute(text("INSERT INTO stock VALUES (1)"))
        session.commit()
        raise ValueError("too late")

    @bus.compensation(Reserve)
    def undo_reserve(cmd: Reserve, output: Done) -> Release:
        return Release()

    @bus.handler
    def do_release(cmd: Release) -> None:
        undone.append(cmd)

    with SagaCoordinator(SagaLog(engine), bus) as coordinator, pytest.raises(SagaFailed, match="commit") as failed:
        coordinator.run(reserving(coordinator), 1)
    assert failed.value.outcome == "compensated"
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM stock")).scalar_one() == 0


def test_a_transactional_handler_may_use_savepoints_and_flush(engine: Engine) -> None:
    bus = CommandBus()

    @bus.handler(transactional=True, pivot=True)
    def do_reserve(cmd: Reserve, session: Session) -> Done:
        with session.begin_nested():
            session.execute(text("INSERT INTO stock VALUES (1)"))
        session.flush()
        return Done()

    with SagaCoordinator(SagaLog(engine), bus) as coordinator:
        assert coordinator.run(reserving(coordinator), 1) == 1
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM stock")).scalar_one() == 1


def test_a_transactional_handler_may_return_a_row_that_expires_with_its_commit(engine: Engine) -> None:
    class Base(MappedAsDataclass, DeclarativeBase):
        """The application's."""

    class Order(Base):
        __tablename__ = "shop_order"
        name: Mapped[str] = mapped_column(primary_key=True)

    Base.metadata.create_all(engine)
    bus = CommandBus()

    @bus.handler(transactional=True, pivot=True)
    def do_reserve(cmd: Reserve, session: Session) -> Any:
        order = Order(name="lamp")
        session.add(order)
        session.flush()
        return order

    with SagaCoordinator(SagaLog(engine), bus) as coordinator:
        assert coordinator.run(reserving(coordinator), 1) == 1
        assert coordinator.log.get(1).steps[0].output == [{"name": "lamp"}]


# Submitting


def test_an_input_that_no_worker_could_read_is_not_submitted(log: SagaLog) -> None:
    coordinator = SagaCoordinator(log, Shop().bus)
    saga = reserving(coordinator)
    with pytest.raises(PayloadError, match="a str is no input of it"):
        coordinator.submit(saga, "a lamp")
    with pytest.raises(PayloadError, match="a NoneType is no input of it"):
        coordinator.submit(saga)
    assert log.max_saga_id() == 0


def test_a_copy_of_a_log_whose_process_never_recovered_knows_its_environment(log: SagaLog) -> None:
    from sagalog.errors import WrongEnvironment

    with SagaCoordinator(log, Shop().bus, environment="production") as production:
        production.run(reserving(production), 1)
    with SagaCoordinator(log, Shop().bus, environment="staging") as staging, pytest.raises(WrongEnvironment):
        staging.recover()


# Starts and ends


def test_a_start_whose_answer_was_lost_is_recognised(log: SagaLog) -> None:
    shop = Shop()
    with SagaCoordinator(log, shop.bus) as coordinator:
        saga = reserving(coordinator)
        lost: list[int] = []

        def losing(effect: Any, answer: Callable[[Any], Any]) -> Any:
            given = answer(effect)
            if isinstance(effect, Write) and effect.operation.asked == "run" and not lost:
                lost.append(1)
                raise LogUnavailable("run", "the connection ended before the answer")
            return given

        coordinator.interpose = losing
        assert coordinator.run(saga, 5, key="order-5") == 5
    assert lost == [1]
    assert shop.verbs == ["reserve"]
    assert log.max_saga_id() == 1


def test_a_start_that_is_cancelled_is_recovered_by_another_process(sqlite_path: Any) -> None:
    bus = CommandBus()

    async def main() -> list[int]:
        async with (
            await AsyncSagaLog.open(sqlite_path) as log,
            AsyncSagaCoordinator(log, bus) as here,
            AsyncSagaCoordinator(log, bus) as there,
        ):

            async def empty(ctx: Any, order: int) -> None:
                """Never begun."""

            here.saga("empty")(empty)
            there.saga("empty")(empty)

            async def cancelling(effect: Any, answer: Callable[[Any], Any]) -> Any:
                given = await answer(effect)
                if isinstance(effect, Write) and effect.operation.asked == "run":
                    raise asyncio.CancelledError
                return given

            here.interpose = cancelling
            with pytest.raises(asyncio.CancelledError):
                await here.run(empty, 1)
            return (await there.recover()).compensated

    assert asyncio.run(main()) == [1]


def test_a_worker_that_is_shut_down_while_a_handler_hangs_gives_up_its_lease(log: SagaLog) -> None:
    hangs, woken = threading.Event(), threading.Event()

    def hanging(step: StepInfo) -> Done:
        hangs.set()
        woken.wait()
        return Done()

    shop = Shop(reserve=hanging)
    coordinator = SagaCoordinator(log, shop.bus)
    submitted = coordinator.submit(reserving(coordinator), 1)
    worker = coordinator.worker()
    worker.start()
    assert hangs.wait(30)
    worker.shutdown(grace=0.0)
    left = [thread.name for thread in threading.enumerate() if thread.name == "sagalog-lease"]
    woken.set()
    assert left == []
    assert log.get(submitted).executor_id is None


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_an_async_worker_closes_the_connection_on_which_it_listened(
    postgres_url: str, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = make_url(postgres_url).set(drivername=f"postgresql+{driver}")
    if driver == "asyncpg" and "host" in url.query:
        url = url.set(query={"host": url.query["host"]})

    async def main() -> None:
        engine = create_async_engine(url)
        coordinator = AsyncSagaCoordinator(AsyncSagaLog(engine), CommandBus())

        @coordinator.saga("empty")
        async def empty(ctx: Any, order: int) -> int:
            return order

        async with coordinator.worker():
            assert await coordinator.wait(await coordinator.submit(empty, 1), timeout=30) == 1
        await engine.dispose()

    asyncio.run(main())
    assert [record.message for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []
    watching = create_engine(postgres_url)
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    until = time.monotonic() + 10
    with watching.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while connection.execute(text(others)).scalar_one() and time.monotonic() < until:
            """The server takes a moment to see that a client is gone."""
        assert connection.execute(text(others)).scalar_one() == 0
    watching.dispose()
