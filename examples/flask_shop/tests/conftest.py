"""The shop on each database: a SQLite file, and Postgres if SHOP_TEST_POSTGRES_URL names a server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, NullPool, create_engine, make_url, text

from flask_shop import create_app
from flask_shop.bank import Bank
from flask_shop.models import Product, db

ALEMBIC = Path(__file__).parent.parent / "alembic.ini"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of the test's own."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'shop.db'}"
        return
    server = os.environ.get("SHOP_TEST_POSTGRES_URL")
    if not server:
        pytest.skip("SHOP_TEST_POSTGRES_URL names no server")
    name = f"shop_{uuid.uuid4().hex}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield make_url(server).set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def alembic_engine(url: str) -> Engine:
    """For pytest-alembic."""
    return create_engine(url, poolclass=NullPool)


@pytest.fixture
def alembic_config() -> Config:
    """For pytest-alembic."""
    return Config(str(ALEMBIC))


@pytest.fixture
def bank() -> Bank:
    """Who charges the cards."""
    return Bank()


@pytest.fixture
def app(url: str, bank: Bank, alembic_engine: Engine, alembic_config: Config) -> Iterator[Flask]:
    """The shop, migrated, with three packets of tea."""
    alembic_config.attributes["connection"] = alembic_engine
    command.upgrade(alembic_config, "head")
    app = create_app(url, bank)
    with app.app_context():
        db.session.add(Product(sku="TEA-1", pence=250, stock=3))
        db.session.commit()
    yield app
    with app.app_context():
        db.engine.dispose()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """A customer."""
    return app.test_client()
