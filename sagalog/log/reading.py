"""The operations that read: one statement each, so that each is one consistent snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, NamedTuple, TypeVar

from sagalog.errors import PayloadError, SagaNotFound
from sagalog.log.database import Call, Database, Kind, Operation, Rows
from sagalog.moments import from_ms, to_ms
from sagalog.payload import check_limit, check_saga_id, check_text
from sagalog.records import (
    AuditRecord,
    SagaRecord,
    SagaSnapshot,
    StepRecord,
    UnresolvedSaga,
    UnresolvedStep,
    build,
)
from sagalog.states import SagaState

S = TypeVar("S", bound=SagaRecord)

_MOMENTS = frozenset(
    {
        "at",
        "deadline_at",
        "ended_at",
        "lease_until",
        "oldest_started_at",
        "read_at",
        "run_at",
        "started_at",
        "terminal_at",
    }
)


def max_saga_id() -> Operation[int]:
    """The highest saga_id in the log.

    Returns:
        0 when the log is empty; an error is raised, never told as 0.
    """

    def run(db: Database) -> int:
        highest: int = db.fetch(db.sql.max_saga_id)[0][0]
        return highest

    return Call("max_saga_id", Kind.READ_ROW, run)


def next_step_index(saga_id: int) -> Operation[int]:
    """The index for a saga's next step.

    Args:
        saga_id: The saga.

    Returns:
        The highest index + 1, or 0 when there is no step.
    """
    check_saga_id(saga_id, "next_step_index")

    def run(db: Database) -> int:
        following: int = db.fetch(db.sql.next_step_index, id_=saga_id)[0][0]
        return following

    return Call("next_step_index", Kind.READ_ROW, run, saga_id)


def get(saga_id: int) -> Operation[SagaRecord]:
    """A saga with every column and its steps.

    Args:
        saga_id: The saga.

    Returns:
        The record; a payload with broken JSON is told when it is read, not here.

    Raises:
        SagaNotFound: No such saga.
    """
    check_saga_id(saga_id, "get")

    def run(db: Database) -> SagaRecord:
        for record in _with_steps(db, db.fetch(db.sql.get, id_=saga_id), SagaRecord, StepRecord):
            return record
        raise SagaNotFound("get", saga_id)

    return Call("get", Kind.READ, run, saga_id)


def unresolved_sagas(*, limit: int | None = None) -> Operation[list[UnresolvedSaga]]:
    """The sagas that somebody owes something: running, compensating or failed.

    Args:
        limit: At most so many; None for all.

    Returns:
        By saga_id, each with its steps by step_index; one consistent snapshot.
    """
    check_limit(limit, "unresolved_sagas")

    def run(db: Database) -> list[UnresolvedSaga]:
        statement = db.sql.unresolved_sagas(limit is not None)
        rows = db.fetch(statement) if limit is None else db.fetch(statement, limit_=limit)
        return list(_with_steps(db, rows, UnresolvedSaga, UnresolvedStep))

    return Call("unresolved_sagas", Kind.READ, run)


def snapshot_recent(limit: int) -> Operation[list[SagaSnapshot]]:
    """The sagas that something happened to last.

    Args:
        limit: At most so many.

    Returns:
        Newest first by terminal_at, or started_at while there is none, then by saga_id.
    """
    check_limit(limit, "snapshot_recent")

    def run(db: Database) -> list[SagaSnapshot]:
        return _snapshots(db, db.fetch(db.sql.snapshot_recent, limit_=limit))

    return Call("snapshot_recent", Kind.READ, run)


def find(
    *,
    state: str | None = None,
    name: str | None = None,
    key: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    open_longer_than: timedelta | None = None,
    limit: int = 100,
    before: int | None = None,
) -> Operation[list[SagaSnapshot]]:
    """Sagas by what is known of them, newest (highest saga_id) first, a page at a time.

    Args:
        state: In this state.
        name: Of this name.
        key: Started with this idempotency key.
        since: Started at this moment or later.
        until: Started before this moment.
        open_longer_than: Unresolved, and started longer ago than this.
        limit: The size of a page.
        before: The saga_id of the last row seen, for the next page.

    Raises:
        PayloadError: A filter that fits no saga: an unknown state, a naive datetime.
    """
    asked = "find"
    check_limit(limit, asked)
    values: dict[str, Any] = {}
    if state is not None:
        if state not in tuple(SagaState):
            raise PayloadError(
                asked, f"there is no state {state!r}", found=str(state), hint=f"States: {', '.join(SagaState)}."
            )
        state = SagaState(state).value
    if name is not None:
        values["name"] = check_text(name, "name", asked)
    if key is not None:
        values["key"] = check_text(key, "key", asked)
    for word, moment in (("since", since), ("until", until)):
        if moment is not None:
            values[word] = _stored_moment(moment, word, asked)
    if before is not None:
        values["before"] = check_saga_id(before, asked)

    def run(db: Database) -> list[SagaSnapshot]:
        given = {f"{word}_": value for word, value in values.items()}
        present = frozenset(values)
        if open_longer_than is not None:
            present |= {"open_longer_than"}
            given["at_"] = db.now() - open_longer_than // timedelta(milliseconds=1)
        return _snapshots(db, db.fetch(db.sql.find(present, state), **given, limit_=limit))

    return Call(asked, Kind.READ, run)


def counts() -> Operation[dict[str, int]]:
    """How many sagas there are in each state; states without one are left out."""

    def run(db: Database) -> dict[str, int]:
        return {state: count for state, count, _oldest in db.fetch(db.sql.counts)}

    return Call("counts", Kind.READ, run)


def audit(saga_id: int) -> Operation[list[AuditRecord]]:
    """What operators did to a saga, oldest first.

    Args:
        saga_id: The saga.
    """
    check_saga_id(saga_id, "audit")

    def run(db: Database) -> list[AuditRecord]:
        rows = db.fetch(db.sql.audit, id_=saga_id)
        return [build(AuditRecord, fields_of(db.sql.audit_fields, row)) for row in rows]

    return Call("audit", Kind.READ, run, saga_id)


class StoredStep(NamedTuple):
    """What whoever works on a saga needs of a step, as the row holds it, moments in Unix milliseconds."""

    step_index: int
    name: str
    cmd_json: str
    state: str
    started_at: int
    deadline_at: int | None
    output_json: str | None
    compensated_by: int | None
    error: str | None


class Stored(NamedTuple):
    """What whoever works on a saga needs of its row, and its steps by index."""

    saga_id: int
    name: str
    state: str
    failure_reason: str | None
    input_json: str
    token: str | None
    version: int | None
    epoch: int
    deadline_at: int | None
    cancel_reason: str | None
    recoveries: int
    steps: list[StoredStep]


_OF_SAGA: Final = Stored._fields[:-1]
_WIDTH: Final = len(_OF_SAGA)


def stored(saga_id: int, asked: str = "recover") -> Operation[Stored]:
    """A saga as the rows hold it, for who works on it: a fifth of what its record costs.

    Raises:
        SagaNotFound: No such saga.
    """
    check_saga_id(saga_id, asked)

    def run(db: Database) -> Stored:
        rows = db.fetch(db.sql.stored(_OF_SAGA, StoredStep._fields), id_=saga_id)
        if not rows:
            raise SagaNotFound(asked, saga_id)
        steps = [StoredStep._make(row[_WIDTH:]) for row in rows if row[_WIDTH] is not None]
        return Stored._make((*rows[0][:_WIDTH], steps))

    return Call(asked, Kind.READ_OWN, run, saga_id)


def _stored_moment(moment: datetime, word: str, asked: str) -> int:
    try:
        return to_ms(moment)
    except (ValueError, AttributeError, TypeError):
        raise PayloadError(
            asked, f"{word} is no aware datetime", found=type(moment).__name__, hint="Give one with tzinfo=UTC."
        ) from None


def fields_of(names: Iterable[str], row: Iterable[Any]) -> dict[str, Any]:
    """A record's fields from a row: stored integers of moments become datetimes."""
    return {
        name: from_ms(value) if value is not None and name in _MOMENTS else value
        for name, value in zip(names, row, strict=True)
    }


def _with_steps(db: Database, rows: Rows, saga_kind: type[S], step_kind: type[StepRecord]) -> Iterable[S]:
    for saga, steps in _sagas_of(db, rows):
        built = tuple(build(step_kind, fields_of(db.sql.step_fields, step)) for step in steps)
        yield build(saga_kind, {**fields_of(db.sql.saga_fields, saga), "steps": built})


def _sagas_of(db: Database, rows: Rows) -> Iterable[tuple[Sequence[Any], list[Sequence[Any]]]]:
    """Each saga's own columns, and those of each of its steps."""
    width = len(db.sql.saga_fields)
    for _, joined in groupby(rows, key=_first):
        of_saga = list(joined)
        yield of_saga[0][:width], [row[width:] for row in of_saga if row[width + 1] is not None]


_first = itemgetter(0)


def _snapshots(db: Database, rows: Rows) -> list[SagaSnapshot]:
    names = (*db.sql.snapshot_fields, "step_count")
    return [build(SagaSnapshot, fields_of(names, row)) for row in rows]
