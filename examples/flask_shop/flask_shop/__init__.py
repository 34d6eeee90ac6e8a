"""A shop that sells over HTTP: `flask --app flask_shop run`."""

from __future__ import annotations

from flask import Flask

from flask_shop import commands
from flask_shop.bank import Bank
from flask_shop.models import database_url, db
from flask_shop.views import views
from sagalog import migrations


def create_app(url: str | None = None, bank: Bank | None = None) -> Flask:
    """Build the application; its tables must be there: `alembic upgrade head`.

    Args:
        url: The database; by default the one in SHOP_URL.
        bank: Who charges cards.

    Raises:
        SchemaMissing, SchemaOutOfDate, SchemaTooNew: The database needs `alembic upgrade head`, or a newer shop.
    """
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url or database_url()
    app.extensions["bank"] = bank or Bank()
    db.init_app(app)
    app.register_blueprint(views)
    for command in (commands.stock, commands.doubts, commands.settle):
        app.cli.add_command(command)
    with app.app_context():
        migrations.check(db.engine)
    return app
