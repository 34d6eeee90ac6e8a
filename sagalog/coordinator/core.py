"""What both coordinators do, as flows: start a saga, submit one, wait for one, recover those that were left."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from sagalog.coordinator.definition import Definition
from sagalog.coordinator.effects import Sleep, Write
from sagalog.coordinator.lease import Executor
from sagalog.coordinator.recover import Left, OnCrash, Recovery, RecoveryReport, finish_claimed, forward_or_back
from sagalog.coordinator.run import Policy, Run, again
from sagalog.coordinator.saga import execute
from sagalog.errors import (
    LeaseLost,
    LogUnavailable,
    PayloadError,
    SagaFailed,
    SagaInProgress,
    UnusableHandler,
    WrongEnvironment,
)
from sagalog.log import claiming, owning, reading, reopening
from sagalog.log.claiming import Candidate
from sagalog.log.database import Operation
from sagalog.log.owning import Fence
from sagalog.log.sagas import Drawn, new_token
from sagalog.moments import now_ms, to_ms
from sagalog.payload import check_text, encode
from sagalog.states import SagaState

T = TypeVar("T")
_log = logging.getLogger("sagalog")
_PAGE = 1000
_FAIRNESS = 4
_FORGOTTEN_AFTER_MS = 24 * 3600 * 1000
_FIRST_PAUSE_MS, _LONGEST_PAUSE_MS = 500, 30_000
_FIRST_LOOK, _LONGEST_LOOK = 0.01, 0.5
_ENDED = (SagaState.COMPENSATED, SagaState.FAILED_COMPENSATION, SagaState.ABANDONED)


class Job(NamedTuple):
    """What a worker may do next."""

    seen: Candidate
    submitted: bool


class Core:
    """A coordinator's settings and flows."""

    def __init__(
        self,
        policy: Policy,
        executor: Executor,
        *,
        on_crash: OnCrash,
        max_recoveries: int,
        environment: str | None,
    ) -> None:
        self.policy = policy
        self.executor = executor
        self.on_crash: OnCrash = on_crash
        self.max_recoveries = max_recoveries
        self.environment = environment
        self.definitions: dict[str, Definition] = {}
        self._of_function: dict[Any, Definition] = {}
        self._not_before: dict[int, int] = {}
        self._pauses: dict[int, int] = {}
        """Until when a worker leaves a saga alone for which nothing could be done; `recover` tries it at once."""

    # Definitions

    def add(self, definition: Definition) -> None:
        """Register a saga.

        Raises:
            UnusableHandler: The name is taken.
        """
        if definition.name in self.definitions:
            raise UnusableHandler(
                f"saga {definition.name!r}", "a saga of that name is registered already", hint="Give another name."
            )
        self.definitions[definition.name] = definition
        self._of_function[definition.function] = definition

    def definition_of(self, saga: Callable[..., Any] | str) -> Definition:
        """The definition of a saga's function, or of a name.

        Raises:
            UnusableHandler: It is not registered here.
        """
        found = self.definitions.get(saga) if isinstance(saga, str) else self._of_function.get(saga)
        if found is None:
            shown = saga if isinstance(saga, str) else getattr(saga, "__qualname__", repr(saga))
            raise UnusableHandler(
                f"saga {shown!r}", "it is not registered with this coordinator", hint='Use @coordinator.saga("name").'
            )
        return found

    # Starting

    async def registered(self) -> None:
        """Hold the lease before anything is owned under it."""
        if self.executor.is_due():
            if self.environment is not None and not self.executor.is_registered:
                await Write(claiming.environment(self.environment))  # a copy of this log will know it by that
            await Write(self.executor.renewal())
            self.executor.renewed()

    async def run(self, definition: Definition, input: Any, key: str | None) -> Any:
        """Start a saga and bring it to its end."""
        text = _input_text(definition, input, key)
        await self.registered()
        token = new_token()
        deadline = _deadline(definition)
        beginning = owning.begin_saga(
            definition.name,
            text,
            key=key,
            version=definition.version,
            executor_id=self.executor.executor_id,
            deadline_at=deadline,
            token=token,
        )
        try:
            begun = await self._taking(
                _written(beginning), lambda drawn: Fence(drawn.saga_id, 1) if drawn.created else None
            )
        except BaseException as error:
            if isinstance(error, LogUnavailable) or not isinstance(error, Exception | GeneratorExit):
                await self._not_begun(token)
            raise
        if not begun.created:
            return await self.outcome(definition, begun.saga_id)
        fence = Fence(begun.saga_id, 1)
        run = Run(self.policy, definition, fence, token, name=definition.name, deadline_at=deadline)
        return await self.owning(fence, execute, run, definition, input)

    async def _not_begun(self, token: str) -> None:
        """It may be in the log all the same, and nobody here works on it."""
        try:
            await Write(owning.release_begun(token, self.executor.executor_id))
        except Exception as error:
            _log.warning("a saga may have been begun, and could not be given back: %s", error)

    async def _taking(self, writing: Awaitable[T], fence_of: Callable[[T], Fence | None]) -> T:
        """Make a saga this process's; until the answer is here, no other thread takes it for one that was left."""
        executor, ticket = self.executor, object()
        coming, active = executor.coming, executor.active
        coming.add(ticket)
        try:
            answer: T = await writing
            fence = fence_of(answer)
            if fence is not None:
                active[fence.saga_id] = fence
            return answer
        finally:
            coming.discard(ticket)

    async def _claimed(self, claim: Operation[bool], fence: Fence) -> bool:
        try:
            return await self._taking(Write(claim), lambda won: fence if won else None)
        except LogUnavailable:
            self.executor.strand(fence)  # it may be this process's all the same
            raise

    async def owning(self, fence: Fence, flow: Callable[..., Any], *args: Any) -> Any:
        """Work on a saga that this process owns; what it stops working on is given back for recovery."""
        active = self.executor.active
        active[fence.saga_id] = fence
        try:
            return await flow(*args)
        except GeneratorExit:
            raise
        except LogUnavailable:
            self.executor.strand(fence)
            raise
        except BaseException as error:
            if not (isinstance(error, SagaFailed) and error.outcome in _ENDED):
                await self._give_back(fence)
            raise
        finally:
            if active.get(fence.saga_id) is fence:
                del active[fence.saga_id]

    async def _give_back(self, fence: Fence) -> None:
        try:
            # In a forked child this changes nothing: the saga names the parent.
            await Write(owning.release(fence, self.executor.executor_id, counted=True))
        except Exception:
            self.executor.strand(fence)

    def submission(
        self, definition: Definition, input: Any, key: str | None, run_at: datetime | None
    ) -> Operation[Drawn]:
        """What submits a saga, in whichever transaction."""
        text = _input_text(definition, input, key)
        definition.check_input(input, text)
        return owning.begin_saga(
            definition.name,
            text,
            key=key,
            version=definition.version,
            executor_id=None,
            run_at=None if run_at is None else _moment(run_at, definition),
        )

    # Results

    async def outcome(self, definition: Definition | None, saga_id: int) -> Any:
        """A recorded result.

        Raises:
            SagaFailed: It did not complete.
            SagaInProgress: It has not ended.
        """
        record = await Write(reading.get(saga_id))
        if record.state == SagaState.COMPLETED:
            return record.result if definition is None else definition.read_result(record.result_json, saga_id)
        if record.state in _ENDED:
            raise SagaFailed(saga_id, record.name, SagaState(record.state), record.failure_reason)
        raise SagaInProgress(saga_id, record.name, record.state)

    async def wait(self, saga_id: int, seconds: float | None) -> Any:
        """The result of a saga, whoever runs it."""
        until = None if seconds is None else time.monotonic() + seconds
        pause = _FIRST_LOOK
        name = (await Write(reading.get(saga_id))).name
        while True:
            try:
                return await self.outcome(self.definitions.get(name), saga_id)
            except SagaInProgress as running:
                left = pause if until is None else until - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"saga {saga_id} ({name}) is {running.found!r} after {seconds} s") from running
            await Sleep(min(pause, left))
            pause = min(_LONGEST_LOOK, pause * 1.5)

    # Recovery

    async def check_environment(self) -> None:
        """A copy of production must not act on the world.

        Raises:
            WrongEnvironment: The log remembers another one.
        """
        remembered = await Write(claiming.environment(self.environment))
        if remembered != self.environment:
            raise WrongEnvironment(self.environment, str(remembered))

    async def recover(self, limit: int | None, *, adopt: bool) -> RecoveryReport:
        """Take over what was left, one saga after the other."""
        report = RecoveryReport()
        await self.check_environment()
        await self.registered()
        done = 0
        passed: set[int] = set()
        while limit is None or done < limit:
            page, full = await self.claimable(report, passed, adopt=adopt)
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
        record = await Write(reading.get(saga_id))
        if record.name not in self.definitions:
            self.definition_of(record.name)
        recovery = Recovery(
            self.policy, self.definitions, self.on_crash, self.max_recoveries, self.executor.executor_id, again
        )
        target = forward_or_back(recovery, record)
        epoch = await Write(reopening.reopen(saga_id, target, note=note, actor=actor, again=again))
        seen = Candidate(saga_id, epoch, record.name)
        fence = Fence(saga_id, epoch + 1)
        if await self._claimed(claiming.claim(seen, self.executor.executor_id, adopt=False), fence):
            await self.owning(fence, finish_claimed, recovery, fence)
        return await Write(reading.get(saga_id))

    async def claimable(
        self, report: RecoveryReport, passed: set[int], *, adopt: bool, most: int = _PAGE
    ) -> tuple[list[Candidate], bool]:
        """Sagas that this process can take over now, and whether there may be more."""
        now = now_ms()
        self._not_before = {saga_id: until for saga_id, until in self._not_before.items() if until > now}
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
        return page[:most], len(found) >= limit

    async def recover_one(self, seen: Candidate, report: RecoveryReport, *, adopt: bool) -> int:
        """Take one saga over; whatever it raises is noted, and the others go on.

        Returns:
            1 if it was taken over, else 0.
        """
        executor_id = self.executor.executor_id
        recovery = Recovery(self.policy, self.definitions, self.on_crash, self.max_recoveries, executor_id)
        fence = Fence(seen.saga_id, seen.epoch + 1)
        try:
            if not await self._claimed(claiming.claim(seen, executor_id, adopt=adopt), fence):
                return 0
            end = await self.owning(fence, finish_claimed, recovery, fence)
        except LeaseLost:
            return 0
        except Exception as error:
            report.errors[seen.saga_id] = f"{type(error).__name__}: {error}"
            self._pauses[seen.saga_id] = now_ms() + min(_LONGEST_PAUSE_MS, _FIRST_PAUSE_MS << min(seen.recoveries, 16))
            return 1
        if end is None:
            return 0
        self._not_before.pop(seen.saga_id, None)
        if end.until is not None:
            self._not_before[seen.saga_id] = end.until
        elif end.waits is not None:
            self._pauses[seen.saga_id] = now_ms() + _LONGEST_PAUSE_MS
        report.add(seen.saga_id, seen.name, end)
        return 1

    async def find_work(self, free: int, busy: set[int]) -> list[Job]:
        """At most `free` sagas that a worker could start or take over now; others may be faster."""
        await self.registered()
        jobs = [Job(seen, submitted=True) for seen in _some(await self._submitted(free, busy), free)]
        if len(jobs) < free:
            now = now_ms()
            self._pauses = {saga_id: until for saga_id, until in self._pauses.items() if until > now}
            passed = busy | self._pauses.keys()
            most = (free - len(jobs)) * _FAIRNESS
            page, full = await self.claimable(RecoveryReport(), passed, adopt=False, most=most)
            while full and not page:
                page, full = await self.claimable(RecoveryReport(), passed, adopt=False, most=most)
            jobs += [Job(seen, submitted=False) for seen in _some(page, free - len(jobs))]
        return jobs

    async def _submitted(self, free: int, busy: set[int]) -> list[Candidate]:
        """Submitted sagas that this process knows, however many stand before them that it does not."""
        limit = free * _FAIRNESS + len(busy)
        while True:
            found = await Write(claiming.submitted(limit))
            known = [seen for seen in found if seen.name in self.definitions and seen.saga_id not in busy]
            if len(known) >= free or len(found) < limit:
                return known
            limit *= _FAIRNESS

    async def do(self, job: Job) -> None:
        """Start or recover one saga, unless another process was faster."""
        if job.submitted:
            await self.start_submitted(job.seen)
            return
        report = RecoveryReport()
        await self.recover_one(job.seen, report, adopt=False)
        for error in report.errors.values():
            _log.error("recovery of saga %s (%s): %s", job.seen.saga_id, job.seen.name, error)

    async def start_submitted(self, seen: Candidate) -> Any:
        """Claim a submitted saga and run it; None if another process was faster."""
        definition = self.definitions[seen.name]
        deadline = _deadline(definition)
        fence = Fence(seen.saga_id, seen.epoch + 1)
        claim = claiming.claim_submitted(seen, self.executor.executor_id, deadline)
        if not await self._claimed(claim, fence):
            return None
        return await self.owning(fence, self._run_claimed, fence, definition, deadline)

    async def _run_claimed(self, fence: Fence, definition: Definition, deadline: int | None) -> Any:
        record = await Write(reading.get(fence.saga_id))
        run = Run(self.policy, definition, fence, record.token or "", name=definition.name, deadline_at=deadline)
        try:
            input = definition.read_input(record.input_json, fence.saga_id)
        except PayloadError as error:
            await run.written(owning.compensated(fence, f"its input cannot be read: {error}"))
            raise
        return await execute(run, definition, input)


async def _written(operation: Operation[T]) -> T:
    """What may be repeated: a start finds its own saga again by its token."""
    try:
        return await Write(operation)  # type: ignore[no-any-return]
    except LogUnavailable:
        return await again(operation)


def _some(page: list[Candidate], most: int) -> list[Candidate]:
    """Some of the first, at random, so that many workers do not all reach for the same."""
    near = page[: most * _FAIRNESS]
    return near if len(near) <= most else random.sample(near, most)


def _input_text(definition: Definition, input: Any, key: str | None) -> str:
    if key is not None:
        check_text(key, "key", f"run of {definition.name}")
    return encode(input, f"the input of {definition.name}")


def _deadline(definition: Definition) -> int | None:
    return None if definition.timeout is None else now_ms() + int(definition.timeout * 1000)


def _moment(moment: datetime, definition: Definition) -> int:
    try:
        return to_ms(moment)
    except (ValueError, AttributeError, TypeError):
        raise PayloadError(
            f"submit of {definition.name}", "run_at is no aware datetime", hint="Give one with tzinfo=UTC."
        ) from None
