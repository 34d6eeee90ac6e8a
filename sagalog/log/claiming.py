"""The operations of a process: its lease, and the sagas that it takes over or starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.fencing import Fence
from sagalog.log.sagas import new_token
from sagalog.log.statements import Statement
from sagalog.log.statements.executors import ExecutorStatements


class Candidate(NamedTuple):
    """A saga that may be taken over, as it was seen."""

    saga_id: int
    epoch: int
    name: str
    recoveries: int = 0
    own: bool | None = False


def renew(executor_id: str, label: str, lease_ms: int) -> Operation[None]:
    """Hold the lease for so long from now, by the database's clock; a lapsed one is kept as well."""

    def run(db: Database) -> None:
        db.write(db.sql.executors.renew, {"executor_": executor_id, "label_": label, "lease_": lease_ms})

    return Call("renew", Kind.WRITE, run)


def retire(executor_id: str) -> Operation[None]:
    """The executor is gone; whatever it still owns is anybody's at once."""

    def run(db: Database) -> None:
        db.write(db.sql.executors.retire, {"executor_": executor_id})

    return Call("retire", Kind.WRITE, run)


def forget_dead(older_than_ms: int) -> Operation[None]:
    """Delete executors whose lease ran out so long ago, and that own nothing unresolved."""

    def run(db: Database) -> None:
        db.write(db.sql.executors.forget_dead, {"lease_": older_than_ms})

    return Call("forget_dead", Kind.WRITE, run)


def candidates(executor_id: str, limit: int, *, adopt: bool) -> Operation[list[Candidate]]:
    """Unresolved sagas whose executor is gone, or is this one, fewest take-overs first."""

    def run(db: Database) -> list[Candidate]:
        rows = db.fetch(db.sql.executors.candidates(adopt), executor_=executor_id, limit_=limit)
        return [Candidate(*row) for row in rows]

    return Call("recover", Kind.READ, run)


def held(executor_id: str) -> Operation[list[Fence]]:
    """The unresolved sagas of an executor, each under its epoch."""

    def run(db: Database) -> list[Fence]:
        return [Fence(*row) for row in db.fetch(db.sql.executors.held, executor_=executor_id)]

    return Call("held", Kind.READ, run)


def unowned(limit: int) -> Operation[list[tuple[int, str]]]:
    """Unresolved sagas that never belonged to a coordinator: (saga_id, name)."""

    def run(db: Database) -> list[tuple[int, str]]:
        return [(row[0], row[1]) for row in db.fetch(db.sql.executors.unowned, limit_=limit)]

    return Call("recover", Kind.READ, run)


def claim(seen: Candidate, executor_id: str, *, adopt: bool) -> Operation[bool]:
    """Take a saga over, unless somebody else did: one compare-and-set, which raises the epoch.

    Raises:
        LogUnavailable: Another transaction holds the saga's row: a stopped process does for as long as it is stopped.
    """
    values = {"id_": seen.saga_id, "epoch_": seen.epoch, "executor_": executor_id, "token_": new_token()}
    return _claim(seen, executor_id, lambda sql: sql.claim(adopt), values)


def _claim(
    seen: Candidate, executor_id: str, statement: Callable[[ExecutorStatements], Statement], values: dict[str, Any]
) -> Operation[bool]:
    """One compare-and-set; what is run again after a lost answer knows its own claim by executor and epoch."""
    sent = False

    def run(db: Database) -> bool:
        nonlocal sent
        again, sent = sent, True
        sql = db.sql.executors
        if db.write_unless_locked(statement(sql), values) == 1:
            return True
        claimed = {"id_": seen.saga_id, "epoch_": seen.epoch + 1, "executor_": executor_id}
        return again and bool(db.fetch(sql.claimed, **claimed))

    return Call("claim", Kind.WRITE, run, seen.saga_id)


def submitted(limit: int) -> Operation[list[Candidate]]:
    """Submitted sagas whose time has come, oldest first."""

    def run(db: Database) -> list[Candidate]:
        return [Candidate(*row) for row in db.fetch(db.sql.executors.submitted, limit_=limit)]

    return Call("submitted", Kind.READ, run)


def claim_submitted(seen: Candidate, executor_id: str, version: int, deadline_at: int | None) -> Operation[bool]:
    """Start a submitted saga, unless somebody else did.

    Args:
        seen: The saga.
        executor_id: Who starts it.
        version: Of the definition that runs it, whichever submitted it.
        deadline_at: After it the saga is undone; Unix milliseconds.
    """
    values = {
        "id_": seen.saga_id,
        "epoch_": seen.epoch,
        "executor_": executor_id,
        "version_": version,
        "deadline_": deadline_at,
    }
    return _claim(seen, executor_id, lambda sql: sql.claim_submitted, values)


def environment(named: str | None) -> Operation[str | None]:
    """What the log remembers as its environment; the first that is named is remembered.

    Args:
        named: This process's environment, or None.
    """

    def run(db: Database) -> str | None:
        if named is not None:
            db.write(db.sql.executors.remember_environment, {"value_": named})
        rows = db.fetch(db.sql.executors.environment)
        return str(rows[0][0]) if rows and rows[0][0] is not None else None

    return Call("environment", Kind.SEVERAL if named is not None else Kind.READ, run)
