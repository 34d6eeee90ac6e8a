"""Alembic's environment for a checkout of sagalog: `alembic upgrade head` on SAGALOG_URL or `-x url=`.

Applications do not use it: the scripts ship inside the package and run through
`sagalog.migrations`.
"""

from __future__ import annotations

import os
import warnings

from alembic import context
from sqlalchemy import create_engine

from sagalog.migrations.environment import options, transaction
from sagalog.models import Base
from sagalog.placement import Placement

url = context.get_x_argument(as_dictionary=True).get("url") or os.environ.get("SAGALOG_URL") or "sqlite:///sagas.db"
# Alembic cannot compare an index on an expression on SQLite, and says so each time; a test compares it.
warnings.filterwarnings("ignore", message=".*expression-based index.*")
settings = {**options(Placement()), "target_metadata": Base.metadata, "compare_server_default": True}

if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, dialect_opts={"paramstyle": "named"}, **settings)
    with context.begin_transaction():
        context.run_migrations()
else:
    engine = create_engine(url)
    with transaction(engine, Placement()) as connection:
        context.configure(connection=connection, **settings)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()
