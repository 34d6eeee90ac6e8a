"""The operations on sagas: each rule once, for every bind and database.

Each function checks its arguments and returns an `Operation`; see `guarded`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from sagalog.errors import KeyConflict, LogUnavailable, PayloadError, SagaExists, SagaLogError
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.fencing import head_of
from sagalog.log.guarded import TRIES, Changed, Decided, saga_refused, steps_in_the_way
from sagalog.log.statements import Statement
from sagalog.log.statements.sagas import SagaStatements
from sagalog.payload import MAX_SAGA_ID, Payload, check_saga_id, check_text, encode, printable, same_json
from sagalog.records import SagaOutcome
from sagalog.states import OUTSTANDING, Actor, SagaState, saga_sources


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

    return Call(asked, Kind.WRITE, run, saga_id)


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
    return Call(asked, Kind.WRITE, NewSaga(asked, values, _plain_statements).id_of, None)


class Drawn(NamedTuple):
    """A saga that was created, or that its key found."""

    saga_id: int
    created: bool


class NewSaga:
    """Draws an id and inserts; what is run again after a lost answer finds its own row by its random token."""

    def __init__(
        self,
        asked: str,
        values: dict[str, Any],
        sql: Callable[[Database], SagaStatements],
        same: Callable[[str], bool] | None = None,
    ) -> None:
        self._asked = asked
        self._values = values
        self._sql = sql
        self._same = same
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
        sent, self._sent = self._sent, True
        if sent and (mine := self._made_before(db)):
            return mine
        sql = self._sql(db)
        statement = sql.create_saga_postgres if db.on_postgres else sql.create_saga_sqlite
        keyed = values["key_"] is not None
        for _ in range(TRIES):
            values["at_"] = db.now()
            # A transaction that is open may hold the key, or be an earlier try of this one.
            made = db.fetch_unless_locked(statement, values) if keyed or sent else db.fetch(statement, **values)
            if made:
                db.writes += 1
                return Drawn(made[0][0], created=True)
            if keyed:
                for found in db.fetch(db.sql.saga_of_key, name_=values["name_"], key_=values["key_"]):
                    if self._is_same(found[1]):
                        return Drawn(found[0], created=found[3] == values["token_"])
                    raise KeyConflict(values["name_"], found[0], found[2])
            if sent and (mine := self._made_before(db)):
                return mine
            self._move_ids_on(db)
        raise LogUnavailable(self._asked, "other processes took every id it drew", hint="Repeat it.")

    def _made_before(self, db: Database) -> Drawn | None:
        for (saga_id,) in db.fetch(db.sql.saga_of_token, token_=self._values["token_"]):
            return Drawn(saga_id, created=True)
        return None

    def _is_same(self, held: str) -> bool:
        """Whether the input of the key's saga is this one."""
        mine: str = self._values["input_"]
        return held == mine or same_json(held, mine) or (self._same is not None and self._same(held))

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


class Move(Decided):
    """A move of a saga to a state.

    Attributes:
        target: The state.
        by: Whose move it is; all but an operator's settling, if none is named.
    """

    __slots__ = ()
    target: ClassVar[SagaState]
    by: ClassVar[tuple[Actor, ...]] = ()

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "target") and "kind" not in vars(cls):  # what looks at the saga's steps locks the saga first
            cls.kind = Kind.LOCKED if cls.target in OUTSTANDING else Kind.WRITE

    def __init__(self, saga_id: int, reason: str | None) -> None:
        super().__init__(saga_id, None, {"id_": saga_id, "reason_": reason})

    def _explain(self, db: Database) -> SagaLogError | None:
        head, target, reason = head_of(db, self.asked, self.saga_id), self.target, self._values["reason_"]
        if head[1] == target and (reason is None or head[4] == reason):
            return None
        sources = saga_sources(target, *self.by)
        if head[1] not in sources:
            return saga_refused(self.asked, self.saga_id, head[1], sources)
        return steps_in_the_way(db, self.asked, self.saga_id, target, head[1]) or Changed()


class MarkCompensating(Move):
    """A saga is being undone."""

    __slots__ = ()
    asked = "mark_compensating"
    target = SagaState.COMPENSATING

    def _statement(self, sql: SagaStatements) -> Statement:
        return sql.mark_compensating


class MarkFailedCompensation(Move):
    """A saga needs a person."""

    __slots__ = ()
    asked = "mark_failed_compensation"
    target = SagaState.FAILED_COMPENSATION

    def _statement(self, sql: SagaStatements) -> Statement:
        return sql.mark_failed_compensation


class Terminate(Move):
    """A saga ended."""

    __slots__ = ()

    def _statement(self, sql: SagaStatements) -> Statement:
        return sql.terminate(self.target)


class TerminateCompleted(Terminate):
    """Everything is done; refused while a step is pending."""

    __slots__ = ()
    asked = "terminate(completed)"
    target = SagaState.COMPLETED


class TerminateFailed(Terminate):
    """It failed, and recovery owns it."""

    __slots__ = ()
    asked = "terminate(failed)"
    target = SagaState.FAILED


class TerminateCompensated(Terminate):
    """What was done is undone; refused while a step is pending or succeeded."""

    __slots__ = ()
    asked = "terminate(compensated)"
    target = SagaState.COMPENSATED


_ENDS: Mapping[str, type[Terminate]] = {
    end.target.value: end for end in (TerminateCompleted, TerminateFailed, TerminateCompensated)
}


def mark_compensating(saga_id: int) -> Operation[None]:
    """Record that a saga is being undone, or that undoing it is tried again.

    Args:
        saga_id: The saga: running, failed, or failed_compensation (an operator's retry).

    Raises:
        SagaNotFound: No such saga.
        InvalidTransition: The saga has ended.
    """
    check_saga_id(saga_id, "mark_compensating")
    return MarkCompensating(saga_id, None)


def mark_failed_compensation(saga_id: int, reason: str) -> Operation[None]:
    """Record that a saga could not be undone and needs a person.

    A saga that a coordinator's process works on is taken from it: that stops at its next write.

    Args:
        saga_id: The saga: running, compensating or failed.
        reason: Why. What a database cannot hold becomes U+FFFD.

    Raises:
        SagaNotFound: No such saga.
        InvalidTransition: The saga has ended, or has another reason already.
    """
    check_saga_id(saga_id, "mark_failed_compensation")
    return MarkFailedCompensation(saga_id, printable(reason))


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
    check_saga_id(saga_id, "terminate")
    if not isinstance(outcome, SagaOutcome):
        raise PayloadError(
            f"terminate of saga {saga_id}",
            f"the outcome is a {type(outcome).__name__}",
            saga_id=saga_id,
            found=type(outcome).__name__,
            hint="Use SagaOutcome.completed(), .failed(reason) or .compensated(reason).",
        )
    reason = None if outcome.reason is None else printable(outcome.reason)
    return _ENDS[outcome.state](saga_id, reason)


def new_token() -> str:
    """A saga's random token, from which its steps' idempotency keys derive."""
    return os.urandom(16).hex()
