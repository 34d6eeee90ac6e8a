"""A file of the earlier program is adopted and upgraded, and nothing is lost."""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from examples import earlier_program
from examples.demo.showing import Observer
from sagalog import SagaLog


def adopt(see: Observer, path: Path) -> None:
    """Write such a file, open it as a saga log, and compare it row by row; then let the earlier program go on with it.

    Args:
        see: Who tells of it.
        path: Where the file is to be.
    """
    earlier_program.write(path)
    before = _rows_of(path)
    counted = Counter(saga[2] for saga in before["saga"])
    with SagaLog.open(path) as log:
        see.say(f"SagaLog.open upgraded a file with {len(before['saga'])} sagas, {len(before['saga_step'])} steps.")
        see.expect("the log counts as many in each state", log.counts(), counted)
        as_json = [(*row[:4], row[4] or "null", *row[5:]) for row in before["saga_step"]]
        after = _rows_of(path)
        see.expect("every saga is as it was, column by column", after["saga"], before["saga"])
        see.expect("so is every step (an empty command is now JSON's null)", after["saga_step"], as_json)
        with closing(earlier_program.EarlierProgram(path)) as program:
            new_id = program.max_saga_id() + 1
            program.insert_saga(new_id, "place_order", '{"order":"one more"}', now=1_750_000_000_000)
            program.insert_step(new_id, 0, "ReserveStock", '{"sku":"TEA-1"}', now=1_750_000_000_001)
        steps = [(step.name, step.state) for step in log.get(new_id).steps]
        see.expect("the earlier program goes on with it; the log reads that", steps, [("ReserveStock", "pending")])


def _rows_of(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of the file, in the columns that the earlier program knows."""
    saga = "saga_id, name, state, started_at, terminal_at, failure_reason, input_json"
    step = "saga_id, step_index, name, state, cmd_json, output_json, started_at, ended_at"
    with closing(sqlite3.connect(path)) as connection:
        return {
            "saga": connection.execute(f"SELECT {saga} FROM saga ORDER BY saga_id").fetchall(),
            "saga_step": connection.execute(f"SELECT {step} FROM saga_step ORDER BY saga_id, step_index").fetchall(),
        }
