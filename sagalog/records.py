"""What the log hands out: frozen Pydantic models with the fields of the schema.

Stored text stays text (`input_json`, `cmd_json`, `output_json`) and is read
when asked for, so that one row with broken JSON never hides the others.
"""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from sagalog.payload import JsonValue, decode, decode_as

T = TypeVar("T")


class _Record(BaseModel):
    # Built when first validated: building all of them would double what importing sagalog costs.
    model_config = ConfigDict(frozen=True, defer_build=True)


class SagaOutcome(_Record):
    """How a saga ends; made by `completed()`, `failed(reason)`, `compensated(reason)`."""

    state: Literal["completed", "failed", "compensated"]
    reason: str | None = None

    @classmethod
    @cache
    def completed(cls) -> SagaOutcome:
        """Everything was done."""
        return cls(state="completed")

    @classmethod
    def failed(cls, reason: str) -> SagaOutcome:
        """It failed and was not undone, or not wholly: recovery owns it."""
        return cls(state="failed", reason=reason)

    @classmethod
    def compensated(cls, reason: str) -> SagaOutcome:
        """Everything that was done is undone."""
        return cls(state="compensated", reason=reason)


class StepRecord(_Record):
    """One row of `saga_step`. `output` is None while there is none."""

    saga_id: int
    step_index: int
    name: str
    state: str
    cmd_json: str
    output_json: str | None = None
    started_at: datetime
    ended_at: datetime | None = None
    compensated_by: int | None = None
    error: str | None = None
    deadline_at: datetime | None = None

    @property
    def cmd(self) -> JsonValue:
        """The command as a plain JSON value."""
        return decode(self.cmd_json, "cmd_json", self.saga_id, self.step_index)

    @property
    def output(self) -> JsonValue:
        """The events, or an object with the reason under `error`, as a plain JSON value."""
        return decode(self.output_json, "output_json", self.saga_id, self.step_index)

    def decode_cmd(self, kind: type[T]) -> T:
        """The command as `kind`; `PayloadError` if it does not fit."""
        return decode_as(kind, self.cmd_json, "cmd_json", self.saga_id, self.step_index)

    def decode_output(self, kind: type[T]) -> T:
        """The output as `kind`; `PayloadError` if it does not fit."""
        return decode_as(kind, self.output_json, "output_json", self.saga_id, self.step_index)


class _SagaFields(_Record):
    saga_id: int
    name: str
    state: str
    started_at: datetime
    terminal_at: datetime | None = None
    failure_reason: str | None = None
    key: str | None = None
    version: int | None = None
    executor_id: str | None = None
    epoch: int = 0
    run_at: datetime | None = None
    deadline_at: datetime | None = None
    cancel_reason: str | None = None
    recoveries: int = 0


class SagaSnapshot(_SagaFields):
    """A line of a listing: a saga without its payloads. `step_count` counts succeeded and compensated steps."""

    step_count: int = 0


class SagaRecord(_SagaFields):
    """Every column of a saga, and its steps by step_index."""

    input_json: str
    token: str | None = None
    result_json: str | None = None
    trace_context: str | None = None
    steps: tuple[StepRecord, ...] = ()

    @property
    def input(self) -> JsonValue:
        """The input as a plain JSON value."""
        return decode(self.input_json, "input_json", self.saga_id)

    @property
    def result(self) -> JsonValue:
        """What the saga's function returned, as a plain JSON value."""
        return decode(self.result_json, "result_json", self.saga_id)

    def decode(self, kind: type[T]) -> T:
        """The input as `kind`; `PayloadError` if it does not fit."""
        return decode_as(kind, self.input_json, "input_json", self.saga_id)


class UnresolvedStep(StepRecord):
    """A step of an unresolved saga."""


class UnresolvedSaga(SagaRecord):
    """A saga that somebody owes something: running, compensating or failed; with its steps."""

    steps: tuple[UnresolvedStep, ...] = ()


class AuditRecord(_Record):
    """What an operator did, when, and why."""

    audit_id: int
    saga_id: int
    step_index: int | None = None
    action: str
    actor: str
    note: str
    at: datetime
    state_before: str | None = None
    state_after: str | None = None


class StateCount(_Record):
    """How many sagas are in a state, and when the oldest of them started."""

    state: str
    count: int
    oldest_started_at: datetime


class ExecutorRecord(_Record):
    """A process that runs sagas. Its lease counts by the clock that said `read_at`."""

    executor_id: str
    label: str | None = None
    started_at: datetime
    lease_until: datetime
    open_sagas: int = 0
    read_at: datetime

    @property
    def is_alive(self) -> bool:
        """Whether its lease held when this was read."""
        return self.lease_until > self.read_at


def build(kind: type[Any], fields: dict[str, Any]) -> Any:
    """A record from stored values, unvalidated: a row with an unknown state is served, not hidden."""
    return kind.model_construct(**fields)
