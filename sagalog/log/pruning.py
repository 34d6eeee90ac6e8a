"""Deleting what has ended, in batches that hold no lock for long."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

from sagalog.errors import PayloadError
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.payload import MAX_SAGA_ID, check_integer

BATCH: Final = 200


def next_batch(done: int, limit: int | None) -> int:
    """How many sagas the next batch of a `prune` may delete, after so many; 0 when it is done."""
    if limit is None:
        return BATCH
    check_integer(limit, "limit", 0, MAX_SAGA_ID, "prune")
    return min(BATCH, limit - done)


def prune_batch(size: int, *, keep_last: int, older_than: timedelta) -> Operation[int]:
    """Delete at most `size` of what `prune` may delete; so many mean that there may be more."""
    _check(keep_last, older_than)

    def run(db: Database) -> int:
        rule = _rule(db, keep_last, older_than)
        if rule is None:
            return 0
        doomed = db.fetch(db.sql.prunable, **rule, limit_=size)
        for row in doomed:
            for statement in db.sql.delete_saga:
                db.write(statement, {"id_": row[0]})
        return len(doomed)

    return Call("prune", Kind.SEVERAL, run)


def prunable(*, keep_last: int = 1000, older_than: timedelta = timedelta(days=7)) -> Operation[int]:
    """How many sagas `prune` would delete now, by the same rule.

    Args:
        keep_last: So many of the most recent sagas stay, whatever their age.
        older_than: What ended, or started, more recently than this stays.
    """
    _check(keep_last, older_than)

    def run(db: Database) -> int:
        rule = _rule(db, keep_last, older_than)
        if rule is None:
            return 0
        count: int = db.fetch(db.sql.count_prunable, **rule)[0][0]
        return count

    return Call("prunable", Kind.READ, run)


def _check(keep_last: int, older_than: timedelta) -> None:
    check_integer(keep_last, "keep_last", 0, MAX_SAGA_ID, "prune")
    if not isinstance(older_than, timedelta) or older_than < timedelta():
        raise PayloadError(
            "prune",
            "older_than is no positive timedelta",
            found=type(older_than).__name__,
            hint="For example timedelta(days=7).",
        )


def _rule(db: Database, keep_last: int, older_than: timedelta) -> dict[str, Any] | None:
    """The limits of what may go, as the statements want them; None when everything is among the newest."""
    for moment, saga_id in db.fetch(db.sql.first_prunable, skip_=keep_last):
        return {"until_": db.now() - older_than // timedelta(milliseconds=1), "at_": moment, "id_": saga_id}
    return None
