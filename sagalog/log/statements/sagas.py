"""The statements that start, move and explain sagas."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    FromClause,
    and_,
    case,
    cast,
    false,
    func,
    literal_column,
    null,
    select,
    true,
    update,
)

from sagalog.log.statements.clause import BIGINT, TEXT, Greater, Statement, bind, insert_into, literal, one_of
from sagalog.log.statements.tables import Tables
from sagalog.payload import MAX_SAGA_ID
from sagalog.states import CANCELLABLE, SagaState

HIGHEST_PRUNED = "highest_pruned_saga_id"
_LARGEST = literal_column(str(MAX_SAGA_ID), BIGINT)


class SagaStatements(Tables):
    """Those of one placement."""

    # Starting

    @cached_property
    def start_saga(self) -> Statement:
        return Statement(insert_into(self.saga).values(saga_id=bind("id_"), **self._new_saga).on_conflict_do_nothing())

    @property
    def _new_saga(self) -> dict[str, Any]:
        return {
            "name": bind("name_"),
            "state": literal(SagaState.RUNNING),
            "started_at": bind("at_"),
            "input_json": bind("input_"),
            "token": bind("token_"),
        }

    @property
    def _highest_id(self) -> Any:
        pruned = select(cast(self.meta.c.value, BigInteger)).where(self.meta.c.name == literal(HIGHEST_PRUNED))
        held = select(func.max(self.saga.c.saga_id))
        zero = literal_column("0", BIGINT)
        each = (func.coalesce(ids.scalar_subquery(), zero) for ids in (held, pruned))
        return select(Greater(*each).label("highest"))

    @cached_property
    def create_saga_sqlite(self) -> Statement:
        known = self._highest_id.subquery("known")
        return self._create_saga(known.c.highest + literal_column("1"), known, known.c.highest < _LARGEST)

    @cached_property
    def create_saga_postgres(self) -> Statement:
        # A caller's explicit id may be ahead of the sequence: then nothing is inserted, and catch_up moves it.
        # Materialized, or Postgres looks the highest one up again wherever the statement names it.
        known = self._highest_id.cte("known", nesting=True).prefix_with("MATERIALIZED")
        drawn = case((known.c.highest < _LARGEST, func.nextval(literal_column(f"'{self.id_sequence}'"))))
        ahead = select(drawn.label("id"), known.c.highest).subquery("drawn")
        return self._create_saga(ahead.c.id, ahead, ahead.c.id > ahead.c.highest)

    def _create_saga(self, new_id: Any, source: FromClause, guard: ColumnElement[bool]) -> Statement:
        values = {**self._new_saga, "key": bind("key_")}
        rows = select(new_id, *values.values()).select_from(source).where(guard)
        inserted = insert_into(self.saga).from_select(["saga_id", *values], rows, include_defaults=False)
        return Statement(inserted.on_conflict_do_nothing().returning(self.saga.c.saga_id))

    @property
    def id_sequence(self) -> str:
        """The Postgres sequence of ids, quoted and with its schema."""
        return self._quoted(f"{self.placement.prefix}saga_id_seq")

    @cached_property
    def catch_up_ids(self) -> Statement:
        known = self._highest_id.subquery("known")
        moved = func.setval(literal_column(f"'{self.id_sequence}'"), known.c.highest)
        return Statement(
            select(moved).select_from(known).where(known.c.highest < _LARGEST, known.c.highest > literal_column("0"))
        )

    @cached_property
    def highest_id(self) -> Statement:
        return Statement(self._highest_id)

    @cached_property
    def saga_of_key(self) -> Statement:
        return Statement(
            select(self.saga.c.saga_id, self.saga.c.input_json, self.saga.c.state, self.saga.c.token).where(
                self.saga.c.key == bind("key_"), self.saga.c.name == bind("name_")
            )
        )

    @cached_property
    def saga_of_token(self) -> Statement:
        """A saga by its random token: an insert of one's own whose answer was lost."""
        return Statement(select(self.saga.c.saga_id).where(self.saga.c.token == bind("token_")))

    # Moving

    def _nobodys(self, also: ColumnElement[bool]) -> dict[str, Any]:
        """A coordinator's saga is taken from its process, which may live: a person gives it back, or keeps it."""
        c = self.saga.c
        taken = and_(c.epoch > literal_column("0"), also)
        return {
            "executor_id": case((taken, null()), else_=c.executor_id),
            "epoch": case((taken, c.epoch + literal_column("1")), else_=c.epoch),
        }

    @cached_property
    def mark_compensating(self) -> Statement:
        nobodys = self._nobodys(self.saga.c.state == literal(SagaState.FAILED_COMPENSATION))
        return Statement(self._move_saga(SagaState.COMPENSATING, terminal_at=null(), **nobodys))

    @cached_property
    def mark_failed_compensation(self) -> Statement:
        return Statement(self._fail_compensation(**self._nobodys(true())))

    def _fail_compensation(self, **also: Any) -> Any:
        values = {"failure_reason": bind("reason_"), "terminal_at": bind("at_"), **also}
        return self._move_saga(SagaState.FAILED_COMPENSATION, **values)

    @lru_cache(maxsize=1024)  # noqa: B019 - one Statements a placement, kept for ever
    def terminate(self, target: SagaState) -> Statement:
        """Completed, failed or compensated; refused in SQL while a step stands in the way."""
        return Statement(self._move_saga(target, failure_reason=bind("reason_"), terminal_at=bind("at_")))

    @cached_property
    def lock_saga(self) -> Statement:
        level = func.current_setting(literal_column("'transaction_isolation'"), type_=TEXT)
        return Statement(select(level).select_from(self.saga).where(self._this_saga).with_for_update(key_share=True))

    @cached_property
    def take_lock(self) -> Statement:
        """It changes nothing; SQLite runs it with the write lock only."""
        return Statement(update(self.saga).where(false()).values(epoch=self.saga.c.epoch))

    @cached_property
    def request_cancel(self) -> Statement:
        submitted = self.saga.c.state == literal(SagaState.SUBMITTED)
        return Statement(
            update(self.saga)
            .where(self._this_saga, one_of(CANCELLABLE, self.saga.c.state), self.saga.c.cancel_reason.is_(None))
            .values(
                cancel_reason=bind("reason_"),
                state=case((submitted, literal(SagaState.COMPENSATED)), else_=self.saga.c.state),
                terminal_at=case((submitted, bind("at_")), else_=self.saga.c.terminal_at),
                failure_reason=case((submitted, bind("reason_")), else_=self.saga.c.failure_reason),
            )
        )

    # Explaining

    @cached_property
    def saga_head(self) -> Statement:
        c = self.saga.c
        fields = (c.name, c.state, c.epoch, c.input_json, c.failure_reason, c.cancel_reason, c.token, c.executor_id)
        return Statement(select(*fields).where(self._this_saga))
