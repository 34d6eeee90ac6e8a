"""What goes wrong outside: locked, full, read-only, damaged, gone. Told as SagaLogError, and over when it is over."""

from __future__ import annotations

import os
import pickle
import sqlite3
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event

import sagalog
from sagalog import (
    LogUnavailable,
    NotASagaLog,
    PayloadError,
    SagaLog,
    SagaLogError,
    StepExists,
    UnusableBind,
)

HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
print("released", flush=True)
"""


class Holder:
    """Another process that holds a file's write lock until told otherwise."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def release(self) -> None:
        if self.process.poll() is None:
            self.process.communicate("\n", timeout=30)


@pytest.fixture
def holder(sqlite_path: Path) -> Iterator[Callable[[], Holder]]:
    made: list[Holder] = []

    def hold() -> Holder:
        made.append(Holder(sqlite_path))
        return made[-1]

    yield hold
    for each in made:
        each.release()


def sqlite_roads(path: Path, timeout: float) -> Iterator[tuple[str, SagaLog, Callable[[], None]]]:
    log = SagaLog.open(path)
    yield "file", log, log.close
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": timeout})
    yield "engine", SagaLog(engine), engine.dispose


def test_a_lock_held_longer_than_the_busy_timeout_is_told_and_over_when_released(
    sqlite_path: Path, holder: Callable[[], Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagalog.log.file.BUSY_TIMEOUT_MS", 300)
    for number, (road, log, close) in enumerate(sqlite_roads(sqlite_path, 0.3), 1):
        held = holder()
        with pytest.raises(LogUnavailable) as locked:
            log.start_saga(number, "s", None)
        assert isinstance(locked.value.__cause__, sqlite3.OperationalError), road
        assert (locked.value.found, locked.value.unknown, locked.value.saga_id) == ("SQLITE_BUSY", False, number)
        assert log.counts().get("running", 0) == number - 1, "readers are not held up"
        held.release()
        log.start_saga(number, "s", None)
        close()


def test_a_lock_released_in_time_is_waited_for(sqlite_path: Path, holder: Callable[[], Holder]) -> None:
    for number, (_road, log, close) in enumerate(sqlite_roads(sqlite_path, 20), 1):
        held = holder()
        waiting = threading.Thread(target=log.start_saga, args=(number, "s", None))
        waiting.start()
        held.release()
        waiting.join(timeout=20)
        assert not waiting.is_alive()
        assert log.get(number).state == "running"
        close()


def limit_pages(connection: Any, more: int) -> None:
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages + more}")


def test_a_full_disk_writes_nothing_and_is_over_when_there_is_room(sqlite_path: Path) -> None:
    log = SagaLog.open(sqlite_path)
    log.start_saga(1, "s", None)
    assert log._bind._connections.writer is not None  # type: ignore[attr-defined]
    limit_pages(log._bind._connections.writer, 3)  # type: ignore[attr-defined]
    with pytest.raises(LogUnavailable) as full:
        log.start_saga(2, "s", "x" * 100_000)
    assert full.value.found == "SQLITE_FULL"
    assert "xxxx" not in "".join(traceback.format_exception(full.value))
    assert log.counts() == {"running": 1}
    log.start_saga(2, "s", "x" * 100_000)
    with pytest.raises(LogUnavailable), log.unit_of_work() as work:
        limit_pages(log._bind._connections.writer, 3)  # type: ignore[attr-defined]
        work.start_saga(3, "s", None)
        with pytest.raises(LogUnavailable):
            work.start_saga(4, "s", "x" * 100_000)
        with pytest.raises(LogUnavailable):
            work.start_saga(5, "s", None)
    assert log.counts() == {"running": 2}
    log.start_saga(3, "s", None)
    log.close()


def test_a_full_disk_on_a_hosts_engine_writes_nothing(sqlite_path: Path) -> None:
    engine = create_engine(f"sqlite:///{sqlite_path}")
    small = True

    @event.listens_for(engine, "checkout")
    def _limit(connection: Any, record: Any, proxy: Any) -> None:
        limit_pages(connection, 3 if small else 100_000)

    log = SagaLog(engine)
    log.start_saga(1, "s", None)
    with pytest.raises(LogUnavailable, match="full"):
        log.start_saga(2, "s", "x" * 100_000)
    small = False
    log.start_saga(2, "s", "x" * 100_000)
    assert log.counts() == {"running": 2}
    engine.dispose()


def test_a_read_only_database_is_told(sqlite_path: Path) -> None:
    SagaLog.open(sqlite_path).close()
    engine = create_engine(f"sqlite:///file:{sqlite_path}?mode=ro&uri=true")
    log = SagaLog(engine)
    assert log.counts() == {}
    with pytest.raises(LogUnavailable) as refused:
        log.start_saga(1, "s", None)
    assert refused.value.found == "SQLITE_READONLY"
    engine.dispose()


@pytest.mark.parametrize("content", [b"this is no database, but a long text " * 100, b"\x00" * 4096, b"short"])
def test_a_file_that_is_no_database_is_refused_untouched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sagas.db"
    path.write_bytes(content)
    with pytest.raises(SagaLogError) as refused:
        SagaLog.open(path)
    assert isinstance(refused.value, NotASagaLog | LogUnavailable)
    assert path.read_bytes() == content


def test_a_truncated_file_is_told(sqlite_path: Path) -> None:
    with SagaLog.open(sqlite_path) as log:
        for saga in range(1, 200):
            log.start_saga(saga, "s", "x" * 500)
    whole = sqlite_path.read_bytes()
    for size in range(4096, len(whole), max(4096, len(whole) // 12)):
        sqlite_path.write_bytes(whole[: size - 100])
        with pytest.raises(SagaLogError), SagaLog.open(sqlite_path) as log:
            for saga in range(1, 200):
                log.get(saga)
                log.start_step(saga, 0, "c", "x" * 500)
            raise LogUnavailable("nothing was damaged", str(size))


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(LogUnavailable):
        SagaLog.open(tmp_path / "missing" / "sagas.db")


def test_a_file_that_vanished_is_an_error_and_not_an_empty_log(sqlite_path: Path) -> None:
    log = SagaLog.open(sqlite_path)
    sqlite_path.unlink()
    with pytest.raises(SagaLogError):
        log.counts()
    log.close()


def test_one_callers_refusal_or_bad_value_does_not_touch_those_it_shares_a_commit_with(sqlite_path: Path) -> None:
    log = SagaLog.open(sqlite_path)
    log.start_saga(1, "s", None)
    outcomes: dict[int, Any] = {}
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with log.unit_of_work():
            inside.set()
            go_on.wait(30)

    def call(number: int) -> None:
        try:
            if number % 3 == 0:
                outcomes[number] = log.start_step(1, 0, "c", number)
            elif number % 3 == 1:
                outcomes[number] = log.finish_step(1, 5000, "no such step")
            else:
                outcomes[number] = log.start_step(1, 100 + number, "c", math_nan if number % 2 else "fine")
        except SagaLogError as error:
            outcomes[number] = error

    math_nan = float("nan")
    threads = [threading.Thread(target=hold), *(threading.Thread(target=call, args=(n,)) for n in range(30))]
    threads[0].start()
    assert inside.wait(30)
    for thread in threads[1:]:
        thread.start()
    while len(log._bind._turns.waiting) < 25:  # type: ignore[attr-defined]
        assert all(thread.is_alive() for thread in threads[:1])
    go_on.set()
    for thread in threads:
        thread.join(30)
    taken = [outcomes[n] for n in range(0, 30, 3)]
    assert [type(o) for o in taken].count(type(None)) == 1
    assert sum(isinstance(o, StepExists) for o in taken) == 9
    fine = [n for n in range(30) if n % 3 == 2 and not n % 2]
    assert [outcomes[n] for n in fine] == [None] * len(fine)
    assert all(isinstance(outcomes[n], PayloadError) for n in range(30) if n % 3 == 2 and n % 2)
    assert {s.step_index for s in log.get(1).steps} == {0, *(100 + n for n in fine)}
    log.close()


def test_a_unit_of_work_in_the_same_thread_is_refused_and_not_waited_for(sqlite_path: Path) -> None:
    log = SagaLog.open(sqlite_path)
    with log.unit_of_work() as work:
        with pytest.raises(UnusableBind, match="unit of work"):
            log.start_saga(1, "s", None)
        work.start_saga(1, "s", None)
    assert log.counts() == {"running": 1}
    log.close()


def test_every_error_pickles_and_names_its_facts(sqlite_path: Path) -> None:
    log = SagaLog.open(sqlite_path)
    log.start_saga(1, "s", None)
    caught: list[SagaLogError] = []
    for call in (
        lambda: log.start_saga(1, "s", None),
        lambda: log.start_step(2, 0, "c", None),
        lambda: log.finish_step(1, 3, None),
        lambda: log.terminate(1, "completed"),  # type: ignore[arg-type]
        lambda: log.resolve(1, "abandoned", note="n", actor="a"),
    ):
        with pytest.raises(SagaLogError) as error:
            call()
        caught.append(error.value)
    caught.append(sagalog.LeaseLost("finish_step", 1, epoch=1, found=2, step_index=0))
    for error_found in caught:
        again = pickle.loads(pickle.dumps(error_found))
        assert type(again) is type(error_found)
        assert (str(again), again.code, again.saga_id, again.found, again.hint) == (
            str(error_found), error_found.code, error_found.saga_id, error_found.found, error_found.hint,
        )  # fmt: skip
    log.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_without_write_permission_is_told(sqlite_path: Path) -> None:
    sqlite_path.chmod(0o400)
    with pytest.raises(LogUnavailable):
        SagaLog.open(sqlite_path).start_saga(1, "s", None)


FULL_DISK = """
import resource, sys, threading
from sagalog import LogUnavailable, SagaLog
log = SagaLog.open(sys.argv[1])
log.start_saga(1, "s", None)
for index in range(20):
    log.start_step(1, index, "c", None)
import os
size = os.path.getsize(sys.argv[1] + "-wal")
outcomes = {}
inside, go_on = threading.Event(), threading.Event()

def hold():
    with log.unit_of_work():
        inside.set()
        go_on.wait(30)

def finish(index):
    try:
        outcomes[index] = log.finish_step(1, index, "x" * 20_000)
    except LogUnavailable as error:
        outcomes[index] = error

threads = [threading.Thread(target=hold)]
threads[0].start()
inside.wait(30)
for index in range(20):
    threads.append(threading.Thread(target=finish, args=(index,)))
    threads[-1].start()
while len(log._bind._turns.waiting) < 20:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100_000, resource.RLIM_INFINITY))
go_on.set()
for thread in threads:
    thread.join(60)
told = sorted(index for index, outcome in outcomes.items() if outcome is not None)
causes = {type(outcomes[index].__cause__).__name__ for index in told}
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
after = {step.step_index for step in log.get(1).steps if step.state == "pending"}
print(len(outcomes), bool(told), causes, set(told) >= after, after >= set(told))
for index in range(20):
    log.finish_step(1, index, "x" * 20_000)
print({step.state for step in log.get(1).steps})
"""


def test_a_failed_commit_is_told_to_every_caller_it_carried(sqlite_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(sqlite_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "20 True {'OperationalError'} True True"
    assert second == "{'succeeded'}"


def test_a_first_write_waits_for_another_process_that_opens_or_closes_the_file(
    sqlite_path: Path, bare: sqlite3.Connection
) -> None:
    with SagaLog.open(sqlite_path) as log, ThreadPoolExecutor(1) as pool:
        # As a process does that finds the write-ahead log of a killed one, or is the last to close the file.
        bare.execute("PRAGMA locking_mode = EXCLUSIVE")
        bare.execute("DELETE FROM saga")
        writing = pool.submit(log.create_saga, "s", None)
        with pytest.raises(TimeoutError):
            writing.result(timeout=0.2)
        bare.close()
        assert writing.result(timeout=30) == 1
