"""`SagaCoordinator`: the shell that answers the core's effects in the caller's thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from sagalog.coordinator.bus import CommandBus, OnUnknown
from sagalog.coordinator.context import SagaContext
from sagalog.coordinator.effects import (
    Call,
    Effect,
    Invoke,
    Settled,
    Sleep,
    Together,
    Write,
    drive,
)
from sagalog.coordinator.recover import OnCrash, RecoveryReport
from sagalog.coordinator.saga import CallSaga
from sagalog.coordinator.shell import Shell, lease_stays
from sagalog.coordinator.worker import Worker
from sagalog.errors import SagaLogError
from sagalog.log import claiming
from sagalog.log.facade import SagaLog
from sagalog.log.fencing import Fence
from sagalog.moments import MOMENT
from sagalog.records import SagaRecord

if TYPE_CHECKING:
    from sagalog.log.facade import SyncTarget

Input = TypeVar("Input")
R = TypeVar("R")
_ENDS_OF_WRITES = 5.0
"""Seconds that an interrupted process gives what its threads still write."""


class SagaCoordinator(Shell):
    """Runs sagas over a bus and a log, undoes them on failure, and recovers what a crash left.

    Args:
        log: A `SagaLog` of its own or of an Engine.
        bus: The handlers and compensations.
        lease: Seconds after which the sagas of a process that died may be taken over.
        on_crash: "compensate" undoes what a dead process left; "resume" runs its function again, each step that the
            log holds answered from it.
        on_unknown: What becomes of a step that stays in doubt, where its handler does not say: "stop" leaves the saga
            to a person, "compensate" undoes the step as if it had happened.
        max_recoveries: A saga taken over more often goes to a person.
        environment: Remembered in the log; a coordinator of another one refuses to recover.
        label: What people see of this process; host and process id if none is given.

    Raises:
        UnusableBind: The log is bound to a caller's Session or Connection.
    """

    _asynchronous = False
    log: SagaLog

    def __init__(
        self,
        log: SagaLog,
        bus: CommandBus,
        *,
        lease: float = 30.0,
        on_crash: OnCrash = "compensate",
        on_unknown: OnUnknown = "stop",
        max_recoveries: int = 10,
        environment: str | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(
            log,
            bus,
            lease=lease,
            on_crash=on_crash,
            on_unknown=on_unknown,
            max_recoveries=max_recoveries,
            environment=environment,
            label=label,
        )

    @overload
    def run(self, saga: Callable[[SagaContext, Input], R], input: Input, /, *, key: str | None = None) -> R: ...

    @overload
    def run(self, saga: Callable[[SagaContext], R], /, *, key: str | None = None) -> R: ...

    @overload
    def run(self, saga: str, /, *input: Any, key: str | None = None) -> Any: ...

    def run(self, saga: Callable[..., Any] | str, /, *input: Any, key: str | None = None) -> Any:
        """Run a saga to its end.

        Args:
            saga: The registered function, or its name.
            input: Its input, if it takes one.
            key: The start's idempotency key: the same (name, key) never runs twice.

        Returns:
            What the function returned; with a key that completed before, the recorded result.

        Raises:
            SagaFailed: It did not complete; with the outcome, from the cause.
            SagaInProgress: A saga of that key has not ended.
            KeyConflict: The key was used with another input.
            LeaseLost: Another process took it over meanwhile.
            LogUnavailable: The log is out of reach; what was begun is left to recovery.
        """
        definition = self._core.definition_of(saga)
        return drive(self._core.run(definition, definition.input_of(input), key), self._perform)

    def submit(
        self,
        saga: Callable[..., Any] | str,
        input: Any = None,
        *,
        key: str | None = None,
        session: SyncTarget | None = None,
        run_at: datetime | None = None,
    ) -> int:
        """Start a saga that a worker will run, inside the caller's own transaction.

        Args:
            saga: The registered function, or its name.
            input: Its input.
            key: The start's idempotency key.
            session: The Session or Connection whose transaction it joins: rolled back with it, and run once it is
                committed. It has to be on the database of the coordinator's log. Without one it is durable when this
                returns.
            run_at: An aware datetime before which it is not started.

        Returns:
            The saga's id; with a key that was used before, that saga's.

        Raises:
            KeyConflict: The key was used with another input.
        """
        definition = self._core.definition_of(saga)
        if session is None:
            return drive(self._core.submit(definition, input, key, run_at), self._perform)
        log = SagaLog(session, **self._placement)
        return log._bind.perform(self._core.submission(definition, input, key, run_at)).saga_id

    def wait(self, saga_id: int, *, timeout: float | None = None) -> Any:
        """Wait for the result of a saga, whoever runs it.

        Args:
            saga_id: The saga.
            timeout: Seconds; None waits for ever.

        Raises:
            SagaFailed: It did not complete.
            TimeoutError: It has not ended in time.
        """
        return drive(self._core.wait(saga_id, timeout), self._perform)

    def recover(self, *, limit: int | None = None, adopt: bool = False) -> RecoveryReport:
        """Take over the sagas whose process is gone, and bring each to an end.

        Args:
            limit: At most so many are brought to an end; None for all. What is left as it is does not count.
            adopt: Take also sagas that never belonged to a coordinator.

        Returns:
            What became of each, and what those that were left wait for.

        Raises:
            WrongEnvironment: The log belongs to another environment.
        """
        return drive(self._core.recover(limit, adopt=adopt), self._perform)

    def retry(self, saga_id: int, *, note: str, actor: str, again: bool = False) -> SagaRecord:
        """Give a saga that needs a person back, and bring it to an end here; audited.

        After a step that cannot be undone it goes forward, otherwise it is undone.

        Args:
            saga_id: The saga, in failed_compensation.
            note: Why.
            actor: Who says so.
            again: Send a step in doubt again, once, under its key; without, a step in doubt is refused.

        Returns:
            The saga as it is now.

        Raises:
            InvalidTransition: It is in another state, or a step is in doubt.
        """
        record: SagaRecord = drive(self._core.retry(saga_id, note=note, actor=actor, again=again), self._perform)
        return record

    def worker(self, *, concurrency: int = 8, poll: float = 1.0) -> Worker:
        """A worker that runs submitted sagas, recovers, and keeps the lease, until it is shut down.

        ``with coordinator.worker():`` or its `start()` and `shutdown(grace=10.0)`.

        Args:
            concurrency: At most so many sagas at a time.
            poll: Seconds between looks for work where nothing tells of it.
        """
        return Worker(self, concurrency, poll)

    def close(self) -> None:
        """Give up the lease; the log stays open, and what is run later takes a new one.

        Calling it again does nothing.
        """
        executor = self._core.executor
        for retired in executor.retirement():
            try:
                self.log._bind.perform(claiming.retire(retired))
                executor.is_gone(retired)
            except SagaLogError as error:
                lease_stays(error)

    def __enter__(self) -> SagaCoordinator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Effects

    def _perform(self, effect: Effect[Any]) -> Any:
        interpose = self.interpose
        if interpose is None or not isinstance(effect, Write | Invoke):
            return self._answer(effect)
        return interpose(effect, self._answer)

    def _answer(self, effect: Effect[Any]) -> Any:
        if isinstance(effect, Write):
            return self.log._bind.perform(effect.operation)
        if isinstance(effect, Invoke):
            return self._invoke(effect)
        if isinstance(effect, CallSaga):
            return effect.call(SagaContext(effect.run, self._perform))
        if isinstance(effect, Sleep):
            return time.sleep(effect.seconds)
        if isinstance(effect, Call):
            return effect.function(*effect.args)
        assert isinstance(effect, Together)
        return self._together(effect)

    def _invoke(self, effect: Invoke[Any]) -> Any:
        handler, owed = effect.handler, self._core.executor.owed  # a forked child has another one
        ticket = owed.watch(effect.fence, effect.info.step_index, effect.info.seconds, handler.settle)
        try:
            if handler.transactional:
                return self._transactions.perform(effect)
            return handler.function(*effect.arguments(None))
        finally:
            owed.unwatch(ticket)

    def _together(self, effect: Together[Any]) -> list[Settled[Any]]:
        ends: list[Settled[Any]] = [Settled(None, None)] * len(effect.flows)

        running: set[int] = set()

        def run(place: int, flow: Any) -> None:
            running.add(place)
            try:
                ends[place] = Settled(drive(flow, self._perform), None)
            except BaseException as error:
                ends[place] = Settled(None, error)
            finally:
                running.discard(place)

        threads: list[threading.Thread] = []
        try:
            for place, flow in enumerate(effect.flows):
                work = (run, place, flow)
                name = f"sagalog-dispatch-{place}"
                thread = threading.Thread(target=copy_context().run, args=work, name=name, daemon=True)
                threads.append(thread)
                try:
                    thread.start()
                except RuntimeError:  # the process may have no more threads now
                    run(place, flow)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        except BaseException:
            effect.interrupted()
            effect.close_unbegun()
            self._wait_for(running, effect.fence)
            raise
        return ends

    def _wait_for(self, running: set[int], fence: Fence) -> None:
        """Before a signal's exception goes on: what is running is not undone meanwhile.

        Not longer than the handlers may take, for the saga is given up then, and than a write does on a log that
        answers. Further signals are not told. The threads are not asked: after an interrupted `join`, CPython takes a
        living one for dead.
        """
        executor, over, until = self._core.executor, False, 0.0
        while not over:
            with suppress(BaseException):
                now = time.monotonic()
                if until == 0.0 or executor.owed.is_watching(fence):
                    until = now + _ENDS_OF_WRITES
                over = not executor.holds(fence) or not running or now > until
                time.sleep(0 if over else MOMENT)
