"""Real processes: forked from a warm parent, killed or stopped at a point, and an account of the outside in a file.

The parent has no log open when it forks, so that a child inherits no connection.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sqlalchemy import delete, update

from sagalog import SagaFailed, SagaLog, SagaRecord
from sagalog.coordinator.effects import Effect, Invoke, Write
from sagalog.log.database import Call, Database, Kind, Operation
from sagalog.log.statements import Statement
from sagalog.testing import lives
from tests.crash_matrix import Shop
from tests.scenarios import Scenario

Strike: TypeAlias = Literal["kill", "stop", "interrupt"]
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}
LONGEST = 120.0


def until(found: Callable[[], Any]) -> Any:
    """What another process, or the heartbeat, brings about: looked for until it is there."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        answer = found()
        if answer:
            return answer
        time.sleep(0.01)
    raise TimeoutError("it did not come about")


def forked() -> int:
    """`os.fork`, without its warning of a test runner's threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


class Child:
    """A forked process; what its work returns, or says before it dies, comes back through a pipe."""

    def __init__(self, work: Callable[[Callable[[Any], None]], Any]) -> None:
        reading, writing = os.pipe()
        self.pid = forked()
        if self.pid == 0:
            _live(work, reading, writing)
        os.close(writing)
        self._reading = reading
        self.status: int | None = None

    def wait_stopped(self) -> bool:
        """Until it is stopped by SIGSTOP (True), or has ended."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return True
        self.status = status
        return False

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def answers(self) -> list[Any]:
        """All that it said, once it has ended; what it raised is raised."""
        until = time.monotonic() + LONGEST
        data = b""
        while True:
            if not select.select([self._reading], [], [], max(0.0, until - time.monotonic()))[0]:
                self.send(signal.SIGABRT)  # it prints where its threads are
                raise TimeoutError(f"process {self.pid} has not ended in {LONGEST} s; it said {_unpacked(data)}")
            more = os.read(self._reading, 1 << 16)
            if not more:
                break
            data += more
        os.close(self._reading)
        if self.status is None:
            _, self.status = os.waitpid(self.pid, 0)
        said = _unpacked(data)
        if os.WIFEXITED(self.status) and os.WEXITSTATUS(self.status) != 0:
            raise AssertionError(f"process {self.pid} failed:\n{said[-1] if said else self.status}")
        return said

    def end(self) -> None:
        """Kill it, if it still lives."""
        if self.status is None:
            self.send(signal.SIGKILL)
            _, self.status = os.waitpid(self.pid, 0)

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL was its end."""
        return self.status is not None and os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL

    def next_answer(self) -> Any:
        """The first thing that it says, while it goes on."""
        if not select.select([self._reading], [], [], LONGEST)[0]:
            raise TimeoutError(f"process {self.pid} said nothing in {LONGEST} s")
        return _unpacked(os.read(self._reading, 1 << 16))[0]


def _live(work: Callable[[Callable[[Any], None]], Any], reading: int, writing: int) -> None:
    failed = 0
    try:
        os.close(reading)
        faulthandler.enable(sys.__stderr__)
        # A test runner's handlers are not this process's.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

        def say(something: Any) -> None:
            _write_all(writing, pickle.dumps(something))

        try:
            say(work(say))
        except BaseException:
            say(traceback.format_exc())
            failed = 1
    finally:
        os._exit(failed)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _unpacked(data: bytes) -> list[Any]:
    import io

    source = io.BytesIO(data)
    said = []
    while source.tell() < len(data):
        said.append(pickle.load(source))
    return said


class Life:
    """What stands around every log transaction and handler call of a process: it counts the points that it passes.

    At one of them the process kills, stops or interrupts itself.

    Args:
        at: The number of that point; None passes all.
        strike: How: "kill", "stop" or "interrupt".
        say: Tells the parent at which point.
        answered: Called once the process has a handler's answer, and has passed the point after it.
    """

    def __init__(
        self,
        at: int | None,
        strike: Strike,
        say: Callable[[Any], None],
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        self._at = at
        self._strike = strike
        self._say = say
        self._answered = answered
        self.passed = 0

    def point(self, label: str) -> None:
        """One point."""
        number, self.passed = self.passed, self.passed + 1
        if number == self._at:
            self._say(label)
            os.kill(os.getpid(), _SIGNALS[self._strike])

    def __call__(self, effect: Effect[Any], answer: Callable[[Effect[Any]], Any]) -> Any:
        label = lives.label_of(effect)
        if label is None:
            return answer(effect)
        self.point(f"before {label}")
        try:
            given = answer(self._opened(effect, label))
        except Exception:
            self.point(f"after {label}, which raised")
            raise
        self.point(f"after {label}")
        if isinstance(effect, Invoke):
            self._answered()
        return given

    def _opened(self, effect: Effect[Any], label: str) -> Effect[Any]:
        """The same with a point before COMMIT; not for who is stopped, for it would hold what others wait for."""
        if self._strike == "stop":
            return effect
        if isinstance(effect, Write) and effect.operation.kind is Kind.SEVERAL:
            return Write(self._uncommitted(effect.operation, label))
        if isinstance(effect, Invoke) and effect.ended is not None:
            ended = effect.ended
            return Invoke(
                effect.handler, effect.cmd, effect.info, effect.fence, lambda v: self._uncommitted(ended(v), label)
            )
        return effect

    def _uncommitted(self, operation: Operation[Any], label: str) -> Operation[Any]:
        def run(db: Database) -> Any:
            answer = operation.run(db)
            self.point(f"before the commit of {label}")
            return answer

        return Call(operation.asked, operation.kind, run, operation.saga_id, operation.step_index)


@dataclass
class World:
    """A database and an account of the outside, both new for each case.

    Attributes:
        folder: For its files.
        name: What it is called in reports.
        url: A migrated Postgres database; None for a SQLite file.
        template: The bytes of a migrated SQLite file.
        durability: Of the SQLite file.
    """

    folder: Path
    name: str
    url: str | None = None
    template: bytes = b""
    durability: Literal["full", "normal"] = "full"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.txt"

    @property
    def path(self) -> Path:
        return self.folder / "sagas.db"

    @property
    def sqlalchemy_url(self) -> str:
        """For a connection beside the log's."""
        return self.url or f"sqlite:///{self.path}"

    def begin_anew(self) -> None:
        """Nothing happened yet."""
        self.ledger.write_bytes(b"")
        if self.url is not None:
            return
        for suffix in ("-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        self.path.write_bytes(self.template)

    def open(self, *, empty: bool = False) -> SagaLog:
        """The log, for one process; `empty` makes it so on Postgres, where the database stays."""
        if self.url is None:
            return SagaLog.open(self.path, durability=self.durability, migrate=False)
        log = SagaLog.open(self.url, migrate=False)
        if empty:
            log._bind.perform(Call("empty", Kind.SEVERAL, _empty))
        return log

    def warm(self) -> None:
        """Load, and make ready, what each child would; whatever is opened is closed again."""
        self.begin_anew()
        shop = Shop(Scenario(2, "raises", 1, "resume", "stop", retried=True), ledger=self.ledger)
        log = self.open(empty=True)
        with shop.build(log) as coordinator, suppress(SagaFailed):
            shop.start(coordinator)
        with shop.build(log) as coordinator:
            time_passes(log)
            coordinator.recover()
            records(log)
        log.close()


def _empty(db: Database) -> None:
    for table in (db.sql.step, db.sql.saga, db.sql.executor):
        db.write(Statement(delete(table)), {})


def time_passes(log: SagaLog) -> None:
    """Every lease has run out, and nothing of what was tried can be under way any more."""
    log._bind.perform(lives.time_passes())


def leases_run_out(log: SagaLog) -> None:
    """Every lease has run out, and what was tried may be under way still."""

    def run(db: Database) -> None:
        db.write(Statement(update(db.sql.executor).values(lease_until=0)), {})

    log._bind.perform(Call("leases", Kind.SEVERAL, run))


def records(log: SagaLog) -> list[SagaRecord]:
    """All sagas, every column."""
    return [log.get(saga_id) for saga_id in log._bind.perform(lives.all_ids())]
