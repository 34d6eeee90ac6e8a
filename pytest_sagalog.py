"""The pytest plugin: fixtures that give each test a saga log of its own.

It stands beside the package and imports pytest only: a test run that uses none
of the fixtures pays nothing, and coverage sees sagalog being imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from sagalog import AsyncSagaLog, SagaLog
    from sagalog.testing import MemoryDatabase


@pytest.fixture
def _saga_memory() -> Iterator[MemoryDatabase]:
    """The database that the default engines of one test share."""
    from sagalog.testing import MemoryDatabase

    with MemoryDatabase() as database:
        yield database


@pytest.fixture
def saga_engine(_saga_memory: MemoryDatabase) -> Engine:
    """An Engine on a migrated, empty SQLite database in memory, the test's own.

    Override it to use a database of yours; `saga_log` then migrates and empties its tables.
    """
    return _saga_memory.engine()


@pytest.fixture
def async_saga_engine(_saga_memory: MemoryDatabase) -> AsyncEngine:
    """An AsyncEngine on the test's own database, the one of `saga_engine`.

    Override it to use a database of yours; `async_saga_log` then migrates and empties its tables.
    """
    return _saga_memory.async_engine()


@pytest.fixture
def saga_log(saga_engine: Engine) -> SagaLog:
    """A SagaLog over `saga_engine`, empty."""
    from sagalog import SagaLog
    from sagalog.testing import start_empty

    start_empty(saga_engine)
    return SagaLog(saga_engine)


@pytest.fixture
def async_saga_log(async_saga_engine: AsyncEngine, request: pytest.FixtureRequest) -> AsyncSagaLog:
    """An AsyncSagaLog over `async_saga_engine`, empty; for asyncio, under any plugin or `asyncio.run`."""
    from sagalog import AsyncSagaLog
    from sagalog.testing import start_empty

    if "anyio_backend_name" in request.fixturenames or "anyio_backend" in request.fixturenames:
        backend = request.getfixturevalue("anyio_backend_name")
        if backend != "asyncio":
            pytest.fail(
                f"async_saga_log works on asyncio, as SQLAlchemy does, and this test runs on {backend}. "
                "Define a fixture anyio_backend that returns 'asyncio'.",
                pytrace=False,
            )
    start_empty(async_saga_engine)
    return AsyncSagaLog(async_saga_engine)
