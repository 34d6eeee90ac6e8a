"""Every saga of one to four steps, with every failure, stopped at every point, held against an account of the outside.

A slice of it runs in `test_crash_points.py`; all of it by::

    python -m tests.crash_matrix [--again] [--postgres URL] [--asynchronous] [--steps N]
    python -m tests.crash_matrix --varied [--steps N]      # pivots, read-only steps, side by side, by hand
    python -m tests.crash_matrix --forgetful --unrefusing  # the outside knows no keys, and refuses nothing
    python -m tests.crash_matrix --late --steps N          # what got no answer lands later

A failing case prints its scenario and stops, with which it is replayed:
``python -m tests.crash_matrix --scenario "..." --only 7,3``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from sagalog import (
    AsyncSagaContext,
    AsyncSagaCoordinator,
    Command,
    CommandBus,
    Retry,
    SagaContext,
    SagaCoordinator,
    StepInfo,
)
from sagalog.testing import Crash, crash_points
from tests.coordinating import carry_all
from tests.outside import LANDS_LATE, SETTLE, Done, Manners, Outside
from tests.scenarios import ALL, PIVOT, READ_ONLY, UNDOABLE, Scenario, scenarios, varied
from tests.tally import Tally, add_replay


class Do(Command[Done]):
    place: int


class Undo(Command[None]):
    place: int


class Confirm(Command[Done]):
    """Cannot be undone."""

    place: int


class Look(Command[Done]):
    """Changes nothing."""

    place: int


_COMMANDS = {UNDOABLE: Do, PIVOT: Confirm, READ_ONLY: Look}


class Shop:
    """A coordinator's surroundings, for one scenario: the same for every process of a run.

    Args:
        scenario: The saga and its trouble.
        asynchronous: Whether the coordinator is async.
        manners: How the outside behaves.
        ledger: The outside's account, which goes on; if none is given, a file that begins anew with each log.
        wakes: Whether a process may ask for something when another one has taken over already.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        asynchronous: bool = False,
        manners: Manners | None = None,
        ledger: Path | None = None,
        wakes: bool = False,
    ) -> None:
        self.scenario = scenario
        self.asynchronous = asynchronous
        self.outside = Outside(scenario, ledger or _ledger(), manners or Manners())
        self._goes_on = ledger is not None
        self._log: Any = None
        self._wakes = wakes
        self._bus_of_all: CommandBus | None = None
        self.function: Any = None

    def build(self, log: Any) -> Any:
        """What a new process makes."""
        if not self._goes_on:
            if log is self._log:
                self.outside.time_passes()
            else:
                self.outside.begin_anew()
                self._log = log
        self.outside.life += 1
        return self._coordinator(log, self._bus_of_this_life())

    def _bus_of_this_life(self) -> CommandBus:
        if self._wakes:  # with the number of its own life
            return self._bus(Outside(**vars(self.outside)))
        if self._bus_of_all is None:
            self._bus_of_all = self._bus(self.outside)
        return self._bus_of_all

    def _bus(self, outside: Outside) -> CommandBus:
        scenario = self.scenario
        bus = CommandBus()
        settle = SETTLE if outside.manners.late else 0
        hangs = scenario.at if scenario.trouble == "timeout" else None
        timeout = 0.02 if self.asynchronous and hangs is not None else None

        for kind, command in _COMMANDS.items():
            options: dict[str, Any] = {"settle": settle, "timeout": timeout}
            options["retry"] = Retry(attempts=2, initial=0) if scenario.retried else None
            options |= {"read_only": kind == READ_ONLY, "pivot": kind == PIVOT}
            if kind == UNDOABLE:
                options["on_unknown"] = scenario.on_unknown
            if self.asynchronous:

                @bus.handler(**options)
                async def ado(cmd: command, step: StepInfo) -> Done:  # type: ignore[valid-type]
                    if cmd.place != hangs:
                        return outside.do(cmd.place, step.idempotency_key)
                    if not outside.manners.late:
                        outside.do(cmd.place, step.idempotency_key)
                    try:
                        return await asyncio.sleep(60, Done(place=cmd.place))
                    finally:
                        if outside.manners.late:  # counted from when its handler gave up
                            outside.do(cmd.place, step.idempotency_key)
            else:

                @bus.handler(**options)
                def do(cmd: command, step: StepInfo) -> Done:  # type: ignore[valid-type]
                    done = outside.do(cmd.place, step.idempotency_key)
                    if cmd.place == hangs:
                        raise TimeoutError("no answer in time")
                    return done

        @bus.handler(retry=Retry(attempts=2, initial=0), settle=settle)
        def undo(cmd: Undo, step: StepInfo) -> None:
            outside.undo(cmd.place, step.idempotency_key)

        @bus.compensation(Do)
        def undone(cmd: Do, output: Done | None) -> Undo:
            return Undo(place=cmd.place)

        return bus

    def _coordinator(self, log: Any, bus: CommandBus) -> Any:
        scenario = self.scenario
        on_crash: Any = scenario.on_crash
        commands = [_COMMANDS[scenario.kind(place)](place=place) for place in range(scenario.steps)]
        by_hand = [(Undo(place=place), [commands[place]]) for place in scenario.undone_by_hand]
        coordinator: Any
        if self.asynchronous:
            coordinator = AsyncSagaCoordinator(log, bus, on_crash=on_crash, label="matrix")

            @coordinator.saga("matrix")
            async def asaga(ctx: AsyncSagaContext) -> int:
                if scenario.shape == ALL:
                    await ctx.dispatch_all(commands)
                    _give_up(scenario, scenario.raises_after)
                else:
                    for place, command in enumerate(commands):
                        await ctx.dispatch(command)
                        _give_up(scenario, place)
                for undo, undone in by_hand:
                    await ctx.compensate(undo, undoes=undone)
                return scenario.steps

            self.function = asaga
        else:
            coordinator = SagaCoordinator(log, bus, on_crash=on_crash, label="matrix")

            @coordinator.saga("matrix")
            def saga(ctx: SagaContext) -> int:
                if scenario.shape == ALL:
                    ctx.dispatch_all(commands)
                    _give_up(scenario, scenario.raises_after)
                else:
                    for place, command in enumerate(commands):
                        ctx.dispatch(command)
                        _give_up(scenario, place)
                for undo, undone in by_hand:
                    ctx.compensate(undo, undoes=undone)
                return scenario.steps

            self.function = saga
        return coordinator

    def start(self, coordinator: Any) -> Any:
        return coordinator.run(self.function)


def _give_up(scenario: Scenario, place: int | None) -> None:
    if place is not None and place == scenario.raises_after:
        raise ValueError("the function gives up")


def _ledger() -> Path:
    return Path(_folder.name) / f"{next(_numbers)}.txt"


_folder = tempfile.TemporaryDirectory(prefix="sagalog-outside-")
_numbers = itertools.count()


def crashes(
    scenario: Scenario, open_log: Callable[[], Any] | None = None, manners: Manners | None = None, **how: Any
) -> Iterator[tuple[Crash, list[str]]]:
    """Each run of a scenario, and what is wrong with it."""
    shop = Shop(scenario, manners=manners, wakes=how.get("zombie", False))
    for crash in crash_points(shop.build, shop.start, open_log=open_log, **how):
        yield crash, shop.outside.problems(crash)


async def acrashes(
    scenario: Scenario, open_log: Callable[[], Any] | None = None, manners: Manners | None = None, **how: Any
) -> AsyncIterator[tuple[Crash, list[str]]]:
    """The same through the async coordinator."""
    shop = Shop(scenario, asynchronous=True, manners=manners, wakes=how.get("zombie", False))
    async for crash in crash_points(shop.build, shop.start, open_log=open_log, **how):
        yield crash, shop.outside.problems(crash)


def _postgres(url: str, *, asynchronous: bool, carried: bool) -> Callable[[], Any]:
    from sqlalchemy import create_engine, text
    from sqlalchemy.ext.asyncio import create_async_engine

    from sagalog import AsyncSagaLog, SagaLog, migrations

    engine = create_engine(url)
    migrations.upgrade(engine)
    other = create_async_engine(url)

    def open_log() -> Any:
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM saga_step"))
            connection.execute(text("DELETE FROM saga"))
        if not asynchronous:
            return SagaLog(engine)
        log = AsyncSagaLog(other)
        if carried:
            carry_all(log)
        return log

    return open_log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="stop the recovery as well")
    parser.add_argument("--zombie", action="store_true")
    parser.add_argument("--repeat", action="store_true")
    parser.add_argument("--asynchronous", action="store_true")
    parser.add_argument("--carried", action="store_true", help="as writes of many tasks that share a transaction")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--every", type=int, default=1, help="only every n-th scenario")
    parser.add_argument("--postgres", metavar="URL")
    add_replay(parser)
    parser.add_argument("--varied", action="store_true", help="pivots, read-only steps, side by side, by hand")
    parser.add_argument("--forgetful", action="store_true", help="the outside does not know keys")
    parser.add_argument("--unrefusing", action="store_true", help="the outside does what was undone already")
    parser.add_argument("--late", action="store_true", help="what got no answer lands later: those troubles only")
    given = parser.parse_args()
    if (given.zombie or given.repeat) and (given.forgetful or given.unrefusing):
        parser.error(
            "what a process sends that lost its saga, and what is delivered twice, only the outside can refuse"
        )
    how: dict[str, Any] = {key: vars(given)[key] for key in ("again", "zombie", "repeat", "only")}
    how["manners"] = Manners(knows_keys=not given.forgetful, refuses=not given.unrefusing, late=given.late)
    chosen = list((varied if given.varied else scenarios)(given.steps))
    if given.late:
        chosen = [scenario for scenario in chosen if scenario.trouble in LANDS_LATE]
    chosen = [Scenario.read(given.scenario)] if given.scenario else chosen[:: given.every]
    open_log = (
        _postgres(given.postgres, asynchronous=given.asynchronous, carried=given.carried) if given.postgres else None
    )
    tally = Tally(len(chosen))

    async def all_async() -> None:
        for scenario in chosen:
            async for crash, problems in acrashes(scenario, open_log, **how):
                tally.judge(scenario.words, crash, problems)

    if given.asynchronous:
        asyncio.run(all_async())
    else:
        for scenario in chosen:
            for crash, problems in crashes(scenario, open_log, **how):
                tally.judge(scenario.words, crash, problems)
    return tally.told()


if __name__ == "__main__":
    raise SystemExit(main())
