"""The shop over HTTP."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, current_app, request
from pydantic import ValidationError

from flask_shop.bank import BankUnreachable
from flask_shop.models import Order, db
from flask_shop.orders import OrderRequest, SoldOut, place
from sagalog import KeyConflict

views = Blueprint("views", __name__)


@views.post("/orders")
def post_order() -> tuple[dict[str, Any], int]:
    """Buy something."""
    wanted = OrderRequest.model_validate(request.get_json())
    order = place(current_app.extensions["bank"], wanted, request.headers.get("Idempotency-Key"))
    return _shown(order), 201


@views.get("/orders/<int:order_id>")
def get_order(order_id: int) -> dict[str, Any]:
    """See how far it is."""
    return _shown(db.get_or_404(Order, order_id))


def _shown(order: Order) -> dict[str, Any]:
    steps = {step.name: step.state for step in order.saga.steps}
    return {"id": order.id, "status": order.status, "saga": order.saga.state, "steps": steps}


@views.errorhandler(SoldOut)
@views.errorhandler(KeyConflict)
def _refused(error: Exception) -> tuple[dict[str, str], int]:
    return {"error": str(error)}, 409


@views.errorhandler(ValidationError)
def _invalid(error: Exception) -> tuple[dict[str, str], int]:
    return {"error": str(error)}, 422


@views.errorhandler(BankUnreachable)
def _doubtful(error: Exception) -> tuple[dict[str, str], int]:
    return {"error": f"{error}; send the request again with the same Idempotency-Key"}, 502
