"""What an operator may do by hand: audited, and, where it takes the saga from its executor, raising its epoch."""

from __future__ import annotations

from sagalog.errors import (
    InvalidTransition,
    LogUnavailable,
    PayloadError,
    SagaLogError,
    SagaNotFound,
    StepNotFound,
)
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.fencing import head_of
from sagalog.log.guarded import Decided, refused_by_saga, steps_in_the_way
from sagalog.log.statements import Statement, Statements
from sagalog.payload import check_saga_id, check_step, check_text, encode, printable
from sagalog.states import (
    CANCELLABLE,
    OUTSTANDING,
    SETTLED,
    STEP_SETTLED,
    UNRESOLVED,
    Actor,
    SagaState,
    StepState,
    saga_sources,
    step_sources,
)


def resolve(saga_id: int, state: str, *, note: str, actor: str) -> Operation[None]:
    """Settle a saga that needs a person.

    Args:
        saga_id: The saga, in `failed_compensation`.
        state: What it is now: "compensated", "completed" or "abandoned".
        note: Why; it stays in the audit.
        actor: Who says so.

    Raises:
        PayloadError: The state is none of these, or the note or the actor is empty.
        SagaNotFound: No such saga.
        InvalidTransition: The saga is in another state, or a step stands in the way:
            `compensated` needs every step undone, `completed` none in doubt.
    """
    asked = "resolve"
    check_saga_id(saga_id, asked)
    target = SagaState(_chosen(state, SETTLED, asked, saga_id))
    check_signed(note, actor, asked, saga_id)
    sources = saga_sources(target, Actor.OPERATOR)

    def run(db: Database) -> None:
        statement, values = db.sql.resolve(target), {"id_": saga_id, "at_": db.now()}
        guarded = target in OUTSTANDING
        if (db.write_locked(statement, values, asked) if guarded else db.write(statement, values)) == 1:
            before = SagaState.FAILED_COMPENSATION
            write_audit(db, asked, saga_id, None, note, actor, before, target)
            return
        rows = db.fetch(db.sql.saga_head, id_=saga_id)
        if not rows:
            raise SagaNotFound(asked, saga_id)
        found = rows[0][1]
        if found == target and _made_before(db, asked, saga_id, None, note, actor, target):
            return
        if found not in sources:
            raise InvalidTransition(
                asked,
                f"the saga is {found!r}, and only {' or '.join(sources)} can be settled by hand",
                saga_id=saga_id,
                found=found,
                hint="" if found in ("completed", "compensated", "abandoned") else "Recovery still owns it.",
            )
        refusal = steps_in_the_way(db, asked, saga_id, target, found)
        raise refusal or LogUnavailable(asked, "it changed meanwhile", saga_id=saga_id, hint="Repeat it.")

    return Call(asked, Kind.SEVERAL, run, saga_id)


def resolve_step(saga_id: int, step_index: int, state: str, *, note: str, actor: str) -> Operation[None]:
    """Say what became of a step that is in doubt, or that a succeeded one is undone.

    Args:
        saga_id: The saga: no process runs it, and it has not ended.
        step_index: The step's place in it, from 0.
        state: "succeeded", "failed" or "compensated".
        note: How it is known; it stays in the audit, and as the error of a failed step.
        actor: Who says so.

    Raises:
        PayloadError: The state is none of these, or the note or the actor is empty.
        SagaNotFound: No such saga.
        StepNotFound: No such step.
        InvalidTransition: The step may not become that, or its request may still be
            under way (before its `deadline_at`), or a process still runs the saga.
    """
    asked = "resolve_step"
    check_step(saga_id, step_index, asked)
    target = StepState(_chosen(state, STEP_SETTLED, asked, saga_id))
    check_signed(note, actor, asked, saga_id)
    output = encode({"error": note}, asked, saga_id, step_index) if target is StepState.FAILED else None

    def run(db: Database) -> None:
        if db.on_postgres:
            db.fetch(db.sql.lock_saga, id_=saga_id)  # before the step's, as its owner does
        rows = db.fetch(db.sql.step_row, id_=saga_id, index_=step_index)
        now = db.now()
        values = {"id_": saga_id, "index_": step_index, "output_": output, "at_": now}
        done = db.write(db.sql.resolve_step(target), values)
        if done == 1:
            db.write(db.sql.raise_epoch, {"id_": saga_id})
            write_audit(db, asked, saga_id, step_index, note, actor, rows[0][1], target)
            return
        head = db.fetch(db.sql.saga_head, id_=saga_id)
        if not head:
            raise SagaNotFound(asked, saga_id, step_index)
        if not rows:
            raise StepNotFound(asked, saga_id, step_index)
        found, deadline = rows[0][1], rows[0][4]
        if found == target and _made_before(db, asked, saga_id, step_index, note, actor, target):
            return
        if found not in step_sources(target):
            problem = f"the step is {found!r}, and only {' or '.join(step_sources(target))} can become {target}"
        elif found == StepState.PENDING and deadline is not None and deadline > now:
            problem = f"its request may still be under way for {deadline - now} ms"
        else:
            runs = head[0][1] in UNRESOLVED and head[0][7]
            problem = f"the saga is {head[0][1]!r}" + (f" and {head[0][7]} runs it" if runs else "")
        raise InvalidTransition(
            asked, problem, saga_id=saga_id, step_index=step_index, found=found, hint="get() shows the saga."
        )

    return Call(asked, Kind.SEVERAL, run, saga_id, step_index)


class _Cancel(Decided):
    __slots__ = ("_actor",)
    asked = "request_cancel"
    kind = Kind.WRITE

    def __init__(self, saga_id: int, reason: str, actor: str | None) -> None:
        super().__init__(saga_id, None, {"id_": saga_id, "reason_": reason})
        self._actor = actor

    def _statement(self, sql: Statements) -> Statement:
        return sql.request_cancel

    def _explain(self, db: Database) -> SagaLogError | None:
        saga_id, actor, reason = self.saga_id, self._actor, self._values["reason_"]
        head = head_of(db, self.asked, saga_id)
        audited = actor is None or _made_before(db, "cancel", saga_id, None, reason, actor)
        if head[5] == reason and audited:
            return None
        if head[5] is not None and head[1] in CANCELLABLE:
            other = "another reason" if head[5] != reason else "the same reason, by another actor"
            problem = f"it was asked to cancel already, for {other}"
            found = str(head[1])
            return InvalidTransition(self.asked, problem, saga_id=saga_id, found=found, hint="Nothing more is needed.")
        return refused_by_saga(db, self.asked, saga_id, None, CANCELLABLE)


def request_cancel(saga_id: int, reason: str, *, actor: str | None = None) -> Operation[None]:
    """Ask that a saga be undone. One that has not run yet ends at once, as `compensated`.

    Args:
        saga_id: The saga: submitted, running, compensating or failed.
        reason: Why. What a database cannot hold becomes U+FFFD.
        actor: The person who asks for it, for the audit; a program that cancels its own saga leaves it out.

    Raises:
        PayloadError: There is an actor, and the actor or the reason is empty.
        SagaNotFound: No such saga.
        InvalidTransition: It has ended, or was asked to cancel for another reason or by another actor.
    """
    asked = "request_cancel"
    check_saga_id(saga_id, asked)
    text = printable(reason)
    if actor is not None:
        check_signed(text, actor, asked, saga_id)

    cancel = _Cancel(saga_id, text, actor)
    if actor is None:
        return cancel
    signed = actor

    def run(db: Database) -> None:
        written = db.writes
        cancel.run(db)
        if db.writes > written:
            # The row is locked by the write: nobody moved it since.
            after = SagaState(str(head_of(db, asked, saga_id)[1]))
            before = SagaState.SUBMITTED if after is SagaState.COMPENSATED else after
            write_audit(db, "cancel", saga_id, None, text, signed, before, after)

    return Call(asked, Kind.SEVERAL, run, saga_id)


def _chosen(state: str, allowed: tuple[str, ...], asked: str, saga_id: int) -> str:
    if state in allowed:
        return str(state)
    raise PayloadError(
        f"{asked} of saga {saga_id}",
        f"{state!r} is nothing that it can be settled as",
        saga_id=saga_id,
        found=str(state),
        hint=f"One of {', '.join(allowed)}.",
    )


def check_signed(note: str, actor: str, asked: str, saga_id: int | None) -> None:
    """An action of an operator says why, and who."""
    check_text(note, "note", asked, saga_id)
    check_text(actor, "actor", asked, saga_id)


def write_audit(
    db: Database, action: str, saga_id: int, step_index: int | None, note: str, actor: str, before: str, after: str
) -> None:
    values = {
        "id_": saga_id,
        "index_": step_index,
        "action_": action,
        "actor_": actor,
        "note_": note,
        "at_": db.now(),
        "state_before_": str(before),
        "state_after_": str(after),
    }
    db.write(db.sql.write_audit, values)


def _made_before(
    db: Database, action: str, saga_id: int, step_index: int | None, note: str, actor: str, after: str | None = None
) -> bool:
    made = (saga_id, step_index, action, actor, note)
    return any(tuple(row[1:6]) == made and after in (None, row[8]) for row in db.fetch(db.sql.audit, id_=saga_id))
