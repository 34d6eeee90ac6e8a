"""Deleting what has ended, in batches that hold no lock for long."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from sagalog.errors import PayloadError
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.payload import MAX_SAGA_ID, check_integer

BATCH: Final = 200


def prune_batch(*, keep_last: int = 1000, older_than: timedelta = timedelta(days=7)) -> Operation[int]:
    """Delete one batch of what `prune` may delete; `BATCH` of them mean that there may be more."""
    asked = "prune"
    check_integer(keep_last, "keep_last", 0, MAX_SAGA_ID, asked)
    if not isinstance(older_than, timedelta) or older_than < timedelta():
        raise PayloadError(
            asked,
            "older_than is no positive timedelta",
            found=type(older_than).__name__,
            hint="For example timedelta(days=7).",
        )

    def run(db: Database) -> int:
        cutoff = db.now() - older_than // timedelta(milliseconds=1)
        for moment, saga_id in db.fetch(db.sql.first_prunable, skip_=keep_last):
            doomed = db.fetch(db.sql.prunable, until_=cutoff, at_=moment, id_=saga_id, limit_=BATCH)
            for row in doomed:
                for statement in db.sql.delete_saga:
                    db.write(statement, {"id_": row[0]})
            return len(doomed)
        return 0

    return Call(asked, Kind.SEVERAL, run)
