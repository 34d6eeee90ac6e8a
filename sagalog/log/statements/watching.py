"""The statements that look at the log from outside: who works on it, how large it is."""

from __future__ import annotations

from functools import cached_property, reduce
from operator import add
from typing import Any

from sqlalchemy import cast, extract, func, literal_column, select, true

from sagalog.log.statements.clause import BIGINT, Statement, bind, one_of
from sagalog.log.statements.tables import Tables
from sagalog.states import UNRESOLVED


class WatchingStatements(Tables):
    """Those of one placement."""

    def _executors(self, now: Any) -> Statement:
        c = self.executor.c
        held = (
            select(func.count())
            .select_from(self.saga)
            .where(self.saga.c.executor_id == c.executor_id, one_of(UNRESOLVED, self.saga.c.state))
        )
        columns = (c.executor_id, c.label, c.started_at, c.lease_until, held.scalar_subquery(), now)
        return Statement(select(*columns).order_by(c.lease_until.desc(), c.executor_id))

    @cached_property
    def executors_sqlite(self) -> Statement:
        return self._executors(bind("at_"))

    @cached_property
    def executors_postgres(self) -> Statement:
        # Leases count by the server's clock.
        seconds = extract("epoch", func.clock_timestamp())
        return self._executors(cast(seconds * literal_column("1000"), BIGINT))

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
