"""The other side of the sagas: it does what it is asked, and keeps its own account, in a file that is only appended to.

What a log says is held against that account: it is the oracle of `crash_matrix` and `kill_matrix`.
"""

from __future__ import annotations

import fcntl
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from pydantic import BaseModel

from sagalog import StepRejected
from sagalog.testing import Crash
from tests.scenarios import READ_ONLY, Scenario

LATE = 0.005
"""Seconds after its handler gave up until a late request lands."""
SETTLE = 0.02
"""What the handlers of a late outside say of that."""
LANDS_LATE = ("before", "timeout", "undo_raises")
"""The troubles whose requests get no answer."""


class Done(BaseModel):
    place: int


@dataclass(frozen=True)
class Manners:
    """How the other side behaves.

    Attributes:
        knows_keys: A repetition under one key takes effect once.
        refuses: What was undone is not done any more.
        late: What got no answer takes effect all the same, a while after its handler gave up.
        slow: Nothing has taken effect before its answer was seen: what a process that is killed had sent is under way
            until its time is over.
    """

    knows_keys: bool = True
    refuses: bool = True
    late: bool = False
    slow: bool = False


class Line(NamedTuple):
    """One of the account.

    Attributes:
        what: asked, sent (it will land), done, repeated, refused.
        verb: do or undo.
        place: The number of the step.
        key: The idempotency key.
        life: The number of the process that asked; each that took over has the next one.
        request: The number of the request.
        due: Of what was sent: when it lands, in seconds of the machine's clock.
    """

    what: str
    verb: str
    place: int
    key: str
    life: int
    request: int
    due: float = 0.0

    @classmethod
    def read(cls, line: str) -> Line:
        what, verb, place, key, life, request, due = line.split()
        return cls(what, verb, int(place), key, int(life), int(request), float(due))

    def write(self, file: IO[bytes]) -> None:
        file.write((" ".join(map(str, self)) + "\n").encode())


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """A file that is only appended to, with a lock that ends with the process."""
    with path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


@dataclass
class Outside:
    """The other side, and its account.

    Attributes:
        scenario: What goes wrong.
        path: The account's file.
        manners: How it behaves.
        life: The number of the process that asks.
    """

    scenario: Scenario
    path: Path
    manners: Manners = field(default_factory=Manners)
    life: int = 0

    def begin_anew(self) -> None:
        """Nothing happened yet."""
        self.path.write_bytes(b"")

    def account(self) -> list[Line]:
        """All its lines."""
        return [Line.read(line) for line in self.path.read_text().splitlines()]

    # What it is asked

    def do(self, place: int, key: str) -> Done:
        """Do a step."""
        here = self.scenario.trouble if self.scenario.at == place else ""
        if here == "rejects":
            raise StepRejected("no")
        late = self.manners.late and here in LANDS_LATE
        if late or here != "before":
            self._asked("do", place, key, LATE if late else None, answers=here == "")
        if here == "before":
            raise OSError("lost on the way there")
        if here == "after":
            raise OSError("lost on the way back")
        return Done(place=place)

    def undo(self, place: int, key: str) -> None:
        """Undo it."""
        here = self.scenario.trouble if self.scenario.at == place else ""
        if here == "undo_rejects":
            raise StepRejected("it cannot be undone")
        if here == "undo_raises":
            if self.manners.late:
                self._asked("undo", place, key, LATE, answers=False)
            raise OSError("the undo is lost")
        self._asked("undo", place, key, None, answers=True)

    def time_passes(self) -> None:
        """All that is under way lands."""
        with locked(self.path) as file:
            self._land(file, until=math.inf)

    def answer_seen(self) -> None:
        """What this process asked for last is no longer under way."""
        if self.manners.slow:
            with locked(self.path) as file:
                self._land(file, until=time.monotonic(), answered=self.life)

    def _asked(self, verb: str, place: int, key: str, lands_in: float | None, *, answers: bool) -> None:
        if answers and self.manners.slow:
            lands_in = math.inf
        now = time.monotonic()
        with locked(self.path) as file:
            account = self._land(file, until=now)
            number = sum(line.what == "asked" for line in account)
            request = Line("asked", verb, place, key, self.life, number)
            request.write(file)
            if lands_in is not None:
                request._replace(what="sent", due=now + lands_in).write(file)
            elif self._arrives(file, account, request) == "refused":
                raise StepRejected("it was undone already")

    def _land(self, file: IO[bytes], until: float, answered: int = 0) -> list[Line]:
        """What is due takes effect, and what was sent by a life whose answers were seen; the account afterwards."""
        account = [Line.read(line) for line in file.read().decode().splitlines()]
        arrived = {line.request for line in account if line.what in ("done", "repeated", "refused")}
        for line in [line for line in account if line.what == "sent" and line.request not in arrived]:
            if line.due <= until or (line.life == answered and line.due == math.inf):
                self._arrives(file, account, line)
        return account

    def _arrives(self, file: IO[bytes], account: list[Line], request: Line) -> str:
        done = {line.key for line in account if line.what == "done"}
        if self.manners.knows_keys and request.key in done:
            what = "repeated"
        elif self.manners.refuses and f"{request.key}:undo" in done:
            what = "refused"
        else:
            what = "done"
        arrived = request._replace(what=what, due=0.0)
        arrived.write(file)
        account.append(arrived)
        return what

    # The oracle

    def problems(self, crash: Crash) -> list[str]:
        """What is wrong with how a run ended; nothing, if the promises hold."""
        self.time_passes()
        account = self.account()
        found = [*_wrong_keys(account), *self._too_often(account, crash), *_late_owners(account)]
        effects = [(line.verb, line.place) for line in account if line.what == "done"]
        done = {place: n for n, (verb, place) in enumerate(effects) if verb == "do"}
        undone = {place: n for n, (verb, place) in enumerate(effects) if verb == "undo"}
        saga = crash.saga
        if saga is None:
            return found + (["effects without a saga"] if effects else [])
        by_hand = self.scenario.undone_by_hand
        if saga.state == "compensated":
            left = [place for place in done if self.scenario.kind(place) != READ_ONLY]
            found += [f"compensated, and {place} is done" for place in left if undone.get(place, -1) < done[place]]
        elif saga.state == "completed":
            missing = set(range(self.scenario.steps)) - set(done)
            found += [f"completed, and {missing} are not done"] if missing else []
            found += [f"completed, and {set(undone)} are undone"] if set(undone) != by_hand else []
        elif saga.state == "failed_compensation":
            found += self._needless_person(crash)
        else:
            found.append(f"unresolved: {saga.state}; {[report.left for report in crash.reports]}")
        for report in crash.reports:
            found += [f"recovery raised {error}" for error in report.errors.values()]
        return found

    def _too_often(self, account: list[Line], crash: Crash) -> list[str]:
        """What took effect more often under one key than the handlers' policies allow."""
        changes = [line for line in account if line.what == "done" and self.scenario.kind(line.place) != READ_ONLY]
        effects = Counter((line.verb, line.key) for line in changes)
        most: dict[str, float] = {"do": 1, "undo": 1}
        if not self.manners.knows_keys:
            # What may be repeated is sent again whenever its answer was lost.
            most["do"] = math.inf if self.scenario.retried else 1
            most["undo"] = math.inf if self.scenario.trouble == "undo_raises" else 1 + len(crash.points)
        return [f"{key} took effect {times} times" for (verb, key), times in effects.items() if times > most[verb]]

    def _needless_person(self, crash: Crash) -> list[str]:
        assert crash.saga is not None
        reason = crash.saga.failure_reason or ""
        if not self.scenario.may_need_a_person:
            return [f"a person is asked without need: {reason}"]
        pending = [step.step_index for step in crash.saga.steps if step.state == "pending"]
        names_it = any(f"step {index} " in reason or f"row {index} " in reason for index in pending)
        if not names_it and "refused" not in reason and "cannot be undone" not in reason:
            return [f"the reason names no step: {reason}"]
        return []


def _wrong_keys(account: list[Line]) -> list[str]:
    keys: dict[tuple[str, int], set[str]] = {}
    for line in account:
        keys.setdefault((line.verb, line.place), set()).add(line.key)
    return [
        f"{verb} {place} was asked for under {len(held)} keys" for (verb, place), held in keys.items() if len(held) > 1
    ]


def _late_owners(account: list[Line]) -> list[str]:
    """A process that lost its saga may send the one request that it was about to send, and no other."""
    asked = [line for line in account if line.what == "asked"]
    late = Counter(line.life for n, line in enumerate(asked) if any(other.life > line.life for other in asked[:n]))
    return [f"process {life} asked {times} times after another took over" for life, times in late.items() if times > 1]
