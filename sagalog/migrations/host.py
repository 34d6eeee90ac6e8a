"""A step of sagalog's inside a revision of the host's own.

The host's `upgrade()` calls ``sagalog.migrations.upgrade(op, from_=..., to=...)``
and its `downgrade()` the way back. The step runs on the host's connection, in
the host's transaction, or prints SQL where the host prints its own. Both ends
are named, so that the host's revision does the same for ever, whichever
version of the library runs it.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from alembic.operations import AbstractOperations
from sqlalchemy import Connection

from sagalog.errors import NotASagaLog, SagaLogError, SchemaMissing, SchemaOutOfDate, SchemaTooNew
from sagalog.log.bind import name_of
from sagalog.migrations.environment import Way, adopt, commits_by_itself, found_in, joined, print_sql, run, told
from sagalog.placement import Placement
from sagalog.schema import REVISIONS, VERSION_TABLE, Found, is_newer

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext

ENDS = ("base", *REVISIONS)


class Step(NamedTuple):
    """Both ends of a host's step, and which way it goes."""

    from_: str
    to: str
    up: bool

    @property
    def low(self) -> str:
        """The older end."""
        return self.from_ if self.up else self.to

    @property
    def high(self) -> str:
        """The newer end."""
        return self.to if self.up else self.from_

    def __str__(self) -> str:
        return f"{'upgrade' if self.up else 'downgrade'}(op, from_={self.from_!r}, to={self.to!r})"


def upwards(from_: str | None, to: str) -> Step:
    """The step of a host's `upgrade()`.

    Raises:
        ValueError: An end is not named, not known, or the step does not lead upwards.
    """
    return _checked(Step(from_ or "", to, up=True))


def downwards(from_: str | None, to: str) -> Step:
    """The step of a host's `downgrade()`.

    Raises:
        ValueError: An end is not named, not known, or the step does not lead downwards.
    """
    return _checked(Step(from_ or "", to, up=False))


def _checked(step: Step) -> Step:
    for name, end in (("from_", step.from_), ("to", step.to)):
        if end in ("", "head"):
            raise ValueError(
                f"{step}: name the revision in {name}=, one of {', '.join(ENDS)}: "
                "a host's revision has to do the same for ever"
            )
        if end not in ENDS:
            raise ValueError(
                f"{step}: this sagalog has no revision {end!r}, only {', '.join(ENDS)}; "
                "a newer sagalog may have it: update the package"
            )
    if ENDS.index(step.low) >= ENDS.index(step.high):
        raise ValueError(f"{step}: {step.to!r} is not {'above' if step.up else 'below'} {step.from_!r}")
    return step


def run_step(op: AbstractOperations | ModuleType, step: Step, placement: Placement) -> None:
    """Run a host's step on the host's connection, or print it where the host prints SQL.

    A database that is within the step already, as one that an earlier attempt or the
    application itself brought on, only goes the rest of the way.

    Args:
        op: The host's `alembic.op`, or its `Operations`.
        step: Where from and where to.
        placement: Where the tables are.

    Raises:
        SchemaMissing, SchemaOutOfDate: The database is older than the step's beginning.
        SchemaTooNew: It is newer than both ends.
        NotASagaLog: Tables of these names are somebody else's.
        LogUnavailable: The database could not do it.
    """
    context: MigrationContext = op.get_context()
    if context.as_sql:
        print_sql(context, placement, step.from_, Way(step.to, step.up))
        return
    connection = context.connection
    assert connection is not None
    # A host that maps schemas means its tables there; SQL text would not be mapped.
    mapped = connection.get_execution_options().get("schema_translate_map") or {}
    placement = Placement(mapped.get(placement.schema, placement.schema), placement.prefix)
    ends = not context.impl.transactional_ddl or commits_by_itself(connection)
    with told(connection.engine), joined(connection, placement, ends=ends):
        _run_online(connection, step, placement)


def _run_online(connection: Connection, step: Step, placement: Placement) -> None:
    if step.up and step.from_ == "base":
        adopt(connection, placement)
    found = found_in(connection, placement)
    _refuse_outside(found, step, f"{step} in {name_of(connection.engine)}")
    if (found.revision or "base") != step.to:
        run(connection, placement, Way(step.to, step.up))


def _refuse_outside(found: Found, step: Step, asked: str) -> None:
    """See that a database is at one of the step's ends, or between them."""

    def refusal(kind: type[SagaLogError], problem: str, hint: str) -> SagaLogError:
        return kind.in_hosts_revision(asked, problem, found=found.revision or "no revision", hint=hint)

    if found.revision is None and found.unversioned_tables:
        raise refusal(
            NotASagaLog,
            "there are tables named saga or saga_step, and nothing records their revision",
            "If they are the earlier program's, a step from 'base' adopts them; else place sagalog's elsewhere "
            "with schema= or prefix=.",
        )
    if found.revision is not None and is_newer(found):
        kind: type[SagaLogError] = SchemaTooNew if found.revision.startswith("sagalog_") else NotASagaLog
        raise refusal(
            kind,
            f"{VERSION_TABLE} holds {found.revision!r}, which this sagalog does not know",
            f"It knows {', '.join(REVISIONS)}; a newer one made it: update the package.",
        )
    at = found.revision or "base"
    if ENDS.index(at) > ENDS.index(step.high):
        raise refusal(
            SchemaTooNew,
            f"the saga log is at {at} already, beyond {step.high}",
            "Something else upgraded it, as sagalog.migrations.upgrade(engine) does. Mark this revision of yours as "
            "done with `alembic stamp`, or bring the log back with sagalog.migrations.downgrade().",
        )
    if ENDS.index(at) < ENDS.index(step.low):
        raise refusal(
            SchemaMissing if found.revision is None else SchemaOutOfDate,
            f"the saga log is at {at}, and this step begins at {step.from_}"
            if step.up
            else f"the saga log is at {at}, and this step ends at {step.to}",
            f"A revision of yours that brings it to {step.low} has to run first.",
        )
