"""What a matrix prints: each bad case as what replays it, and in the end how many there were of each state."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections import Counter

from sagalog.testing import Crash


def add_replay(parser: ArgumentParser) -> None:
    """The arguments that replay one case."""
    parser.add_argument("--scenario", help="only this one: its fields with commas")
    parser.add_argument("--only", type=_stops, help="only these stops")


def _stops(words: str) -> tuple[int, ...]:
    return tuple(int(number) for number in words.split(","))


class Tally:
    """Counts the cases of one run."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._states: Counter[str] = Counter()
        self._bad = 0

    def judge(self, words: str, crash: Crash, problems: list[str]) -> None:
        """Count a case of the scenario of these words; print it if it is bad."""
        self._states[crash.saga.state if crash.saga else "nothing written"] += 1
        if problems:
            self._bad += 1
            stops = ",".join(map(str, crash.stops))
            print(f'--scenario "{words}" --only {stops}: {crash}: {problems}', flush=True)  # noqa: T201

    def told(self, scenarios: int) -> int:
        """Print the sum; the process's exit status."""
        cases, took = self._states.total(), time.monotonic() - self._began
        print(f"{scenarios} scenarios, {cases} cases, {self._bad} bad, {took:.0f} s: {dict(self._states)}")  # noqa: T201
        return min(self._bad, 1)
