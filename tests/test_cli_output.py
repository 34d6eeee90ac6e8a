"""What is printed: harmless text, JSON for programs, warnings of diag; and what starting costs."""

from __future__ import annotations

import json
import os
import pty
import re
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cli import EVIL, execute, fill, sagalog
from sqlalchemy import create_engine, make_url

from sagalog.cli.health import filesystem_of
from sagalog.cli.text import harmless, read_duration, read_moment, shown_duration, shown_size

ROOT = Path(__file__).parent.parent


def on_a_terminal(*words: object, columns: int = 100, **env: str) -> bytes:
    """What a command writes to a terminal of that width, as bytes."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm-256color", **env}
    command = [sys.executable, "-m", "sagalog", *map(str, words)]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    written = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # how Linux tells the end
            break
        if not piece:
            break
        written += piece
    os.close(leader)
    process.wait(timeout=60)
    return written


@pytest.mark.parametrize("words", [("list",), ("show", 2), ("diag",), ("watch", "--looks", 1)], ids=lambda w: w[0])
def test_names_and_reasons_cannot_steer_a_terminal(words: tuple[object, ...], sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    written = on_a_terminal("--url", sqlite_path, *words, columns=240).decode()
    colours = re.sub(r"\x1b\[[0-9;?]*[mhlHJKA]", "", written)
    assert set(colours) & {chr(code) for code in range(32)} <= {"\n", "\r", "\t"}, written
    assert r"\x1b]0;title\x07" in colours
    assert "[red]x[/red] :smile:" in colours
    assert "\u202e" not in written
    assert "\x1b[2J [red]" not in written
    assert r"the bank \x1b[31m[/bold] said no" in colours or words[0] == "watch"


@pytest.mark.parametrize("words", [("list",), ("show", 2), ("diag",), ("watch", "--looks", 1)], ids=lambda w: w[0])
def test_names_go_unharmed_and_harmless_into_a_pipe(words: tuple[object, ...], migrated_url: str) -> None:
    fill(migrated_url)
    out = sagalog("--url", migrated_url, *words).out
    assert "\x1b" not in out
    assert harmless(EVIL) in out


def test_a_graph_of_steps_with_such_names_is_harmless(sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    execute(f"sqlite:///{sqlite_path}", "UPDATE saga_step SET name = :name WHERE saga_id = 2", name=f'{EVIL}"]')
    written = on_a_terminal("--url", sqlite_path, "graph", EVIL).decode()
    assert not {"\x1b", "\x07", "\u202e"} & set(written)
    assert f'n0["{harmless(EVIL)}\']"]' in written, "a quote would end the node's name"


def test_an_error_that_quotes_the_database_is_harmless(sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    execute(f"sqlite:///{sqlite_path}", "UPDATE saga SET state = :state WHERE saga_id = 4", state="\x1b[31mdone")
    done = sagalog("--url", sqlite_path, "cancel", 4, "--note", "why", "--yes")
    assert done.status == 1
    assert "\x1b" not in done.err
    assert r"\x1b[31mdone" in done.err


def test_the_question_of_an_action_is_harmless(sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    done = sagalog("--url", sqlite_path, "resolve", 2, "--state", "abandoned", "--note", "why", "--actor", "\x1b[31m")
    assert done.status == 2
    assert "\x1b" not in done.err


@pytest.mark.parametrize("words", [("list",), ("show", 2, "--payloads"), ("diag",)], ids=lambda words: words[0])
def test_json_is_plain_ascii_and_reads_back(words: tuple[object, ...], migrated_url: str) -> None:
    fill(migrated_url)
    done = sagalog("--url", migrated_url, *words, "--json")
    assert done.out.isascii()
    assert "\x1b" not in done.out
    assert json.dumps(EVIL) in done.out
    (line,) = (
        sagalog("--url", migrated_url, *words, "--output", "jsonl", "--limit", 1).lines
        if words == ("list",)
        else (sagalog("--url", migrated_url, *words, "--output", "jsonl").lines)
    )
    assert isinstance(line, dict)


def test_the_form_may_be_asked_for_before_or_after_the_command(sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    after = sagalog("--url", sqlite_path, "list", "--json")
    assert sagalog("--url", sqlite_path, "--json", "list").out == after.out
    assert sagalog("--url", sqlite_path, "--output", "json", "list").out == after.out
    assert sagalog("--url", sqlite_path, "--json", "list", "--output", "table").out.startswith("id")
    assert len(sagalog("--url", sqlite_path, "list", "--output", "jsonl").lines) == 4


def test_a_pipe_gets_whole_lines(sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    execute(f"sqlite:///{sqlite_path}", "UPDATE saga SET failure_reason = :long WHERE saga_id = 1", long="why " * 200)
    lines = sagalog("--url", sqlite_path, "list").out.splitlines()
    assert len(lines) == 6
    assert ("why " * 200).strip() in lines[-1]


def test_a_narrow_terminal_gets_shorter_bars_and_whole_names(sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    wide, narrow = (
        on_a_terminal("--url", sqlite_path, "show", 1, columns=columns).decode().splitlines() for columns in (160, 72)
    )
    for lines in (wide, narrow):
        for name in ("ReserveStock", "ChargeCard", "ReleaseStock"):
            (line,) = (line for line in lines if name in line)
            assert "█" in line
    assert max(map(len, narrow)) < max(map(len, wide))


def test_moments_are_printed_in_utc(sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    execute(f"sqlite:///{sqlite_path}", "UPDATE saga SET started_at = 1700000000123")
    assert "2023-11-14 22:13:20Z" in sagalog("--url", sqlite_path, "list").out
    assert sagalog("--url", sqlite_path, "list", "--json").json[0]["started_at"] == "2023-11-14T22:13:20.123Z"


def test_the_progress_of_prune_is_drawn_on_a_terminal(sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    words = ("prune", "--keep-last", 0, "--older-than", 0, "--yes")
    written = on_a_terminal("--url", sqlite_path, *words).decode()
    assert "deleting" in written
    assert "deleted 1 saga" in written


# Warnings


def warnings_of(*words: object) -> list[str]:
    done = sagalog(*words, "diag", "--json")
    assert done.status == 0, done.err
    found: list[str] = done.json["warnings"]
    return found


def test_diag_warns_of_a_file_that_everybody_can_read(sqlite_path: Path) -> None:
    sqlite_path.chmod(0o600)
    assert not [text for text in warnings_of("--url", sqlite_path) if "Everybody" in text]
    sqlite_path.chmod(0o644)
    (warning,) = (text for text in warnings_of("--url", sqlite_path) if "Everybody" in text)
    assert f"chmod 600 {sqlite_path}" in warning


@pytest.mark.parametrize(("version", "warned"), [((3, 51, 2), True), ((3, 51, 3), False), ((3, 52, 0), False)])
def test_diag_warns_of_a_sqlite_with_the_wal_reset_bug(
    version: tuple[int, int, int], warned: bool, sqlite_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    assert any("3.51.3" in text for text in warnings_of("--url", sqlite_path)) == warned


def test_diag_warns_of_postgres_settings_that_lose_commits(postgres_url: str) -> None:
    assert not [text for text in warnings_of("--url", postgres_url) if "synchronous_commit" in text]
    engine = create_engine(postgres_url)
    database = engine.url.database
    engine.dispose()
    execute(postgres_url, f"ALTER DATABASE {database} SET synchronous_commit = off")
    (warning,) = (text for text in warnings_of("--url", postgres_url) if "synchronous_commit" in text)
    assert "may take the last commits" in warning
    assert "synchronous_commit off" in sagalog("--url", postgres_url, "check").out


def test_diag_warns_of_a_synchronous_below_full(sqlite_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sagalog.cli import health

    monkeypatch.setattr(health, "_sqlite_settings", lambda file: ("NORMAL", "wal"))  # as some builds of SQLite are
    assert any("PRAGMA synchronous = FULL" in text for text in warnings_of("--url", sqlite_path))


def test_diag_warns_of_a_network_file_system(sqlite_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sagalog.cli import health

    mounts = sqlite_path.parent / "mounts"
    mounts.write_text(
        "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"36 21 0:40 / {sqlite_path.parent} rw,relatime shared:1 - nfs4 server:/export rw\n"
    )
    monkeypatch.setattr(health, "_MOUNTS", mounts)
    assert any("network file system (nfs4)" in text for text in warnings_of("--url", sqlite_path))


def test_the_innermost_mount_tells_the_file_system() -> None:
    mounts = (
        "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "22 21 0:40 / /mnt/share rw - nfs server:/ rw\n"
        "23 22 0:41 / /mnt/share/local\\040disk rw - xfs /dev/sdb rw\n"
    )
    assert filesystem_of(Path("/mnt/share/sagas.db"), mounts) == "nfs"
    assert filesystem_of(Path("/mnt/shared/sagas.db"), mounts) == "ext4"
    assert filesystem_of(Path("/mnt/share/local disk/sagas.db"), mounts) == "xfs"


def test_passwords_are_not_shown(postgres_url: str) -> None:
    fill(postgres_url)
    separator = "&" if "?" in postgres_url else "?"
    facts = sagalog("--url", f"{postgres_url}{separator}password=secret", "diag", "--json")
    assert facts.status == 0, facts.err
    assert "resolve-step 2 0" in facts.out
    assert "secret" not in facts.out
    typed = make_url(postgres_url).set(password="secret").render_as_string(hide_password=False)
    for words in (("diag",), ("check",), ("show", 99), ("downgrade", "base")):
        shown = sagalog("--url", typed, *words)
        assert "secret" not in shown.out + shown.err


# Reading and writing moments, durations, sizes


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("1d12h", 129_600), ("1.5h", 5400), ("1w", 604_800)]
)
def test_durations_are_read(text: str, seconds: int) -> None:
    assert read_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "2", "h", "2x", "2h!", "-2h", "9" * 400 + "w"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"duration|too long"):
        read_duration(text)


def test_moments_are_read_in_utc_unless_they_say_otherwise() -> None:
    assert read_moment("2026-03-01") == datetime(2026, 3, 1, tzinfo=UTC)
    assert read_moment("2026-03-01T12:00+02:00") == datetime(2026, 3, 1, 10, tzinfo=UTC)
    assert abs(datetime.now(UTC) - timedelta(hours=2) - read_moment("2h")) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0ms"), (0.25, "250ms"), (61, "1m 1s"), (90_000, "1d 1h"), (-5, "-5s"), (86_405, "1d 5s")],
)
def test_durations_are_shown_in_their_two_largest_units(seconds: float, shown: str) -> None:
    assert shown_duration(timedelta(seconds=seconds)) == shown


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_500_000_000_000, "2.5 TB")]
)
def test_sizes_are_shown_for_people(size: int, shown: str) -> None:
    assert shown_size(size) == shown


# Starting


def run(code: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env}, timeout=60)


def test_help_loads_neither_sqlalchemy_nor_rich() -> None:
    code = (
        "import sys\nfrom sagalog.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print([name for name in ('sqlalchemy', 'alembic', 'pydantic', 'rich.console') if name in sys.modules])"
    )
    done = run(code, "--help")
    assert done.returncode == 0, done.stderr
    assert "resolve-step" in done.stdout
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_the_script_prints_the_install_line(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from sagalog.cli import main; main()"
    done = run(code, "--help")
    assert done.returncode == 2
    assert done.stdout == ""
    assert 'pip install "sagalog[cli]"' in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_script_and_the_module_are_the_same_program(sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    script = Path(sys.executable).with_name("sagalog")
    outputs: list[Any] = []
    for command in ([str(script)], [sys.executable, "-m", "sagalog"]):
        done = subprocess.run(
            [*command, "--url", str(sqlite_path), "list", "--json"], capture_output=True, text=True, check=True
        )
        outputs.append(json.loads(done.stdout))
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 4


def test_a_terminal_whose_encoding_lacks_a_character_gets_it_escaped(sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    execute(f"sqlite:///{sqlite_path}", "UPDATE saga SET name = 'bestellung-ü-注'")
    command = [sys.executable, "-m", "sagalog", "--url", str(sqlite_path), "list"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert r"bestellung-\xfc-\u6ce8" in done.stdout


def test_a_reader_that_goes_away_is_no_traceback(sqlite_path: Path) -> None:
    fill(f"sqlite:///{sqlite_path}")
    command = [
        sys.executable,
        "-m",
        "sagalog",
        "--url",
        str(sqlite_path),
        "watch",
        "--output",
        "jsonl",
        "--every",
        "0.1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        execute(f"sqlite:///{sqlite_path}", "UPDATE saga SET name = 'renamed'")
        complaint = process.stderr.read()
    assert "Traceback" not in complaint


def test_the_version_is_told() -> None:
    from importlib.metadata import version

    assert sagalog("--version").out.strip() == version("sagalog")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_offered(shell: str) -> None:
    # A test may run where no shell is among its parents, as under a service: Typer would ask for them.
    detected = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = run("from sagalog.cli import main; main()", "--show-completion", shell, **detected)
    assert done.returncode == 0, done.stderr
    assert "_SAGALOG_COMPLETE" in done.stdout
