"""What stands for the payment provider: another system, with a memory of its own."""

from __future__ import annotations

from pydantic import BaseModel


class ChargeCard(BaseModel):
    """What the shop asks of it."""

    card: str
    pence: int


class CardCharged(BaseModel):
    """What it answers."""

    receipt: str


class CardDeclined(Exception):
    """It answers that nothing was charged."""


class BankUnreachable(Exception):
    """It gives no answer: nobody knows whether the card was charged."""


class Bank:
    """Charges a card once for each key, however often it is asked, as payment providers do.

    Attributes:
        charged: The charges by their key.
    """

    def __init__(self) -> None:
        self.charged: dict[str, ChargeCard] = {}

    def charge(self, charge: ChargeCard, key: str) -> CardCharged:
        """Charge the card.

        Raises:
            CardDeclined: Nothing was charged.
            BankUnreachable: It is not known.
        """
        if charge.card == "declined":
            raise CardDeclined("the card was declined")
        self.charged[key] = charge
        return CardCharged(receipt=f"receipt for {key}")
