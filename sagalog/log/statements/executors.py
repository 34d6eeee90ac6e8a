"""The statements about processes: their leases, and the sagas that one may take.

Lease times are the database's clock on Postgres, the machine's on SQLite.
"""

from __future__ import annotations

import hashlib
from functools import cached_property, lru_cache
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, exists, func, literal_column, or_, select, update

from sagalog.log.statements.clause import DatabaseNow, Statement, bind, insert_into, literal, one_of
from sagalog.log.statements.tables import Tables
from sagalog.states import ATTENTION, UNRESOLVED, SagaState

ENVIRONMENT = "environment"


_LONGEST_CHANNEL = 63
"""Bytes of a name on Postgres."""


class ExecutorStatements(Tables):
    """Those of one placement."""

    # Leases

    @cached_property
    def renew(self) -> Statement:
        """A lease until `lease_` milliseconds from now; a late one is kept as well."""
        now = DatabaseNow()
        new = insert_into(self.executor).values(
            executor_id=bind("executor_"), label=bind("label_"), started_at=now, lease_until=now + bind("lease_")
        )
        return Statement(
            new.on_conflict_do_update(index_elements=["executor_id"], set_={"lease_until": new.excluded["lease_until"]})
        )

    @cached_property
    def retire(self) -> Statement:
        return Statement(delete(self.executor).where(self.executor.c.executor_id == bind("executor_")))

    @cached_property
    def forget_dead(self) -> Statement:
        """Executors whose lease ran out long ago, and that no unresolved saga names."""
        named: Any = select(literal_column("1")).where(
            self.saga.c.executor_id == self.executor.c.executor_id, one_of(UNRESOLVED, self.saga.c.state)
        )
        return Statement(
            delete(self.executor).where(self.executor.c.lease_until < DatabaseNow() - bind("lease_"), ~exists(named))
        )

    @property
    def _is_alive(self) -> ColumnElement[bool]:
        alive: Any = select(literal_column("1")).where(
            self.executor.c.executor_id == self.saga.c.executor_id, self.executor.c.lease_until > DatabaseNow()
        )
        return exists(alive)

    # Sagas to be taken over

    def _is_free(self, *, adopt: bool) -> ColumnElement[bool]:
        c = self.saga.c
        nobodys = c.executor_id.is_(None) if adopt else and_(c.executor_id.is_(None), c.epoch > literal_column("0"))
        dead = and_(c.executor_id.is_not(None), ~self._is_alive)
        return or_(nobodys, c.executor_id == bind("executor_"), dead)

    @cached_property
    def unowned(self) -> Statement:
        """Unresolved sagas that never belonged to a coordinator."""
        c = self.saga.c
        never = and_(c.executor_id.is_(None), c.epoch == literal_column("0"))
        return Statement(
            select(c.saga_id, c.name)
            .where(one_of(UNRESOLVED, c.state), never)
            .order_by(c.saga_id)
            .limit(bind("limit_"))
        )

    @lru_cache(maxsize=1024)  # noqa: B019 - one Statements a placement, kept for ever
    def candidates(self, adopt: bool) -> Statement:  # noqa: FBT001 - a cache key
        """Unresolved sagas whose executor is gone, fewest take-overs first."""
        c = self.saga.c
        return Statement(
            select(c.saga_id, c.epoch, c.name, c.recoveries, c.executor_id == bind("executor_"))
            .where(one_of(UNRESOLVED, c.state), self._is_free(adopt=adopt))
            .order_by(c.recoveries, c.saga_id)
            .limit(bind("limit_"))
        )

    @cached_property
    def held(self) -> Statement:
        """Unresolved sagas of an executor."""
        c = self.saga.c
        return Statement(
            select(c.saga_id, c.epoch).where(one_of(UNRESOLVED, c.state), c.executor_id == bind("executor_"))
        )

    @lru_cache(maxsize=1024)  # noqa: B019 - one Statements a placement, kept for ever
    def claim(self, adopt: bool) -> Statement:  # noqa: FBT001 - a cache key
        """One compare-and-set: by the epoch that was seen, and only if the owner has not come back."""
        c = self.saga.c
        return Statement(
            update(self.saga)
            .where(
                c.saga_id == bind("id_"),
                c.epoch == bind("epoch_"),
                one_of(UNRESOLVED, c.state),
                self._is_free(adopt=adopt),
            )
            .values(
                executor_id=bind("executor_"),
                epoch=c.epoch + literal_column("1"),
                recoveries=c.recoveries + literal_column("1"),
                token=func.coalesce(c.token, bind("token_")),
            )
        )

    @cached_property
    def claimed(self) -> Statement:
        """Whether an executor's claim of an epoch is there."""
        c = self.saga.c
        return Statement(
            select(c.saga_id).where(
                c.saga_id == bind("id_"), c.epoch == bind("epoch_"), c.executor_id == bind("executor_")
            )
        )

    # Submitted sagas

    @cached_property
    def submitted(self) -> Statement:
        """Sagas that are to be started by now, oldest first."""
        c = self.saga.c
        due = or_(c.run_at.is_(None), c.run_at <= DatabaseNow())
        return Statement(
            select(c.saga_id, c.epoch, c.name)
            .where(c.state == literal(SagaState.SUBMITTED), one_of(ATTENTION, c.state), due)
            .order_by(c.saga_id)
            .limit(bind("limit_"))
        )

    @cached_property
    def claim_submitted(self) -> Statement:
        c = self.saga.c
        return Statement(
            update(self.saga)
            .where(c.saga_id == bind("id_"), c.epoch == bind("epoch_"), c.state == literal(SagaState.SUBMITTED))
            .values(
                state=literal(SagaState.RUNNING),
                executor_id=bind("executor_"),
                epoch=c.epoch + literal_column("1"),
                version=bind("version_"),
                deadline_at=bind("deadline_"),
            )
        )

    @property
    def channel(self) -> str:
        """What submitted sagas are told on, to those that listen."""
        schema = f"{self.placement.schema}." if self.placement.schema else ""
        name = f"sagalog.{schema}{self.placement.prefix}submitted"
        if len(name.encode()) <= _LONGEST_CHANNEL:
            return name
        return f"sagalog.{hashlib.sha256(name.encode()).hexdigest()[:32]}"

    @cached_property
    def notify(self) -> Statement:
        """A hint to workers on Postgres, with the transaction's commit; polling is the truth."""
        return Statement(select(func.pg_notify(bind("channel_"), literal(""))))

    # Facts about the log

    @cached_property
    def environment(self) -> Statement:
        return Statement(select(self.meta.c.value).where(self.meta.c.name == literal(ENVIRONMENT)))

    @cached_property
    def remember_environment(self) -> Statement:
        """The first that is named stays."""
        return Statement(
            insert_into(self.meta)
            .values(name=literal(ENVIRONMENT), value=bind("value_"))
            .on_conflict_do_nothing(index_elements=["name"])
        )

    @cached_property
    def open_sagas(self) -> Statement:
        """Sagas that a process could still act on."""
        c = self.saga.c
        running = select(c.saga_id, c.epoch, c.state).where(one_of(UNRESOLVED, c.state))
        waiting = select(c.saga_id, c.epoch, c.state).where(
            c.state == literal(SagaState.SUBMITTED), one_of(ATTENTION, c.state)
        )
        return Statement(running.union_all(waiting).limit(bind("limit_")))
