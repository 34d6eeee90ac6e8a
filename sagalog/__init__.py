"""A durable saga log for SQLAlchemy applications."""

from typing import TYPE_CHECKING

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
from sagalog.records import (
    AuditRecord,
    SagaOutcome,
    SagaRecord,
    SagaSnapshot,
    StepRecord,
    UnresolvedSaga,
    UnresolvedStep,
)
from sagalog.states import SagaState, StepState

if TYPE_CHECKING:
    from sagalog.coordinator.bus import CommandBus
    from sagalog.coordinator.commands import Command, Compensates, Retry, StepInfo
    from sagalog.coordinator.context import AsyncSagaContext, SagaContext
    from sagalog.coordinator.recover import Left, RecoveryReport
    from sagalog.coordinator.shells import AsyncSagaCoordinator, SagaCoordinator
    from sagalog.models import Saga, SagaAudit, SagaExecutor, SagaStep

__all__ = [
    "AsyncSagaContext",
    "AsyncSagaCoordinator",
    "AsyncSagaLog",
    "AuditRecord",
    "Command",
    "CommandBus",
    "Compensates",
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
    "WrongEnvironment",
]


_LATER = {
    "Saga": "models",
    "SagaAudit": "models",
    "SagaExecutor": "models",
    "SagaStep": "models",
    "AsyncSagaContext": "coordinator.context",
    "SagaContext": "coordinator.context",
    "AsyncSagaCoordinator": "coordinator.shells",
    "SagaCoordinator": "coordinator.shells",
    "CommandBus": "coordinator.bus",
    "Command": "coordinator.commands",
    "Compensates": "coordinator.commands",
    "Retry": "coordinator.commands",
    "StepInfo": "coordinator.commands",
    "Left": "coordinator.recover",
    "RecoveryReport": "coordinator.recover",
}


def __getattr__(name: str) -> object:
    # Loaded when first asked for: mapping the models alone costs more than importing the log.
    if name in _LATER:
        from importlib import import_module

        found: object = getattr(import_module(f"sagalog.{_LATER[name]}"), name)
        return found
    raise AttributeError(f"module 'sagalog' has no attribute {name!r}")
