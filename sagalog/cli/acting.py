"""`resolve`, `resolve-step`, `cancel`, `prune`: what changes the log; asked first, and signed."""

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sagalog.cli.options import Actor, Json, Note, Output, SagaId, StepIndex, Yes, ask
from sagalog.cli.output import Form, console, form_of, plain, print_json, print_lines
from sagalog.cli.settings import settings_of
from sagalog.cli.text import sagas
from sagalog.states import SETTLED, STEP_SETTLED

if TYPE_CHECKING:
    from sagalog import SagaLog

_PRUNED_AT_ONCE = 1000


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command()(resolve)
    app.command("resolve-step")(resolve_step)
    app.command()(cancel)
    app.command()(prune)


def _settled_as(allowed: tuple[str, ...], told: str) -> Any:
    def check(value: str) -> str:
        if value not in allowed:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(allowed)}")
        return value

    return typer.Option(
        "--state", metavar="|".join(allowed), callback=check, autocompletion=lambda: list(allowed), help=told
    )


SettledState = Annotated[str, _settled_as(SETTLED, "What it is now.")]
SettledStep = Annotated[str, _settled_as(STEP_SETTLED, "What became of it.")]


def resolve(
    context: typer.Context,
    saga_id: SagaId,
    state: SettledState,
    note: Note,
    actor: Actor,
    yes: Yes = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Settle a saga that needs a person.

    One in failed_compensation, after a look at the world outside. Refused while a step stands in the way:
    resolve-step comes first.
    """

    def act(log: "SagaLog") -> None:
        log.resolve(saga_id, state, note=note, actor=actor)

    _act(context, act, f"settle it as {state}", saga_id, None, actor, yes, form_of(context, as_json, output))


def resolve_step(
    context: typer.Context,
    saga_id: SagaId,
    step_index: StepIndex,
    state: SettledStep,
    note: Note,
    actor: Actor,
    yes: Yes = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Say what became of a step.

    Of one that is in doubt, or that a succeeded one is undone. Refused while a process runs the saga, or while a
    request of the step may still be under way.
    """

    def act(log: "SagaLog") -> None:
        log.resolve_step(saga_id, step_index, state, note=note, actor=actor)

    asked = f"settle step {step_index} as {state}"
    _act(context, act, asked, saga_id, step_index, actor, yes, form_of(context, as_json, output))


def cancel(
    context: typer.Context,
    saga_id: SagaId,
    note: Note,
    actor: Actor,
    yes: Yes = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Ask that a saga be undone.

    Whoever runs the saga, or recovers it, undoes what it did; one that has not run yet ends at once.
    """

    def act(log: "SagaLog") -> None:
        log.request_cancel(saga_id, note, actor=actor)

    _act(context, act, "ask that it be undone", saga_id, None, actor, yes, form_of(context, as_json, output))


def _act(
    context: typer.Context,
    act: "Callable[[SagaLog], None]",
    asked: str,
    saga_id: int,
    step_index: int | None,
    actor: str,
    yes: bool,
    form: Form,
) -> None:
    """Ask, act, and tell what the saga is now."""
    from sagalog.cli.connect import opened_log

    with opened_log(settings_of(context), writing=True) as log:
        if not yes:
            saga = log.get(saga_id)
            ask(f"Saga {saga_id} ({saga.name}) is {saga.state}: {asked}, as {actor}?", yes=yes)
        act(log)
        saga = log.get(saga_id)
    step = next((step for step in saga.steps if step.step_index == step_index), None)
    if form is not Form.TABLE:
        facts = {"saga_id": saga_id, "state": saga.state, "cancel_reason": saga.cancel_reason, "actor": actor}
        print_json(form, facts if step is None else {**facts, "step_index": step_index, "step_state": step.state})
        return
    told = f"saga {saga_id} is {saga.state}" if step is None else f"step {step_index} of saga {saga_id} is {step.state}"
    asked_for = " and is asked to be undone" if saga.cancel_reason and saga.state in ("running", "failed") else ""
    print_lines([plain(told + (asked_for if step is None else ""))])


def prune(
    context: typer.Context,
    keep_last: Annotated[
        int, typer.Option(metavar="N", min=0, help="So many of the most recent sagas stay, whatever their age.")
    ] = 1000,
    older_than: Annotated[
        float, typer.Option(metavar="DAYS", min=0, max=36_500, help="What ended more recently than this stays.")
    ] = 7,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be deleted.")] = False,
    yes: Yes = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Delete old sagas that ended.

    Those outside both limits, with their steps and audit. The newest saga always stays, and no id is used again. In
    batches: it may be interrupted, and go on later.
    """
    from sagalog.cli.connect import opened_log

    form = form_of(context, as_json, output)
    age = timedelta(days=older_than)
    with opened_log(settings_of(context), writing=not dry_run) as log:
        count = log.prunable(keep_last=keep_last, older_than=age)
        if dry_run or count == 0:
            _tell_pruned(form, count, 0, dry_run)
            return
        ask(f"Delete {sagas(count)} for ever, all but the last {keep_last} and those of {older_than:g} days?", yes=yes)
        _tell_pruned(form, count, _prune(log, count, keep_last, age), dry_run)


def _prune(log: "SagaLog", count: int, keep_last: int, age: timedelta) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = console(stderr=True)
    columns = (TextColumn("deleting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    deleted = 0
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("", total=count)
        while (batch := log.prune(keep_last=keep_last, older_than=age, limit=_PRUNED_AT_ONCE)) > 0:
            deleted += batch
            progress.update(task, advance=batch)
    return deleted


def _tell_pruned(form: Form, count: int, deleted: int, dry_run: bool) -> None:
    if form is not Form.TABLE:
        print_json(form, {"prunable": count, "deleted": deleted, "dry_run": dry_run})
    elif dry_run:
        print_lines([f"would delete {sagas(count)}"])
    else:
        print_lines([f"deleted {sagas(deleted)}"])
