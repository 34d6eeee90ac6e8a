"""`list` and `watch`: sagas as lines of a table."""

from collections.abc import Iterable
from datetime import UTC, datetime
from time import sleep
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sagalog.cli.options import Json, Output, duration, moment
from sagalog.cli.output import Form, console, form_of, plain, print_json, print_lines, state, table
from sagalog.cli.settings import Settings, settings_of
from sagalog.cli.text import shown_duration, shown_moment
from sagalog.cli.usage import bad_usage
from sagalog.states import SagaState

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from sagalog import SagaLog, SagaSnapshot

_ROOMY = 120


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command("list")(list_sagas)
    app.command()(watch)


def list_sagas(
    context: typer.Context,
    state_: Annotated[SagaState | None, typer.Option("--state", help="In this state.")] = None,
    name: Annotated[str | None, typer.Option(help="Of this name.")] = None,
    key: Annotated[str | None, typer.Option(help="Started with this idempotency key.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="WHEN", callback=moment, help="Started at this moment or later; 2h: ago.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="WHEN", callback=moment, help="Started before this moment.")
    ] = None,
    open_longer_than: Annotated[
        str | None,
        typer.Option(metavar="DURATION", callback=duration, help="Unresolved for longer than this: 90s, 15m, 2h, 7d."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 50,
    before: Annotated[
        int | None, typer.Option(metavar="ID", min=1, help="The last id seen, for the next page.")
    ] = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """List sagas, newest first. Moments are in UTC; payloads are not shown."""
    from sagalog.cli.connect import opened_log

    settings = settings_of(context)
    form = form_of(context, as_json, output)
    filters: dict[str, Any] = {"state": state_, "name": name, "key": key, "since": since, "until": until}
    with opened_log(settings) as log:
        found = log.find(**filters, open_longer_than=open_longer_than, limit=limit, before=before)  # type: ignore[arg-type]
    if form is not Form.TABLE:
        print_json(form, [saga.model_dump() for saga in found])
        return
    if not found:
        print_lines(["no sagas"])
        return
    out = console()
    out.print(saga_table(found, out.width))
    if len(found) == limit:
        console(stderr=True).print(f"There may be more: add --before {found[-1].saga_id}.", style="dim")


def saga_table(found: "Iterable[SagaSnapshot]", width: int) -> "Table":
    """Sagas for people, one a line; the start and the key only where there is room."""
    now = datetime.now(UTC)
    roomy = width >= _ROOMY
    headings = ("id", "name", "state", "steps", *(("started",) if roomy else ()), "age", "took", "reason")
    numbers = ("id", "steps", "age", "took")
    shown = table(*headings, *(("key",) if roomy else ()), right=numbers, whole=("state", "started"))
    for saga in found:
        reason = saga.failure_reason or (f"cancel: {saga.cancel_reason}" if saga.cancel_reason else "")
        shown.add_row(
            str(saga.saga_id),
            plain(saga.name),
            state(saga.state),
            str(saga.step_count),
            *((shown_moment(saga.started_at),) if roomy else ()),
            shown_duration(now - saga.started_at),
            shown_duration(saga.terminal_at - saga.started_at) if saga.terminal_at else "",
            plain(reason),
            *((plain(saga.key),) if roomy else ()),
        )
    return shown


def watch(
    context: typer.Context,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="How often to look.")] = 2.0,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many sagas.")] = 20,
    looks: Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after so many looks.")] = None,
    output: Output = None,
) -> None:
    """Watch the latest sagas, until Ctrl-C.

    With --output jsonl it prints a line for each saga that is new or has changed, for as long as it runs.
    """
    settings = settings_of(context)
    form = form_of(context, output=output)
    if form is Form.JSON:
        raise bad_usage("watch has no end, and JSON would have one: use --output jsonl.")
    try:
        if form is Form.JSONL:
            _print_changes(settings, every, limit, looks)
        else:
            _draw(settings, every, limit, looks)
    except KeyboardInterrupt:
        return


def _print_changes(settings: Settings, every: float, limit: int, looks: int | None) -> None:
    from sagalog.cli.connect import opened_log

    seen: dict[int, SagaSnapshot] = {}
    with opened_log(settings) as log:
        for look in _looks(looks):
            if look:
                sleep(every)
            recent = log.snapshot_recent(limit)
            for saga in reversed(recent):
                if seen.get(saga.saga_id) != saga:
                    print_json(Form.JSONL, saga.model_dump())
            seen = {saga.saga_id: saga for saga in recent}


def _draw(settings: Settings, every: float, limit: int, looks: int | None) -> None:
    from rich.live import Live

    from sagalog.cli.connect import opened_log

    screen = console()
    with opened_log(settings) as log:
        if not screen.is_terminal:
            for look in _looks(looks):
                if look:
                    sleep(every)
                screen.print(_view(log, limit, screen.width))
            return
        with Live(console=screen, auto_refresh=False, screen=looks is None) as live:
            for look in _looks(looks):
                if look:
                    sleep(every)
                live.update(_view(log, limit, screen.width), refresh=True)


def _looks(looks: int | None) -> Iterable[int]:
    look = 0
    while looks is None or look < looks:
        yield look
        look += 1


def _view(log: "SagaLog", limit: int, width: int) -> "Group":
    from rich.console import Group
    from rich.text import Text

    head = Text(shown_moment(datetime.now(UTC)), "dim")
    for name, count in log.counts().items():
        head.append("   ").append_text(state(name)).append(f" {count}")
    return Group(head, saga_table(log.snapshot_recent(limit), width))
