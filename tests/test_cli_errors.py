"""Bad usage, refused actions, unusable databases: one sentence, the right exit status, nothing written."""

from __future__ import annotations

import hashlib
import os
import pty
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from cli import execute, fill, log_at, sagalog
from sqlalchemy import make_url

from sagalog.cli.app import app

COMMANDS = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
READING = (
    ("list",), ("show", 1), ("diag",), ("watch", "--looks", 1), ("graph", "place_order"), ("current",), ("check",),
)  # fmt: skip
ACTING = (
    ("resolve", 2, "--state", "abandoned", "--note", "why", "--yes"),
    ("resolve-step", 2, 0, "--state", "failed", "--note", "why", "--yes"),
    ("cancel", 3, "--note", "why", "--yes"),
    ("quarantine", "--note", "why", "--yes"),
    ("prune", "--yes"),
    ("downgrade", "base", "--yes"),
)
ON_A_LOG = [words for words in (*READING, *ACTING) if words[0] not in ("current", "downgrade")]


def said(words: tuple[object, ...]) -> str:
    return " ".join(map(str, words[:1]))


def fingerprint(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_no_command_prints_the_help() -> None:
    done = sagalog()
    assert done.status == 2
    assert "resolve-step" in done.out
    assert done.err == "Error: No command. Begin with `sagalog diag`.\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_bad_usage_of_every_command(command: str) -> None:
    done = sagalog(command, "--no-such-option")
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert "No such option: --no-such-option" in done.err
    assert f"sagalog {command} --help" in done.err


@pytest.mark.parametrize("words", [*READING, *ACTING, ("upgrade",)], ids=said)
def test_no_database_is_bad_usage_of_every_command_that_needs_one(
    words: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = sagalog(*words)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert "--url" in done.err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--url", "mysql://host/db", "list"), "sagalog works on SQLite and on Postgres"),
        (("--url", "postgresql://me:secret@host:port/shop", "list"), "cannot be read"),
        (("--url", "sqlite://", "list"), "in memory"),
        (("list", "--url", "x.db"), "--url goes before the command"),
        (("lisst",), "Did you mean 'list'?"),
        (("show",), "Missing argument"),
        (("show", "many"), "valid integer"),
        (("show", 0), "greater than or equal to 1"),
        (("show", 2**70), "saga_id"),
        (("list", "--since", "yesterday"), "is no moment"),
        (("list", "--open-longer-than", "long"), "is no duration"),
        (("list", "--state", "broken"), "broken"),
        (("list", "--limit", 0), "--limit"),
        (("list", "--json", "--output", "jsonl"), "two forms"),
        (("--json", "--output", "table", "list"), "two forms"),
        (("watch", "--output", "json"), "--output jsonl"),
        (("resolve", 2, "--note", "why"), "--state"),
        (("resolve", 2, "--state", "running", "--note", "why"), "abandoned"),
        (("resolve-step", 2, "--state", "failed", "--note", "why"), "INDEX"),
        (("resolve-step", 2, 0, "--state", "pending", "--note", "why"), "compensated"),
        (("cancel", 3), "--note"),
        (("prune", "--older-than", -1), "--older-than"),
        (("prune", "--keep-last", "all"), "--keep-last"),
        (("upgrade", "sagalog_9999"), "there is no revision"),
        (("upgrade", "base"), "downgrade base"),
        (("downgrade",), "REVISION"),
        (("downgrade", "head"), "go back to"),
    ],
)
def test_bad_usage_exits_2_with_one_sentence(words: tuple[object, ...], complaint: str, sqlite_path: Path) -> None:
    known = {"SAGALOG_URL": str(sqlite_path)}
    before = fingerprint(sqlite_path.parent)
    done = sagalog(*words, env=known)
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert complaint in done.err
    assert "secret" not in done.err
    assert done.out == ""
    assert fingerprint(sqlite_path.parent) == before


@pytest.mark.parametrize("note", ["", "   ", "\t"])
@pytest.mark.parametrize("words", [words for words in ACTING if "--note" in words], ids=said)
def test_an_empty_note_or_actor_is_refused(words: tuple[object, ...], note: str, sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    emptied = [note if word == "why" else word for word in words]
    done = sagalog("--url", sqlite_path, *emptied)
    assert done.status == 2
    assert "--note" in done.err
    nobody = sagalog("--url", sqlite_path, *words, "--actor", note)
    assert nobody.status == 2
    assert "--actor" in nobody.err
    with log_at(f"sqlite:///{sqlite_path}") as log:
        assert log.audit(2) == log.audit(3) == []


@pytest.mark.parametrize("words", ACTING, ids=said)
def test_an_action_that_nobody_can_be_asked_about_needs_yes(words: tuple[object, ...], migrated_url: str) -> None:
    fill(migrated_url)
    with log_at(migrated_url) as log:
        log.start_saga(5, "last", None)
    older = ("--keep-last", 0, "--older-than", 0) if words[0] == "prune" else ()
    done = sagalog("--url", migrated_url, *[word for word in words if word != "--yes"], *older)
    assert done.status == 2
    assert "--yes" in done.err
    assert done.err.count("\n") == 1
    with log_at(migrated_url) as log:
        assert log.counts() == {"compensated": 1, "completed": 1, "failed_compensation": 1, "running": 2}
        assert log.audit(2) == log.audit(3) == []


@pytest.mark.parametrize(("answer", "status"), [("n", 1), ("y", 0)])
def test_an_action_asks_on_a_terminal(answer: str, status: int, sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "sagalog", "--url", str(sqlite_path), "cancel", "3", "--note", "why"]
    process = subprocess.Popen(command, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.close(follower)
    os.write(leader, f"{answer}\n".encode())
    out, err = process.communicate(timeout=60)
    os.close(leader)
    assert process.returncode == status, err
    assert "Saga 3 (place_order) is running: ask that it be undone" in err
    assert ("Nothing was changed." in err) == (status == 1)
    assert ("asked to be undone" in out) == (status == 0)
    with log_at(f"sqlite:///{sqlite_path}") as log:
        assert (log.get(3).cancel_reason is None) == (status == 1)


@pytest.mark.parametrize(
    "words",
    [
        ("show", 99),
        ("resolve", 99, "--state", "abandoned", "--note", "why", "--yes"),
        ("resolve", 3, "--state", "abandoned", "--note", "why", "--yes"),
        ("resolve-step", 2, 9, "--state", "failed", "--note", "why", "--yes"),
        ("resolve-step", 4, 0, "--state", "failed", "--note", "why", "--yes"),
        ("cancel", 99, "--note", "why", "--yes"),
        ("cancel", 4, "--note", "why", "--yes"),
    ],
    ids=lambda words: " ".join(map(str, words[:2])),
)
def test_a_refused_action_exits_1_and_changes_nothing(words: tuple[object, ...], migrated_url: str) -> None:
    fill(migrated_url)
    tables = ("saga", "saga_step", "saga_audit")
    before = [sorted(map(repr, execute(migrated_url, f"SELECT * FROM {table}"))) for table in tables]
    done = sagalog("--url", migrated_url, *words)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("Error: ")
    assert "Nothing was changed." in done.err
    assert [sorted(map(repr, execute(migrated_url, f"SELECT * FROM {table}"))) for table in tables] == before


@pytest.mark.parametrize("words", [*READING, *ACTING], ids=said)
def test_a_missing_file_is_told_and_not_made(words: tuple[object, ...], tmp_path: Path) -> None:
    done = sagalog("--url", tmp_path / "missing.db", *words)
    assert (done.status, done.out) == (1, "")
    assert "There is no file" in done.err
    assert "upgrade" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ON_A_LOG, ids=said)
def test_a_database_without_a_log_is_told_and_not_migrated(words: tuple[object, ...], database_url: str) -> None:
    execute(database_url, "CREATE TABLE orders (number INTEGER)")
    done = sagalog("--url", database_url, *words)
    assert (done.status, done.out) == (1, "")
    assert "its tables are not there" in done.err
    assert "sagalog upgrade" in done.err
    assert sagalog("--url", database_url, "current").out.strip() == "no revision"


@pytest.mark.parametrize("words", ON_A_LOG, ids=said)
def test_a_database_that_is_too_new_is_told_and_not_touched(words: tuple[object, ...], migrated_url: str) -> None:
    execute(migrated_url, "UPDATE sagalog_version SET version_num = 'sagalog_9999'")
    execute(migrated_url, "UPDATE sagalog_meta SET value = 'sagalog_9998' WHERE name = 'oldest_revision'")
    done = sagalog("--url", migrated_url, *words)
    assert (done.status, done.out) == (1, "")
    assert "Update the sagalog package" in done.err
    assert sagalog("--url", migrated_url, "upgrade").status == 1
    assert sagalog("--url", migrated_url, "downgrade", "base", "--yes").status == 1
    assert execute(migrated_url, "SELECT version_num FROM sagalog_version") == [("sagalog_9999",)]


@pytest.mark.parametrize("words", [*ON_A_LOG, ("upgrade",), ("downgrade", "base", "--yes")], ids=said)
def test_tables_of_somebody_else_are_told_and_not_touched(words: tuple[object, ...], database_url: str) -> None:
    execute(database_url, "CREATE TABLE saga (hero TEXT)")
    done = sagalog("--url", database_url, *words)
    assert (done.status, done.out) == (1, "")
    assert "not those of a saga log" in done.err
    assert "prefix=" in done.err
    assert execute(database_url, "SELECT * FROM saga") == []


@pytest.mark.parametrize("words", [*READING, *ACTING, ("upgrade",)], ids=said)
def test_a_file_that_is_no_database_is_told_and_not_touched(words: tuple[object, ...], tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes, and no database\n" * 100)
    before = fingerprint(tmp_path)
    done = sagalog("--url", path, *words)
    assert (done.status, done.out) == (1, "")
    assert "no SQLite database" in done.err
    assert fingerprint(tmp_path) == before


def test_an_upgrade_refuses_tables_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "norse.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE saga (hero TEXT)")
    connection.close()
    before = fingerprint(tmp_path)
    done = sagalog("--url", path, "upgrade")
    assert done.status == 1
    assert "not those of a saga log" in done.err
    assert fingerprint(tmp_path) == before


def test_an_upgrade_that_fails_leaves_no_new_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert sagalog("--url", folder / "sagas.db", "upgrade").status == 1
    folder.mkdir()
    assert sagalog("--url", folder, "upgrade").status == 1
    assert list(folder.iterdir()) == []


def test_an_upgrade_makes_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "sagas.db"
    assert sagalog("--url", path, "upgrade").status == 0
    assert path.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA page_size").fetchone() == (2048,)
    connection.close()


@pytest.mark.parametrize("words", [*READING, *ACTING, ("upgrade",)], ids=said)
def test_a_server_that_cannot_be_reached_is_told_without_the_password(words: tuple[object, ...]) -> None:
    for url in (
        "postgresql://me:secret@127.0.0.1:1/shop",
        "postgresql+asyncpg://me@127.0.0.1:1/shop?password=secret",
    ):
        done = sagalog("--url", url, *words)
        assert (done.status, done.out) == (1, "")
        assert "cannot be reached" in done.err
        assert "secret" not in done.err


def test_a_wrong_database_name_is_told(postgres_server: str) -> None:
    url = make_url(postgres_server).set(database="nowhere").render_as_string(hide_password=False)
    done = sagalog("--url", url, "list")
    assert done.status == 1
    assert "nowhere" in done.err


@pytest.mark.parametrize("words", READING, ids=said)
def test_a_command_that_reads_changes_no_byte(words: tuple[object, ...], sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    before = fingerprint(sqlite_path.parent)
    assert sagalog("--url", sqlite_path, *words).status == 0
    assert fingerprint(sqlite_path.parent) == before


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[tool.sagalog", "cannot be read"),
        ("[tool]\nsagalog = 3", "is no table"),
        ("[tool.sagalog]\nurl = 3", "is no string"),
        ("tool = 3", "is no table"),
    ],
)
def test_a_pyproject_that_cannot_be_used_is_told(
    text: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text(text)
    done = sagalog("list")
    assert done.status == 2
    assert complaint in done.err
