"""What both coordinators share: their settings, and registering sagas."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from sagalog.coordinator.bus import CommandBus, OnUnknown
from sagalog.coordinator.definition import define
from sagalog.coordinator.effects import (
    Effect,
)
from sagalog.coordinator.lease import Executor
from sagalog.coordinator.recover import OnCrash
from sagalog.coordinator.run import Policy
from sagalog.coordinator.taking import TakingCore
from sagalog.coordinator.transacting import Transactions
from sagalog.errors import SagaLogError, UnusableBind, UnusableHandler
from sagalog.log.apart import apart_of, inner_bind
from sagalog.log.caller import CallerBind
from sagalog.log.facade import AsyncSagaLog, SagaLog
from sagalog.moments import is_seconds
from sagalog.payload import check_text

_log = logging.getLogger("sagalog")
F = TypeVar("F", bound=Callable[..., Any])


Interpose: TypeAlias = Callable[[Effect[Any], Callable[[Effect[Any]], Any]], Any]
"""What `sagalog.testing.crash_points` puts around every log transaction and every handler call."""


class Shell:
    """What the two coordinators share: settings, and registering sagas."""

    _asynchronous: bool

    def __init__(
        self,
        log: SagaLog | AsyncSagaLog,
        bus: CommandBus,
        *,
        lease: float,
        on_crash: OnCrash,
        on_unknown: OnUnknown,
        max_recoveries: int,
        environment: str | None,
        label: str | None,
    ) -> None:
        self._check(log, bus, lease, on_crash, on_unknown, max_recoveries)
        for what, text in (("environment", environment), ("label", label)):
            if text is not None:
                check_text(text, what, type(self).__name__)
        self.log = log
        self.bus = bus
        bind = log._bind
        self._transactions = Transactions(bind)
        executor = Executor(lease, label, lambda: apart_of(bind))
        self._core = TakingCore(
            Policy(bus, on_unknown, self._asynchronous, executor.holds),
            executor,
            on_crash=on_crash,
            max_recoveries=max_recoveries,
            environment=environment,
        )
        self.interpose: Interpose | None = None
        # The lease's thread would otherwise outlive a coordinator that nobody closed.
        weakref.finalize(self, executor.abandon).atexit = False

    def _check(self, log: Any, bus: Any, lease: float, on_crash: str, on_unknown: str, max_recoveries: int) -> None:
        asked = type(self).__name__
        wanted = AsyncSagaLog if self._asynchronous else SagaLog
        if not isinstance(log, wanted):
            raise UnusableBind(asked, f"the log is a {type(log).__name__}", hint=f"Give it a {wanted.__name__}.")
        if isinstance(inner_bind(log._bind), CallerBind):
            raise UnusableBind(
                asked,
                "the log is bound to a caller's transaction, with which its writes would be lost",
                hint="Give SagaLog the Engine. To start a saga inside a transaction: submit(..., session=session).",
            )
        for name, value, allowed in (
            ("on_crash", on_crash, ("compensate", "resume")),
            ("on_unknown", on_unknown, ("stop", "compensate")),
        ):
            if value not in allowed:
                raise UnusableHandler(asked, f"{name}={value!r}", hint=f"Use one of {', '.join(allowed)}.")
        if not isinstance(bus, CommandBus):
            raise UnusableHandler(asked, f"the bus is a {type(bus).__name__}", hint="Give it a CommandBus.")
        if not is_seconds(lease) or type(max_recoveries) is not int or max_recoveries < 0:
            problem = f"lease={lease!r}, max_recoveries={max_recoveries!r}"
            raise UnusableHandler(asked, problem, hint="A lease is seconds above 0, max_recoveries a number from 0.")

    @property
    def _placement(self) -> dict[str, Any]:
        """Where the log's tables are, for another bind to them."""
        return self._transactions.placement._asdict()

    @property
    def executor_id(self) -> str:
        """This process's identity in the log; another one after a fork, and after `close()`."""
        return self._core.executor.executor_id

    def saga(
        self, name: str, *, version: int = 1, timeout: float | None = None, resumes: tuple[int, ...] = ()
    ) -> Callable[[F], F]:
        """Register a saga's function, ``(ctx, input) -> result``.

        Args:
            name: The saga's name in the log.
            version: Recorded with each saga; raise it when the function dispatches otherwise than before.
            timeout: Seconds after which a saga is undone, unless it passed a pivot.
            resumes: Earlier versions whose sagas this function may go on with.

        Returns:
            A decorator that returns the function unchanged.

        Raises:
            UnusableHandler: The function does not fit, or the name is taken.
        """
        names = sys._getframe(1).f_locals
        if not isinstance(name, str):
            problem = f"its name is a {type(name).__name__}"
            raise UnusableHandler("saga", problem, hint='Give it a name in the log: @coordinator.saga("place_order").')

        def register(function: F) -> F:
            self._core.add(
                define(
                    function,
                    names,
                    name=name,
                    version=version,
                    timeout=timeout,
                    resumes=resumes,
                    asynchronous=self._asynchronous,
                )
            )
            return function

        return register


def lease_stays(error: SagaLogError) -> None:
    """A log that is closed, or out of reach, keeps the lease until it runs out by itself."""
    _log.info("the lease was not given up, and runs out: %s", error)
