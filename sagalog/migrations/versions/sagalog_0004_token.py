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
    """Create the index; of sagas that have one token already, the first that was worked on keeps it."""
    saga, step = placed("saga"), placed("saga_step")
    twins = f"SELECT token FROM {saga} WHERE token IS NOT NULL GROUP BY token HAVING count(*) > 1"
    has_steps = f"EXISTS (SELECT 1 FROM {step} s WHERE s.saga_id = t.saga_id)"
    ranked = (
        f"SELECT t.saga_id, row_number() OVER (PARTITION BY t.token "
        f"ORDER BY CASE WHEN {has_steps} THEN 0 ELSE 1 END, t.saga_id) AS rank "
        f"FROM {saga} t JOIN ({twins}) w ON w.token = t.token"
    )
    op.execute(
        f"UPDATE {saga} SET token = token || '-' || saga_id "
        f"WHERE saga_id IN (SELECT saga_id FROM ({ranked}) AS r WHERE rank > 1)"
    )
    create_index("saga_token_idx", "saga", "token", unique=True, where="token IS NOT NULL")


def downgrade() -> None:
    """Drop the index."""
    drop_index("saga_token_idx", "saga")
