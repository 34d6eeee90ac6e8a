"""Dispatching commands, and what a function computed once: written first, or answered from the log on a resume."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final

from pydantic import BaseModel

from sagalog.coordinator.bus import RESERVED, Handler
from sagalog.coordinator.effects import Call, Together
from sagalog.coordinator.run import Policy, Run, Step, Stopped
from sagalog.coordinator.signature import takes_none
from sagalog.coordinator.trying import (
    Doubt,
    Outcome,
    Refused,
    Succeeded,
    as_held,
    cut_off,
    due_of,
    end_step,
    failure_of_step,
    known,
    retry_of,
    tried,
)
from sagalog.errors import UnusableHandler
from sagalog.log import owned_steps, owning
from sagalog.log.database import Operation
from sagalog.moments import from_ms, now_ms
from sagalog.payload import check_text, decode, encode
from sagalog.states import StepState

NOW: Final = f"{RESERVED}now"
RECORD: Final = f"{RESERVED}record:"

# Dispatching


def admitted(run: Run, cmd: Any) -> Handler:
    """The handler of a forward command.

    Raises:
        UnusableHandler: None takes it, or nothing says how it is undone, or the shell cannot call it.
    """
    policy = run.policy
    bus = policy.bus
    asked = type(cmd), bus.revision
    known = policy.admitted.get(asked)
    if known is not None:
        return known
    handler = bus.handler_of(cmd)
    bus.check_undoable(handler)
    check_callable(policy, handler)
    compensation = bus.compensation_of(handler)
    if compensation is not None and run.unknown_policy(handler) == "compensate" and not takes_none(compensation.output):
        raise UnusableHandler(
            f"dispatch of {handler.name}",
            'the coordinator says on_unknown="compensate", and its compensation does not admit an output of None',
            hint="Annotate the output as X | None, or say on_unknown='stop' at the handler.",
        )
    policy.admitted[asked] = handler
    return handler


def check_callable(policy: Policy, handler: Handler) -> None:
    """A synchronous coordinator cannot call an async handler."""
    if not policy.can_call(handler):
        raise UnusableHandler(
            f"dispatch of {handler.name}", "its handler is async", hint="Use an AsyncSagaCoordinator."
        )


async def dispatch(run: Run, cmd: Any) -> Any:
    """Do a command: write it, call its handler, write how it ended."""
    call = run.begin_call()
    try:
        handler = admitted(run, cmd)
        step, held, begun = _placed(run, handler, cmd)
        if begun is not None:
            await run.written(begun)
            run.steps[step.index] = step
        return await _ended(run, handler, step, held, begun=begun is not None)
    finally:
        run.end_call(call)


async def dispatch_all(run: Run, commands: Iterable[Any]) -> list[Any]:
    """Do commands side by side; all are awaited, and then the failure of the first that failed is raised."""
    if isinstance(commands, BaseModel | str | type | set | frozenset) or run.policy.bus.takes(commands):
        raise UnusableHandler("dispatch_all", f"it was given a {type(commands).__name__}", hint="Give it a list.")
    call = run.begin_call()
    try:
        return await _together(run, list(commands))
    finally:
        run.end_call(call)


async def _together(run: Run, commands: list[Any]) -> list[Any]:
    handlers = [admitted(run, cmd) for cmd in commands]
    placed = [_placed(run, handler, cmd) for handler, cmd in zip(handlers, commands, strict=True)]
    beginnings = [begun for _, _, begun in placed if begun is not None]
    if beginnings:
        await run.written(owning.joined("dispatch_all", run.fence, beginnings))
    run.steps.update((step.index, step) for step, _, _ in placed)
    flows = [
        _ended(run, handler, step, held, begun=begun is not None)
        for handler, (step, held, begun) in zip(handlers, placed, strict=True)
    ]

    def interrupted() -> None:
        run.interrupted = True
        for step, _, _ in placed:  # one that was not begun could not say so itself
            cut_off(run, step)

    try:
        ends = await Together(flows, run.fence, interrupted)
    except BaseException as error:
        interrupted()
        run.interrupted_by(error)
        raise
    errors = [end.error for end in ends if end.error is not None]
    if errors:
        # What ends the whole process comes before what ends a step.
        raise next((error for error in errors if not isinstance(error, Exception)), errors[0])
    return [end.value for end in ends]


def _placed(run: Run, handler: Handler, cmd: Any) -> tuple[Step, Any, Operation[None] | None]:
    """The next step, its command as the log holds it, and the write that begins it if the log does not hold it yet."""
    index = run.take_index()
    asked = f"dispatch of {handler.name}"
    if index in run.replay:
        with _as_the_log_holds(run, index):
            text, held = as_held(run, handler, cmd, index, asked)
            recorded = _recorded(run, index, handler.name, text)
            recorded.given = cmd
            if recorded.cmd_json != text:  # equal, and perhaps not the same
                held = handler.read_cmd(recorded.cmd_json, run.saga_id, index)
        return recorded, held, None
    text, held = as_held(run, handler, cmd, index, asked)
    began = now_ms()
    due = due_of(handler, began)
    step = Step(index, handler.name, text, StepState.PENDING, began, due, given=cmd)
    begin = owned_steps.begin_step(run.fence, index, handler.name, text, due, cancellable=not run.reached_pivot)
    return step, held, begin


async def _ended(run: Run, handler: Handler, step: Step, cmd: Any, *, begun: bool) -> Any:
    """What a step returned; one that an earlier process left in doubt is tried again if that does no harm.

    A doubt stays in the log, and stops the saga.
    """
    if step.state is StepState.SUCCEEDED:
        with _as_the_log_holds(run, step.index):
            return handler.read_output(step.output_json, run.saga_id, step.index)
    if step.state is StepState.FAILED:
        raise failure_of_step(run, step, Refused(recorded_reason(run, step), None))
    try:
        if begun and run.over:
            outcome: Outcome = await end_step(run, handler, step, Refused("the saga's function had ended", None))
        elif begun:
            outcome = await tried(run, handler, step, cmd, retry_of(handler))
            if not isinstance(outcome, Doubt):
                outcome = await end_step(run, handler, step, outcome)
        else:
            outcome = await known(run, handler, step, cmd)
    except BaseException as error:
        cut_off(run, step, error)
        raise
    if isinstance(outcome, Succeeded):
        return outcome.value
    failure = failure_of_step(run, step, outcome)
    if isinstance(outcome, Doubt):
        run.stop(failure)
    raise failure


# Going on where another process stopped


@contextmanager
def _as_the_log_holds(run: Run, index: int) -> Iterator[None]:
    """What cannot be read, or compared, differs from the log, and is no reason to take another way than it holds."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        raise run.stop(differs(run, index, str(error) or type(error).__name__)) from error


def _recorded(run: Run, index: int, name: str, text: str) -> Step:
    """The row that the log holds at an index.

    Raises:
        Stopped: It is another command than the function dispatches now.
    """
    step = run.replay.pop(index)
    same = step.name == name and _same(run, step, text)
    if same and step.state is not StepState.COMPENSATED:
        return step
    found = "is undone" if step.state is StepState.COMPENSATED else "holds another command"
    raise run.stop(differs(run, index, f"the log {found} there ({step.name}), and the function dispatches {name}"))


def _same(run: Run, step: Step, text: str) -> bool:
    """Whether two commands are equal, as JSON or as objects: what a set of strings looks like differs by process."""
    held, asked = (decode(json, "cmd_json", run.saga_id, step.index) for json in (step.cmd_json, text))
    if held == asked:
        return True
    handler = run.handler_named(step.name)
    if handler is None:
        return False
    read = [handler.read_cmd(json, run.saga_id, step.index) for json in (step.cmd_json, text)]
    return bool(read[0] == read[1])


def differs(run: Run, index: int | None, problem: str) -> Stopped:
    """The error of a function that does not do again what the log holds."""
    return Stopped(
        f"resume of saga {run.saga_id}", problem, saga_id=run.saga_id, step_index=index, found="differs", outcome=""
    )


def recorded_reason(run: Run, step: Step) -> str:
    """Why a failed step failed, as the log holds it."""
    held = decode(step.output_json, "output_json", run.saga_id, step.index)
    return str(held.get("error", "")) if isinstance(held, dict) else ""


# What is the same on a resume


async def now(run: Run) -> datetime:
    """The moment at which the function first asked."""
    return from_ms(await _kept(run, NOW, now_ms))


def new_uuid(run: Run) -> uuid.UUID:
    """The n-th UUID that the function asks for, from the saga's random token: no row is needed to have it again."""
    run.refuse_stopped()
    run.uuids += 1
    digest = hashlib.sha256(f"{run.token}:uuid:{run.uuids}".encode()).digest()
    return uuid.UUID(bytes=digest[:16], version=4)


async def record(run: Run, name: str, function: Callable[[], Any]) -> Any:
    """What a function returned when it was first called here, as a JSON value."""
    check_text(name, "name", f"record in saga {run.saga_id}", run.saga_id)
    return await _kept(run, f"{RECORD}{name}", function)


async def _kept(run: Run, name: str, function: Callable[[], Any]) -> Any:
    call = run.begin_call()
    try:
        return await _recorded_once(run, name, function)
    finally:
        run.end_call(call)


async def _recorded_once(run: Run, name: str, function: Callable[[], Any]) -> Any:
    index = run.take_index()
    if index in run.replay:
        with _as_the_log_holds(run, index):
            recorded = _recorded(run, index, name, "null")
            return decode(recorded.output_json, "output_json", run.saga_id, index)
    text = encode(await Call(function), name, run.saga_id, index)
    await run.written(owned_steps.record_step(run.fence, index, name, text, cancellable=not run.reached_pivot))
    run.steps[index] = Step(index, name, "null", StepState.SUCCEEDED, now_ms(), output_json=text)
    return decode(text, "output_json", run.saga_id, index)
