"""How an order is carried out.

Two steps: stock is reserved in the shop's own database, and a card is charged
elsewhere. The rows of the shop and those of the saga log are always written in
one transaction: either both are there, or neither. A paid order is sent by a
saga of the coordinator's, see `fastapi_shop.parcels`.
"""

from __future__ import annotations

from contextlib import suppress

from pydantic import BaseModel, PositiveInt
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_shop.bank import Bank, BankUnreachable, CardCharged, CardDeclined, ChargeCard
from fastapi_shop.models import Order, Product
from fastapi_shop.parcels import send
from sagalog import AsyncSagaCoordinator, AsyncSagaLog, SagaOutcome


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


async def place(
    session: AsyncSession, bank: Bank, parcels: AsyncSagaCoordinator, wanted: OrderRequest, key: str | None
) -> Order:
    """Place an order; the same key again is the same order, not a second one.

    Args:
        session: The request's.
        bank: Who charges the card.
        parcels: Who sends what is paid.
        wanted: What the customer wants.
        key: The request's own name, given by the customer's program.

    Raises:
        SoldOut: Nothing was written, neither an order nor a saga.
        KeyConflict: The key belongs to another request.
        BankUnreachable: The order is kept, its payment in doubt; see `settle_all`.
    """
    order = await _accept(session, wanted, key)
    await session.commit()
    if order.status == "accepted":
        await _charge(session, bank, parcels, order)
    return order


async def _accept(session: AsyncSession, wanted: OrderRequest, key: str | None) -> Order:
    """One transaction: the saga, the stock, the order. Whatever raises here takes all of it back."""
    log = AsyncSagaLog(session)
    saga_id = await log.create_saga("place_order", wanted, key=key)
    earlier = await session.scalar(select(Order).where(Order.saga_id == saga_id))
    if earlier is not None:
        return earlier
    reserve = ReserveStock(sku=wanted.sku, quantity=wanted.quantity)
    await log.start_step(saga_id, RESERVE, "ReserveStock", reserve)
    enough = (Product.sku == wanted.sku) & (Product.stock >= wanted.quantity)
    taken = update(Product).where(enough).values(stock=Product.stock - wanted.quantity).returning(Product.pence)
    pence = await session.scalar(taken)
    if pence is None:
        raise SoldOut(f"there are not {wanted.quantity} of {wanted.sku}")
    await log.finish_step(saga_id, RESERVE, [reserve])
    order = Order(sku=wanted.sku, quantity=wanted.quantity, status="accepted", saga_id=saga_id)
    session.add(order)
    # Committed before the bank is asked: a crash in between leaves a step that is known to be in doubt.
    await log.start_step(saga_id, CHARGE, "ChargeCard", ChargeCard(card=wanted.card, pence=pence * wanted.quantity))
    return order


async def _charge(session: AsyncSession, bank: Bank, parcels: AsyncSagaCoordinator, order: Order) -> None:
    """Ask the bank, holding no transaction; then write what it said. Asking again under the same key is harmless."""
    saga = await AsyncSagaLog(session).get(order.saga_id)
    charge = saga.steps[CHARGE].decode_cmd(ChargeCard)
    key = f"order-{order.id}"
    await session.commit()
    try:
        charged = await bank.charge(charge, key)
    except CardDeclined as declined:
        await _undo(session, order, str(declined))
    else:
        await _complete(session, parcels, order, charged)
    await session.commit()


async def _complete(session: AsyncSession, parcels: AsyncSagaCoordinator, order: Order, charged: CardCharged) -> None:
    if not await _moved(session, order, "paid"):
        return
    log = AsyncSagaLog(session)
    await log.finish_step(order.saga_id, CHARGE, [charged])
    await log.terminate(order.saga_id, SagaOutcome.completed())
    await send(parcels, session, order)


async def _undo(session: AsyncSession, order: Order, reason: str) -> None:
    if not await _moved(session, order, "cancelled"):
        return
    log = AsyncSagaLog(session)
    await log.fail_step(order.saga_id, CHARGE, reason)
    await session.execute(update(Product).where(Product.sku == order.sku).values(stock=Product.stock + order.quantity))
    await log.compensate_step(order.saga_id, RESERVE, [ReserveStock(sku=order.sku, quantity=-order.quantity)])
    await log.terminate(order.saga_id, SagaOutcome.compensated(reason))


async def _moved(session: AsyncSession, order: Order, status: str) -> bool:
    """Whether it was this request that ended the order; another may have asked the bank at the same time."""
    mine = update(Order).where(Order.id == order.id, Order.status == "accepted").values(status=status)
    return await session.scalar(mine.returning(Order.id)) is not None


async def settle_all(session: AsyncSession, bank: Bank, parcels: AsyncSagaCoordinator) -> None:
    """Finish or undo what interrupted requests left; the application does it when it starts."""
    unresolved = [saga.saga_id for saga in await AsyncSagaLog(session).unresolved_sagas()]
    orders = await session.scalars(select(Order).where(Order.saga_id.in_(unresolved)).order_by(Order.id))
    for order in orders.all():
        with suppress(BankUnreachable):  # it stays in doubt, for the next time
            await _charge(session, bank, parcels, order)
