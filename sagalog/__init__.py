"""A durable saga log for SQLAlchemy applications."""

from sagalog.errors import (
    InvalidTransition,
    KeyConflict,
    LeaseLost,
    LogUnavailable,
    NotASagaLog,
    PayloadError,
    SagaExists,
    SagaLogError,
    SagaNotFound,
    SchemaMissing,
    SchemaOutOfDate,
    SchemaTooNew,
    StepExists,
    StepNotFound,
    UnusableBind,
)
from sagalog.log.facade import AsyncSagaLog, SagaLog
from sagalog.models import Saga, SagaAudit, SagaExecutor, SagaStep
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

__all__ = [
    "AsyncSagaLog",
    "AuditRecord",
    "InvalidTransition",
    "KeyConflict",
    "LeaseLost",
    "LogUnavailable",
    "NotASagaLog",
    "PayloadError",
    "Saga",
    "SagaAudit",
    "SagaExecutor",
    "SagaExists",
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
    "StepNotFound",
    "StepRecord",
    "StepState",
    "UnresolvedSaga",
    "UnresolvedStep",
    "UnusableBind",
]
