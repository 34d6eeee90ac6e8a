"""Alembic's environment of the shop: `alembic upgrade head`, over the application's own async driver."""

from __future__ import annotations

import asyncio

from alembic import context
from sqlalchemy import Connection, NullPool
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from fastapi_shop.models import Base, database_url
from sagalog.migrations import include_name

metadata = Base.metadata  # without sagalog's tables: include_name keeps autogenerate from dropping them


def migrate(connection: Connection) -> None:
    """Run what the command asks for."""
    context.configure(connection=connection, target_metadata=metadata, include_name=include_name)
    with context.begin_transaction():
        context.run_migrations()


async def migrate_over(engine: AsyncEngine) -> None:
    """Run it on a connection of the engine's."""
    async with engine.connect() as connection:
        await connection.run_sync(migrate)


if context.is_offline_mode():
    context.configure(url=database_url(), literal_binds=True, target_metadata=metadata, include_name=include_name)
    with context.begin_transaction():
        context.run_migrations()
else:
    # The tests give an engine of theirs.
    given = context.config.attributes.get("connection")
    asyncio.run(migrate_over(given or create_async_engine(database_url(), poolclass=NullPool)))
