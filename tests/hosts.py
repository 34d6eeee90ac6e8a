"""A host application's Alembic environment in a folder, run through Alembic's own commands."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect

from sagalog import migrations

ENV = """
from alembic import context
from sqlalchemy import NullPool, create_engine

url = context.config.attributes["url"]
settings = context.config.attributes["settings"]

if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, **settings)
    with context.begin_transaction():
        context.run_migrations()
else:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, **settings)
        with context.begin_transaction():
            context.run_migrations()
"""
ASYNC_ENV = """
import asyncio

from alembic import context
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import create_async_engine

url = context.config.attributes["url"].replace("sqlite:", "sqlite+aiosqlite:")


def migrate(connection):
    context.configure(connection=connection, **context.config.attributes["settings"])
    with context.begin_transaction():
        context.run_migrations()


async def main():
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(migrate)


asyncio.run(main())
"""


class Host:
    """An application of somebody's, its env.py configured with `settings`."""

    def __init__(self, folder: Path, url: str, env: str = ENV, **settings: Any) -> None:
        self.url = url
        self.folder = folder / "migrations"
        self.output = io.StringIO()
        self.config = Config(str(folder / "alembic.ini"), output_buffer=self.output, stdout=io.StringIO())
        self.config.attributes["url"] = url
        self.config.attributes["settings"] = {"include_name": migrations.include_name, **settings}
        command.init(self.config, str(self.folder))
        self.config.set_main_option("script_location", str(self.folder))
        (self.folder / "env.py").write_text(env)
        self.engine: Engine = create_engine(url)

    @property
    def settings(self) -> dict[str, Any]:
        """What env.py gives to `context.configure`."""
        found: dict[str, Any] = self.config.attributes["settings"]
        return found

    def revision(self, message: str, up: str = "pass", down: str = "pass", **more: Any) -> Path:
        """A revision of the host's own, as a person writes it."""
        script = command.revision(self.config, message, **more)
        path = Path(script.path)
        text = re.sub(r"\n    pass\n", f"\n    {up}\n", path.read_text(), count=1)
        path.write_text(re.sub(r"\n    pass\n", f"\n    {down}\n", text, count=1))
        return path

    def write(self, **more: Any) -> Path:
        """The revision that sagalog writes."""
        return migrations.write_host_revision(self.config, **more)

    def autogenerate(self, message: str) -> str:
        """What Alembic writes by itself."""
        return Path(command.revision(self.config, message, autogenerate=True).path).read_text()

    def upgrade(self, to: str = "head") -> None:
        """Run `alembic upgrade`."""
        command.upgrade(self.config, to)

    def downgrade(self, to: str) -> None:
        """Run `alembic downgrade`."""
        command.downgrade(self.config, to)

    def check(self) -> None:
        """`alembic check`: raises if the models and the database differ."""
        command.check(self.config)

    def sql(self, way: str, revisions: str) -> str:
        """What `alembic upgrade --sql` prints."""
        self.output.truncate(0)
        self.output.seek(0)
        getattr(command, way)(self.config, revisions, sql=True)
        return self.output.getvalue()

    @property
    def heads(self) -> list[str]:
        """The host's heads."""
        return list(ScriptDirectory.from_config(self.config).get_heads())

    def tables(self, schema: str | None = None) -> set[str]:
        """The tables that are there."""
        return set(inspect(self.engine).get_table_names(schema=schema))

    def saga_log(self) -> str | None:
        """The saga log's revision."""
        return migrations.current(self.engine)
