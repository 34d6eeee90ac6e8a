"""Executors and their leases; the audit of what operators did.

Revision ID: sagalog_0003
Revises: sagalog_0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from sagalog.migrations.placing import create_index, placement, stored_integer

revision = "sagalog_0003"
down_revision = "sagalog_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables."""
    schema, prefix = placement()
    op.create_table(
        f"{prefix}saga_executor",
        sa.Column("executor_id", sa.Text, primary_key=True),
        sa.Column("label", sa.Text),
        sa.Column("started_at", stored_integer(), nullable=False),
        sa.Column("lease_until", stored_integer(), nullable=False),
        schema=schema,
    )
    op.create_table(
        f"{prefix}saga_audit",
        sa.Column("audit_id", stored_integer(), primary_key=True),
        sa.Column("saga_id", stored_integer(), nullable=False),
        sa.Column("step_index", sa.Integer),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("at", stored_integer(), nullable=False),
        sa.Column("state_before", sa.Text),
        sa.Column("state_after", sa.Text),
        schema=schema,
    )
    create_index("saga_audit_idx", "saga_audit", "saga_id")


def downgrade() -> None:
    """Drop both tables."""
    schema, prefix = placement()
    op.drop_table(f"{prefix}saga_audit", schema=schema)
    op.drop_table(f"{prefix}saga_executor", schema=schema)
