"""`diag`: what an operator runs first."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sagalog.cli.options import Json, Output
from sagalog.cli.output import Form, console, form_of, plain, print_json, state, table
from sagalog.cli.settings import Settings, settings_of
from sagalog.cli.text import shown_duration, shown_moment, shown_size
from sagalog.schema import HEAD
from sagalog.states import OUTSTANDING, SETTLED, STEP_SETTLED, UNRESOLVED

if TYPE_CHECKING:
    from rich.console import Console
    from sqlalchemy import Engine

    from sagalog import SagaLog, SagaRecord

_NAMED = 10
_STALE = timedelta(hours=1)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(diag)


def diag(
    context: typer.Context,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 if a saga needs a person; for probes.")
    ] = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Say how the log is, and what needs a person.

    Run this first. It tells the database and its schema, the sagas by state, what to type next for each that needs a
    person, the processes and their leases, the size, and warnings. A database that cannot be used exits with 1 in any
    case; warnings alone never do.
    """
    from sagalog.cli.connect import log_on, opened_engine

    settings = settings_of(context)
    form = form_of(context, as_json, output)
    with opened_engine(settings) as engine:
        log = log_on(engine, settings)
        facts = _facts(log, engine, settings)
    if form is Form.TABLE:
        _print(facts, settings)
    else:
        print_json(form, facts)
    if exit_code and facts["needs_person"]["count"]:
        raise typer.Exit(1)


def _facts(log: "SagaLog", engine: "Engine", settings: Settings) -> dict[str, Any]:
    from sagalog import migrations
    from sagalog.cli.health import durability_of, product_of, wal_size_of, warnings_of
    from sagalog.urls import shown_url

    now = datetime.now(UTC)
    states = [
        {"state": row.state, "count": row.count, "oldest_age": now - row.oldest_started_at}
        for row in log.state_counts()
    ]
    executors = [
        {**row.model_dump(exclude={"read_at"}), "alive": row.is_alive, "lease_left": row.lease_until - row.read_at}
        for row in log.executors()
    ]
    waiting = {row["state"]: row["count"] for row in states}.get("failed_compensation", 0)
    named = [log.get(saga.saga_id) for saga in log.find(state="failed_compensation", limit=_NAMED)]
    return {
        "database": shown_url(engine.url),
        "product": product_of(engine),
        "revision": migrations.current(engine, **settings.placement),
        "head": HEAD,
        "durability": durability_of(engine),
        "size": log.size(),
        "wal_size": wal_size_of(engine),
        "states": states,
        "needs_person": {"count": waiting, "sagas": [_need(saga, settings) for saga in named]},
        "executors": executors,
        "warnings": warnings_of(engine),
    }


def _need(saga: "SagaRecord", settings: Settings) -> dict[str, Any]:
    return {
        "saga_id": saga.saga_id,
        "name": saga.name,
        "reason": saga.failure_reason,
        "age": datetime.now(UTC) - saga.started_at,
        "next": list(_next_commands(saga, settings)),
    }


def _next_commands(saga: "SagaRecord", settings: Settings) -> Iterator[str]:
    """What to type: settle what is in doubt, then what is not undone, then the saga."""
    yield settings.command("show", saga.saga_id)
    doubtful = [step.step_index for step in saga.steps if step.state == "pending"]
    for index in doubtful:
        words = ("resolve-step", saga.saga_id, index, "--state", "|".join(STEP_SETTLED), "--note", "TEXT")
        yield settings.command(*words)
    if not doubtful:
        if saga.state == "failed_compensation" and saga.token is not None:
            yield settings.command("retry", saga.saga_id, "--note", "TEXT")
        found = {step.state for step in saga.steps}
        possible = (target for target in SETTLED if found.isdisjoint(OUTSTANDING.get(target, ())))
        yield settings.command("resolve", saga.saga_id, "--state", "|".join(possible), "--note", "TEXT")


def _print(facts: dict[str, Any], settings: Settings) -> None:
    out = console()
    size = shown_size(facts["size"])
    if facts["wal_size"]:
        size += f", and {shown_size(facts['wal_size'])} of write-ahead log"
    revision = facts["revision"] + (" (head)" if facts["revision"] == facts["head"] else "")
    for name, value in (
        ("database", facts["database"]),
        ("product", facts["product"]),
        ("revision", revision),
        ("durability", facts["durability"]),
        ("size", size),
    ):
        out.print(plain(f"{name:<11}{value}"), soft_wrap=True)
    _print_states(out, facts["states"], settings)
    _print_executors(out, facts["executors"])
    _print_needs(out, facts["needs_person"], settings)
    for warning in facts["warnings"]:
        out.print(plain(f"Warning: {warning}", "yellow"), soft_wrap=True)


def _print_states(out: "Console", states: list[dict[str, Any]], settings: Settings) -> None:
    if not states:
        out.print("no sagas")
        return
    shown = table("state", "sagas", "oldest", right=("sagas", "oldest"))
    for row in states:
        shown.add_row(state(row["state"]), str(row["count"]), shown_duration(row["oldest_age"]))
    out.print(shown)
    stale = [row for row in states if row["state"] in UNRESOLVED and row["oldest_age"] > _STALE]
    if stale:
        listing = settings.command("list", "--open-longer-than", "1h")
        out.print(plain(f"Some have been open for more than an hour: {listing}"), soft_wrap=True)


def _print_executors(out: "Console", executors: list[dict[str, Any]]) -> None:
    if not executors:
        return
    shown = table("executor", "label", "since", "open sagas", "lease", right=("open sagas",))
    for row in executors:
        left = shown_duration(abs(row["lease_left"]))
        lease = plain(f"for {left} more", "green") if row["alive"] else plain(f"ran out {left} ago", "red")
        since = shown_moment(row["started_at"])
        shown.add_row(plain(row["executor_id"]), plain(row["label"]), since, str(row["open_sagas"]), lease)
    out.print(shown)


def _print_needs(out: "Console", needs: dict[str, Any], settings: Settings) -> None:
    if not needs["count"]:
        out.print("Nothing needs a person.")
        return
    out.print(plain(f"Sagas that need a person: {needs['count']}", "bold red"))
    for saga in needs["sagas"]:
        reason = f": {saga['reason']}" if saga["reason"] else ""
        age = shown_duration(saga["age"])
        out.print(plain(f"  saga {saga['saga_id']} {saga['name']}, {age} old{reason}"), soft_wrap=True)
        for command in saga["next"]:
            out.print(plain(f"    {command}", "cyan"), soft_wrap=True)
    if needs["count"] > len(needs["sagas"]):
        listing = settings.command("list", "--state", "failed_compensation")
        out.print(plain(f"  ... and {needs['count'] - len(needs['sagas'])} more: {listing}"), soft_wrap=True)
