"""Sagas and their troubles: each of one to four steps, with every failure, in both modes and under all policies."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

UNDOABLE, PIVOT, READ_ONLY = "upr"
EACH, ALL, BY_HAND = "each", "all", "by-hand"


@dataclass(frozen=True)
class Scenario:
    """One saga and its trouble.

    Attributes:
        steps: How many.
        trouble: "" or what goes wrong: raises (the function), rejects, before, after, timeout (the handler of step
            `at`), undo_rejects, undo_raises (the undo of it).
        at: The step concerned.
        on_crash: The coordinator's.
        on_unknown: The handlers'.
        retried: Whether the handlers are tried again.
        kinds: A letter for each step: u is undone by a command, p is a pivot, r is read-only. "" means all u.
        shape: How the function asks for them: each after the other, all side by side, or each, the last of them then
            undone by hand.
    """

    steps: int
    trouble: str
    at: int
    on_crash: str
    on_unknown: str
    retried: bool
    kinds: str = ""
    shape: str = EACH

    @classmethod
    def read(cls, words: str) -> Scenario:
        """One of `words`."""
        steps, trouble, at, on_crash, on_unknown, retried, *others = words.split(",")
        return cls(int(steps), trouble, int(at), on_crash, on_unknown, retried == "True", *others)

    @property
    def words(self) -> str:
        """Its fields with commas, for a command line."""
        return ",".join(map(str, dataclasses.astuple(self)))

    def kind(self, place: int) -> str:
        """What kind of step it is."""
        return self.kinds[place] if self.kinds else UNDOABLE

    @property
    def undone_by_hand(self) -> set[int]:
        """The steps that the function itself undoes, once all are done."""
        last = self.steps - 1
        return {last} if self.shape == BY_HAND and self.kind(last) == UNDOABLE else set()

    @property
    def raises_after(self) -> int | None:
        """The step after which the function raises, or None."""
        if self.trouble.startswith("undo_"):
            return self.steps - 1
        return self.at if self.trouble == "raises" else None

    # What its policies say of a person

    @property
    def may_need_a_person(self) -> bool:
        """Whether a run of it may end with a person."""
        return self.cannot_be_undone or self._stays_in_doubt or self._cannot_go_back

    @property
    def cannot_be_undone(self) -> bool:
        """Whether an undo of it fails."""
        return self.trouble.startswith("undo_")

    @property
    def _stays_in_doubt(self) -> bool:
        """Whether a step of it may end in doubt, with nobody allowed to undo it."""
        policies = {UNDOABLE: self.on_unknown, PIVOT: "stop", READ_ONLY: "none"}
        return any(policies[self.kind(place)] == "stop" and self._doubt_lasts(place) for place in range(self.steps))

    def _doubt_lasts(self, place: int) -> bool:
        return not self.retried or (self.at == place and self.trouble in ("before", "after", "timeout"))

    @property
    def _cannot_go_back(self) -> bool:
        """Whether it may have to be undone after a pivot was reached."""
        if PIVOT not in self.kinds:
            return False
        pivot = self.kinds.index(PIVOT)
        troubled = self.trouble != "" and (self.at >= pivot or self.shape == ALL)
        return troubled or not self.retried or bool(self.undone_by_hand)


TROUBLES = ("raises", "rejects", "before", "after", "timeout", "undo_rejects", "undo_raises")
_POLICIES = tuple(itertools.product(("compensate", "resume"), ("stop", "compensate"), (False, True)))


def scenarios(most_steps: int = 4) -> Iterator[Scenario]:
    """All of steps that are undone by a command and come one after the other."""
    for steps in range(1, most_steps + 1):
        yield from _troubled(steps)


def varied(most_steps: int = 3) -> Iterator[Scenario]:
    """All with pivots and read-only steps, side by side, and undone by hand."""
    for steps in range(1, most_steps + 1):
        for kinds in _kinds(steps):
            yield from _troubled(steps, kinds)
        for shape in (ALL, BY_HAND):
            yield from _troubled(steps, "", shape)
        if steps > 1:
            yield from _troubled(steps, PIVOT + UNDOABLE * (steps - 1), ALL)


def _kinds(steps: int) -> Iterator[str]:
    """Of one and two steps every order of kinds; of more, those where one step is of another kind."""
    for letters in itertools.product("upr", repeat=steps):
        others = steps - letters.count(UNDOABLE)
        if others and (steps < 3 or others == 1):
            yield "".join(letters)


def _troubled(steps: int, kinds: str = "", shape: str = EACH) -> Iterator[Scenario]:
    for trouble, at in [("", 0), *itertools.product(TROUBLES, range(steps))]:
        if trouble.startswith("undo_") and kinds and kinds[at] != UNDOABLE:
            continue
        for on_crash, on_unknown, retried in _POLICIES:
            yield Scenario(steps, trouble, at, on_crash, on_unknown, retried, kinds, shape)
