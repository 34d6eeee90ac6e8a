"""saga log

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import op

import sagalog.migrations

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    sagalog.migrations.upgrade(op, from_="base", to="sagalog_0004")


def downgrade() -> None:
    sagalog.migrations.downgrade(op, from_="sagalog_0004", to="base")
