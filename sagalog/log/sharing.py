"""Tasks that write through one AsyncEngine on psycopg share transactions, as the callers of a file do.

The first that come go alone. Those that come meanwhile are carried together:
their first statements in one transaction and one round trip. An operation that
has something to look up then asks in the next one, for in autocommit, too, each
statement is a transaction.

Whoever waits for a lock would hold up all the others: what is not done at once
is undone, and each is run alone. The statements stand in the order of their
sagas, so that two processes do not wait for each other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextvars import Context
from functools import cache
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from greenlet import getcurrent, greenlet
from sqlalchemy import Engine, PoolProxiedConnection
from sqlalchemy.engine import Dialect
from sqlalchemy.util import await_only, greenlet_spawn

from sagalog.errors import LogUnavailable
from sagalog.log.asynchronous import AsyncBind, GreenletBind, Waiting, decided
from sagalog.log.bind import Bind
from sagalog.log.database import BEGIN, Operation, PostgresCursorDatabase, Rows
from sagalog.log.engine import EngineBind
from sagalog.log.faults import was_sent
from sagalog.log.statements import Statement, Statements

R = TypeVar("R")
_LARGEST_BATCH = 256

Asked: TypeAlias = tuple[tuple[str, Any], ...]
"""Statements with their values; the answer is the last one's."""


def awaited(bind: Bind) -> AsyncBind:
    """The async face of a bind."""
    return SharingBind(bind) if isinstance(bind, EngineBind) and _shares(bind.engine) else GreenletBind(bind)


def _shares(engine: Engine) -> bool:
    dialect = engine.dialect
    if not dialect.is_async or dialect.driver != "psycopg":
        return False
    dbapi: Any = dialect.loaded_dbapi
    return bool(dbapi.Pipeline.is_supported())  # by a libpq older than 14


class _Carried(Waiting):
    """A task's write that is carried with others.

    Attributes:
        operation: What is to be written.
        alone: It was not carried: the task is to run it.
        lost: How the connection broke on which it may have been written.
    """

    __slots__ = ("alone", "lost", "operation")

    def __init__(self, operation: Operation[Any], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(operation, loop)
        self.operation = operation
        self.alone = False
        self.lost: Exception | None = None

    def leave(self, lost: Exception | None) -> None:
        """Let the task run it alone."""
        self.alone, self.lost = True, lost
        self.tell()


class _Queue:
    """One event loop's writes."""

    __slots__ = ("alone", "leader", "waiting")

    def __init__(self) -> None:
        self.alone = 0
        self.leader: asyncio.Task[None] | None = None
        self.waiting: deque[_Carried] = deque()


class SharingBind(GreenletBind):
    """An AsyncEngine on psycopg.

    Args:
        bind: Over its sync counterpart.
        alone: So many writes go alone at the same time, for one that is carried waits for those before it.
    """

    _bind: EngineBind

    def __init__(self, bind: EngineBind, *, alone: int = 2) -> None:
        super().__init__(bind)
        self._alone = alone
        self._queues: WeakKeyDictionary[asyncio.AbstractEventLoop, _Queue] = WeakKeyDictionary()

    async def perform(self, operation: Operation[R]) -> R:
        """See `AsyncBind`."""
        kind = operation.kind
        if kind.reads or kind.several or not self._bind.ready:
            return await super().perform(operation)
        loop = asyncio.get_running_loop()
        queue = self._queues.get(loop)
        if queue is None:
            queue = self._queues[loop] = _Queue()
        if queue.leader is None and queue.alone < self._alone:
            queue.alone += 1
            try:
                return await super().perform(operation)
            finally:
                queue.alone -= 1
        waiting = _Carried(operation, loop)
        queue.waiting.append(waiting)
        if queue.leader is None:
            # In no task's context: a hook of the host's at its connections would take all writes for that task's.
            queue.leader = loop.create_task(self._lead(queue), name="sagalog-writer", context=Context())
        await waiting.decision()
        if waiting.alone:
            return await decided(greenlet_spawn(self._bind.perform, operation, waiting.lost))
        value: R = waiting.ticket.outcome()
        return value

    async def _lead(self, queue: _Queue) -> None:
        batch: list[_Carried] = []
        try:
            while queue.waiting:
                batch = [queue.waiting.popleft() for _ in range(min(len(queue.waiting), _LARGEST_BATCH))]
                lost = None
                try:
                    await greenlet_spawn(self._bind.on_connection, self._carry, batch)
                except Exception as error:
                    lost = error if was_sent(error) else None
                for waiting in batch:
                    if not waiting.decided:
                        waiting.leave(lost)
                await asyncio.sleep(0)  # those whose writes this one carried come with their next
        finally:
            queue.leader = None
            for waiting in batch:
                if not waiting.decided:
                    waiting.ticket.error = LogUnavailable(
                        waiting.operation.asked,
                        "the task that wrote for it was cancelled",
                        saga_id=waiting.operation.saga_id,
                        step_index=waiting.operation.step_index,
                        hint="Repeat it.",
                        unknown=True,
                    )
                    waiting.tell()
            while queue.waiting:
                queue.waiting.popleft().leave(None)

    def _carry(self, connected: PoolProxiedConnection, driver: Any, batch: list[_Carried]) -> None:
        hub = getcurrent()
        engine = self._bind.engine
        asking: list[_Asking] = []
        try:
            for operation, waiting in sorted(((each.operation, each) for each in batch), key=_saga_of):
                _Asking(waiting, hub, self._bind.sql, engine.dialect).go_on(operation, asking)
            while asking:
                answers = await_only(_in_one_transaction(connected.driver_connection, [each.asked for each in asking]))
                if answers is None:
                    return
                asked, asking = asking, []
                for each, answer in zip(asked, answers, strict=True):
                    each.go_on(answer, asking)
        finally:
            for each in asking:
                each.give_up()


def _saga_of(carried: tuple[Operation[Any], _Carried]) -> int:
    return carried[0].saga_id or 0


class _Answer:
    """What a statement gave, as a cursor has it."""

    __slots__ = ("_rows", "rowcount")

    def __init__(self, rowcount: int, rows: Rows) -> None:
        self.rowcount = rowcount
        self._rows = rows

    def fetchall(self) -> Rows:
        return self._rows


class _Asking:
    """An operation that stops at each statement, until the answer is there.

    Attributes:
        asked: What it waits for.
    """

    asked: Asked

    def __init__(self, waiting: _Carried, hub: Any, sql: Statements, dialect: Dialect) -> None:
        self._waiting = waiting
        self._database = _AskedDatabase(hub, sql, dialect)
        self._stack = greenlet(self._run, hub)

    def _run(self, operation: Operation[Any]) -> None:
        ticket = self._waiting.ticket
        try:
            ticket.value = operation.run(self._database)
        except Exception as error:
            ticket.error = error
        self._waiting.tell()

    def go_on(self, given: Any, asking: list[_Asking]) -> None:
        """Run to the next statement, if there is one.

        Args:
            given: The answer; at the beginning, the operation.
            asking: Where it waits then.
        """
        asked = self._stack.switch(given)
        if not self._stack.dead:
            self.asked = asked
            asking.append(self)

    def give_up(self) -> None:
        """Nobody answers."""
        self._stack.throw()


class _AskedDatabase(PostgresCursorDatabase):
    """Asks the hub for each statement's answer."""

    def __init__(self, hub: greenlet, sql: Statements, dialect: Dialect) -> None:
        super().__init__(None, sql, dialect)
        self._hub = hub

    def _send(self, statement: Statement, values: dict[str, Any]) -> None:
        self._cursor = self._hub.switch((self._ready(statement, values),))

    def write_locked(self, statement: Statement, values: dict[str, Any], asked: str) -> int:
        """See `Database`."""
        self._cursor = self._hub.switch((self._ready(self.sql.lock_saga, values), self._ready(statement, values)))
        return self._changed()

    def write_unless_locked(self, statement: Statement, values: dict[str, Any]) -> int:
        """See `Database`; what is carried waits for no lock that long."""
        return self.write(statement, values)

    def fetch_unless_locked(self, statement: Statement, values: dict[str, Any]) -> Rows:
        """See `Database`; see `write_unless_locked`."""
        return self.fetch(statement, **values)

    def _ready(self, statement: Statement, values: dict[str, Any]) -> tuple[str, Any]:
        text, order = statement.ready(self._dialect)
        return text, order(values)


async def _in_one_transaction(connection: Any, asked: list[Asked]) -> list[_Answer] | None:
    """Send all and commit, in one round trip.

    Returns:
        None if it was rolled back.
    """
    answering = []
    try:
        async with connection.pipeline():
            await connection.execute(BEGIN)
            await connection.execute(_limits(killed=connection.info.server_version >= 170_000))
            for statements in asked:
                for text, values in statements:
                    cursor = connection.cursor()
                    await cursor.execute(text, values)
                answering.append(cursor)
            await connection.execute("COMMIT")
    except Exception:
        if connection.closed:
            raise
        await connection.execute("ROLLBACK")
        return None
    return [_Answer(cursor.rowcount, await cursor.fetchall() if cursor.description else ()) for cursor in answering]


@cache
def _limits(*, killed: bool) -> str:
    """What ends a transaction that does not come to its end: it holds the rows of many sagas.

    A lock that another one holds for longer than this, in milliseconds. A host that is gone, in seconds: its death in
    the middle of a sending would go unseen for hours. A process that stands still in the middle of it, in milliseconds,
    where the server knows such a limit.
    """
    limits = {"lock_timeout": 100, "tcp_keepalives_idle": 10, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 3}
    if killed:
        limits["transaction_timeout"] = 5000
    return "SELECT " + ", ".join(f"set_config('{name}', '{value}', true)" for name, value in limits.items())
