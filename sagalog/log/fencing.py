"""Who may write to a saga: its epoch, compared in the transaction that writes."""

from __future__ import annotations

from typing import Any, NamedTuple

from sagalog.errors import LeaseLost, SagaLogError, SagaNotFound
from sagalog.log.database import Database


class Fence(NamedTuple):
    """Who may write to a saga: whoever knows its epoch."""

    saga_id: int
    epoch: int


class CancelAsked(SagaLogError):
    """The saga was asked to cancel: nothing new is begun."""

    def __init__(self, asked: str, saga_id: int, reason: str) -> None:
        self.reason = reason
        super().__init__(asked, f"it was asked to cancel: {reason}", saga_id=saga_id)


def head_of(db: Database, asked: str, saga_id: int, step_index: int | None = None) -> tuple[Any, ...]:
    """What its row says of a saga: name, state, epoch, and more.

    Raises:
        SagaNotFound: No such saga.
    """
    for row in db.fetch(db.sql.saga_head, id_=saga_id):
        return tuple(row)
    raise SagaNotFound(asked, saga_id, step_index)


def check_owner(db: Database, asked: str, fence: Fence, step_index: int | None = None) -> tuple[Any, ...]:
    """The saga's head, if its epoch is the owner's.

    Raises:
        LeaseLost: Somebody took it over.
        SagaNotFound: It is gone.
    """
    head = head_of(db, asked, fence.saga_id, step_index)
    if head[2] != fence.epoch:
        raise LeaseLost(asked, fence.saga_id, epoch=fence.epoch, found=int(head[2] or 0), step_index=step_index)
    return head
