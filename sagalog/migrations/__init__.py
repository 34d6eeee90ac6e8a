"""Schema versions of the saga log, by Alembic: `upgrade`, `downgrade`, `current`, `check`.

Each takes an Engine or a Connection, also in memory; given an AsyncEngine or
AsyncConnection it returns an awaitable. In a host application with its own
Alembic, `upgrade` and `downgrade` take the `op` of a revision of the host's
own, which `write_host_revision` writes, and `include_name` keeps the host's
autogenerate away.
"""

from sagalog.migrations.api import check, current, downgrade, upgrade
from sagalog.migrations.include import include_name
from sagalog.migrations.revision_file import write_host_revision

__all__ = ["check", "current", "downgrade", "include_name", "upgrade", "write_host_revision"]
