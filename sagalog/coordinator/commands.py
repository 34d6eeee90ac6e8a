"""What users write and receive around a command: its result's type, what a handler is told, how often it is tried."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from sagalog.moments import is_wait

E = TypeVar("E")


class Command(BaseModel, Generic[E]):
    """A base for commands that says what their handler returns: ``class ReserveStock(Command[StockReserved])``.

    It types ``ctx.dispatch``. A command need not derive from it: any Pydantic model or dataclass will do.
    """

    model_config = ConfigDict(frozen=True)


@dataclass(frozen=True, slots=True)
class Compensates:
    """The forward step that an undo undoes.

    Attributes:
        step_index: Its place in the saga.
        idempotency_key: The key that its command was sent under.
    """

    step_index: int
    idempotency_key: str


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What a handler may want to know of the try that it is called for.

    Attributes:
        saga_id: The saga.
        step_index: The row of the log that records this command.
        attempt: 1 for the first try in this process, then 2, ...
        deadline: When the handler's time is up.
        idempotency_key: The same on every try of this step, in whichever process, after whichever crash; no other
            step has it. Send it along, so that the other side can recognise a repetition.
        compensates: In an undo, the forward step that it undoes (the newest, if one command undoes several).
    """

    saga_id: int
    step_index: int
    attempt: int
    deadline: datetime
    idempotency_key: str
    compensates: Compensates | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """How a command whose outcome is not known is tried again, under the same idempotency key.

    Attributes:
        attempts: At most so many tries in one process; recovery begins anew.
        initial: Seconds to wait before the second try.
        factor: What each further wait is multiplied by.
        maximum: The longest wait, in seconds.
        jitter: The part of a wait that is drawn at random, 0 to 1, so that many callers do not come at once.
        within: A step whose first try is older than this is not tried again: the outside forgets keys.
    """

    attempts: int = 5
    initial: float = 0.1
    factor: float = 2.0
    maximum: float = 30.0
    jitter: float = 0.5
    within: timedelta = timedelta(hours=23)

    def __post_init__(self) -> None:
        if type(self.attempts) is not int or self.attempts < 1:
            raise ValueError(f"Retry(attempts={self.attempts!r}): an int, for a command is tried at least once")
        waits = (self.initial, self.maximum, self.factor, self.jitter)
        if not all(is_wait(one) for one in waits) or self.factor < 1 or self.jitter > 1:
            raise ValueError(f"{self}: waits are seconds from 0, factor is at least 1, jitter is 0 to 1")
        if not isinstance(self.within, timedelta) or self.within <= timedelta(0):
            raise ValueError(f"Retry(within={self.within!r}): a timedelta, or a step could never be tried again")

    def wait_before(self, attempt: int) -> float:
        """Seconds to wait before a try.

        Args:
            attempt: 2 for the second, ...
        """
        longest = min(self.maximum, self.initial * self.factor ** min(attempt - 2, 64))
        return longest * (1 - self.jitter * random.random())
