"""A file as the earlier program leaves it, and that program's own statements.

The earlier program was written in Rust and kept its sagas in a SQLite file.
This script makes such a file without sagalog, in plain SQL, so that the demo
and the tests can show that the file is adopted whole, and that the earlier
program can go on with it afterwards:

    python examples/earlier_program.py sagas.db --sagas 300
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = """
CREATE TABLE saga (
    saga_id        INTEGER PRIMARY KEY,
    name           TEXT NOT NULL,
    state          TEXT NOT NULL,
    started_at     INTEGER NOT NULL,
    terminal_at    INTEGER,
    failure_reason TEXT,
    input_json     TEXT NOT NULL
);
CREATE TABLE saga_step (
    saga_id     INTEGER NOT NULL REFERENCES saga(saga_id),
    step_index  INTEGER NOT NULL,
    name        TEXT NOT NULL,
    state       TEXT NOT NULL,
    cmd_json    TEXT NOT NULL,
    output_json TEXT,
    started_at  INTEGER NOT NULL,
    ended_at    INTEGER,
    PRIMARY KEY (saga_id, step_index)
);
CREATE INDEX saga_state_idx ON saga(state) WHERE state IN ('running', 'compensating');
CREATE INDEX saga_terminal_idx ON saga(terminal_at);
"""

STATES = ("completed", "running", "compensated", "compensating", "failed", "failed_compensation")
"""Every state that the earlier program had; the first sagas of a file are one of each, in this order."""

_WEIGHTS = (60, 8, 14, 6, 7, 5)
_FIRST_START = 1_718_000_000_000

# What the commands of the fixture say: quotes, backslashes, several scripts, nulls, and numbers that a double loses.
_TEXTS = (
    "plain",
    'a "quoted" word',
    "O'Neill & Søn",
    "C:\\stock\\north",
    "two\nlines\tand a tab",
    "東京都千代田区",
    "Ёлка, 🎄 и ещё",
    "مرحبا",
    "</script><!-- -->",
    "%s {} ; DROP TABLE saga; --",
    "",
)
_NUMBERS = (0, -1, 3, 4096, 2**31, 2**53 + 1, 2**63 - 1, 2**64 - 1, -(2**63), 0.1, 1e-7, 1.5e300)
_COMMANDS = {
    "place_order": ("ReserveStock", "ChargeCard", "BookCourier", "SendReceipt"),
    "open_account": ("CreateUser", "AllocateStorage", "SendWelcome"),
    "import_photos": ("Scan", "CopyFiles", "WriteIndex", "BuildThumbnails", "Announce"),
}


class Step(NamedTuple):
    """A row of `saga_step`."""

    saga_id: int
    step_index: int
    name: str
    state: str
    cmd_json: str
    output_json: str | None
    started_at: int
    ended_at: int | None


class Saga(NamedTuple):
    """A row of `saga`."""

    saga_id: int
    name: str
    state: str
    started_at: int
    terminal_at: int | None
    failure_reason: str | None
    input_json: str


def write(path: str | os.PathLike[str], sagas: int = 300, *, seed: int = 1871) -> None:
    """Write a file of the earlier program.

    Args:
        path: Where; nothing may be there yet.
        sagas: How many; from 6 on, every state is among them.
        seed: The same seed gives the same rows.

    Raises:
        FileExistsError: Something is there already.
    """
    if Path(path).exists():
        raise FileExistsError(f"{os.fspath(path)} exists; nothing was written")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.executescript(SCHEMA)
        connection.execute("PRAGMA user_version = 1")
        connection.execute("BEGIN")
        for saga, steps in _rows(random.Random(seed), sagas):
            connection.execute("INSERT INTO saga VALUES (?, ?, ?, ?, ?, ?, ?)", saga)
            connection.executemany("INSERT INTO saga_step VALUES (?, ?, ?, ?, ?, ?, ?, ?)", steps)
        connection.execute("COMMIT")


class EarlierProgram:
    """The earlier program at work on a file, with the statements that it sends.

    They name no column that came later, so they work on an upgraded file too.

    Args:
        path: The file, which must be there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._connection = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)
        self._connection.execute("PRAGMA foreign_keys = ON")

    def insert_saga(self, saga_id: int, name: str, input_json: str, now: int) -> None:
        """Record that a saga starts."""
        self._connection.execute(
            "INSERT INTO saga (saga_id, name, state, started_at, input_json) VALUES (?1, ?2, 'running', ?3, ?4)",
            (saga_id, name, now, input_json),
        )

    def insert_step(self, saga_id: int, step_index: int, name: str, cmd_json: str, now: int) -> None:
        """Record that a step starts."""
        self._connection.execute(
            "INSERT INTO saga_step (saga_id, step_index, name, state, cmd_json, started_at) "
            "VALUES (?1, ?2, ?3, 'pending', ?4, ?5)",
            (saga_id, step_index, name, cmd_json, now),
        )

    def update_step(self, saga_id: int, step_index: int, state: str, output_json: str, now: int) -> int:
        """Record how a step ended; returns how many rows that changed."""
        return self._connection.execute(
            "UPDATE saga_step SET state = ?3, output_json = ?4, ended_at = ?5 WHERE saga_id = ?1 AND step_index = ?2",
            (saga_id, step_index, state, output_json, now),
        ).rowcount

    def compensate_step(self, saga_id: int, step_index: int, output_json: str, now: int) -> None:
        """Record that a step is undone; without a row it writes one, which has no command."""
        self._connection.execute(
            "INSERT INTO saga_step (saga_id, step_index, name, state, cmd_json, output_json, started_at, ended_at) "
            "VALUES (?1, ?2, 'compensate', 'compensated', '', ?3, ?4, ?4) "
            "ON CONFLICT (saga_id, step_index) DO UPDATE "
            "SET state = 'compensated', output_json = excluded.output_json, ended_at = excluded.ended_at",
            (saga_id, step_index, output_json, now),
        )

    def update_saga(self, saga_id: int, state: str, reason: str | None, now: int) -> int:
        """Record how a saga ended; returns how many rows that changed."""
        return self._connection.execute(
            "UPDATE saga SET state = ?2, failure_reason = ?3, terminal_at = ?4 WHERE saga_id = ?1",
            (saga_id, state, reason, now),
        ).rowcount

    def unresolved(self) -> list[tuple[int, str, str, str]]:
        """The sagas to recover: saga_id, name, state, input_json."""
        return self._connection.execute(
            "SELECT saga_id, name, state, input_json FROM saga "
            "WHERE state IN ('running', 'compensating', 'failed') ORDER BY saga_id"
        ).fetchall()

    def steps(self, saga_id: int) -> list[tuple[int, str, str, str, str | None]]:
        """A saga's steps: step_index, name, state, cmd_json, output_json."""
        return self._connection.execute(
            "SELECT step_index, name, state, cmd_json, output_json FROM saga_step WHERE saga_id = ?1 "
            "ORDER BY step_index",
            (saga_id,),
        ).fetchall()

    def max_saga_id(self) -> int:
        """The highest saga_id, 0 when there is none."""
        highest: int = self._connection.execute("SELECT COALESCE(MAX(saga_id), 0) FROM saga").fetchone()[0]
        return highest

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def _rows(chance: random.Random, sagas: int) -> Iterator[tuple[Saga, list[Step]]]:
    now = _FIRST_START
    for saga_id in range(1, sagas + 1):
        now += chance.randrange(1, 600_000)
        state = STATES[saga_id - 1] if saga_id <= len(STATES) else chance.choices(STATES, _WEIGHTS)[0]
        name = chance.choice(tuple(_COMMANDS))
        steps = _steps(chance, saga_id, _COMMANDS[name], state, now)
        ended = max((step.ended_at or step.started_at for step in steps), default=now) + 1
        reason = None if state in ("completed", "running", "compensating") else _reason(chance, steps)
        terminal = None if state in ("running", "compensating") else ended
        yield Saga(saga_id, name, state, now, terminal, reason, _json(_payload(chance, saga_id))), steps


def _steps(chance: random.Random, saga_id: int, commands: tuple[str, ...], state: str, now: int) -> list[Step]:
    """The steps that a saga in this state has: forward ones, the one that failed or hangs, and undos."""
    forward = len(commands) if state == "completed" else chance.randrange(0 if state == "running" else 1, len(commands))
    steps: list[Step] = []

    def add(name: str, ended_as: str, cmd: str, output: Any) -> None:
        started = now + 40 * len(steps)
        text, ended = (None, None) if ended_as == "pending" else (_json(output), started + chance.randrange(1, 40))
        steps.append(Step(saga_id, len(steps), name, ended_as, cmd, text, started, ended))

    undone = {"compensated": forward, "compensating": forward // 2, "failed_compensation": forward - 1}.get(state, 0)
    for index in range(forward):
        was = "compensated" if index >= forward - undone else "succeeded"
        event = {"type": f"{commands[index]}Done", "id": chance.choice(_NUMBERS), "note": chance.choice(_TEXTS)}
        add(commands[index], was, _json({"type": commands[index], **_payload(chance, saga_id)}), [event])
    if state == "running":
        if chance.random() < 0.8:
            add(commands[forward], "pending", _json({"type": commands[forward], **_payload(chance, saga_id)}), None)
        return steps
    if state != "completed":
        refused = {"error": f"{commands[forward]} refused: {chance.choice(_TEXTS)}"}
        add(commands[forward], "failed", _json({"type": commands[forward]}), refused)
    for _ in range(undone):
        add("compensate", "compensated", "", [{"type": "Undone", "note": chance.choice(_TEXTS)}])
    if state == "failed_compensation":
        add(f"Undo{commands[0]}", "failed", _json({"type": f"Undo{commands[0]}"}), {"error": "timed out after 30 s"})
    return steps


def _payload(chance: random.Random, saga_id: int) -> dict[str, Any]:
    return {
        "order": saga_id,
        "text": chance.choice(_TEXTS),
        "number": chance.choice(_NUMBERS),
        "coupon": None,
        "lines": [{"sku": f"S-{chance.randrange(1000)}", "qty": chance.randrange(1, 9), "gift": chance.random() < 0.5}],
    }


def _reason(chance: random.Random, steps: list[Step]) -> str:
    failed = [step.name for step in steps if step.state == "failed"]
    return f"{', '.join(failed)}: {chance.choice(_TEXTS)}"


def _json(value: Any) -> str:
    """JSON text as Rust's serde_json writes it: no spaces, no escapes where none are needed."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a saga file as the earlier program leaves it.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--sagas", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1871)
    given = parser.parse_args()
    try:
        write(given.path, given.sagas, seed=given.seed)
    except FileExistsError as error:
        parser.error(str(error))
    print(f"{given.path}: {given.sagas} sagas")


if __name__ == "__main__":
    main()
