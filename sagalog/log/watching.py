"""What an operator looks at first: how much there is in each state, who works on it, how large the log is."""

from __future__ import annotations

from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.reading import fields_of
from sagalog.records import ExecutorRecord, StateCount, build

_COUNTED = ("state", "count", "oldest_started_at")
_EXECUTOR = ("executor_id", "label", "started_at", "lease_until", "open_sagas", "read_at")


def state_counts() -> Operation[list[StateCount]]:
    """How many sagas there are in each state, and when the oldest of them started; states without one are left out."""

    def run(db: Database) -> list[StateCount]:
        return [build(StateCount, fields_of(_COUNTED, row)) for row in db.fetch(db.sql.counts)]

    return Call("state_counts", Kind.READ, run)


def executors() -> Operation[list[ExecutorRecord]]:
    """The processes that run sagas, and until when their leases hold; the lease that lasts longest first."""

    def run(db: Database) -> list[ExecutorRecord]:
        return [build(ExecutorRecord, fields_of(_EXECUTOR, row)) for row in db.fetch(db.sql.all_executors)]

    return Call("executors", Kind.READ, run)


def size() -> Operation[int]:
    """How many bytes the log takes: on Postgres its tables with their indexes, on SQLite the whole database file."""

    def run(db: Database) -> int:
        statement = db.sql.size_postgres if db.on_postgres else db.sql.size_sqlite
        taken: int = db.fetch(statement)[0][0]
        return taken

    return Call("size", Kind.READ, run)
