"""What the tests of the command line share: the application run in this process, and a filled log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import create_engine, make_url, text
from typer.testing import CliRunner

from sagalog import SagaLog, SagaOutcome
from sagalog.cli.app import app

EVIL = "evil \x1b]0;title\x07\x1b[2J [red]x[/red] :smile:\u202e\nline"


@dataclass
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


def sagalog(*words: object, env: dict[str, str | None] | None = None) -> Done:
    """Run a command line in this process, where nobody can answer a question."""
    environment = {"SAGALOG_URL": None, "SAGALOG_SCHEMA": None, "SAGALOG_PREFIX": None, "COLUMNS": None, **(env or {})}
    result = CliRunner().invoke(app, [str(word) for word in words], env=environment, prog_name="sagalog")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


@contextmanager
def log_at(url: str, **placement: Any) -> Iterator[SagaLog]:
    """The library's log on the same database."""
    engine = create_engine(url)
    yield SagaLog(engine, **placement)
    engine.dispose()


def execute(url: str, statement: str, **values: Any) -> list[Any]:
    """Run SQL as a stranger would."""
    engine = create_engine(url)
    with engine.begin() as connection:
        result = connection.execute(text(statement), values)
        rows = [tuple(row) for row in result] if result.returns_rows else []
    engine.dispose()
    return rows


def fill(url: str, **placement: Any) -> None:
    """1: compensated. 2: needs a person, step 0 in doubt. 3: running. 4: completed."""
    with log_at(url, **placement) as log:
        log.start_saga(1, "place_order", {"order": 1})
        log.start_step(1, 0, "ReserveStock", {"sku": "TEA-1"})
        log.finish_step(1, 0, [{"reservation": "R-1"}])
        log.start_step(1, 1, "ChargeCard", {"pence": 5})
        log.fail_step(1, 1, "card declined")
        log.mark_compensating(1)
        log.start_step(1, 2, "ReleaseStock", None)
        log.compensate_step(1, 2, [])
        log.mark_step_compensated(1, 0)
        log.terminate(1, SagaOutcome.compensated("card declined"))
        log.start_saga(2, EVIL, {"card": "4111"})
        log.start_step(2, 0, "Refund \x1b[31m[bold]", None)
        log.mark_failed_compensation(2, "the bank \x1b[31m[/bold] said no")
        log.start_saga(3, "place_order", {"order": 3})
        log.start_saga(4, "ship", None)
        log.terminate(4, SagaOutcome.completed())


def without_password(url: str) -> str:
    return make_url(url).render_as_string(hide_password=True)
