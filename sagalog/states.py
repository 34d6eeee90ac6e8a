"""The states of sagas and steps, and every allowed move, as one table.

The guards inside the SQL statements, the messages, the tests and the
documentation's state diagram all read `SAGA_MOVES` and `STEP_MOVES`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple


class SagaState(StrEnum):
    """Where a saga is."""

    SUBMITTED = "submitted"
    RUNNING = "running"
    COMPENSATING = "compensating"
    COMPLETED = "completed"
    COMPENSATED = "compensated"
    FAILED = "failed"
    FAILED_COMPENSATION = "failed_compensation"
    ABANDONED = "abandoned"


class StepState(StrEnum):
    """Where a step is; `pending` without a running handler means in doubt."""

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    COMPENSATED = "compensated"


class Actor(StrEnum):
    """Who may make a move."""

    SAGA = "saga"
    RECOVERY = "recovery"
    RETRY = "an operator's retry"
    OPERATOR = "an operator, with a note"
    QUARANTINE = "an operator, of every open saga"


class Move(NamedTuple):
    """One allowed change of a saga's state."""

    source: SagaState
    target: SagaState
    by: Actor


_S = SagaState

SAGA_MOVES: Final[tuple[Move, ...]] = (
    Move(_S.SUBMITTED, _S.RUNNING, Actor.SAGA),
    Move(_S.SUBMITTED, _S.COMPENSATED, Actor.SAGA),
    Move(_S.SUBMITTED, _S.FAILED_COMPENSATION, Actor.QUARANTINE),
    Move(_S.RUNNING, _S.COMPLETED, Actor.SAGA),
    Move(_S.RUNNING, _S.COMPENSATING, Actor.SAGA),
    Move(_S.RUNNING, _S.COMPENSATED, Actor.SAGA),
    Move(_S.RUNNING, _S.FAILED, Actor.SAGA),
    Move(_S.RUNNING, _S.FAILED_COMPENSATION, Actor.SAGA),
    Move(_S.COMPENSATING, _S.COMPENSATED, Actor.SAGA),
    Move(_S.COMPENSATING, _S.FAILED, Actor.SAGA),
    Move(_S.COMPENSATING, _S.FAILED_COMPENSATION, Actor.SAGA),
    Move(_S.FAILED, _S.RUNNING, Actor.RECOVERY),
    Move(_S.FAILED, _S.COMPENSATING, Actor.RECOVERY),
    Move(_S.FAILED, _S.COMPENSATED, Actor.RECOVERY),
    Move(_S.FAILED, _S.FAILED_COMPENSATION, Actor.RECOVERY),
    Move(_S.FAILED_COMPENSATION, _S.RUNNING, Actor.RETRY),
    Move(_S.FAILED_COMPENSATION, _S.COMPENSATING, Actor.RETRY),
    Move(_S.FAILED_COMPENSATION, _S.COMPENSATED, Actor.OPERATOR),
    Move(_S.FAILED_COMPENSATION, _S.COMPLETED, Actor.OPERATOR),
    Move(_S.FAILED_COMPENSATION, _S.ABANDONED, Actor.OPERATOR),
)

STEP_MOVES: Final[tuple[tuple[StepState, StepState], ...]] = (
    (StepState.PENDING, StepState.SUCCEEDED),
    (StepState.PENDING, StepState.FAILED),
    (StepState.PENDING, StepState.COMPENSATED),
    (StepState.SUCCEEDED, StepState.COMPENSATED),
)

FINAL: Final = (_S.COMPLETED, _S.COMPENSATED, _S.ABANDONED)
"""Nothing leads out of these; `prune` may delete them."""

UNRESOLVED: Final = (_S.RUNNING, _S.COMPENSATING, _S.FAILED)
"""What `unresolved_sagas` lists: a coordinator, or recovery, owes these something."""

ATTENTION: Final = (_S.SUBMITTED, _S.FAILED_COMPENSATION, _S.ABANDONED)
"""What waits for a worker or a person, or was given up: an index of its own keeps these quick to find."""

OPEN_FOR_STEPS: Final = (_S.RUNNING, _S.COMPENSATING)
"""A step may be started in these."""

NOT_FINAL: Final = (_S.RUNNING, _S.COMPENSATING, _S.FAILED, _S.FAILED_COMPENSATION)
"""A step may be marked undone, or settled, in these."""

CANCELLABLE: Final = (_S.SUBMITTED, *UNRESOLVED)
"""A cancel may still be asked for in these."""

SETTLED: Final = tuple(move.target for move in SAGA_MOVES if move.by is Actor.OPERATOR)
"""As what an operator may settle a saga that needs a person."""

STEP_SETTLED: Final = (StepState.SUCCEEDED, StepState.FAILED, StepState.COMPENSATED)
"""As what an operator may settle a step."""

OUTSTANDING: Final[dict[SagaState, tuple[StepState, ...]]] = {
    _S.COMPLETED: (StepState.PENDING,),
    _S.COMPENSATED: (StepState.PENDING, StepState.SUCCEEDED),
}
"""A saga may not end in the key while a step is in one of the values."""


OWNER: Final = (Actor.SAGA, Actor.RECOVERY)
"""What whoever owns a saga may do with it."""


def saga_sources(target: SagaState, *by: Actor) -> tuple[SagaState, ...]:
    """The states from which `by` (all but an operator's settling, if none is named) may move to `target`."""
    actors = by or (Actor.SAGA, Actor.RECOVERY, Actor.RETRY)
    return tuple(move.source for move in SAGA_MOVES if move.target is target and move.by in actors)


def step_sources(target: StepState) -> tuple[StepState, ...]:
    """The states from which a step may move to `target`."""
    return tuple(source for source, to in STEP_MOVES if to is target)
