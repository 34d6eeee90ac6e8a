"""The operations on sagas: each rule once, for every bind and database.

Each function checks its arguments and returns an `Operation`; see `guarded`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from sagalog.errors import KeyConflict, LogUnavailable, PayloadError, SagaExists, SagaLogError
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.guarded import TRIES, Changed, Decided, head_of, saga_refused, steps_in_the_way
from sagalog.log.statements import Statement, Statements
from sagalog.log.statements.sagas import SagaStatements
from sagalog.payload import MAX_SAGA_ID, Payload, check_saga_id, check_text, encode, printable
from sagalog.records import SagaOutcome
from sagalog.states import OUTSTANDING, SagaState, saga_sources

_mark_compensating = attrgetter("mark_compensating")
_mark_failed_compensation = attrgetter("mark_failed_compensation")


def start_saga(saga_id: int, name: str, input: Payload) -> Operation[None]:
    """Record that a saga starts, under an id of the caller's.

    Durable when it returns over an engine; else with the caller's commit.

    Args:
        saga_id: 1 to 2**63-1, not taken. `create_saga` takes one from the database.
        name: What kind of saga it is.
        input: What it was started with; stored as JSON text.

    Raises:
        PayloadError: An argument cannot be stored; nothing was sent.
        SagaExists: The id is taken, also by an earlier try of this call: see `identical`.
    """
    asked = "start_saga"
    check_saga_id(saga_id, asked)
    check_text(name, "name", asked, saga_id)
    text = encode(input, asked, saga_id)
    token = new_token()

    def run(db: Database) -> None:
        values = {"id_": saga_id, "name_": name, "input_": text, "token_": token, "at_": db.now()}
        if db.write(db.sql.start_saga, values) == 1:
            return
        rows = db.fetch(db.sql.saga_head, id_=saga_id)
        if not rows:
            raise LogUnavailable(asked, "the row that was in the way is gone", saga_id=saga_id, hint="Repeat it.")
        head = rows[0]
        raise SagaExists(saga_id, found=head[1], identical=head[0] == name and head[3] == text)

    return Call(asked, Kind.INSERT, run, saga_id)


def create_saga(name: str, input: Payload, *, key: str | None = None) -> Operation[int]:
    """Record that a saga starts, under a fresh id from the database.

    The id was never used before, whatever ids callers chose and whatever was
    pruned. With a key, the same (name, key) again returns the first saga's id
    and writes nothing.

    Args:
        name: What kind of saga it is.
        input: What it was started with; stored as JSON text.
        key: The start's idempotency key, for example an order's number.

    Returns:
        The saga's id.

    Raises:
        PayloadError: An argument cannot be stored, or 2**63-1 is taken: there is no id after it.
        KeyConflict: The key was used with another input.
    """
    asked = "create_saga"
    check_text(name, "name", asked)
    if key is not None:
        check_text(key, "key", asked)
    text = encode(input, asked)
    values = {"name_": name, "input_": text, "token_": new_token(), "key_": key}
    return Call(asked, Kind.INSERT, NewSaga(asked, values, _plain_statements).id_of, None)


class Drawn(NamedTuple):
    """A saga that was created, or that its key found."""

    saga_id: int
    created: bool


class NewSaga:
    """Draws an id and inserts; what is run again after a lost answer finds its own row by its random token."""

    def __init__(self, asked: str, values: dict[str, Any], sql: Callable[[Database], SagaStatements]) -> None:
        self._asked = asked
        self._values = values
        self._sql = sql
        self._sent = False

    def id_of(self, db: Database) -> int:
        """The saga's id alone."""
        return self.drawn(db).saga_id

    def drawn(self, db: Database) -> Drawn:
        """Create the saga, or find the one of the key.

        Raises:
            PayloadError: There is no id left.
            KeyConflict: The key was used with another input.
        """
        values = self._values
        if self._sent:
            for (saga_id,) in db.fetch(db.sql.saga_of_token, token_=values["token_"]):
                return Drawn(saga_id, created=True)
        self._sent = True
        sql = self._sql(db)
        statement = sql.create_saga_postgres if db.on_postgres else sql.create_saga_sqlite
        for _ in range(TRIES):
            made = db.fetch(statement, **values, at_=db.now())
            if made:
                db.writes += 1
                return Drawn(made[0][0], created=True)
            if values["key_"] is not None:
                for found in db.fetch(db.sql.saga_of_key, name_=values["name_"], key_=values["key_"]):
                    if found[1] == values["input_"]:
                        return Drawn(found[0], created=found[3] == values["token_"])
                    raise KeyConflict(values["name_"], found[0], found[2])
            self._move_ids_on(db)
        raise LogUnavailable(self._asked, "other processes took every id it drew", hint="Repeat it.")

    def _move_ids_on(self, db: Database) -> None:
        if db.fetch(db.sql.highest_id)[0][0] >= MAX_SAGA_ID:
            raise PayloadError(
                self._asked,
                f"saga_id {MAX_SAGA_ID} is taken, and there is no id after it",
                hint="Whoever chose that id chose the last one; use start_saga() with free ids.",
            )
        if db.on_postgres:
            db.fetch(db.sql.catch_up_ids)


def _plain_statements(db: Database) -> SagaStatements:
    return db.sql


def mark_compensating(saga_id: int) -> Operation[None]:
    """Record that a saga is being undone, or that undoing it is tried again.

    Args:
        saga_id: The saga: running, failed, or failed_compensation (an operator's retry).

    Raises:
        SagaNotFound: No such saga.
        InvalidTransition: The saga has ended.
    """
    asked = "mark_compensating"
    check_saga_id(saga_id, asked)
    return moving(asked, saga_id, SagaState.COMPENSATING, Kind.WRITE, _mark_compensating, None)


def mark_failed_compensation(saga_id: int, reason: str) -> Operation[None]:
    """Record that a saga could not be undone and needs a person.

    Args:
        saga_id: The saga: running, compensating or failed.
        reason: Why. What a database cannot hold becomes U+FFFD.

    Raises:
        SagaNotFound: No such saga.
        InvalidTransition: The saga has ended, or has another reason already.
    """
    asked = "mark_failed_compensation"
    check_saga_id(saga_id, asked)
    target = SagaState.FAILED_COMPENSATION
    text = printable(reason)
    return moving(asked, saga_id, target, Kind.WRITE, _mark_failed_compensation, text)


def terminate(saga_id: int, outcome: SagaOutcome) -> Operation[None]:
    """Record how a saga ended.

    `completed` is refused while a step is pending, `compensated` while one is
    pending or still succeeded: the log does not call done what is in doubt.

    Args:
        saga_id: The saga.
        outcome: `SagaOutcome.completed()`, `.failed(reason)` or `.compensated(reason)`.

    Raises:
        SagaNotFound: No such saga.
        InvalidTransition: It ended otherwise, or a step stands in the way; the message names it.
    """
    asked = f"terminate({getattr(outcome, 'state', '?')})"
    check_saga_id(saga_id, asked)
    if not isinstance(outcome, SagaOutcome):
        raise PayloadError(
            f"terminate of saga {saga_id}",
            f"the outcome is a {type(outcome).__name__}",
            saga_id=saga_id,
            found=type(outcome).__name__,
            hint="Use SagaOutcome.completed(), .failed(reason) or .compensated(reason).",
        )
    target = SagaState(outcome.state)
    reason = None if outcome.reason is None else printable(outcome.reason)
    kind = Kind.LOCKED if target in OUTSTANDING else Kind.WRITE
    return moving(asked, saga_id, target, kind, lambda sql: sql.terminate(target), reason)


def moving(
    asked: str,
    saga_id: int,
    target: SagaState,
    kind: Kind,
    statement: Callable[[Statements], Statement],
    reason: str | None,
) -> Decided:
    """A move of a saga to a state."""

    def explain(db: Database) -> SagaLogError | None:
        head = head_of(db, asked, saga_id)
        if head[1] == target and (reason is None or head[4] == reason):
            return None
        if head[1] not in saga_sources(target):
            return saga_refused(asked, saga_id, head[1], saga_sources(target))
        return steps_in_the_way(db, asked, saga_id, target, head[1]) or Changed()

    return Decided(asked, kind, statement, {"id_": saga_id, "reason_": reason}, explain, saga_id)


def new_token() -> str:
    """A saga's random token, from which its steps' idempotency keys derive."""
    return secrets.token_hex(16)
