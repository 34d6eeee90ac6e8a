"""What a matrix prints: each bad case as what replays it, how far it is, and how many there were of each state."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections import Counter

from sagalog.testing import Crash

_PROGRESS_EVERY = 60.0


def add_replay(parser: ArgumentParser) -> None:
    """The arguments that replay one case."""
    parser.add_argument("--scenario", help="only this one: its fields with commas")
    parser.add_argument("--only", type=_stops, help="only these stops")


def _stops(words: str) -> tuple[int, ...]:
    return tuple(int(number) for number in words.split(","))


class Tally:
    """Counts the cases of one run of so many scenarios."""

    def __init__(self, scenarios: int) -> None:
        self._scenarios = scenarios
        self._seen: set[str] = set()
        self._began = self._told_at = time.monotonic()
        self._states: Counter[str] = Counter()
        self._bad = 0

    def judge(self, words: str, crash: Crash, problems: list[str]) -> None:
        """Count a case of the scenario of these words; print it if it is bad."""
        self._states[crash.saga.state if crash.saga else "nothing written"] += 1
        self._seen.add(words)
        if problems:
            self._bad += 1
            stops = ",".join(map(str, crash.stops))
            print(f'--scenario "{words}" --only {stops}: {crash}: {problems}', flush=True)  # noqa: T201

        if time.monotonic() - self._told_at >= _PROGRESS_EVERY:  # a run of hours that is stopped has shown something
            self._told_at = time.monotonic()
            self._tell()

    def told(self) -> int:
        """Print the sum; the process's exit status."""
        self._tell()
        return min(self._bad, 1)

    def _tell(self) -> None:
        cases, took = self._states.total(), time.monotonic() - self._began
        of_all = f"{len(self._seen)} of {self._scenarios} scenarios"
        print(f"{of_all}, {cases} cases, {self._bad} bad, {took:.0f} s: {dict(self._states)}", flush=True)  # noqa: T201
