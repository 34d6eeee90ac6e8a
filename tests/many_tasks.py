"""A process that runs many sagas in tasks, which share transactions, is killed, or stopped and woken, at any statement.

What it was told before, it wrote to a file: nothing of that may be missing from the log.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import create_async_engine

from sagalog import AsyncSagaContext, AsyncSagaCoordinator, AsyncSagaLog, LeaseLost, SagaFailed, SagaRecord
from sagalog.log.database import CursorDatabase
from tests.crash_matrix import Do
from tests.many_processes import STEPS, asked, build, many_bus, noting
from tests.processes import Child, World, records, time_passes

_STRIKES = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def _strike_at(at: int | None, strike: str) -> Callable[[], int]:
    """Let this process be struck before its n-th statement; returns what tells how many there were."""
    import psycopg

    passed = 0

    def counted(kind: type, name: str) -> None:
        send = getattr(kind, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal passed
            if strike == "stop" and _between_two_statements(args[0]):
                return send(*args, **kwargs)
            passed += 1
            if passed - 1 == at:
                os.kill(os.getpid(), _STRIKES[strike])
            return send(*args, **kwargs)

        setattr(kind, name, counting)

    counted(psycopg.AsyncCursor, "execute")
    counted(CursorDatabase, "write")
    return lambda: passed


def _between_two_statements(cursor: Any) -> bool:
    """Whether its transaction is open and waits for the next one: as long as it does, it holds what others wait for."""
    from psycopg.pq import PipelineStatus, TransactionStatus

    info = cursor.connection.info
    return info.pipeline_status == PipelineStatus.OFF and info.transaction_status != TransactionStatus.IDLE


async def _opened(world: World) -> AsyncSagaLog:
    if world.url is None:
        return await AsyncSagaLog.open(world.path, durability=world.durability, migrate=False)
    return AsyncSagaLog(create_async_engine(world.url))


def _life(world: World, sagas: int, at: int | None, strike: str) -> Child:
    async def main() -> int:
        note = noting(world.ledger)
        log = await _opened(world)
        coordinator = AsyncSagaCoordinator(log, many_bus(note))
        lost = 0

        @coordinator.saga("many")
        async def many(ctx: AsyncSagaContext, number: int) -> int:
            for place in range(STEPS):
                await ctx.dispatch(Do(place=place))
                note("told", f"{ctx.saga_id}:{place}")
            if number % 3 == 2 and strike == "kill":  # an undo's transaction of two statements would stand still
                raise ValueError("a third of them is undone")
            return number

        async def run(number: int) -> None:
            nonlocal lost
            try:
                await coordinator.run(many, number)
                note("completed", str(number))
            except SagaFailed as failed:
                note(failed.outcome, str(number))
            except LeaseLost:
                lost += 1

        await coordinator.run(many, 0)  # the lease, and what is made ready at first
        passed = _strike_at(at, strike)
        await asyncio.gather(*(run(number) for number in range(1, sagas + 1)))
        return -lost if lost else passed()

    return Child(lambda say: asyncio.run(main()))


def _recovered(world: World) -> list[SagaRecord]:
    def recover(say: Callable[[Any], None]) -> list[SagaRecord]:
        log = world.open()
        coordinator, _ = build(log, noting(world.ledger))
        time_passes(log)
        for _ in range(2):
            report = coordinator.recover()
            assert not report.errors, report.errors
        return records(log)

    return Child(recover).answers()[-1]  # type: ignore[no-any-return]


def _begun(world: World) -> None:
    world.begin_anew()
    [_] = Child(lambda say: world.open(empty=True).close()).answers()


def tasks_killed(world: World, sagas: int, at: int) -> tuple[bool, list[str]]:
    """Kill a process that runs so many sagas before its n-th statement; whether it came so far, and what is wrong."""
    _begun(world)
    child = _life(world, sagas, at, "kill")
    child.answers()
    return child.was_killed, _problems(_recovered(world), world.ledger)


def tasks_woken(world: World, sagas: int, at: int) -> tuple[bool, list[str]]:
    """The same with a process that is stopped, and woken after others took over what it ran."""
    _begun(world)
    child = _life(world, sagas, at, "stop")
    if not child.wait_stopped():
        child.answers()
        return False, _problems(_recovered(world), world.ledger)
    before = {saga.saga_id: saga for saga in _recovered(world)}
    child.send(signal.SIGCONT)
    [lost] = child.answers()
    after = _recovered(world)
    problems = _problems(after, world.ledger)
    ended = [saga for saga in before.values() if saga.state in ("completed", "compensated")]
    late = [saga.saga_id for saga in ended if saga not in after]
    if late:
        problems.append(f"sagas {late} were written to after their end")
    if lost > 0 and any(saga.recoveries for saga in before.values()):
        problems.append("it did not notice that others took its sagas")
    return True, problems


def _problems(found: list[SagaRecord], ledger: Path) -> list[str]:
    calls = asked(ledger)
    problems = [
        f"saga {saga.saga_id} is {saga.state}" for saga in found if saga.state not in ("completed", "compensated")
    ]
    for state in ("completed", "compensated"):
        ended = {str(saga.input) for saga in found if saga.state == state}
        problems += [f"the saga of {number} was told to be {state}" for number in calls[state] if number not in ended]
    held = {f"{saga.saga_id}:{step.step_index}" for saga in found for step in saga.steps if step.output is not None}
    problems += [
        f"step {step} was told to be done, and is not in the log" for step in calls["told"] if step not in held
    ]
    for verb, most in (("do", 1), ("undo", 2)):  # an undo that a kill cut off is sent again, under its key
        problems += [f"{verb} {key} was asked for {times} times" for key, times in calls[verb].items() if times > most]
    for saga in found:
        keys = [f"{saga.token}:{index}" for index in range(STEPS)]
        done, undone = (
            [key for key in keys if key + end in calls[verb]] for verb, end in (("do", ""), ("undo", ":undo"))
        )
        if saga.state == "completed" and (len(done) < STEPS or undone):
            problems.append(f"saga {saga.saga_id} is completed; done: {done}, undone: {undone}")
        if saga.state == "compensated" and set(done) - set(undone):
            problems.append(f"saga {saga.saga_id} is compensated; done: {done}, undone: {undone}")
    return problems
