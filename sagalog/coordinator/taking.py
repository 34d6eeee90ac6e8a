"""Taking sagas over: those that a dead process left, and those that were submitted for any worker."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from sagalog.coordinator.core import Core, always, deadline_of
from sagalog.coordinator.definition import Definition
from sagalog.coordinator.effects import Write
from sagalog.coordinator.recover import (
    Left,
    Recovery,
    RecoveryReport,
    finish_claimed,
    forward_or_back,
    refuse_unknown,
)
from sagalog.coordinator.run import Run
from sagalog.coordinator.saga import execute
from sagalog.errors import InvalidTransition, LeaseLost, LogUnavailable, PayloadError
from sagalog.log import claiming, reading, reopening
from sagalog.log.claiming import Candidate
from sagalog.log.database import Operation
from sagalog.log.faults import LOCK_HELD
from sagalog.log.fencing import Fence
from sagalog.moments import now_ms
from sagalog.payload import check_limit

_log = logging.getLogger("sagalog")
_PAGE = 1000
_FAIRNESS = 4
_LOOK_BACK_MS = 1000
_FORGOTTEN_AFTER_MS, _FORGETS_EACH_MS = 24 * 3600 * 1000, 3600 * 1000
_FIRST_PAUSE_MS, _LONGEST_PAUSE_MS = 500, 30_000


class Job(NamedTuple):
    """What a worker may do next."""

    seen: Candidate
    submitted: bool


@dataclass(eq=False)
class TakingCore(Core):
    """A core that also takes over what it did not start itself.

    Attributes:
        _not_before: Until when nothing can be done for a saga, for a step may still be under way.
        _pauses: Until when a worker leaves a saga alone for which nothing could be done; `recover` tries it at once.
        _look_back_at: When a worker looks for sagas that were left before it looks for submitted ones.
        _forget_at: When a worker forgets executors that are gone for long.
    """

    _not_before: dict[int, int] = field(default_factory=dict)
    _pauses: dict[int, int] = field(default_factory=dict)
    _look_back_at: int = 0
    _forget_at: int = 0

    async def recover(self, limit: int | None, *, adopt: bool) -> RecoveryReport:
        """Take over what was left, one saga after the other."""
        check_limit(limit, "recover")
        report = RecoveryReport()
        await self.check_environment()
        await self.registered()
        done = 0
        passed: set[int] = set()
        while limit is None or done < limit:
            page, full = await self.claimable(report, passed, adopt=adopt, most=_PAGE)
            for seen in page:
                if limit is not None and done >= limit:
                    break
                passed.add(seen.saga_id)
                done += await self.recover_one(seen, report, adopt=adopt)
            if not full:
                break
        if not adopt:
            for saga_id, name in await Write(claiming.unowned(_PAGE)):
                report.left.append(Left(saga_id, name, "it never belonged to a coordinator; adopt=True takes it"))
        await Write(claiming.forget_dead(_FORGOTTEN_AFTER_MS))
        return report

    async def retry(self, saga_id: int, *, note: str, actor: str, again: bool) -> Any:
        """Give a saga that needs a person back, and bring it to an end here."""
        await self.check_environment()
        await self.registered()
        record = await Write(reading.stored(saga_id, "retry"))
        self.definition_of(record.name)
        recovery = Recovery(
            # The person's word is one take-over, however few are allowed.
            self.policy,
            self.definitions,
            self.on_crash,
            max(1, self.max_recoveries),
            again,
        )
        target = forward_or_back(recovery, record)
        refuse_unknown(recovery, record)
        fence = Fence(saga_id, (record.epoch or 0) + 1)
        reopened = partial(reopening.reopen, fence, target, note=note, actor=actor, again=again)
        try:
            if not await self.claimed(reopened, fence):
                raise InvalidTransition(
                    "retry",
                    "another call of this process gives it back",
                    saga_id=saga_id,
                    found=record.state,
                    hint="get() shows how that went.",
                )
            end = await self.owning(fence, finish_claimed, recovery, fence, self.executor.executor_id)
        except BaseException as error:
            if not isinstance(error, Exception):
                self.let_go(fence)
            raise
        if end is not None and end.waits is not None:
            _log.warning("saga %s (%s) waits: %s; recover() goes on with it", saga_id, record.name, end.waits)
        return await Write(reading.get(saga_id))

    async def claimable(
        self, report: RecoveryReport, passed: set[int], *, adopt: bool, most: int
    ) -> tuple[list[Candidate], bool]:
        """Sagas that this process can take over now, and whether there may be more."""
        now = now_ms()
        _forget_past(self._not_before, now)
        limit = most + len(passed) + len(self._not_before) + len(self.executor.active)
        found = await Write(claiming.candidates(self.executor.executor_id, limit, adopt=adopt))
        coming = bool(self.executor.coming)  # looked at before `active`, into which what comes is moved
        page = []
        for seen in found:
            if seen.saga_id in passed or seen.saga_id in self.executor.active:
                continue
            if seen.own and coming:
                passed.add(seen.saga_id)
                continue
            if seen.name not in self.definitions:
                passed.add(seen.saga_id)
                report.left.append(Left(seen.saga_id, seen.name, f"no saga {seen.name!r} is registered here"))
            elif (until := self._not_before.get(seen.saga_id, 0)) > now:
                passed.add(seen.saga_id)
                report.left.append(Left(seen.saga_id, seen.name, "a step may still be under way", until))
            else:
                page.append(seen)
        return page[:most], len(found) >= limit or len(page) > most

    async def recover_one(
        self, seen: Candidate, report: RecoveryReport, *, adopt: bool, wanted: Callable[[], bool] = always
    ) -> int:
        """Take one saga over; whatever it raises is noted, and the others go on.

        Returns:
            1 if it was taken over and not left again, else 0.
        """
        recovery = Recovery(self.policy, self.definitions, self.on_crash, self.max_recoveries)
        fence = Fence(seen.saga_id, seen.epoch + 1)
        try:
            won = await self._wins(partial(claiming.claim, seen, adopt=adopt), fence, wanted)
            if won is None:
                report.left.append(Left(seen.saga_id, seen.name, "another transaction holds its row"))
            if not won:
                return 0
            end = await self.owning(fence, finish_claimed, recovery, fence, self.executor.executor_id)
        except LeaseLost:
            return 0
        except BaseException as error:
            self.pause(seen.saga_id, min(_LONGEST_PAUSE_MS, _FIRST_PAUSE_MS << min(seen.recoveries, 16)))
            if not isinstance(error, Exception):
                self.let_go(fence)
                raise
            report.errors[seen.saga_id] = f"{type(error).__name__}: {error}"
            return 1
        if end is None:
            return 0
        self._not_before.pop(seen.saga_id, None)
        if end.until is not None:
            self._not_before[seen.saga_id] = end.until
        elif end.waits is not None:
            self.pause(seen.saga_id, _LONGEST_PAUSE_MS)
        report.add(seen.saga_id, seen.name, end)
        return 0 if end.waits is not None else 1  # what waits would otherwise use up every limit

    async def _wins(
        self, claim: Callable[[str], Operation[bool]], fence: Fence, wanted: Callable[[], bool]
    ) -> bool | None:
        """Whether a claim won; None if another transaction holds the saga's row."""
        try:
            return await self.claimed(claim, fence, wanted)
        except LogUnavailable as error:
            self.pause(fence.saga_id)  # a worker would come back to it at once
            if error.found != LOCK_HELD:
                raise
            return None

    async def find_work(self, free: int, busy: Set[int]) -> list[Job]:
        """At most `free` sagas that a worker could start or take over now; others may be faster."""
        await self.registered()
        now = _steady_ms()
        left: list[Job] | None = None
        reserved = 0
        if now >= self._look_back_at:
            # However many are submitted, some of what was left is undone as well.
            self._look_back_at = now + _LOOK_BACK_MS
            await self._forget_dead(now)
            left = await self._left_over(free, busy)
            reserved = min(len(left), max(1, free // 2))
        submitted = _some(await self._submitted(free - reserved, busy), free - reserved)
        jobs = [Job(seen, submitted=True) for seen in submitted]
        if left is None and len(jobs) < free:
            left = await self._left_over(free - len(jobs), busy)
        return jobs + (left or [])[: free - len(jobs)]

    async def _forget_dead(self, now: int) -> None:
        if now >= self._forget_at:
            self._forget_at = now + _FORGETS_EACH_MS
            await Write(claiming.forget_dead(_FORGOTTEN_AFTER_MS))

    def _paused(self) -> set[int]:
        """The sagas that a worker leaves alone for now."""
        _forget_past(self._pauses, _steady_ms())
        return set(self._pauses)

    def pause(self, saga_id: int, milliseconds: int = _FIRST_PAUSE_MS) -> None:
        """A worker leaves a saga alone for so long."""
        self._pauses[saga_id] = _steady_ms() + milliseconds

    async def _left_over(self, most: int, busy: Set[int]) -> list[Job]:
        passed = self._paused() | busy
        width = most * _FAIRNESS
        page, full = await self.claimable(RecoveryReport(), passed, adopt=False, most=width)
        while full and not page:
            width *= _FAIRNESS  # each look reads again what was passed over
            page, full = await self.claimable(RecoveryReport(), passed, adopt=False, most=width)
        return [Job(seen, submitted=False) for seen in _some(page, most)]

    async def _submitted(self, free: int, busy: Set[int]) -> list[Candidate]:
        """Submitted sagas that this process knows, however many stand before them that it does not."""
        passed = self._paused() | busy
        limit = free * _FAIRNESS + len(passed)
        while True:
            found = await Write(claiming.submitted(limit))
            known = [seen for seen in found if seen.name in self.definitions and seen.saga_id not in passed]
            if len(known) >= free or len(found) < limit:
                return known
            limit *= _FAIRNESS

    async def do(self, job: Job, wanted: Callable[[], bool]) -> None:
        """Start or recover one saga, unless another process was faster, or it is not wanted any more."""
        if job.submitted:
            await self.start_submitted(job.seen, wanted)
            return
        report = RecoveryReport()
        await self.recover_one(job.seen, report, adopt=False, wanted=wanted)
        for left in report.left:
            _log.warning("saga %s (%s) is left: %s", left.saga_id, left.name, left.reason)
        for error in report.errors.values():
            _log.error("recovery of saga %s (%s): %s", job.seen.saga_id, job.seen.name, error)

    async def start_submitted(self, seen: Candidate, wanted: Callable[[], bool]) -> Any:
        """Claim a submitted saga and run it; None if another process was faster."""
        definition = self.definitions[seen.name]
        record = await Write(reading.stored(seen.saga_id, "run"))
        try:
            input = self._input_of_submitted(definition, record)
        except PayloadError as error:
            # A process of the version that submitted it can run it.
            _log.warning("saga %s (%s) stays submitted: %s", seen.saga_id, seen.name, error)
            self.pause(seen.saga_id, _LONGEST_PAUSE_MS)
            return None
        deadline = deadline_of(definition)
        fence = Fence(seen.saga_id, seen.epoch + 1)
        claim = partial(claiming.claim_submitted, seen, version=definition.version, deadline_at=deadline)
        run = Run(self.policy, definition, fence, record.token or "", name=definition.name, deadline_at=deadline)
        try:
            if not await self._wins(claim, fence, wanted):
                return None
            return await self.owning(fence, execute, run, definition, input)
        except BaseException as error:
            if not isinstance(error, Exception):
                self.let_go(fence)
            raise

    def _input_of_submitted(self, definition: Definition, record: reading.Stored) -> Any:
        """The input of a submitted saga.

        Raises:
            PayloadError: This process must not run it: a later version submitted it, or its input cannot be read here.
        """
        if (record.version or 0) > definition.version:
            raise PayloadError(
                f"run of saga {record.saga_id}",
                f"version {record.version} of it was submitted, and this process has version {definition.version}",
                saga_id=record.saga_id,
                hint="A process of that version runs it.",
            )
        return definition.read_input(record.input_json, record.saga_id)


def _steady_ms() -> int:
    """What pauses are measured by: the wall clock may step."""
    return time.monotonic_ns() // 1_000_000


def _forget_past(until: dict[int, int], now: int) -> None:
    """Other threads write to it meanwhile."""
    for saga_id, moment in until.copy().items():
        if moment <= now:
            until.pop(saga_id, None)


def _some(page: list[Candidate], most: int) -> list[Candidate]:
    """Some of the first, at random, so that many workers do not all reach for the same."""
    near = page[: most * _FAIRNESS]
    return near if len(near) <= most else random.sample(near, most)
