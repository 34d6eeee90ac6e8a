"""The shop over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import selectinload

from fastapi_shop.bank import Bank, BankUnreachable
from fastapi_shop.courier import Courier
from fastapi_shop.models import Order, Parcel, database_url
from fastapi_shop.orders import OrderRequest, SoldOut, place, settle_all
from fastapi_shop.parcels import parcels_over
from fastapi_shop.report import in_doubt
from sagalog import AsyncSagaCoordinator, AsyncSagaLog, KeyConflict, Saga, migrations


def create_app(url: str | None = None, bank: Bank | None = None, courier: Courier | None = None) -> FastAPI:
    """Build the application; its tables must be there when it starts: `alembic upgrade head`.

    Args:
        url: The database; by default the one in SHOP_URL.
        bank: Who charges cards.
        courier: Who fetches parcels.
    """
    bank = bank or Bank()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = create_async_engine(url or database_url())
        try:
            await migrations.check(engine)
            app.state.sessions = async_sessionmaker(engine, expire_on_commit=False)
            app.state.parcels = parcels = parcels_over(engine, courier or Courier())
            async with app.state.sessions() as session:
                await settle_all(session, bank, parcels)
            async with parcels.worker():
                yield
        finally:
            await engine.dispose()

    app = FastAPI(lifespan=lifespan)
    app.state.bank = bank
    app.post("/orders", status_code=201)(post_order)
    app.get("/orders/{order_id}")(get_order)
    app.get("/orders/{order_id}/parcel")(get_parcel)
    app.get("/doubts")(get_doubts)
    app.exception_handler(SoldOut)(_refused)
    app.exception_handler(KeyConflict)(_refused)
    app.exception_handler(BankUnreachable)(_doubtful)
    return app


async def session_of(request: Request) -> AsyncIterator[AsyncSession]:
    """The request's session: what it did not commit is rolled back when the request ends."""
    async with request.app.state.sessions() as session:
        yield session


def bank_of(request: Request) -> Bank:
    """Who charges cards."""
    bank: Bank = request.app.state.bank
    return bank


def parcels_of(request: Request) -> AsyncSagaCoordinator:
    """Who sends what is paid."""
    parcels: AsyncSagaCoordinator = request.app.state.parcels
    return parcels


SessionOf = Annotated[AsyncSession, Depends(session_of)]
BankOf = Annotated[Bank, Depends(bank_of)]
ParcelsOf = Annotated[AsyncSagaCoordinator, Depends(parcels_of)]


async def post_order(
    wanted: OrderRequest,
    session: SessionOf,
    bank: BankOf,
    parcels: ParcelsOf,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> dict[str, Any]:
    """Buy something."""
    order = await place(session, bank, parcels, wanted, idempotency_key)
    return await get_order(order.id, session)


async def get_order(order_id: int, session: SessionOf) -> dict[str, Any]:
    """See how far it is."""
    with_saga = select(Order).where(Order.id == order_id).options(selectinload(Order.saga).selectinload(Saga.steps))
    order = await session.scalar(with_saga.execution_options(populate_existing=True))
    if order is None:
        raise HTTPException(404)
    steps = {step.name: step.state for step in order.saga.steps}
    return {"id": order.id, "status": order.status, "saga": order.saga.state, "steps": steps}


async def get_parcel(order_id: int, session: SessionOf) -> dict[str, str]:
    """See where its parcel is; there is none before the worker has sent it."""
    parcel = await session.get(Parcel, order_id)
    if parcel is None:
        raise HTTPException(404)
    return {"tracking": parcel.tracking}


async def get_doubts(session: SessionOf) -> list[str]:
    """The sagas that have no end, and the step whose outcome nobody knows."""
    return [line async for line in in_doubt(AsyncSagaLog(session))]


def _refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 409)


def _doubtful(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": f"{error}; send the request again with the same Idempotency-Key"}, 502)
