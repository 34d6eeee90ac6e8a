"""The revisions that this library knows, and the rule by which it accepts a database.

No Alembic here: `SagaLog` looks before its first statement, and importing
Alembic costs more than opening a log. A test holds the list against the scripts.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from sagalog.errors import NotASagaLog, SchemaMissing, SchemaOutOfDate, SchemaTooNew

REVISIONS: Final = ("sagalog_0001", "sagalog_0002", "sagalog_0003", "sagalog_0004")
BASE: Final = REVISIONS[0]
HEAD: Final = REVISIONS[-1]
VERSION_TABLE: Final = "sagalog_version"


class Found(NamedTuple):
    """What a database says of its saga log.

    Attributes:
        revision: The recorded revision, or None without a version table.
        oldest_revision: The oldest revision whose library can run on it, if recorded.
        unversioned_tables: There is no version table, yet a table named `saga` or `saga_step`.
        strange: What tells those tables from the earlier program's; nothing if they are that program's.
    """

    revision: str | None
    oldest_revision: str | None = None
    unversioned_tables: bool = False
    strange: tuple[str, ...] = ()


def is_newer(found: Found) -> bool:
    """The database was upgraded by a library that knows more revisions than this one."""
    return found.revision is not None and found.revision not in REVISIONS


def verify(found: Found, database: str) -> None:
    """Accept a database at this library's revision, or at a newer one that allows this library.

    Args:
        found: What the database says.
        database: Its name for the message, without a password.

    Raises:
        SchemaMissing: No saga log in it.
        SchemaOutOfDate: It needs `upgrade` first.
        SchemaTooNew: The newer revision does not allow this library.
        NotASagaLog: Its tables are somebody else's, or its version table holds something else than one revision.
    """
    if found.revision is None:
        if found.strange:
            raise NotASagaLog.of_strange_tables(f"using the tables in {database}", found.strange)
        if found.unversioned_tables:
            raise SchemaOutOfDate(database, found=f"none (tables of the earlier program, before {BASE})", needed=HEAD)
        raise SchemaMissing(database)
    if is_newer(found):
        if not found.revision.startswith("sagalog_"):
            raise NotASagaLog(
                f"using the saga log in {database}",
                f"its table {VERSION_TABLE} holds {found.revision!r}",
                found=found.revision,
                hint="That is no revision of sagalog; look at who writes that table.",
            )
        if found.oldest_revision not in REVISIONS:
            raise SchemaTooNew(database, found=found.revision, known=HEAD)
        return
    if found.revision != HEAD:
        raise SchemaOutOfDate(database, found=found.revision, needed=HEAD)
