"""The shop on the command line: `flask --app flask_shop COMMAND`."""

from __future__ import annotations

import click
from flask import current_app
from flask.cli import with_appcontext

from flask_shop.models import Product, db
from flask_shop.orders import settle_all
from flask_shop.report import in_doubt
from sagalog import SagaLog


@click.command("stock")
@click.argument("sku")
@click.argument("quantity", type=int)
@click.argument("pence", type=int)
@with_appcontext
def stock(sku: str, quantity: int, pence: int) -> None:
    """Put something up for sale."""
    db.session.merge(Product(sku=sku, stock=quantity, pence=pence))
    db.session.commit()


@click.command("doubts")
@with_appcontext
def doubts() -> None:
    """List the sagas that have no end, and the step whose outcome nobody knows."""
    for line in in_doubt(SagaLog(db.engine)):
        click.echo(line)


@click.command("settle")
@with_appcontext
def settle() -> None:
    """Finish or undo the orders that an interrupted request left, as after a crash."""
    for order in settle_all(current_app.extensions["bank"]):
        click.echo(f"order {order.id} is {order.status}")
