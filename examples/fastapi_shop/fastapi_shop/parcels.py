"""How a paid order is sent: by sagalog's coordinator, after the request.

The request that is paid submits the saga in its own transaction. A worker, in
this process or in any other that runs the shop, carries it out, undoes it if it
fails, and recovers what a process that died left.
"""

from __future__ import annotations

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from fastapi_shop.courier import Courier
from fastapi_shop.models import Order, Parcel
from sagalog import (
    AsyncSagaContext,
    AsyncSagaCoordinator,
    AsyncSagaLog,
    Command,
    CommandBus,
    Retry,
    StepInfo,
    StepRejected,
)


class Booked(BaseModel):
    """What the courier answers."""

    tracking: str


class BookCourier(Command[Booked]):
    """Ask the courier to fetch a parcel."""

    order: int


class CancelCourier(Command[None]):
    """Undo `BookCourier`."""

    tracking: str


class NoteParcel(Command[None]):
    """Write into the shop's own tables that the parcel is on its way."""

    order: int
    tracking: str


async def send_parcel(ctx: AsyncSagaContext, order: int) -> str:
    """The saga. If its second step is refused, the first one is undone."""
    booked = await ctx.dispatch(BookCourier(order=order))
    await ctx.dispatch(NoteParcel(order=order, tracking=booked.tracking))
    return booked.tracking


def parcels_over(engine: AsyncEngine, courier: Courier) -> AsyncSagaCoordinator:
    """The coordinator that knows the saga, and how each of its commands is done."""
    bus = CommandBus()

    @bus.handler(retry=Retry())  # when no answer came it may be asked again: the courier knows the key
    async def book(cmd: BookCourier, step: StepInfo) -> Booked:
        return Booked(tracking=await courier.book(cmd.order, step.idempotency_key))

    @bus.compensation(BookCourier)
    def cancelling(cmd: BookCourier, output: Booked) -> CancelCourier:
        return CancelCourier(tracking=output.tracking)

    @bus.handler
    async def cancel(cmd: CancelCourier) -> None:
        await courier.cancel(cmd.tracking)

    @bus.handler(transactional=True, pivot=True)  # the row and the end of the step are one transaction
    async def note(cmd: NoteParcel, session: AsyncSession) -> None:
        order = await session.get_one(Order, cmd.order, with_for_update=True)
        if order.status != "paid":
            raise StepRejected(f"order {order.id} is {order.status}")
        session.add(Parcel(order_id=order.id, tracking=cmd.tracking))

    coordinator = AsyncSagaCoordinator(AsyncSagaLog(engine), bus)
    coordinator.saga("send_parcel")(send_parcel)
    return coordinator


async def send(parcels: AsyncSagaCoordinator, session: AsyncSession, order: Order) -> None:
    """Have a paid order sent, once the transaction that says that it is paid is committed."""
    await parcels.submit(send_parcel, order.id, key=f"order-{order.id}", session=session)
