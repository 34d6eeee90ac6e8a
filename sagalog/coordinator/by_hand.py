"""Undoing by hand: a saga's function says which command undoes which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sagalog.coordinator.dispatching import check_callable, differs
from sagalog.coordinator.run import Run, Step
from sagalog.coordinator.unwind import begin_undo, is_being_undone, reserve, undo_until_known
from sagalog.errors import StepFailed, UnusableHandler
from sagalog.states import StepState


async def compensate(run: Run, cmd: Any, undoes: Sequence[Any] | None) -> Any:
    """Undo by hand: one command for several dispatched ones, the newest if none is named.

    Raises:
        UnusableHandler: Nothing takes the command, or what it is to undo was not dispatched, did not succeed, or is
            undone; nothing was written.
        StepFailed: The undo was refused or stays in doubt.
    """
    call = run.begin_call(undoing=True)
    try:
        return await _undone(run, cmd, undoes)
    finally:
        run.end_call(call)


async def _undone(run: Run, cmd: Any, undoes: Sequence[Any] | None) -> Any:
    handler = run.policy.bus.handler_of(cmd)
    check_callable(run.policy, handler)
    if handler.on_unknown == "compensate":
        raise UnusableHandler(
            f"compensate with {handler.name}",
            'its handler says on_unknown="compensate", and an undo is not undone',
            hint="An undo is tried again under its key, and then left to a person.",
        )
    if run.replay:
        index = min(run.replay)
        problem = (
            f"the log holds step {index}, and the function undoes with {handler.name} before it asked for it again"
        )
        raise run.stop(differs(run, index, problem))
    with run.reserving:
        reserved = reserve(run, _chosen(run, cmd, undoes))
    undo, held = await begin_undo(run, handler, cmd, reserved)
    try:
        return await undo_until_known(run, handler, undo, held, [step for step, _ in reserved.undone])
    except StepFailed as failure:
        if failure.kind == "in_doubt":
            run.stop(failure)
        raise


def _chosen(run: Run, cmd: Any, undoes: Sequence[Any] | None) -> list[Step]:
    """The steps that a command undoes; each changed something, and can be undone."""
    asked = f"compensate with {type(cmd).__name__} in saga {run.saga_id}"
    done = [
        step
        for step in run.forward()
        if step.state is StepState.SUCCEEDED and _changed_something(run, step) and not is_being_undone(run, step)
    ]
    chosen = done[:1] if undoes is None else _named(asked, done, undoes)
    if not chosen:
        raise UnusableHandler(asked, "no step is there to be undone", hint="Dispatch comes first.")
    for pivot in run.pivots():
        if pivot in chosen:
            raise UnusableHandler(
                asked, f"step {pivot.index} ({pivot.name}) is a pivot", hint="What cannot be undone is not named."
            )
    return chosen


def _changed_something(run: Run, step: Step) -> bool:
    handler = run.handler_named(step.name)
    return not step.own and not (handler is not None and handler.read_only)


def _named(asked: str, done: list[Step], undoes: Sequence[Any]) -> list[Step]:
    """The steps of commands: of the same objects, or else of equal ones."""
    if not isinstance(undoes, list | tuple):
        raise UnusableHandler(asked, f"undoes= is a {type(undoes).__name__}", hint="It is a list of commands.")
    if not undoes:
        raise UnusableHandler(asked, "undoes= is empty", hint="Name the commands, or leave it out for the newest.")
    left, named = list(done), []
    for wanted in undoes:
        found = next((step for step in left if step.given is wanted), None) or next(
            (step for step in left if step.given == wanted), None
        )
        if found is None:
            raise UnusableHandler(
                asked,
                f"a {type(wanted).__name__} in undoes= was not dispatched by this saga, did not succeed, or is undone",
                hint="Name commands that ctx.dispatch() was called with, and that change something.",
            )
        named.append(found)
        left.remove(found)
    return named
