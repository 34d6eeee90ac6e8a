"""Being told of submitted sagas on Postgres, by LISTEN on a connection of one's own. A hint: polling is the truth."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sagalog.log.apart import inner_bind, own_engine
from sagalog.log.engine import EngineBind

_log = logging.getLogger("sagalog")
_AGAIN_AFTER = 5.0
_LOOK_AT_STOP = 1.0
_CLOSED_WITHIN = 5.0


def _postgres(log: Any) -> EngineBind | None:
    bind = inner_bind(log._bind)
    return bind if isinstance(bind, EngineBind) and bind.engine.dialect.name == "postgresql" else None


def _listen_on(channel: str) -> str:
    quoted = channel.replace('"', '""')
    return f'LISTEN "{quoted}"'


class Listener:
    """A thread that listens."""

    def __init__(self, bind: EngineBind, told: Callable[[], None]) -> None:
        self._engine = own_engine(bind.engine)
        self._channel = bind.sql.executors.channel
        self._told = told
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="sagalog-listener", daemon=True)
        self._thread.start()

    @classmethod
    def on(cls, log: Any, told: Callable[[], None]) -> Listener | None:
        """A listener for a log on Postgres by psycopg; None for any other, which is polled."""
        bind = _postgres(log)
        return cls(bind, told) if bind is not None and bind.engine.dialect.driver == "psycopg" else None

    def close(self) -> None:
        """Stop listening."""
        self._stop.set()
        self._thread.join()
        self._engine.dispose()

    def _keep(self) -> None:
        while not self._stop.is_set():
            try:
                self._listen()
            except Exception as error:
                _log.warning("listening for submitted sagas failed, and they are polled: %s", type(error).__name__)
                self._stop.wait(_AGAIN_AFTER)

    def _listen(self) -> None:
        connection = self._engine.raw_connection()
        try:
            driver: Any = connection.driver_connection
            driver.autocommit = True
            driver.execute(_listen_on(self._channel))
            while not self._stop.is_set():
                for _ in driver.notifies(timeout=_LOOK_AT_STOP, stop_after=1):
                    self._told()
        finally:
            connection.invalidate()
            connection.close()


async def alisten(log: Any, told: Callable[[], None]) -> None:
    """Listen until cancelled; at once done for a database that does not notify."""
    from sqlalchemy.ext.asyncio import AsyncEngine

    bind = _postgres(log)
    if bind is None:
        return
    engine = AsyncEngine(own_engine(bind.engine))
    try:
        while True:
            try:
                await _alisten(engine, bind.sql.executors.channel, told)
            except Exception as error:
                _log.warning("listening for submitted sagas failed, and they are polled: %s", type(error).__name__)
                await asyncio.sleep(_AGAIN_AFTER)
    finally:
        await engine.dispose()


async def _alisten(engine: Any, channel: str, told: Callable[[], None]) -> None:
    from sqlalchemy.util import greenlet_spawn

    connection = await engine.raw_connection()
    driver: Any = connection.driver_connection
    try:
        if engine.dialect.driver == "asyncpg":
            gone = asyncio.Event()
            driver.add_termination_listener(lambda _: gone.set())
            await driver.add_listener(channel, lambda *_: told())
            await gone.wait()
            raise ConnectionError("the connection ended")
        await driver.set_autocommit(True)
        await driver.execute(_listen_on(channel))
        async for _ in driver.notifies():
            told()
    finally:
        with suppress(Exception):
            # In so many words, and awaited: what is only let go leaves its transport to the garbage collector.
            async with asyncio.timeout(_CLOSED_WITHIN):
                await driver.close()
        await greenlet_spawn(connection.invalidate)
