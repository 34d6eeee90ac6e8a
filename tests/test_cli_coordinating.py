"""The commands that work with the application's own coordinator: recover, retry, worker; and quarantine, graph."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cli import execute, sagalog

from sagalog import SagaLog

APP = """
    import os
    from pydantic import BaseModel
    from sagalog import AsyncSagaCoordinator, AsyncSagaLog, CommandBus, SagaCoordinator, SagaLog, StepInfo

    class Charge(BaseModel):
        amount: int

    class Refund(BaseModel):
        amount: int

    bus = CommandBus()

    @bus.handler
    def charge(cmd: Charge) -> None:
        if os.environ.get("BANK") == "shut":
            raise OSError("no answer")

    @bus.handler
    def refund(cmd: Refund, step: StepInfo) -> None: ...

    @bus.compensation(Charge)
    def refund_of(cmd: Charge, output: None) -> Refund:
        return Refund(amount=cmd.amount)

    def make() -> SagaCoordinator:
        coordinator = SagaCoordinator(SagaLog.open("shop.db"), bus)

        @coordinator.saga("pay")
        def pay(ctx, amount: int) -> int:
            ctx.dispatch(Charge(amount=amount))
            if amount == 13:
                raise KeyboardInterrupt
            return amount

        return coordinator

    def undoing() -> SagaCoordinator:
        coordinator = SagaCoordinator(SagaLog.open("shop.db"), bus, on_unknown="compensate")
        coordinator.saga("pay")(lambda ctx, amount: None)
        return coordinator

    async def amake() -> AsyncSagaCoordinator:
        coordinator = AsyncSagaCoordinator(await AsyncSagaLog.open("shop.db"), bus)

        @coordinator.saga("pay")
        async def pay(ctx, amount: int) -> int:
            await ctx.dispatch(Charge(amount=amount))
            return amount

        return coordinator

    nonsense = 7

    def raises():
        return {}["DATABASE_URL"]

    def wants(argument):
        return argument

    def ends():
        raise SystemExit(0)

    def unreachable() -> SagaCoordinator:
        return SagaCoordinator(SagaLog.open("postgresql://me:secret@127.0.0.1:1/shop"), bus)
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """The application's module, imported anew, in its folder."""
    name = f"shop_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(APP))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return __import__(name)


def interrupted(shop: Any) -> int:
    with shop.make() as coordinator:
        with pytest.raises(KeyboardInterrupt):
            coordinator.run("pay", 13)
        saga_id: int = coordinator.log.max_saga_id()
        coordinator.log.close()
    return saga_id


@pytest.mark.parametrize("make", ["make", "amake"])
def test_recover_undoes_what_was_left_and_tells_it(shop: Any, make: str) -> None:
    saga_id = interrupted(shop)
    done = sagalog("--app", f"{shop.__name__}:{make}", "recover")
    assert (done.status, done.out.strip()) == (0, "completed 0, undone 1"), done.err
    with SagaLog.open("shop.db") as log:
        assert log.get(saga_id).state == "compensated"
    again = sagalog("--app", f"{shop.__name__}:{make}", "recover", "--json")
    assert json.loads(again.out)["compensated"] == []


def test_recover_names_what_it_leaves(shop: Any) -> None:
    with SagaLog.open("shop.db") as log:
        log.start_saga(5, "unheard_of", None)
    done = sagalog("--app", f"{shop.__name__}:make", "recover")
    assert done.status == 0
    assert "saga 5 (unheard_of) is left: it never belonged to a coordinator" in done.out


def left_in_doubt(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saga 1, whose bank does not answer."""
    monkeypatch.setenv("BANK", "shut")
    with shop.make() as coordinator:
        with pytest.raises(Exception, match="in doubt"):
            coordinator.run("pay", 1)
        coordinator.log.close()


@pytest.mark.parametrize("make", ["make", "amake"])
def test_retry_refuses_a_doubt_and_sends_it_again_when_told(
    shop: Any, make: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_in_doubt(shop, monkeypatch)
    monkeypatch.delenv("BANK")
    app = ("--app", f"{shop.__name__}:{make}")
    refused = sagalog(*app, "retry", "1", "--note", "the bank is back", "--yes")
    assert refused.status == 1
    assert "sagalog resolve-step 1 0" in refused.err
    done = sagalog(*app, "retry", "1", "--note", "the bank is back", "--actor", "ann", "--again", "--yes")
    assert (done.status, done.out.strip()) == (
        0,
        "saga 1 is compensated: step 0 (Charge) is in doubt: OSError: no answer",
    )
    assert "ann" in sagalog("--url", "shop.db", "show", "1").out


def test_retry_of_a_saga_that_waits_tells_that_it_has_not_ended(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left_in_doubt(shop, monkeypatch)
    app = ("--app", f"{shop.__name__}:undoing")
    done = sagalog(*app, "retry", "1", "--note", "try", "--again", "--yes")
    assert (done.status, done.out.strip().partition(":")[0]) == (1, "saga 1 is compensating"), done.out
    assert "Saga 1 has not ended: it waits." in done.err


def test_retry_of_a_saga_that_needs_a_person_still_has_failed(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left_in_doubt(shop, monkeypatch)
    done = sagalog("--app", f"{shop.__name__}:make", "retry", "1", "--note", "try", "--again", "--yes")
    assert (done.status, done.out.strip().partition(":")[0]) == (1, "saga 1 is failed_compensation"), done.out
    assert "Saga 1 still needs a person." in done.err


def test_diag_names_the_retry_that_may_end_a_saga(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left_in_doubt(shop, monkeypatch)
    with closing(sqlite3.connect("shop.db")) as connection, connection:
        connection.execute("UPDATE saga_step SET deadline_at = 1")
    with SagaLog.open("shop.db") as log:
        log.resolve_step(1, 0, "failed", note="the bank never saw it", actor="ann")
    (need,) = sagalog("--url", "shop.db", "diag", "--json").json["needs_person"]["sagas"]
    assert [words for words in need["next"] if "retry" in words] == ["sagalog --url shop.db retry 1 --note TEXT"]


def test_quarantine_leaves_open_sagas_to_a_person(shop: Any) -> None:
    saga_id = interrupted(shop)
    done = sagalog("--url", "shop.db", "quarantine", "--note", "a copy", "--actor", "ann", "--yes")
    assert (done.status, done.out.strip()) == (0, "1 sagas are left to a person")
    with SagaLog.open("shop.db") as log:
        assert (log.get(saga_id).state, log.audit(saga_id)[0].actor) == ("failed_compensation", "ann")
    assert (
        json.loads(sagalog("--url", "shop.db", "quarantine", "--note", "a copy", "--yes", "--json").out)["quarantined"]
        == 0
    )


def test_graph_draws_how_sagas_went(shop: Any) -> None:
    interrupted(shop)
    sagalog("--app", f"{shop.__name__}:make", "recover")
    lines = sagalog("--url", "shop.db", "graph", "pay").out.splitlines()
    assert lines[0] == "flowchart TD"
    assert any('["Charge"]' in line for line in lines)
    assert any("undone by 1" in line for line in lines)
    unknown = sagalog("--url", "shop.db", "graph", "nothing")
    assert (unknown.status, "There is no saga named 'nothing'" in unknown.err) == (1, True)


@pytest.mark.parametrize(
    ("app", "sentence"),
    [
        (None, "No coordinator: give --app"),
        ("shop", "is not of the form module:name"),
        ("no_such_module:x", "cannot be loaded"),
        ("{shop}:missing", "cannot be loaded"),
        (".shop:x", "is not of the form module:name"),
        ("{shop}:nonsense", "it must be a coordinator"),
        ("{shop}:raises", "cannot be loaded: KeyError: 'DATABASE_URL' ({folder}/{shop}.py, line "),
        ("{shop}:ends", "cannot be loaded: SystemExit: 0"),
        ("{shop}:wants", "missing 1 required positional argument"),
        ("broken:x", "cannot be loaded: SyntaxError: "),
    ],
)
@pytest.mark.parametrize("command", [("recover",), ("worker",), ("retry", "1", "--note", "x", "--yes")])
def test_an_app_that_is_no_coordinator_is_bad_usage(shop: Any, app: str | None, sentence: str, command: Any) -> None:
    Path("broken.py").write_text("def (")
    before = [] if app is None else ["--app", app.format(shop=shop.__name__)]
    done = sagalog(*before, *command)
    told = sentence.format(shop=shop.__name__, folder=Path.cwd())
    assert (done.status, told in done.err, done.out) == (2, True, ""), done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("command", [("recover",), ("worker",), ("retry", "1", "--note", "x", "--yes")])
def test_a_database_of_the_app_that_cannot_be_reached_is_told(shop: Any, command: Any) -> None:
    done = sagalog("--app", f"{shop.__name__}:unreachable", *command)
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert "the server" in done.err
    assert "secret" not in done.err


@pytest.mark.parametrize("command", [("recover",), ("worker",), ("retry", "1", "--note", "x", "--yes")])
def test_a_database_of_the_app_without_a_fitting_log_is_told_and_not_migrated(shop: Any, command: Any) -> None:
    assert sagalog("--url", "shop.db", "upgrade").status == 0
    execute("sqlite:///shop.db", "UPDATE sagalog_version SET version_num = 'sagalog_9999'")
    execute("sqlite:///shop.db", "UPDATE sagalog_meta SET value = 'sagalog_9998' WHERE name = 'oldest_revision'")
    done = sagalog("--app", f"{shop.__name__}:make", *command)
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert "Update the sagalog package" in done.err
    assert execute("sqlite:///shop.db", "SELECT version_num FROM sagalog_version") == [("sagalog_9999",)]


@pytest.mark.parametrize("make", ["make", "amake"])
def test_a_worker_runs_until_it_is_told_to_stop(shop: Any, make: str) -> None:
    with shop.make() as coordinator:
        saga_id = coordinator.submit("pay", 5)
        call = [sys.executable, "-m", "sagalog", "--app", f"{shop.__name__}:{make}", "worker", "--poll", "0.05"]
        process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "the worker runs"
        assert coordinator.wait(saga_id, timeout=60) == 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        process.stdout.close()
        coordinator.log.close()


def test_a_worker_whose_application_hangs_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("print('loading', flush=True)\nimport time\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "sagalog", "--app", "hangs:coordinator", "worker"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loading\n"
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode != 0


def test_a_typed_url_is_refused_where_the_coordinator_has_its_own_log() -> None:
    told = sagalog("--url", "sqlite:///other.db", "--app", "shop:make", "recover")
    assert told.status == 2
    assert "works on its own log" in told.err
