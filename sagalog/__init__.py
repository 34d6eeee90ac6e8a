"""A durable saga log for SQLAlchemy applications, and a coordinator that runs, undoes and recovers sagas over it.

Every name is loaded when it is first asked for: the command line, a test run's
plugin and a worker that only looks at errors pay for what they use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sagalog.coordinator.awaiting import AsyncSagaCoordinator
    from sagalog.coordinator.blocking import SagaCoordinator
    from sagalog.coordinator.bus import CommandBus
    from sagalog.coordinator.commands import Command, Compensates, Retry, StepInfo
    from sagalog.coordinator.context import AsyncSagaContext, SagaContext
    from sagalog.coordinator.recover import Left, RecoveryReport
    from sagalog.coordinator.worker import AsyncWorker, Worker
    from sagalog.errors import (
        InvalidTransition,
        KeyConflict,
        LeaseLost,
        LogUnavailable,
        NotASagaLog,
        PayloadError,
        RevisionRefused,
        SagaExists,
        SagaFailed,
        SagaInProgress,
        SagaLogError,
        SagaNotFound,
        SchemaMissing,
        SchemaOutOfDate,
        SchemaTooNew,
        StepExists,
        StepFailed,
        StepNotFound,
        StepRejected,
        UnusableBind,
        UnusableHandler,
        WrongEnvironment,
    )
    from sagalog.log.facade import AsyncSagaLog, SagaLog
    from sagalog.models import Saga, SagaAudit, SagaExecutor, SagaStep
    from sagalog.records import (
        AuditRecord,
        ExecutorRecord,
        SagaOutcome,
        SagaRecord,
        SagaSnapshot,
        StateCount,
        StepRecord,
        UnresolvedSaga,
        UnresolvedStep,
    )
    from sagalog.states import SagaState, StepState

__all__ = [
    "AsyncSagaContext",
    "AsyncSagaCoordinator",
    "AsyncSagaLog",
    "AsyncWorker",
    "AuditRecord",
    "Command",
    "CommandBus",
    "Compensates",
    "ExecutorRecord",
    "InvalidTransition",
    "KeyConflict",
    "LeaseLost",
    "Left",
    "LogUnavailable",
    "NotASagaLog",
    "PayloadError",
    "RecoveryReport",
    "Retry",
    "RevisionRefused",
    "Saga",
    "SagaAudit",
    "SagaContext",
    "SagaCoordinator",
    "SagaExecutor",
    "SagaExists",
    "SagaFailed",
    "SagaInProgress",
    "SagaLog",
    "SagaLogError",
    "SagaNotFound",
    "SagaOutcome",
    "SagaRecord",
    "SagaSnapshot",
    "SagaState",
    "SagaStep",
    "SchemaMissing",
    "SchemaOutOfDate",
    "SchemaTooNew",
    "StateCount",
    "StepExists",
    "StepFailed",
    "StepInfo",
    "StepNotFound",
    "StepRecord",
    "StepRejected",
    "StepState",
    "UnresolvedSaga",
    "UnresolvedStep",
    "UnusableBind",
    "UnusableHandler",
    "Worker",
    "WrongEnvironment",
]

_HOMES = {
    "sagalog.coordinator.bus": ("CommandBus",),
    "sagalog.coordinator.commands": (
        "Command",
        "Compensates",
        "Retry",
        "StepInfo",
    ),
    "sagalog.coordinator.context": (
        "AsyncSagaContext",
        "SagaContext",
    ),
    "sagalog.coordinator.recover": (
        "Left",
        "RecoveryReport",
    ),
    "sagalog.coordinator.awaiting": ("AsyncSagaCoordinator",),
    "sagalog.coordinator.blocking": ("SagaCoordinator",),
    "sagalog.coordinator.worker": ("AsyncWorker", "Worker"),
    "sagalog.log.facade": (
        "AsyncSagaLog",
        "SagaLog",
    ),
    "sagalog.models": (
        "Saga",
        "SagaAudit",
        "SagaExecutor",
        "SagaStep",
    ),
    "sagalog.records": (
        "AuditRecord",
        "ExecutorRecord",
        "SagaOutcome",
        "SagaRecord",
        "SagaSnapshot",
        "StateCount",
        "StepRecord",
        "UnresolvedSaga",
        "UnresolvedStep",
    ),
    "sagalog.states": (
        "SagaState",
        "StepState",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in __all__:
        value: object = getattr(import_module(_HOME_OF.get(name, "sagalog.errors")), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sagalog' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
