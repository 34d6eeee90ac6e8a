"""What a saga's function is given: the door through which it does, undoes and remembers."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar, overload

from sagalog.coordinator import dispatching as flows
from sagalog.coordinator.by_hand import compensate
from sagalog.coordinator.commands import Command
from sagalog.coordinator.effects import Effect, Perform, adrive, drive
from sagalog.coordinator.run import Run

E = TypeVar("E")
T = TypeVar("T")


class SagaContext:
    """A running saga, for its synchronous function."""

    def __init__(self, run: Run, perform: Perform) -> None:
        self._run = run
        self._perform = perform

    @property
    def saga_id(self) -> int:
        """The saga's id."""
        return self._run.saga_id

    @overload
    def dispatch(self, cmd: Command[E]) -> E: ...

    @overload
    def dispatch(self, cmd: object) -> Any: ...

    def dispatch(self, cmd: Any) -> Any:
        """Do a command as the saga's next step; that it succeeded is durable when this returns.

        Args:
            cmd: The command; its handler and how it is undone are registered on the bus.

        Returns:
            What its handler returned.

        Raises:
            StepFailed: It did nothing, or is in doubt; see `kind`.
            UnusableHandler: Nothing takes it, or nothing says how it is undone; nothing was written.
            LeaseLost: Another process took the saga over; stop.
        """
        return drive(flows.dispatch(self._run, cmd), self._perform)

    def dispatch_all(self, commands: Sequence[Any]) -> list[Any]:
        """Do commands side by side, each a step, in list order.

        Returns:
            What their handlers returned, in the same order; all are awaited before anything is raised.

        Raises:
            StepFailed: The first in the list that did not succeed.
        """
        return drive(flows.dispatch_all(self._run, commands), self._perform)

    def compensate(self, cmd: Any, undoes: Sequence[Any] | None = None) -> Any:
        """Undo by hand; what is undone so is not undone again.

        Args:
            cmd: The command that undoes.
            undoes: The dispatched commands that it undoes; the newest that is not undone, if none are named.

        Returns:
            What its handler returned.

        Raises:
            StepFailed: It was refused, or stays in doubt.
            UnusableHandler: There is nothing of that kind to undo; nothing was written.
        """
        return drive(compensate(self._run, cmd, undoes), self._perform)

    def now(self) -> datetime:
        """The moment, aware and in UTC; the same on a resume."""
        return drive(flows.now(self._run), self._perform)

    def uuid(self) -> uuid.UUID:
        """A random UUID; the same on a resume."""
        return flows.new_uuid(self._run)

    def record(self, name: str, function: Callable[[], T]) -> T:
        """What a function returns, as a JSON value; once it returned, it is not called again on a resume.

        Args:
            name: What it is, for the log.
            function: Called without arguments. It must have no effects: there is nothing that undoes it.
        """
        value: T = drive(flows.record(self._run, name, function), self._perform)
        return value


class AsyncSagaContext:
    """The same, for an async function."""

    def __init__(self, run: Run, perform: Callable[[Effect[Any]], Awaitable[Any]]) -> None:
        self._run = run
        self._perform = perform

    @property
    def saga_id(self) -> int:
        """The saga's id."""
        return self._run.saga_id

    @overload
    async def dispatch(self, cmd: Command[E]) -> E: ...

    @overload
    async def dispatch(self, cmd: object) -> Any: ...

    async def dispatch(self, cmd: Any) -> Any:
        """See `SagaContext.dispatch`."""
        return await adrive(flows.dispatch(self._run, cmd), self._perform)

    async def dispatch_all(self, commands: Sequence[Any]) -> list[Any]:
        """See `SagaContext.dispatch_all`."""
        return await adrive(flows.dispatch_all(self._run, commands), self._perform)

    async def compensate(self, cmd: Any, undoes: Sequence[Any] | None = None) -> Any:
        """See `SagaContext.compensate`."""
        return await adrive(compensate(self._run, cmd, undoes), self._perform)

    async def now(self) -> datetime:
        """See `SagaContext.now`."""
        return await adrive(flows.now(self._run), self._perform)

    def uuid(self) -> uuid.UUID:
        """See `SagaContext.uuid`."""
        return flows.new_uuid(self._run)

    @overload
    async def record(self, name: str, function: Callable[[], Awaitable[T]]) -> T: ...

    @overload
    async def record(self, name: str, function: Callable[[], T]) -> T: ...

    async def record(self, name: str, function: Callable[[], Any]) -> Any:
        """See `SagaContext.record`; the function may be async."""
        return await adrive(flows.record(self._run, name, function), self._perform)
