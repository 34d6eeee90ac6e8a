"""Alembic's environment of the shop: `alembic upgrade head`."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, NullPool, create_engine

from flask_shop.models import database_url, db
from sagalog.migrations import include_name

metadata = db.metadata  # without sagalog's tables: include_name keeps autogenerate from dropping them


def migrate(connection: Connection) -> None:
    """Run what the command asks for."""
    context.configure(connection=connection, target_metadata=metadata, include_name=include_name)
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    context.configure(url=database_url(), literal_binds=True, target_metadata=metadata, include_name=include_name)
    with context.begin_transaction():
        context.run_migrations()
else:
    # The tests give an engine of theirs.
    engine = context.config.attributes.get("connection") or create_engine(database_url(), poolclass=NullPool)
    with engine.connect() as connection:
        migrate(connection)
