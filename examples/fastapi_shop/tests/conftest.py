"""The shop on each database: a SQLite file, and Postgres if SHOP_TEST_POSTGRES_URL names a server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, NullPool, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

from fastapi_shop.app import create_app
from fastapi_shop.bank import Bank
from fastapi_shop.courier import Courier
from fastapi_shop.models import Product

ALEMBIC = Path(__file__).parent.parent / "alembic.ini"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of the test's own."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}"
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
def alembic_engine(url: str) -> AsyncEngine:
    """For pytest-alembic."""
    return create_async_engine(url, poolclass=NullPool)


@pytest.fixture
def alembic_config() -> Config:
    """For pytest-alembic."""
    return Config(str(ALEMBIC))


@pytest.fixture
def database(url: str) -> Engine:
    """The same database for the tests themselves, which are not async."""
    return create_engine(url.replace("+aiosqlite", ""), poolclass=NullPool)


@pytest.fixture
def bank() -> Bank:
    """Who charges the cards."""
    return Bank()


@pytest.fixture
def courier() -> Courier:
    """Who fetches the parcels."""
    return Courier()


@pytest.fixture
def app(
    url: str, bank: Bank, courier: Courier, database: Engine, alembic_engine: AsyncEngine, alembic_config: Config
) -> FastAPI:
    """The shop, migrated, with three packets of tea."""
    alembic_config.attributes["connection"] = alembic_engine
    command.upgrade(alembic_config, "head")
    with Session(database) as session:
        session.add(Product(sku="TEA-1", pence=250, stock=3))
        session.commit()
    return create_app(url, bank, courier)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    """A customer of the running shop."""
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
