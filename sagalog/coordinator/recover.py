"""Recovery: a saga whose process is gone is taken over, and undone, or gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from sagalog.coordinator.definition import Definition
from sagalog.coordinator.effects import Write
from sagalog.coordinator.run import Policy, Run, Step, known_state
from sagalog.coordinator.saga import Waits, execute
from sagalog.coordinator.unwind import NOT_UNDONE, End, Unknown, require_handlers, to_person, unwind
from sagalog.errors import PayloadError, SagaFailed, UnusableHandler
from sagalog.log import owning, reading
from sagalog.log.fencing import Fence
from sagalog.log.reading import Stored
from sagalog.states import FINAL, SagaState, StepState

OnCrash: TypeAlias = Literal["compensate", "resume"]


@dataclass(frozen=True)
class Left:
    """A saga that recovery left as it is.

    Attributes:
        saga_id: The saga.
        name: What kind of saga it is.
        reason: What it waits for.
        until: The moment (Unix milliseconds) before which nothing can be done, or None.
    """

    saga_id: int
    name: str
    reason: str
    until: int | None = None


@dataclass
class RecoveryReport:
    """What one call of `recover` did.

    Attributes:
        completed: The sagas that were finished.
        compensated: The sagas that were undone.
        failed_compensation: The sagas that need a person, with the reason.
        left: The sagas that were left as they are, and what each waits for.
        errors: The sagas at which something was raised; they stay unresolved, and the next recovery tries again.
    """

    completed: list[int] = field(default_factory=list)
    compensated: list[int] = field(default_factory=list)
    failed_compensation: dict[int, str] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def resolved(self) -> int:
        """How many sagas reached an end."""
        return len(self.completed) + len(self.compensated) + len(self.failed_compensation)

    def add(self, saga_id: int, name: str, end: End) -> None:
        """Note how one saga ended."""
        if end.waits is not None:
            self.left.append(Left(saga_id, name, end.waits, end.until))
        elif end.state is SagaState.COMPLETED:
            self.completed.append(saga_id)
        elif end.state is SagaState.COMPENSATED:
            self.compensated.append(saga_id)
        else:
            self.failed_compensation[saga_id] = end.reason


@dataclass(frozen=True, slots=True)
class Recovery:
    """What decides about sagas that were taken over.

    Attributes:
        policy: The coordinator's.
        definitions: The sagas that this process knows, by name.
        on_crash: "compensate" or "resume".
        max_recoveries: After so many take-overs a saga goes to a person.
        again: Whether an operator wants what is in doubt to be sent again, once, under its key.
    """

    policy: Policy
    definitions: Mapping[str, Definition]
    on_crash: OnCrash
    max_recoveries: int
    again: bool = False


async def finish_claimed(recovery: Recovery, fence: Fence, executor_id: str) -> End | None:
    """Bring a saga that was just claimed to an end.

    Args:
        recovery: What decides.
        fence: The claim.
        executor_id: Who claimed.

    Returns:
        How it ended, or what it waits for; None if it was taken over again meanwhile.
    """
    # After the claim, never before: what was read earlier may have changed under the old owner.
    record = await Write(reading.stored(fence.saga_id))
    if record.epoch != fence.epoch or record.state in FINAL:
        return None
    try:
        run = _run_of(recovery, record, fence)
    except PayloadError as error:
        unread = _run_of(recovery, record._replace(steps=[]), fence)
        return await to_person(unread, f"its rows cannot be read: {error}")
    end = await _resolved(recovery, run, record)
    if end.waits is not None:
        await Write(owning.release(fence, executor_id, counted=False))
    return end


def _run_of(recovery: Recovery, record: Stored, fence: Fence) -> Run:
    return Run(
        recovery.policy,
        recovery.definitions.get(record.name),
        fence,
        record.token or "",
        name=record.name,
        state=known_state(SagaState, record.state, record.saga_id),
        deadline_at=record.deadline_at,
        steps=[Step.of(record.saga_id, step) for step in record.steps],
        patient=False,
        again=recovery.again,
    )


async def _resolved(recovery: Recovery, run: Run, record: Stored) -> End:
    if record.recoveries > recovery.max_recoveries:
        return await to_person(run, f"it was taken over {record.recoveries} times and did not end")
    if may_resume(recovery, run, record):
        return await _resume(run, record)
    if run.reached_pivot and _pivot_is_done(run):
        return await to_person(run, _cannot_resume(run, record))
    return await unwind(run, _reason(record))


def forward_or_back(recovery: Recovery, record: Stored) -> SagaState:
    """Where an operator's retry leads: after a step that cannot be undone only forward, if no undo began."""
    run = _run_of(recovery, record, Fence(record.saga_id, record.epoch))
    return SagaState.RUNNING if run.reached_pivot and not run.undos else SagaState.COMPENSATING


def refuse_unknown(recovery: Recovery, record: Stored) -> None:
    """Before a saga is given back to the coordinator: it must know what is to be done.

    Raises:
        UnusableHandler: It has no handler for a command of the saga.
    """
    try:
        require_handlers(_run_of(recovery, record, Fence(record.saga_id, record.epoch)))
    except Unknown as unknown:
        raise UnusableHandler(
            f"retry of saga {record.saga_id}", str(unknown), hint="Use the application that has it."
        ) from None


def may_resume(recovery: Recovery, run: Run, record: Stored) -> bool:
    """Whether the saga's function runs again: it was running, no undo began, and this function may go on with it."""
    definition = run.definition
    if record.state != SagaState.RUNNING or definition is None or record.version not in definition.resumes:
        return False
    wanted = recovery.on_crash == "resume" and record.cancel_reason is None
    return (wanted or run.reached_pivot) and not run.undos


def _pivot_is_done(run: Run) -> bool:
    return any(step.state is StepState.SUCCEEDED for step in run.pivots())


def _cannot_resume(run: Run, record: Stored) -> str:
    if run.definition is not None and record.version not in run.definition.resumes:
        why_not = f"version {record.version} of it cannot be resumed by version {run.definition.version}"
    elif run.undos:
        why_not = "an undo was begun"
    else:
        why_not = f"it is {record.state}"
    return f"a step that cannot be undone succeeded, so it only goes forward, and {why_not}"


def _reason(record: Stored) -> str:
    if record.cancel_reason is not None:
        return f"it was asked to cancel: {record.cancel_reason}"
    reason = (record.failure_reason or "").partition(NOT_UNDONE)[0]
    return reason or "its process stopped before it ended"


async def _resume(run: Run, record: Stored) -> End:
    definition = run.definition
    assert definition is not None
    try:
        input = definition.read_input(record.input_json, run.saga_id)
    except PayloadError as error:
        return End(run.state, "", waits=f"its input cannot be read: {error}")
    run.begin_replay()
    try:
        await execute(run, definition, input)
    except Waits as waiting:
        return waiting.end
    except SagaFailed as failure:
        return End(SagaState(failure.outcome), failure.reason or "")
    return End(SagaState.COMPLETED, "")
