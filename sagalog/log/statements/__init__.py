"""Every SQL statement of the log, once, in SQLAlchemy Core, for one placement of the tables.

Each write carries its guard: the first statement acts, a second one only
explains. On Postgres a guard that reads the saga's row locks it (FOR NO KEY
UPDATE), without which it loses the race against a concurrent move; SQLite
ignores that.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

from sagalog.log.statements.clause import Statement
from sagalog.log.statements.executors import ExecutorStatements
from sagalog.log.statements.owned import OwnedStatements
from sagalog.log.statements.reading import ReadingStatements
from sagalog.log.statements.sagas import SagaStatements
from sagalog.log.statements.settling import SettlingStatements
from sagalog.log.statements.steps import StepStatements
from sagalog.log.statements.watching import WatchingStatements
from sagalog.placement import Placement

__all__ = ["Statement", "Statements", "statements_at"]


class Statements(SagaStatements, StepStatements, ReadingStatements, WatchingStatements, SettlingStatements):
    """All statements for one placement; made once and shared by every `SagaLog` there."""

    @cached_property
    def owned(self) -> OwnedStatements:
        """Those that compare the saga's epoch."""
        return OwnedStatements(self.placement)

    @cached_property
    def executors(self) -> ExecutorStatements:
        """Those about processes and what they may take."""
        return ExecutorStatements(self.placement)


@lru_cache(maxsize=64)
def statements_at(placement: Placement) -> Statements:
    """The statements of a placement, built once: building them for each call costs seven times the call."""
    return Statements(placement)
