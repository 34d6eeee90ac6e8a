"""Idempotency keys, tokens, epochs, cancels; facts about the log; ids that are never used again.

Every column is nullable or has a constant default, so that the earlier program
can still read and write the file, and nothing is rebuilt.

Revision ID: sagalog_0002
Revises: sagalog_0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from sagalog.migrations.placing import (
    add_columns,
    create_index,
    drop_columns,
    drop_index,
    on_postgres,
    placed,
    placement,
    stored_integer,
)

revision = "sagalog_0002"
down_revision = "sagalog_0001"
branch_labels = None
depends_on = None

_HIGHEST = "highest_pruned_saga_id"


def upgrade() -> None:
    """Add the columns, the facts and the indexes."""
    schema, prefix = placement()
    add_columns(
        "saga",
        sa.Column("key", sa.Text),
        sa.Column("token", sa.Text),
        sa.Column("version", sa.Integer),
        sa.Column("result_json", sa.Text),
        sa.Column("executor_id", sa.Text),
        sa.Column("epoch", stored_integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("run_at", stored_integer()),
        sa.Column("deadline_at", stored_integer()),
        sa.Column("cancel_reason", sa.Text),
        sa.Column("recoveries", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("trace_context", sa.Text),
    )
    add_columns(
        "saga_step",
        sa.Column("compensated_by", sa.Integer),
        sa.Column("error", sa.Text),
        sa.Column("deadline_at", stored_integer()),
    )
    # The earlier program writes no command for an undo; JSON text has to be JSON.
    op.execute(f"UPDATE {placed('saga_step')} SET cmd_json = 'null' WHERE cmd_json = ''")
    op.create_table(
        f"{prefix}sagalog_meta",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Text),
        schema=schema,
    )
    random = "replace(gen_random_uuid()::text, '-', '')" if on_postgres() else "lower(hex(randomblob(16)))"
    meta = placed("sagalog_meta")
    op.execute(f"INSERT INTO {meta} (name, value) VALUES ('log_id', {random})")
    op.execute(f"INSERT INTO {meta} (name, value) VALUES ('oldest_revision', 'sagalog_0002')")
    create_index("saga_key_idx", "saga", "key", "name", unique=True, where="key IS NOT NULL")
    create_index("saga_unresolved_idx", "saga", "saga_id", where="state IN ('running', 'compensating', 'failed')")
    create_index(
        "saga_attention_idx", "saga", "saga_id", where="state IN ('submitted', 'failed_compensation', 'abandoned')"
    )
    create_index("saga_name_idx", "saga", "name", "saga_id")
    create_index("saga_recent_idx", "saga", sa.text("coalesce(terminal_at, started_at)"), "saga_id")
    _remember_pruned_ids()


def _remember_pruned_ids() -> None:
    # A trigger holds whoever deletes: the earlier program, a host's own SQL, prune.
    saga, meta = placed("saga"), placed("sagalog_meta")
    prefix = placement().prefix
    if not on_postgres():
        op.execute(
            f'CREATE TRIGGER "{prefix}saga_id_kept" AFTER DELETE ON {saga} BEGIN '
            f"INSERT INTO {meta} (name, value) VALUES ('{_HIGHEST}', CAST(OLD.saga_id AS TEXT)) "
            f"ON CONFLICT (name) DO UPDATE SET value = excluded.value "
            f"WHERE CAST(excluded.value AS INTEGER) > CAST({meta}.value AS INTEGER); END"
        )
        return
    op.execute(f"CREATE SEQUENCE {placed('saga_id_seq')} AS bigint")
    op.execute(f"SELECT setval('{placed('saga_id_seq')}', max(saga_id)) FROM {saga} HAVING max(saga_id) > 0")
    op.execute(
        f"CREATE FUNCTION {placed('saga_id_kept')}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"INSERT INTO {meta} AS held (name, value) "
        f"SELECT '{_HIGHEST}', max(saga_id)::text FROM gone HAVING count(*) > 0 "
        f"ON CONFLICT (name) DO UPDATE SET value = excluded.value "
        f"WHERE excluded.value::bigint > held.value::bigint; RETURN NULL; END $$"
    )
    op.execute(
        f'CREATE TRIGGER "{prefix}saga_id_kept" AFTER DELETE ON {saga} REFERENCING OLD TABLE AS gone '
        f"FOR EACH STATEMENT EXECUTE FUNCTION {placed('saga_id_kept')}()"
    )


def downgrade() -> None:
    """Drop what upgrade added; sagas and steps stay."""
    schema, prefix = placement()
    if on_postgres():
        op.execute(f'DROP TRIGGER "{prefix}saga_id_kept" ON {placed("saga")}')
        op.execute(f"DROP FUNCTION {placed('saga_id_kept')}()")
        op.execute(f"DROP SEQUENCE {placed('saga_id_seq')}")
    else:
        op.execute(f'DROP TRIGGER "{prefix}saga_id_kept"')
    for name in ("saga_recent_idx", "saga_name_idx", "saga_attention_idx", "saga_unresolved_idx", "saga_key_idx"):
        drop_index(name, "saga")
    op.drop_table(f"{prefix}sagalog_meta", schema=schema)
    drop_columns("saga_step", "deadline_at", "error", "compensated_by")
    drop_columns(
        "saga",
        "trace_context",
        "recoveries",
        "cancel_reason",
        "deadline_at",
        "run_at",
        "epoch",
        "executor_id",
        "result_json",
        "version",
        "token",
        "key",
    )
