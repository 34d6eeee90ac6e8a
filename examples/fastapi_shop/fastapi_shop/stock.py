"""Put something up for sale: `python -m fastapi_shop.stock SKU QUANTITY PENCE`."""

from __future__ import annotations

import asyncio
import sys

from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from fastapi_shop.models import Product, database_url


async def main(sku: str, quantity: str, pence: str) -> None:
    """Write it into the shop's database."""
    engine = create_async_engine(database_url())
    async with AsyncSession(engine) as session:
        await session.merge(Product(sku=sku, stock=int(quantity), pence=int(pence)))
        await session.commit()
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
