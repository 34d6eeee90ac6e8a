"""No two sagas have one token, so no two steps have one idempotency key.

A start whose answer was lost is sent again while the first may still be under
way: the index lets one of them in.

Revision ID: sagalog_0004
Revises: sagalog_0003
"""

from __future__ import annotations

from alembic import op

from sagalog.migrations.placing import create_index, drop_index, placed

revision = "sagalog_0004"
down_revision = "sagalog_0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the index; of sagas that have one token already, the first keeps it."""
    saga = placed("saga")
    first = f"SELECT min(saga_id) FROM {saga} WHERE token IS NOT NULL GROUP BY token"
    op.execute(
        f"UPDATE {saga} SET token = token || '-' || saga_id WHERE token IS NOT NULL AND saga_id NOT IN ({first})"
    )
    create_index("saga_token_idx", "saga", "token", unique=True, where="token IS NOT NULL")


def downgrade() -> None:
    """Drop the index."""
    drop_index("saga_token_idx", "saga")
