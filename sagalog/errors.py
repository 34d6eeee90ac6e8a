"""Every exception of sagalog, each building its own message.

A message says what was asked, what was found, that nothing was changed, and
what to do. The facts are attributes too, so that a program needs no parsing:
``code``, ``saga_id``, ``step_index``, ``found``, ``hint``. All of them pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def _rebuild(cls: type[SagaLogError], args: tuple[Any, ...], facts: dict[str, Any]) -> SagaLogError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


def where(saga_id: object, step_index: object = None) -> str:
    """Name a saga, or a step of it, for a message."""
    if saga_id is None:
        return "the saga log"
    return f"saga {saga_id}" if step_index is None else f"saga {saga_id}, step {step_index}"


class SagaLogError(Exception):
    """The root of everything that sagalog raises on purpose.

    Attributes:
        code: A short stable name of the kind of error.
        saga_id: The saga concerned, if there is one.
        step_index: The step concerned, if there is one.
        found: What was found in its place: a state, a revision, a type.
        hint: What to do about it.
    """

    code = "saga_log"

    def __init__(
        self,
        asked: str,
        problem: str,
        *,
        saga_id: int | None = None,
        step_index: int | None = None,
        found: str | None = None,
        hint: str = "",
        outcome: str = "Nothing was changed.",
    ) -> None:
        self.saga_id = saga_id
        self.step_index = step_index
        self.found = found
        self.hint = hint
        stop = "" if problem.endswith((".", "!", "?")) else "."
        super().__init__(" ".join(part for part in (f"{asked}: {problem}{stop}", outcome, hint) if part))

    @classmethod
    def in_hosts_revision(cls, step: str, problem: str, *, found: str, hint: str) -> SagaLogError:
        """This error, about a step inside a host's own Alembic revision."""
        error = cls.__new__(cls)
        SagaLogError.__init__(error, step, problem, found=found, hint=hint)
        return error

    def __reduce__(self) -> tuple[Callable[..., SagaLogError], tuple[Any, ...]]:
        return _rebuild, (type(self), self.args, self.__dict__)


class SagaExists(SagaLogError):
    """The saga_id is taken. ``identical`` says whether the row found is the one that was to be written."""

    code = "saga_exists"

    def __init__(self, saga_id: int, *, found: str, identical: bool) -> None:
        self.identical = identical
        same = "the same name and input" if identical else "another name or input"
        super().__init__(
            f"start_saga {saga_id}",
            f"the id is taken by a saga with {same}, now {found!r}",
            saga_id=saga_id,
            found=found,
            hint="Use create_saga() for an id from the database"
            + (
                ", or, if this call repeats one whose answer was lost, go on with the saga found." if identical else "."
            ),
        )


class SagaNotFound(SagaLogError):
    """There is no saga with that id."""

    code = "saga_not_found"

    def __init__(self, asked: str, saga_id: int, step_index: int | None = None) -> None:
        super().__init__(
            f"{asked} of {where(saga_id, step_index)}",
            "there is no such saga",
            saga_id=saga_id,
            step_index=step_index,
            hint="start_saga() or create_saga() comes first; a pruned saga is gone.",
        )


class StepExists(SagaLogError):
    """The step_index is taken. ``identical`` says whether the row found is the one that was to be written."""

    code = "step_exists"

    def __init__(self, asked: str, saga_id: int, step_index: int, *, found: str, identical: bool) -> None:
        self.identical = identical
        same = "the same content" if identical else "other content"
        super().__init__(
            f"{asked} of {where(saga_id, step_index)}",
            f"the index is taken by a step with {same}, now {found!r}",
            saga_id=saga_id,
            step_index=step_index,
            found=found,
            hint="Another coordinator may be running this saga; next_step_index() gives a free index."
            + (" If this call repeats one whose answer was lost, go on with the step found." if identical else ""),
        )


class StepNotFound(SagaLogError):
    """The saga has no step with that index."""

    code = "step_not_found"

    def __init__(self, asked: str, saga_id: int, step_index: int) -> None:
        super().__init__(
            f"{asked} of {where(saga_id, step_index)}",
            "the saga has no such step",
            saga_id=saga_id,
            step_index=step_index,
            hint="start_step() comes first.",
        )


class InvalidTransition(SagaLogError):
    """The saga or the step is in a state from which that move is not allowed."""

    code = "invalid_transition"

    def __init__(
        self, asked: str, problem: str, *, saga_id: int, found: str, step_index: int | None = None, hint: str = ""
    ) -> None:
        super().__init__(
            f"{asked} of {where(saga_id, step_index)}",
            problem,
            saga_id=saga_id,
            step_index=step_index,
            found=found,
            hint=hint,
        )


class KeyConflict(SagaLogError):
    """A saga of that name and idempotency key exists with another input."""

    code = "key_conflict"

    def __init__(self, name: str, saga_id: int, found: str) -> None:
        super().__init__(
            f"create_saga {name!r}",
            f"its key belongs to saga {saga_id}, which was started with another input and is {found!r}",
            saga_id=saga_id,
            found=found,
            hint="A key names one request: send the first input again, or use a new key.",
        )


class PayloadError(SagaLogError):
    """A value that JSON or the database cannot hold, or a stored one that cannot be read."""

    code = "payload"


class LeaseLost(SagaLogError):
    """Another executor or an operator owns the saga now: this one may not write to it any more."""

    code = "lease_lost"

    def __init__(self, asked: str, saga_id: int, *, epoch: int, found: int, step_index: int | None = None) -> None:
        super().__init__(
            f"{asked} of {where(saga_id, step_index)}",
            f"the saga was taken over (its epoch is {found}, this writer's is {epoch})",
            saga_id=saga_id,
            step_index=step_index,
            found=str(found),
            hint="Stop working on it; whoever took it over decides.",
        )


class SchemaMissing(SagaLogError):
    """The database has no saga log yet."""

    code = "schema_missing"

    def __init__(self, database: str) -> None:
        super().__init__(
            f"using the saga log in {database}",
            "its tables are not there",
            hint="Run `sagalog upgrade`, or sagalog.migrations.upgrade(engine), once in a deploy.",
        )


class SchemaOutOfDate(SagaLogError):
    """The database is older than this library."""

    code = "schema_out_of_date"

    def __init__(self, database: str, *, found: str, needed: str) -> None:
        super().__init__(
            f"using the saga log in {database}",
            f"it is at revision {found}, and this library needs {needed}",
            found=found,
            hint="Run `sagalog upgrade`, or sagalog.migrations.upgrade(engine), in the deploy.",
        )


class SchemaTooNew(SagaLogError):
    """The database was upgraded by a newer library, which says that this one cannot work on it."""

    code = "schema_too_new"

    def __init__(self, database: str, *, found: str, known: str) -> None:
        super().__init__(
            f"using the saga log in {database}",
            f"it is at revision {found}, and this library knows revisions up to {known}",
            found=found,
            hint="Update the sagalog package, or downgrade the database with the newer one.",
        )


class RevisionRefused(SagaLogError):
    """No revision file was written into a host's Alembic environment: nothing is new, or it would not fit."""

    code = "revision_refused"


class NotASagaLog(SagaLogError):
    """The file is no database, or its tables of that name are somebody else's."""

    code = "not_a_saga_log"

    @classmethod
    def of_strange_tables(cls, asked: str, strange: Sequence[str]) -> NotASagaLog:
        """For tables whose shape is not that of a saga log's."""
        problem = "they are not those of a saga log: " + "; ".join(strange[:5])
        hint = "Place sagalog's tables elsewhere with schema= or prefix=, or give it a file of its own."
        return cls(asked, problem, found=strange[0], hint=hint)


class LogUnavailable(SagaLogError):
    """The database could not do it now: locked, full, read-only, conflicting, or gone.

    The driver's error is the cause (``__cause__``). ``unknown`` is True where
    the write may have become durable all the same, as after a COMMIT whose
    answer was lost. A caller's transaction that met this can only be rolled back.
    """

    code = "log_unavailable"

    def __init__(
        self,
        asked: str,
        problem: str,
        *,
        saga_id: int | None = None,
        step_index: int | None = None,
        found: str | None = None,
        hint: str = "",
        unknown: bool = False,
    ) -> None:
        self.unknown = unknown
        super().__init__(
            asked,
            problem,
            saga_id=saga_id,
            step_index=step_index,
            found=found,
            hint=hint,
            outcome="It is not known whether it was written." if unknown else "Nothing was changed.",
        )


class UnusableBind(SagaLogError):
    """What SagaLog was given cannot carry its promises: no bind, an autocommit connection, a closed log."""

    code = "unusable_bind"


class UnusableHandler(SagaLogError):
    """A handler, compensation or saga cannot be registered or run so; told before anything is written."""

    code = "unusable_handler"

    def __init__(self, asked: str, problem: str, *, hint: str = "", found: str | None = None) -> None:
        super().__init__(asked, problem, hint=hint, found=found)


class StepRejected(Exception):
    """Raised by a handler: it did nothing, and says why. The step has failed, and there is nothing to undo."""


class StepFailed(SagaLogError):
    """A dispatched command did not succeed; the same on the first run and on a resume.

    Attributes:
        kind: "failed": it did nothing, and the saga may take another way. "in_doubt": it may have happened; the
            saga cannot go on, whatever is caught.
        reason: What the handler said.
        name: The command's name.
    """

    code = "step_failed"

    def __init__(self, kind: str, reason: str, *, saga_id: int, step_index: int, name: str) -> None:
        self.kind = kind
        self.reason = reason
        self.name = name
        what = "did nothing" if kind == "failed" else "may have happened"
        super().__init__(
            f"{name} of {where(saga_id, step_index)}",
            f"{what}: {reason}",
            saga_id=saga_id,
            step_index=step_index,
            found=kind,
            outcome="",
        )


class SagaFailed(SagaLogError):
    """A saga did not complete.

    Attributes:
        outcome: The saga's state: "compensated" (all undone), "failed" (recovery owns it), "failed_compensation" (a
            person is needed), or "abandoned".
        reason: Why it did not complete; what could not be undone.
        name: What kind of saga it is.
    """

    code = "saga_failed"

    def __init__(self, saga_id: int, name: str, outcome: str, reason: str | None) -> None:
        self.outcome = str(outcome)
        self.reason = reason
        self.name = name
        told = {
            "compensated": "everything that was done is undone",
            "failed": "it is not undone yet, and recovery owns it",
            "failed_compensation": "it is not wholly undone, and a person is needed",
        }
        super().__init__(
            f"{name} (saga {saga_id})",
            f"{reason or 'no reason was recorded'}",
            saga_id=saga_id,
            found=str(outcome),
            outcome=f"It is {str(outcome)!r}: {told.get(outcome, 'it is settled')}.",
        )

    @property
    def cause(self) -> BaseException | None:
        """What the saga's function raised, in the process in which it did; else None."""
        return self.__cause__


class SagaInProgress(SagaLogError):
    """A saga of that name and key was started, and has not ended."""

    code = "saga_in_progress"

    def __init__(self, saga_id: int, name: str, found: str) -> None:
        super().__init__(
            f"run of {name}",
            f"saga {saga_id} has that key and is {found!r}",
            saga_id=saga_id,
            found=found,
            hint="wait() returns its result; if its process died, recover() takes it over.",
        )


class WrongEnvironment(SagaLogError):
    """The log belongs to another environment: a copy of production must not act on the world."""

    code = "wrong_environment"

    def __init__(self, environment: str | None, found: str) -> None:
        super().__init__(
            "recover",
            f"the log belongs to the environment {found!r}, and this coordinator to {environment!r}",
            found=found,
            hint="If this is a copy, `quarantine` its open sagas first; else give the coordinator environment=.",
        )
