"""A durable saga log for SQLAlchemy applications.

Every name is loaded when it is first asked for: the command line, a test run's
plugin and a worker that only looks at errors pay for what they use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    "AsyncSagaLog",
    "AuditRecord",
    "ExecutorRecord",
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
    "StateCount",
    "StepExists",
    "StepNotFound",
    "StepRecord",
    "StepState",
    "UnresolvedSaga",
    "UnresolvedStep",
    "UnusableBind",
]

_HOMES = {
    "sagalog.log.facade": ("AsyncSagaLog", "SagaLog"),
    "sagalog.models": ("Saga", "SagaAudit", "SagaExecutor", "SagaStep"),
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
    "sagalog.states": ("SagaState", "StepState"),
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
