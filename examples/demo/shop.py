"""The shop: its commands, how each is done and undone, and the saga. This is what a user of sagalog writes."""

from __future__ import annotations

from pydantic import BaseModel

from examples.demo.outside import CardDeclined, NoCourier, Outside, SoldOut
from sagalog import Command, CommandBus, Retry, SagaContext, SagaCoordinator, SagaLog, StepInfo


class Order(BaseModel):
    """What a customer asks for."""

    number: int
    customer: str
    quantity: int = 2
    pence: int = 1250
    postcode: str = "EC1A 1BB"

    @property
    def key(self) -> str:
        """The order's name: a request that comes twice is one saga."""
        return f"order-{self.number}"


class Receipt(BaseModel):
    """What the customer gets."""

    payment: str
    parcel: str


# What the shop asks of other systems, and what they answer. `Command[X]`: its handler returns an X.


class Done(BaseModel):
    """The other system's reference."""

    reference: str


class ReserveTea(Command[Done]):
    """Ask the warehouse."""

    order: int
    quantity: int


class ReleaseTea(Command[None]):
    """Undo `ReserveTea`."""

    order: int
    quantity: int


class ChargeCard(Command[Done]):
    """Ask the bank."""

    order: int
    customer: str
    pence: int


class RefundCard(Command[None]):
    """Undo `ChargeCard`."""

    order: int
    customer: str
    pence: int


class BookCourier(Command[Done]):
    """Ask the courier. A parcel that left cannot be called back."""

    order: int
    postcode: str


TEA = "TEA-1"
AGAIN = Retry(attempts=5)
"""When no answer came, the same request may be sent again: the other systems know its key."""


def bus_to(outside: Outside) -> CommandBus:
    """How each command is done, and what undoes it."""
    bus = CommandBus()

    @bus.handler(rejects=SoldOut, retry=AGAIN)  # SoldOut: nothing was done. Anything else: nobody knows.
    def reserve(cmd: ReserveTea, step: StepInfo) -> Done:
        return Done(reference=outside.reserve(cmd.order, TEA, cmd.quantity, key=step.idempotency_key))

    @bus.compensation(ReserveTea)
    def release_of(cmd: ReserveTea, output: Done) -> ReleaseTea:
        return ReleaseTea(order=cmd.order, quantity=cmd.quantity)

    @bus.handler
    def release(cmd: ReleaseTea, step: StepInfo) -> None:
        outside.release(cmd.order, TEA, cmd.quantity, key=step.idempotency_key)

    @bus.handler(rejects=CardDeclined, retry=AGAIN)
    def charge(cmd: ChargeCard, step: StepInfo) -> Done:
        return Done(reference=outside.charge(cmd.order, cmd.customer, cmd.pence, key=step.idempotency_key))

    @bus.compensation(ChargeCard)
    def refund_of(cmd: ChargeCard, output: Done) -> RefundCard:
        return RefundCard(order=cmd.order, customer=cmd.customer, pence=cmd.pence)

    @bus.handler
    def refund(cmd: RefundCard, step: StepInfo) -> None:
        outside.refund(cmd.order, cmd.customer, cmd.pence, key=step.idempotency_key)

    @bus.handler(rejects=NoCourier, retry=AGAIN, pivot=True)  # pivot: once it may have happened, only forward
    def book(cmd: BookCourier, step: StepInfo) -> Done:
        return Done(reference=outside.book(cmd.order, cmd.postcode, key=step.idempotency_key))

    return bus


def place_order(ctx: SagaContext, order: Order) -> Receipt:
    """The saga. If it raises, the steps that succeeded are undone, the last one first."""
    ctx.dispatch(ReserveTea(order=order.number, quantity=order.quantity))
    payment = ctx.dispatch(ChargeCard(order=order.number, customer=order.customer, pence=order.pence))
    parcel = ctx.dispatch(BookCourier(order=order.number, postcode=order.postcode))
    return Receipt(payment=payment.reference, parcel=parcel.reference)


def open_shop(log: SagaLog, outside: Outside, *, lease: float = 30.0) -> SagaCoordinator:
    """A coordinator that knows the saga; `lease` is in seconds."""
    coordinator = SagaCoordinator(log, bus_to(outside), lease=lease)
    coordinator.saga("place_order")(place_order)
    return coordinator
