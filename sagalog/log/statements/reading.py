"""The statements that read: one each, for two are no snapshot at READ COMMITTED."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

from sqlalchemy import Select, and_, func, literal_column, select

from sagalog.log.statements.clause import Statement, bind, literal, one_of
from sagalog.log.statements.tables import Tables
from sagalog.states import ATTENTION, UNRESOLVED, StepState


class ReadingStatements(Tables):
    """Those of one placement."""

    @cached_property
    def max_saga_id(self) -> Statement:
        return Statement(select(func.coalesce(func.max(self.saga.c.saga_id), literal_column("0"))))

    @cached_property
    def next_step_index(self) -> Statement:
        highest = func.max(self.step.c.step_index) + literal_column("1")
        return Statement(select(func.coalesce(highest, literal_column("0"))).where(self.step.c.saga_id == bind("id_")))

    def _with_steps(self, sagas: Select[Any]) -> Statement:
        picked = sagas.subquery("picked")
        joined = picked.outerjoin(self.step, self.step.c.saga_id == picked.c.saga_id)
        columns = [*(picked.c[name] for name in self.saga_fields), *self.step.c]
        return Statement(select(*columns).select_from(joined).order_by(picked.c.saga_id, self.step.c.step_index))

    @cached_property
    def get(self) -> Statement:
        return self._with_steps(select(*self.saga.c).where(self._this_saga))

    @lru_cache(maxsize=1024)  # noqa: B019 - one Statements a placement, kept for ever
    def stored(self, of_saga: tuple[str, ...], of_step: tuple[str, ...]) -> Statement:
        """Some columns of a saga, and of each of its steps."""
        joined = self.saga.outerjoin(self.step, self.step.c.saga_id == self.saga.c.saga_id)
        columns = [*(self.saga.c[name] for name in of_saga), *(self.step.c[name] for name in of_step)]
        found = select(*columns).select_from(joined).where(self._this_saga)
        return Statement(found.order_by(self.step.c.step_index))

    @lru_cache(maxsize=1024)  # noqa: B019 - one Statements a placement, kept for ever
    def unresolved_sagas(self, limited: bool) -> Statement:  # noqa: FBT001 - a cache key
        """All unresolved sagas with their steps, or the first `limit_` of them."""
        sagas = select(*self.saga.c).where(one_of(UNRESOLVED, self.saga.c.state)).order_by(self.saga.c.saga_id)
        return self._with_steps(sagas.limit(bind("limit_")) if limited else sagas)

    def _snapshots(self, sagas: Select[Any]) -> Statement:
        picked = sagas.subquery("picked")
        counted = (
            select(func.count())
            .select_from(self.step)
            .where(
                self.step.c.saga_id == picked.c.saga_id,
                one_of((StepState.SUCCEEDED, StepState.COMPENSATED), self.step.c.state),
            )
        )
        order = [picked.c.rank_.desc()] if "rank_" in picked.c else []
        fields = [picked.c[name] for name in self.snapshot_fields]
        return Statement(select(*fields, counted.scalar_subquery()).order_by(*order, picked.c.saga_id.desc()))

    @property
    def _snapshot_columns(self) -> list[Any]:
        return [self.saga.c[name] for name in self.snapshot_fields]

    @cached_property
    def snapshot_recent(self) -> Statement:
        recent = (
            select(*self._snapshot_columns, self._recency.label("rank_"))
            .order_by(self._recency.desc(), self.saga.c.saga_id.desc())
            .limit(bind("limit_"))
        )
        return self._snapshots(recent)

    @lru_cache(maxsize=1024)  # noqa: B019 - one Statements a placement, kept for ever
    def find(self, present: frozenset[str], state: str | None) -> Statement:
        """Sagas newest first, by the filters that are present."""
        c = self.saga.c
        open_states = one_of(UNRESOLVED, c.state)
        filters = {
            "name": c.name == bind("name_"),
            "key": c.key == bind("key_"),
            "since": c.started_at >= bind("since_"),
            "until": c.started_at < bind("until_"),
            "open_longer_than": and_(open_states, c.started_at < bind("at_")),
            "before": c.saga_id < bind("before_"),
        }
        found = select(*self._snapshot_columns).where(*(filters[name] for name in sorted(present)))
        if state is not None:
            found = found.where(c.state == literal(state))
            for indexed in (UNRESOLVED, ATTENTION):
                if state in indexed:
                    found = found.where(one_of(indexed, c.state))
        return self._snapshots(found.order_by(c.saga_id.desc()).limit(bind("limit_")))

    @cached_property
    def counts(self) -> Statement:
        """The states, how many sagas are in each, and when the oldest of them started."""
        c = self.saga.c
        counted = select(c.state, func.count(), func.min(c.started_at))
        return Statement(counted.group_by(c.state).order_by(c.state))
