"""The statements that look at the log from outside: who works on it, how large it is."""

from __future__ import annotations

from functools import cached_property, reduce
from operator import add

from sqlalchemy import cast, func, literal_column, select, true

from sagalog.log.statements.clause import BIGINT, DatabaseNow, Statement, one_of
from sagalog.log.statements.tables import Tables
from sagalog.states import UNRESOLVED


class WatchingStatements(Tables):
    """Those of one placement."""

    @cached_property
    def all_executors(self) -> Statement:
        """The processes, what each holds, and the clock by which leases count."""
        c = self.executor.c
        held = (
            select(func.count())
            .select_from(self.saga)
            .where(self.saga.c.executor_id == c.executor_id, one_of(UNRESOLVED, self.saga.c.state))
        )
        columns = (c.executor_id, c.label, c.started_at, c.lease_until, held.scalar_subquery(), DatabaseNow())
        return Statement(select(*columns).order_by(c.lease_until.desc(), c.executor_id))

    @cached_property
    def size_sqlite(self) -> Statement:
        count = func.pragma_page_count().table_valued("page_count")
        size = func.pragma_page_size().table_valued("page_size")
        return Statement(select(count.c.page_count * size.c.page_size).select_from(count.join(size, true())))

    @cached_property
    def size_postgres(self) -> Statement:
        tables = (self.saga, self.step, self.executor, self.audit_table, self.meta)
        sizes = [func.pg_total_relation_size(literal_column(f"'{self._quoted(of.name)}'")) for of in tables]
        return Statement(select(cast(reduce(add, sizes), BIGINT)))
