"""Every saga of one to four steps, with every failure, stopped at every point, held against an account of the outside.

A slice of it runs in `test_crash_points.py`; all of it by::

    python -m tests.crash_matrix [--again] [--postgres URL] [--asynchronous] [--steps N]

A failing case prints its scenario and stops, with which it is replayed:
``python -m tests.crash_matrix --scenario "..." --only 7,3``.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from sagalog import (
    AsyncSagaContext,
    AsyncSagaCoordinator,
    Command,
    CommandBus,
    Retry,
    SagaContext,
    SagaCoordinator,
    StepInfo,
    StepRejected,
)
from sagalog.testing import Crash, crash_points
from tests.coordinating import carry_all


class Done(BaseModel):
    place: int


class Do(Command[Done]):
    place: int


class Undo(Command[None]):
    place: int


@dataclass(frozen=True)
class Scenario:
    """One saga and its trouble.

    Attributes:
        steps: How many.
        trouble: "" or what goes wrong: raises (the function), rejects, before, after, timeout (the handler of step
            `at`), undo_rejects, undo_raises (the undo of it).
        at: The step concerned.
        on_crash: The coordinator's.
        on_unknown: The handlers'.
        retried: Whether the handlers are tried again.
    """

    steps: int
    trouble: str
    at: int
    on_crash: str
    on_unknown: str
    retried: bool

    @property
    def stays_in_doubt(self) -> bool:
        """Whether a step of it may end in doubt, with nobody allowed to undo it."""
        return self.on_unknown == "stop" and (not self.retried or self.trouble in ("before", "after", "timeout"))

    @property
    def cannot_be_undone(self) -> bool:
        return self.trouble.startswith("undo_")


TROUBLES = ("rejects", "before", "after", "timeout", "undo_rejects", "undo_raises")


def scenarios(most_steps: int = 4) -> Iterator[Scenario]:
    """All of them."""
    for steps in range(1, most_steps + 1):
        troubles = [("", 0), *itertools.product(("raises", *TROUBLES), range(steps))]
        for (trouble, at), on_crash, on_unknown, retried in itertools.product(
            troubles, ("compensate", "resume"), ("stop", "compensate"), (False, True)
        ):
            yield Scenario(steps, trouble, at, on_crash, on_unknown, retried)


@dataclass
class Outside:
    """The other side, which keeps its own account: what was asked, and what took effect.

    It knows keys: a repetition under one key takes effect once, and what was undone is not done later.
    """

    scenario: Scenario
    asked: list[tuple[str, int, str]] = field(default_factory=list)
    effects: list[tuple[str, int, str]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)

    def _take_effect(self, verb: str, place: int, key: str) -> None:
        self.asked.append((verb, place, key))
        if key in self.keys:
            return
        if verb == "do" and f"{key}:undo" in self.keys:
            raise StepRejected("it was undone already")
        self.keys.add(key)
        self.effects.append((verb, place, key))

    def do(self, place: int, key: str) -> Done:
        here = self.scenario.trouble if self.scenario.at == place else ""
        if here == "rejects":
            raise StepRejected("no")
        if here == "before":
            raise OSError("lost on the way there")
        self._take_effect("do", place, key)
        if here == "after":
            raise OSError("lost on the way back")
        return Done(place=place)

    def undo(self, place: int, key: str) -> None:
        here = self.scenario.trouble if self.scenario.at == place else ""
        if here == "undo_rejects":
            raise StepRejected("it cannot be undone")
        if here == "undo_raises":
            raise OSError("the undo is lost")
        self._take_effect("undo", place, key)

    # The oracle

    def problems(self, crash: Crash) -> list[str]:
        """What is wrong with how a run ended; nothing, if the promises hold."""
        found = []
        done = {place: index for index, (verb, place, _) in enumerate(self.effects) if verb == "do"}
        undone = {place: index for index, (verb, place, _) in enumerate(self.effects) if verb == "undo"}
        for verb in ("do", "undo"):
            keys: dict[int, set[str]] = {}
            for asked, place, key in self.asked:
                if asked == verb:
                    keys.setdefault(place, set()).add(key)
            found += [
                f"{verb} {place} was asked for under {len(held)} keys" for place, held in keys.items() if len(held) > 1
            ]
        saga = crash.saga
        if saga is None:
            return found + (["effects without a saga"] if self.effects else [])
        if saga.state == "compensated":
            found += [f"compensated, and {p} is done" for p, at in done.items() if undone.get(p, -1) < at]
        elif saga.state == "completed":
            missing = set(range(self.scenario.steps)) - set(done)
            found += [f"completed, and {missing} are not done"] if missing else []
            found += [f"completed, and {sorted(undone)} are undone"] if undone else []
        elif saga.state == "failed_compensation":
            found += self._needless_person(crash)
        else:
            found.append(f"unresolved: {saga.state}; {[report.left for report in crash.reports]}")
        for report in crash.reports:
            found += [f"recovery raised {error}" for error in report.errors.values()]
        return found

    def _needless_person(self, crash: Crash) -> list[str]:
        assert crash.saga is not None
        reason = crash.saga.failure_reason or ""
        pending = [step.step_index for step in crash.saga.steps if step.state == "pending"]
        if not (self.scenario.stays_in_doubt or self.scenario.cannot_be_undone):
            return [f"a person is asked without need: {reason}"]
        if (
            not any(f"step {index} " in reason or f"row {index} " in reason for index in pending)
            and "refused" not in reason
        ):
            return [f"the reason names no step: {reason}"]
        return []


class Shop:
    """A coordinator's surroundings, for one scenario: the same for every process of a run."""

    def __init__(self, scenario: Scenario, *, asynchronous: bool = False) -> None:
        self.scenario = scenario
        self.asynchronous = asynchronous
        self.outside = Outside(scenario)
        self._logs: list[Any] = []
        self.function: Any = None

    def new_outside(self) -> Outside:
        """The other side of one run."""
        return Outside(self.scenario)

    def build(self, log: Any) -> Any:
        if log not in self._logs:
            self._logs, self.outside = [log], self.new_outside()
        bus = CommandBus()
        retry = Retry(attempts=2, initial=0) if self.scenario.retried else None
        undo_retry = Retry(attempts=2, initial=0)
        timeout = 0.02 if self.asynchronous and self.scenario.trouble == "timeout" else None
        on_unknown: Any = self.scenario.on_unknown
        outside = self.outside
        hangs = self.scenario.at if self.scenario.trouble == "timeout" else None

        if self.asynchronous:

            @bus.handler(retry=retry, on_unknown=on_unknown, timeout=timeout, settle=0)
            async def ado(cmd: Do, step: StepInfo) -> Done:
                done = outside.do(cmd.place, step.idempotency_key)
                if cmd.place == hangs:
                    await asyncio.sleep(60)
                return done

            @bus.handler(retry=undo_retry, settle=0)
            async def aundo(cmd: Undo, step: StepInfo) -> None:
                outside.undo(cmd.place, step.idempotency_key)
        else:

            @bus.handler(retry=retry, on_unknown=on_unknown, settle=0)
            def do(cmd: Do, step: StepInfo) -> Done:
                done = outside.do(cmd.place, step.idempotency_key)
                if cmd.place == hangs:
                    raise TimeoutError("no answer in time")
                return done

            @bus.handler(retry=undo_retry, settle=0)
            def undo(cmd: Undo, step: StepInfo) -> None:
                outside.undo(cmd.place, step.idempotency_key)

        @bus.compensation(Do)
        def undone(cmd: Do, output: Done | None) -> Undo:
            return Undo(place=cmd.place)

        return self._coordinator(log, bus)

    def _coordinator(self, log: Any, bus: CommandBus) -> Any:
        scenario = self.scenario
        on_crash: Any = scenario.on_crash
        fails = scenario.steps - 1 if scenario.cannot_be_undone else scenario.at
        raises = scenario.trouble == "raises" or scenario.cannot_be_undone
        coordinator: Any
        if self.asynchronous:
            coordinator = AsyncSagaCoordinator(log, bus, on_crash=on_crash, label="matrix")

            @coordinator.saga("matrix")
            async def asaga(ctx: AsyncSagaContext) -> int:
                for place in range(scenario.steps):
                    await ctx.dispatch(Do(place=place))
                    if raises and place == fails:
                        raise ValueError("the function gives up")
                return scenario.steps

            self.function = asaga
        else:
            coordinator = SagaCoordinator(log, bus, on_crash=on_crash, label="matrix")

            @coordinator.saga("matrix")
            def saga(ctx: SagaContext) -> int:
                for place in range(scenario.steps):
                    ctx.dispatch(Do(place=place))
                    if raises and place == fails:
                        raise ValueError("the function gives up")
                return scenario.steps

            self.function = saga
        return coordinator

    def start(self, coordinator: Any) -> Any:
        return coordinator.run(self.function)


def crashes(
    scenario: Scenario, open_log: Callable[[], Any] | None = None, **how: Any
) -> Iterator[tuple[Crash, list[str]]]:
    """Each run of a scenario, and what is wrong with it."""
    shop = Shop(scenario)
    for crash in crash_points(shop.build, shop.start, open_log=open_log, **how):
        yield crash, shop.outside.problems(crash)


async def acrashes(
    scenario: Scenario, open_log: Callable[[], Any] | None = None, **how: Any
) -> AsyncIterator[tuple[Crash, list[str]]]:
    """The same through the async coordinator."""
    shop = Shop(scenario, asynchronous=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="stop the recovery as well")
    parser.add_argument("--zombie", action="store_true")
    parser.add_argument("--repeat", action="store_true")
    parser.add_argument("--asynchronous", action="store_true")
    parser.add_argument("--carried", action="store_true", help="as writes of many tasks that share a transaction")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--every", type=int, default=1, help="only every n-th scenario")
    parser.add_argument("--postgres", metavar="URL")
    parser.add_argument("--scenario", help="only this one: its fields with commas")
    parser.add_argument("--only", help="only these stops")
    given = parser.parse_args()
    how: dict[str, Any] = {"again": given.again, "zombie": given.zombie, "repeat": given.repeat}
    if given.only:
        how["only"] = tuple(int(number) for number in given.only.split(","))
    chosen = list(scenarios(given.steps))[:: given.every]
    if given.scenario:
        steps, trouble, at, on_crash, on_unknown, retried = given.scenario.split(",")
        chosen = [Scenario(int(steps), trouble, int(at), on_crash, on_unknown, retried == "True")]
    open_log = (
        _postgres(given.postgres, asynchronous=given.asynchronous, carried=given.carried) if given.postgres else None
    )
    began = time.monotonic()
    states: Counter[str] = Counter()
    bad = 0

    def judge(scenario: Scenario, crash: Crash, problems: list[str]) -> None:
        nonlocal bad
        states[crash.saga.state if crash.saga else "nothing written"] += 1
        if problems:
            bad += 1
            shown = ",".join(map(str, dataclasses.astuple(scenario)))
            print(f'--scenario "{shown}" --only {",".join(map(str, crash.stops))}: {crash}: {problems}')  # noqa: T201

    async def all_async() -> None:
        for scenario in chosen:
            async for crash, problems in acrashes(scenario, open_log, **how):
                judge(scenario, crash, problems)

    if given.asynchronous:
        asyncio.run(all_async())
    else:
        for scenario in chosen:
            for crash, problems in crashes(scenario, open_log, **how):
                judge(scenario, crash, problems)
    took = time.monotonic() - began
    print(f"{len(chosen)} scenarios, {sum(states.values())} cases, {bad} bad, {took:.0f} s: {dict(states)}")  # noqa: T201


if __name__ == "__main__":
    main()
