"""`recover`, `retry`, `quarantine`, `worker`, `graph`: by the application's coordinator, or about a saga's course."""

import asyncio
import importlib
import inspect
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sagalog.cli.options import Actor, Json, Note, Output, SagaId, Yes, ask
from sagalog.cli.output import Form, form_of, plain, print_json, print_lines
from sagalog.cli.settings import settings_of
from sagalog.cli.text import harmless
from sagalog.cli.usage import CommandError, bad_usage
from sagalog.errors import SagaLogError
from sagalog.states import UNRESOLVED

if TYPE_CHECKING:
    from sagalog import AsyncSagaCoordinator, RecoveryReport, SagaCoordinator, SagaRecord

_LOOKED_AT = 100


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command()(recover)
    app.command()(retry)
    app.command()(quarantine)
    app.command()(worker)
    app.command()(graph)


def recover(
    context: typer.Context,
    limit: Annotated[int | None, typer.Option(metavar="N", min=0, help="At most so many sagas.")] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Take also sagas that never belonged to a coordinator.")
    ] = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Take over what dead processes left.

    Each saga is undone, or gone on with, by the application's coordinator (--app). Tells what became of each, and what
    those that are left wait for.
    """
    form = form_of(context, as_json, output)
    with _coordinator(context) as call:
        report: RecoveryReport = call(lambda coordinator: coordinator.recover(limit=limit, adopt=adopt))
    if form is not Form.TABLE:
        print_json(form, {**vars(report), "left": [vars(left) for left in report.left]})
    else:
        print_lines(plain(line) for line in _told(report))
    if report.errors:
        raise CommandError(f"{len(report.errors)} sagas could not be recovered; the next recovery tries them again.")


def _told(report: "RecoveryReport") -> Iterator[str]:
    yield f"completed {len(report.completed)}, undone {len(report.compensated)}"
    for saga_id, reason in report.failed_compensation.items():
        yield f"saga {saga_id} needs a person: {harmless(reason)}"
    for left in report.left:
        yield f"saga {left.saga_id} ({harmless(left.name)}) is left: {harmless(left.reason)}"
    for saga_id, error in report.errors.items():
        yield f"saga {saga_id} raised {harmless(error)}"


def retry(
    context: typer.Context,
    saga_id: SagaId,
    note: Note,
    actor: Actor,
    again: Annotated[
        bool, typer.Option("--again", help="Send a step in doubt again, once, under its key. Refused without.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Try a saga that needs a person again.

    One in failed_compensation, by the application's coordinator (--app): it is undone, or, after a step that cannot be
    undone, gone on with. Refused while a step is in doubt: resolve-step comes first, or --again.
    """
    form = form_of(context, as_json, output)
    ask(f"Try saga {saga_id} again, as {actor}?", yes=yes)
    with _coordinator(context) as call:
        saga: SagaRecord = call(lambda one: one.retry(saga_id, note=note, actor=actor, again=again))
    if form is not Form.TABLE:
        facts = {"saga_id": saga_id, "state": saga.state, "failure_reason": saga.failure_reason, "actor": actor}
        print_json(form, facts)
    else:
        why = f": {harmless(saga.failure_reason)}" if saga.failure_reason and saga.state != "completed" else ""
        print_lines([plain(f"saga {saga_id} is {saga.state}{why}")])
    if saga.state in UNRESOLVED:
        raise CommandError(f"Saga {saga_id} has not ended: it waits. recover, or a worker, goes on with it.")
    if saga.state == "failed_compensation":
        raise CommandError(f"Saga {saga_id} still needs a person.")


def quarantine(
    context: typer.Context,
    note: Note,
    actor: Actor,
    yes: Yes = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Give every open saga to a person.

    For a restored backup or a copy of a database: no process runs or recovers them any more, until each is settled or
    tried again.
    """
    from sagalog.cli.connect import opened_log

    form = form_of(context, as_json, output)
    ask(f"Take every open saga from its process and leave it to a person, as {actor}?", yes=yes)
    with opened_log(settings_of(context), writing=True) as log:
        count = log.quarantine(note=note, actor=actor)
    if form is not Form.TABLE:
        print_json(form, {"quarantined": count, "actor": actor})
    else:
        print_lines([f"{count} sagas are left to a person"])


def worker(
    context: typer.Context,
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, help="At most so many sagas at a time.")] = 8,
    poll: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.01, help="Between looks for work where nothing tells of it.")
    ] = 1.0,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="For what is under way at the end, before it is given up.")
    ] = 10.0,
) -> None:
    """Run submitted sagas, and recover.

    By the application's coordinator (--app), until SIGINT or SIGTERM: then no more are taken, and those under way may
    end.
    """
    stop = threading.Event()
    with _coordinator(context) as call:

        def begin(coordinator: Any) -> Any:
            made = coordinator.worker(concurrency=concurrency, poll=poll)
            return _started(made)

        made = call(begin)
        # Not before: an application that hangs, or a log that does not answer, could not be stopped.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print_lines([plain("the worker runs")])
        sys.stdout.flush()
        call(lambda _: _stopped(made, stop, grace))


def _started(made: Any) -> Any:
    begun = made.start()
    if not inspect.isawaitable(begun):
        return made

    async def started() -> Any:
        await begun
        return made

    return started()


def _stopped(made: Any, stop: threading.Event, grace: float) -> Any:
    if not inspect.iscoroutinefunction(made.shutdown):
        while not stop.wait(0.5):  # a signal's handler runs between two waits
            pass
        made.shutdown(grace)
        return None

    async def stopped() -> None:
        await asyncio.to_thread(stop.wait)
        await made.shutdown(grace)

    return stopped()


def graph(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The saga's name.")],
) -> None:
    """Draw the course of a saga, as Mermaid.

    As the last hundred sagas of that name went: how often which step followed which, failed, and was undone by what.
    """
    from sagalog.cli.connect import opened_log

    edges: Counter[tuple[str, str, str]] = Counter()
    with opened_log(settings_of(context)) as log:
        sagas = log.find(name=name, limit=_LOOKED_AT)
        if not sagas:
            raise CommandError(f"There is no saga named {name!r} in this log.")
        for found in sagas:
            edges.update(_edges(log.get(found.saga_id)))
    print_lines(_mermaid(edges))


def _edges(saga: "SagaRecord") -> Iterator[tuple[str, str, str]]:
    by_index = {step.step_index: step for step in saga.steps}
    undos = {step.compensated_by for step in saga.steps}
    before = "started"
    for step in saga.steps:
        if step.step_index in undos:
            continue
        yield (before, step.name, "")
        if step.state in ("failed", "pending"):
            yield (step.name, "refused" if step.state == "failed" else "in doubt", "")
        undo = by_index.get(step.compensated_by) if step.compensated_by is not None else None
        if undo is not None:
            yield (step.name, undo.name, "undone by")
        before = step.name
    yield (before, saga.state, "")


def _mermaid(edges: "Counter[tuple[str, str, str]]") -> Iterator[str]:
    names = sorted({name for source, target, _ in edges for name in (source, target)})
    yield "flowchart TD"
    for number, name in enumerate(names):
        yield f'    n{number}["{harmless(name).replace(chr(34), chr(39))}"]'
    for (source, target, label), count in sorted(edges.items()):
        told = f"{label} {count}".strip()
        yield f"    n{names.index(source)} -->|{told}| n{names.index(target)}"


@contextmanager
def _coordinator(context: typer.Context) -> Iterator[Callable[[Callable[[Any], Any]], Any]]:
    """The application's coordinator, as something that calls a function of it, sync or async, to its end."""
    settings = settings_of(context)
    app = settings.app
    if any(option == "--url" for option, _ in settings.typed):
        raise bad_usage("--url says nothing here: the coordinator of --app works on its own log. Leave --url out.")
    found = _loaded(app)
    with asyncio.Runner() as runner:

        def call(function: Callable[[Any], Any]) -> Any:
            answer = function(coordinator)
            return runner.run(_awaited(answer)) if inspect.isawaitable(answer) else answer

        with _told_in_a_sentence(app):
            made = found() if callable(found) else found
            coordinator = runner.run(_awaited(made)) if inspect.isawaitable(made) else made
        _check(coordinator)
        try:
            yield call
        finally:
            call(lambda one: one.close())


async def _awaited(answer: Any) -> Any:
    return await answer


def _loaded(app: str | None) -> Any:
    """What `module:name` names."""
    if not app:
        raise bad_usage("No coordinator: give --app module:name, or set SAGALOG_APP, or app in [tool.sagalog].")
    module, _, name = app.partition(":")
    if not module or not name or module.startswith("."):
        raise bad_usage(f"--app {app!r} is not of the form module:name.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    with _told_in_a_sentence(app):
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    return found


@contextmanager
def _told_in_a_sentence(app: str | None) -> Iterator[None]:
    """Whatever the application's own code raises while it makes its coordinator, with the line that raised it."""
    try:
        yield
    except SagaLogError:  # a sentence already
        raise
    except (Exception, SystemExit) as error:
        *_, raised = traceback.extract_tb(error.__traceback__)
        told = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise bad_usage(f"--app {app} cannot be loaded: {told} ({raised.filename}, line {raised.lineno}).") from error


def _check(coordinator: "SagaCoordinator | AsyncSagaCoordinator | object") -> None:
    from sagalog import AsyncSagaCoordinator, SagaCoordinator

    if not isinstance(coordinator, SagaCoordinator | AsyncSagaCoordinator):
        kind = type(coordinator).__name__
        raise bad_usage(f"--app names a {kind}, and it must be a coordinator, or a function that makes one.")
