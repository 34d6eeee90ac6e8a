"""What stands for the courier: another system, with a memory of its own."""

from __future__ import annotations


class Courier:
    """Books a parcel once for each key, however often it is asked.

    Attributes:
        booked: The tracking numbers by their key.
        cancelled: Those of them that were taken back.
    """

    def __init__(self) -> None:
        self.booked: dict[str, str] = {}
        self.cancelled: list[str] = []

    async def book(self, order: int, key: str) -> str:
        """Have it fetched; its tracking number."""
        return self.booked.setdefault(key, f"P-{order}")

    async def cancel(self, tracking: str) -> None:
        """Do not fetch it; to be asked again is harmless."""
        if tracking not in self.cancelled:
            self.cancelled.append(tracking)
