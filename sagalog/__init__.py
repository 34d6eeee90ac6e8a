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
    from sagalog.models import Saga, SagaAudit, SagaExecutor, SagaStep

__all__ = [
    "AsyncSagaLog",
    "AuditRecord",
    "InvalidTransition",
    "KeyConflict",
    "LeaseLost",
    "LogUnavailable",
    "NotASagaLog",
    "PayloadError",
    "RevisionRefused",
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


def __getattr__(name: str) -> object:
    # The models are mapped when first asked for: that costs more than importing all the rest.
    if name in ("Saga", "SagaAudit", "SagaExecutor", "SagaStep"):
        from sagalog import models

        return getattr(models, name)
    raise AttributeError(f"module 'sagalog' has no attribute {name!r}")
