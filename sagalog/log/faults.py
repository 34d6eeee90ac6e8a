"""A driver's error becomes a SagaLogError here, and nowhere else.

Read by codes, never by classes or text: drivers disagree on classes, and their
texts may quote a payload or a URL. The driver's own error is the cause.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    OperationalError,
    ResourceClosedError,
    SQLAlchemyError,
    StatementError,
)

from sagalog.errors import LogUnavailable, NotASagaLog, SagaLogError, SchemaMissing, SchemaOutOfDate, where
from sagalog.log.database import Operation
from sagalog.schema import HEAD

SQLITE_BUSY = 5
SQLITE_IOERR = 10
LOCK_HELD = "55P03"

_SQLITE = {
    5: ("another writer holds the database's lock", "Repeat it; see who holds a transaction open."),
    6: ("another connection holds a table's lock", "Repeat it."),
    8: ("the database is read-only", "Give the process write access to the file and its folder."),
    10: ("the disk reported an error", "Look at the disk; then repeat it."),
    11: ("the database file is damaged", "Restore it from a backup; `PRAGMA integrity_check` tells more."),
    13: ("the disk is full", "Free space; then repeat it."),
    14: ("the file cannot be opened", "See that its folder exists and that the process may use it."),
    19: ("a constraint of the host's own refused it", "See which of the host's tables refer to the saga."),
}
_POSTGRES = {
    "40001": ("it conflicts with a concurrent transaction", "Roll back, and do the whole transaction again."),
    "40P01": ("the server broke a deadlock", "Roll back, and do the whole transaction again."),
    LOCK_HELD: ("another transaction holds the lock", "Repeat it."),
    "57014": ("the server cancelled the statement (a timeout)", "Repeat it."),
    "25006": ("the transaction is read-only", "Use a read-write connection to the primary."),
    "25P02": ("the transaction had failed before", "Roll back, and do the whole transaction again."),
    "53100": ("the server's disk is full", "Free space; then repeat it."),
    "53300": ("the server has no connection left", "Repeat it."),
    "42501": ("the role lacks the right", "Grant it the tables of the saga log."),
    "23503": ("a row of the host's still refers to the saga", "Give the host's foreign key an ON DELETE."),
}
_GONE = ("the connection to the server is gone", "Repeat it once the server answers.")


def driver_error(error: BaseException) -> BaseException:
    """The driver's own error under SQLAlchemy's wrapper, whose text would quote the parameters."""
    original = getattr(error, "orig", None)
    return original if isinstance(original, BaseException) else error


def sqlite_code(error: BaseException) -> int:
    """SQLite's primary result code, 0 if it is no error of SQLite's."""
    return int(getattr(driver_error(error), "sqlite_errorcode", 0) or 0) & 0xFF


def is_disconnect(error: BaseException) -> bool:
    """The connection is gone, or could not be made."""
    if was_sent(error):
        return True
    cause = driver_error(error)
    state = _sqlstate(cause)
    if state is not None:
        return state.startswith(("08", "57P"))
    # What no server and no SQLite gave a code came from the way there.
    unreached = isinstance(error, OperationalError | InterfaceError) and not sqlite_code(error)
    return unreached or isinstance(cause, OSError | TimeoutError)


def was_sent(error: BaseException) -> bool:
    """The connection broke after it was made: the server may or may not have done what it was sent."""
    return isinstance(error, DBAPIError) and error.connection_invalidated


def is_transient(error: BaseException) -> bool:
    """The database gave the whole transaction up, and the same one may succeed later."""
    return is_fault(error) and (
        is_disconnect(error)
        or sqlite_code(error) in (SQLITE_BUSY, 6, SQLITE_IOERR, 13)
        or _sqlstate(driver_error(error)) in ("40001", "40P01", LOCK_HELD, "53300")
    )


def is_savepoint_missing(error: BaseException) -> bool:
    """The transaction that had a savepoint is over."""
    cause = driver_error(error)
    return _sqlstate(cause) in ("3B001", "25P01") or (sqlite_code(error) == 1 and "no such savepoint" in str(cause))


def _sqlstate(cause: Any) -> str | None:
    state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    return state if isinstance(state, str) else None


def is_fault(error: BaseException) -> bool:
    """An error of the database or its driver, as opposed to a refusal of the log's or a user's exception."""
    return isinstance(error, SQLAlchemyError | sqlite3.Error | OSError) or _sqlstate(error) is not None


def translate(error: BaseException, operation: Operation[Any], database: str, *, committing: bool) -> SagaLogError:
    """The SagaLogError that tells a driver's error.

    Args:
        error: What the driver or SQLAlchemy raised.
        operation: What was under way.
        database: The database's name for a message, without a password.
        committing: Whether a write was on its way to become durable, so that a
            lost answer leaves its outcome unknown.
    """
    cause = driver_error(error)
    facts: dict[str, Any] = {"saga_id": operation.saga_id, "step_index": operation.step_index}
    asked = f"{operation.asked} of {where(operation.saga_id, operation.step_index)}"
    code = sqlite_code(error)
    if code == 26:
        return NotASagaLog(asked, "the file is no SQLite database", **facts, hint="See whether the path is right.")
    text = str(cause)
    state = _sqlstate(cause)
    if state == "42P01" or (code == 1 and "no such table" in text):
        return SchemaMissing(database)
    if state in ("42703", "42883") or (code == 1 and ("no such column" in text or "has no column" in text)):
        return SchemaOutOfDate(database, found="an older one", needed=HEAD)
    unknown = False
    if code:
        found = getattr(cause, "sqlite_errorname", None) or f"SQLite error {code}"
        problem, hint = _SQLITE.get(code, ("SQLite gave up", "The cause tells more."))
        unknown = committing and code == SQLITE_IOERR
    elif state in _POSTGRES:
        found = state or ""
        problem, hint = _POSTGRES[found]
    elif is_disconnect(error):
        found = state or type(cause).__name__
        problem, hint = _GONE
        unknown = committing
    else:
        found = state or type(cause).__name__
        problem, hint = "the database gave up", "The cause tells more."
        if isinstance(error, ResourceClosedError | StatementError) and not isinstance(error, DBAPIError):
            hint = "The connection or transaction that the log was given has ended."
    return LogUnavailable(asked, f"{problem} ({found})", **facts, found=found, hint=hint, unknown=unknown)
