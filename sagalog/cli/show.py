"""`show`: one saga, its steps as a timeline, and what operators did to it."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sagalog.cli.options import Json, Output, SagaId
from sagalog.cli.output import STATE_STYLES, Form, console, form_of, plain, print_json, state, table
from sagalog.cli.settings import settings_of
from sagalog.cli.text import harmless, shown_duration, shown_moment
from sagalog.errors import PayloadError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sagalog import AuditRecord, SagaRecord, StepRecord

_LONGEST_BAR, _SHORTEST_BAR = 24, 8
_BESIDE_THE_BAR = 64
"""So many columns of a terminal are for the words; the bars get shorter before these are broken."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(show)


def show(
    context: typer.Context,
    saga_id: SagaId,
    payloads: Annotated[bool, typer.Option("--payloads", help="Print the input, commands and outputs too.")] = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Show a saga: its steps on a timeline, its audit.

    Moments are in UTC. Reasons are shown, payloads only on demand.
    """
    from sagalog.cli.connect import opened_log

    form = form_of(context, as_json, output)
    with opened_log(settings_of(context)) as log:
        saga = log.get(saga_id)
        audit = log.audit(saga_id)
    if form is not Form.TABLE:
        print_json(form, _facts(saga, audit, payloads))
        return
    out = console()
    for line in _head(saga):
        out.print(line, soft_wrap=True)
    if saga.steps:
        length = min(max(out.width - _BESIDE_THE_BAR, _SHORTEST_BAR), _LONGEST_BAR)
        out.print(_timeline(saga, _drawable(out), length))
    if audit:
        out.print(_audit_table(audit))
    if payloads:
        for title, text in _payloads(saga):
            out.print(plain(title, "bold"), soft_wrap=True)
            out.print(text, soft_wrap=True)


def _head(saga: "SagaRecord") -> "Iterator[Text]":
    from rich.text import Text

    yield Text.assemble(plain(f"saga {saga.saga_id}  "), plain(saga.name, "bold"), "  ", state(saga.state))
    took = shown_duration((saga.terminal_at or datetime.now(UTC)) - saga.started_at)
    over = f"ended {shown_moment(saga.terminal_at)} after {took}" if saga.terminal_at else f"open for {took}"
    yield plain(f"started {shown_moment(saga.started_at)}, {over}")
    facts = {
        "key": saga.key,
        "reason": saga.failure_reason,
        "asked to be undone": saga.cancel_reason,
        "not before": saga.run_at and shown_moment(saga.run_at),
        "deadline": saga.deadline_at and shown_moment(saga.deadline_at),
        "run by": saga.executor_id,
        "take-overs": saga.recoveries or None,
    }
    for name, value in facts.items():
        if value is not None:
            yield Text.assemble((f"{name}: ", "dim"), plain(value))


def _timeline(saga: "SagaRecord", mark: str, length: int) -> "Table":
    undoes: dict[int, list[int]] = {}
    for step in saga.steps:
        if step.compensated_by is not None:
            undoes.setdefault(step.compensated_by, []).append(step.step_index)
    start = min(saga.started_at, *(step.started_at for step in saga.steps))
    ends = [step.ended_at or step.started_at for step in saga.steps]
    end = max(*ends, saga.terminal_at or (datetime.now(UTC) if saga.state in _MOVING else ends[0]), ends[0])
    headings = ("step", "name", "state", "after", "took", "timeline", "")
    shown = table(*headings, right=("step", "after", "took"), whole=("state", "timeline"))
    for step in saga.steps:
        took = "" if step.ended_at is None else shown_duration(step.ended_at - step.started_at)
        after = shown_duration(step.started_at - start)
        bar = _bar(step, start, end, mark, length)
        shown.add_row(
            str(step.step_index), plain(step.name), state(step.state), after, took, bar, _remarks(step, undoes)
        )
    return shown


_MOVING = ("running", "compensating")


def _bar(step: "StepRecord", start: datetime, end: datetime, mark: str, length: int) -> "Text":
    from rich.text import Text

    span = max(end - start, timedelta(milliseconds=1))
    first = min(int((step.started_at - start) / span * length), length - 1)
    last = max(int(((step.ended_at or end) - start) / span * length), first + 1)
    # A step without an end may be under way, or in doubt.
    return Text(" " * first + (mark if step.ended_at else "?") * (last - first), STATE_STYLES.get(step.state, ""))


def _remarks(step: "StepRecord", undoes: dict[int, list[int]]) -> "Text":
    parts = []
    if step.step_index in undoes:
        parts.append("undoes " + ", ".join(map(str, undoes[step.step_index])))
    if step.compensated_by is not None:
        parts.append(f"undone by {step.compensated_by}")
    if step.state == "pending" and step.deadline_at is not None:
        parts.append(f"may be under way until {shown_moment(step.deadline_at)}")
    reason = _reason(step)
    if reason is not None:
        parts.append(reason)
    return plain("; ".join(parts))


def _reason(step: "StepRecord") -> str | None:
    """Why a step failed, or what was raised last on one in doubt."""
    if step.error is not None or step.state != "failed":
        return step.error
    value, _ = _read(step, "output")
    reason = value.get("error") if isinstance(value, dict) else None
    return reason if isinstance(reason, str) else None


def _audit_table(audit: "list[AuditRecord]") -> "Table":
    shown = table("at", "actor", "action", "step", "from", "to", "note", right=("step",))
    for row in audit:
        index = "" if row.step_index is None else str(row.step_index)
        moved = (state(row.state_before or ""), state(row.state_after or ""))
        shown.add_row(shown_moment(row.at), plain(row.actor), plain(row.action), index, *moved, plain(row.note))
    return shown


def _read(row: Any, field: str) -> tuple[Any, bool]:
    """A payload as a JSON value, or its stored text and False if that is no JSON."""
    try:
        return getattr(row, field), True
    except PayloadError:
        return getattr(row, f"{field}_json"), False


def _payloads(saga: "SagaRecord") -> Iterator[tuple[str, str]]:
    fields: list[tuple[Any, str, str]] = [(saga, "input", "input"), (saga, "result", "result")]
    for step in saga.steps:
        name = f"step {step.step_index} {step.name}"
        fields += [(step, "cmd", f"{name}: command"), (step, "output", f"{name}: output")]
    for row, field, title in fields:
        if getattr(row, f"{field}_json") is None:
            continue
        value, is_json = _read(row, field)
        text = json.dumps(value, indent=2, ensure_ascii=False) if is_json else f"(stored, but no JSON) {value}"
        yield title, harmless(text, keep="\n")


def _facts(saga: "SagaRecord", audit: "list[AuditRecord]", payloads: bool) -> dict[str, Any]:
    facts = saga.model_dump(exclude={"steps", "input_json", "result_json"})
    facts["steps"] = []
    for step in saga.steps:
        row = step.model_dump(exclude={"cmd_json", "output_json"})
        row["error"] = _reason(step)
        if payloads:
            row.update(_payload_facts(step, "cmd", "output"))
        facts["steps"].append(row)
    if payloads:
        facts.update(_payload_facts(saga, "input", "result"))
    facts["audit"] = [row.model_dump() for row in audit]
    return facts


def _payload_facts(row: Any, *fields: str) -> dict[str, Any]:
    read = {field: _read(row, field) for field in fields}
    return {(field if is_json else f"{field}_json"): value for field, (value, is_json) in read.items()}


def _drawable(out: "Console") -> str:
    return "█" if out.encoding.lower().startswith("utf") else "="
