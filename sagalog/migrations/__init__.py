"""Schema versions of the saga log, by Alembic: `upgrade`, `downgrade`, `current`, `check`.

Each takes an Engine or a Connection, also in memory; given an AsyncEngine or
AsyncConnection it returns an awaitable.
"""

from sagalog.migrations.api import check, current, downgrade, upgrade

__all__ = ["check", "current", "downgrade", "upgrade"]
