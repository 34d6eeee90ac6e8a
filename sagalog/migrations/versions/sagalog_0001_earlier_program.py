"""The schema of the earlier program: exactly what its files have.

Revision ID: sagalog_0001
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from sagalog.migrations.placing import create_index, placement, stored_integer

revision = "sagalog_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables and their indexes."""
    schema, prefix = placement()
    op.create_table(
        f"{prefix}saga",
        sa.Column("saga_id", stored_integer(), primary_key=True, autoincrement=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("started_at", stored_integer(), nullable=False),
        sa.Column("terminal_at", stored_integer()),
        sa.Column("failure_reason", sa.Text),
        sa.Column("input_json", sa.Text, nullable=False),
        schema=schema,
    )
    target = f"{schema}.{prefix}saga" if schema else f"{prefix}saga"
    op.create_table(
        f"{prefix}saga_step",
        sa.Column("saga_id", stored_integer(), sa.ForeignKey(f"{target}.saga_id"), nullable=False),
        sa.Column("step_index", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("cmd_json", sa.Text, nullable=False),
        sa.Column("output_json", sa.Text),
        sa.Column("started_at", stored_integer(), nullable=False),
        sa.Column("ended_at", stored_integer()),
        sa.PrimaryKeyConstraint("saga_id", "step_index"),
        schema=schema,
    )
    create_index("saga_state_idx", "saga", "state", where="state IN ('running', 'compensating')")
    create_index("saga_terminal_idx", "saga", "terminal_at")


def downgrade() -> None:
    """Drop both tables, and with them every saga."""
    schema, prefix = placement()
    op.drop_table(f"{prefix}saga_step", schema=schema)
    op.drop_table(f"{prefix}saga", schema=schema)
