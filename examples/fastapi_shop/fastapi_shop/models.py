"""The shop's own tables."""

from __future__ import annotations

import os

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from sagalog import Saga


def database_url() -> str:
    """The database of the application and of its migrations: SHOP_URL, or shop.db here."""
    return os.environ.get("SHOP_URL") or "sqlite+aiosqlite:///shop.db"


class Base(DeclarativeBase):
    """What the shop's models are made from."""


class Product(Base):
    """What is for sale."""

    __tablename__ = "product"

    sku: Mapped[str] = mapped_column(primary_key=True)
    pence: Mapped[int]
    stock: Mapped[int]


class Order(Base):
    """What was bought, and the saga that carries it out."""

    __tablename__ = "shop_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str] = mapped_column(ForeignKey(Product.sku))
    quantity: Mapped[int]
    status: Mapped[str]
    saga_id: Mapped[int] = mapped_column(ForeignKey(Saga.saga_id), unique=True)

    # By the class: the name "Saga" alone is unknown in the shop's own registry. Queries that need it load it.
    saga: Mapped[Saga] = relationship(Saga, lazy="raise")


class Parcel(Base):
    """What is on its way."""

    __tablename__ = "parcel"

    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id), primary_key=True)
    tracking: Mapped[str]
