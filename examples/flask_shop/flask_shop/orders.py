"""How an order is carried out.

Two steps: stock is reserved in the shop's own database, and a card is charged
elsewhere. The rows of the shop and those of the saga log are always written in
one transaction: either both are there, or neither.
"""

from __future__ import annotations

from contextlib import suppress

from pydantic import BaseModel, PositiveInt
from sqlalchemy import select, update

from flask_shop.bank import Bank, BankUnreachable, CardCharged, CardDeclined, ChargeCard
from flask_shop.models import Order, Product, db
from sagalog import SagaLog, SagaOutcome


class OrderRequest(BaseModel):
    """What a customer sends."""

    sku: str
    quantity: PositiveInt
    card: str


class ReserveStock(BaseModel):
    """The first step, and what undoing it gives back."""

    sku: str
    quantity: int


class SoldOut(Exception):
    """There is not enough of it."""


RESERVE, CHARGE = 0, 1


def place(bank: Bank, wanted: OrderRequest, key: str | None) -> Order:
    """Place an order; the same key again is the same order, not a second one.

    Args:
        bank: Who charges the card.
        wanted: What the customer wants.
        key: The request's own name, given by the customer's program.

    Raises:
        SoldOut: Nothing was written, neither an order nor a saga.
        KeyConflict: The key belongs to another request.
        BankUnreachable: The order is kept, its payment in doubt; see `settle_all`.
    """
    order = _accept(wanted, key)
    db.session.commit()
    if order.status == "accepted":
        _charge(bank, order)
    return order


def _accept(wanted: OrderRequest, key: str | None) -> Order:
    """One transaction: the saga, the stock, the order. Whatever raises here takes all of it back."""
    log = SagaLog(db.session)
    saga_id = log.create_saga("place_order", wanted, key=key)
    earlier: Order | None = db.session.scalar(select(Order).where(Order.saga_id == saga_id))
    if earlier is not None:
        return earlier
    reserve = ReserveStock(sku=wanted.sku, quantity=wanted.quantity)
    log.start_step(saga_id, RESERVE, "ReserveStock", reserve)
    enough = (Product.sku == wanted.sku) & (Product.stock >= wanted.quantity)
    taken = update(Product).where(enough).values(stock=Product.stock - wanted.quantity).returning(Product.pence)
    pence = db.session.scalar(taken)
    if pence is None:
        raise SoldOut(f"there are not {wanted.quantity} of {wanted.sku}")
    log.finish_step(saga_id, RESERVE, [reserve])
    order = Order(sku=wanted.sku, quantity=wanted.quantity, status="accepted", saga_id=saga_id)
    db.session.add(order)
    # Committed before the bank is asked: a crash in between leaves a step that is known to be in doubt.
    log.start_step(saga_id, CHARGE, "ChargeCard", ChargeCard(card=wanted.card, pence=pence * wanted.quantity))
    return order


def _charge(bank: Bank, order: Order) -> None:
    """Ask the bank, holding no transaction; then write what it said. Asking again under the same key is harmless."""
    charge = SagaLog(db.session).get(order.saga_id).steps[CHARGE].decode_cmd(ChargeCard)
    key = f"order-{order.id}"
    db.session.commit()
    try:
        charged = bank.charge(charge, key)
    except CardDeclined as declined:
        _undo(order, str(declined))
    else:
        _complete(order, charged)
    db.session.commit()


def _complete(order: Order, charged: CardCharged) -> None:
    if not _moved(order, "paid"):
        return
    log = SagaLog(db.session)
    log.finish_step(order.saga_id, CHARGE, [charged])
    log.terminate(order.saga_id, SagaOutcome.completed())


def _undo(order: Order, reason: str) -> None:
    if not _moved(order, "cancelled"):
        return
    log = SagaLog(db.session)
    log.fail_step(order.saga_id, CHARGE, reason)
    db.session.execute(update(Product).where(Product.sku == order.sku).values(stock=Product.stock + order.quantity))
    log.compensate_step(order.saga_id, RESERVE, [ReserveStock(sku=order.sku, quantity=-order.quantity)])
    log.terminate(order.saga_id, SagaOutcome.compensated(reason))


def _moved(order: Order, status: str) -> bool:
    """Whether it was this request that ended the order; another may have asked the bank at the same time."""
    mine = update(Order).where(Order.id == order.id, Order.status == "accepted").values(status=status)
    return db.session.scalar(mine.returning(Order.id)) is not None


def settle_all(bank: Bank) -> list[Order]:
    """Finish or undo what interrupted requests left; run it when the shop starts again."""
    unresolved = [saga.saga_id for saga in SagaLog(db.session).unresolved_sagas()]
    orders = list(db.session.scalars(select(Order).where(Order.saga_id.in_(unresolved)).order_by(Order.id)))
    for order in orders:
        with suppress(BankUnreachable):  # it stays in doubt, for the next time
            _charge(bank, order)
    return orders
