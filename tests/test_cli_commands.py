"""Each command, on SQLite and on Postgres, as an operator types it."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cli import EVIL, execute, fill, log_at, sagalog

from sagalog.schema import HEAD, REVISIONS


@pytest.fixture
def url(migrated_url: str) -> str:
    fill(migrated_url)
    return migrated_url


def test_upgrade_current_check_and_downgrade(database_url: str) -> None:
    first = sagalog("--url", database_url, "upgrade", REVISIONS[0])
    assert (first.status, first.out.strip()) == (0, f"no revision -> {REVISIONS[0]}")
    assert sagalog("--url", database_url, "current").out.strip() == REVISIONS[0]
    refused = sagalog("--url", database_url, "check")
    assert refused.status == 1
    assert "sagalog upgrade" in refused.err
    assert sagalog("--url", database_url, "upgrade", "--json").json == {
        "before": REVISIONS[0], "revision": HEAD, "head": HEAD,
    }  # fmt: skip
    assert sagalog("--url", database_url, "current").out.strip() == f"{HEAD} (head)"
    assert sagalog("--url", database_url, "upgrade").out.strip() == f"at {HEAD} already"
    checked = sagalog("--url", database_url, "check", "--json")
    assert (checked.status, checked.json["ok"], checked.json["revision"]) == (0, True, HEAD)
    assert sagalog("--url", database_url, "downgrade", "base", "--yes").out.strip() == f"{HEAD} -> no revision"
    assert sagalog("--url", database_url, "current", "--json").json == {"revision": None, "head": HEAD}


def test_list_shows_the_newest_first_and_filters(url: str) -> None:
    shown = sagalog("--url", url, "list")
    assert shown.status == 0
    assert [line.split()[0] for line in shown.out.splitlines()[2:]] == ["4", "3", "2", "1"]
    assert "card declined" in shown.out

    def ids(*words: object) -> list[int]:
        return [saga["saga_id"] for saga in sagalog("--url", url, "list", "--json", *words).json]

    assert ids("--state", "running") == [3]
    assert ids("--name", "place_order") == [3, 1]
    assert ids("--open-longer-than", "0s") == [3]
    assert ids("--since", "1h") == [4, 3, 2, 1]
    assert ids("--until", "1h") == []
    assert ids("--since", "2999-01-01") == []
    assert ids("--limit", 2) == [4, 3]
    assert ids("--limit", 2, "--before", 3) == [2, 1]
    assert ids("--key", "none") == []
    assert sagalog("--url", url, "list", "--key", "none").out.strip() == "no sagas"
    assert "--before 3" in sagalog("--url", url, "list", "--limit", 2).err


def test_show_draws_the_steps_in_order_with_their_reasons(url: str) -> None:
    shown = sagalog("--url", url, "show", 1).out.splitlines()
    assert shown[0] == "saga 1  place_order  compensated"
    rows = [line.split()[:3] for line in shown if line.strip()[:1].isdigit()]
    assert rows == [
        ["0", "ReserveStock", "compensated"],
        ["1", "ChargeCard", "failed"],
        ["2", "ReleaseStock", "compensated"],
    ]
    (failed,) = (line for line in shown if "ChargeCard" in line)
    assert failed.rstrip().endswith("card declined")
    bars = [line.index("█") for line in shown if "█" in line]
    assert bars == sorted(bars)
    assert len(bars) == 3


def test_a_step_without_an_end_is_drawn_as_in_doubt(url: str) -> None:
    (line,) = (line for line in sagalog("--url", url, "show", 2).out.splitlines() if "pending" in line)
    assert "?" in line


def test_show_tells_which_step_undoes_which(url: str) -> None:
    execute(url, "UPDATE saga_step SET compensated_by = 2 WHERE saga_id = 1 AND step_index = 0")
    shown = sagalog("--url", url, "show", 1).out
    assert "undone by 2" in shown
    assert "undoes 0" in shown


def test_payloads_are_shown_only_on_demand(url: str) -> None:
    for words in (("show", 1), ("show", 1, "--json"), ("list",), ("list", "--json"), ("diag",), ("diag", "--json")):
        shown = sagalog("--url", url, *words)
        assert "TEA-1" not in shown.out, words
        assert "R-1" not in shown.out, words
    shown = sagalog("--url", url, "show", 1, "--payloads").out
    assert '"sku": "TEA-1"' in shown
    facts = sagalog("--url", url, "show", 1, "--payloads", "--json").json
    assert facts["input"] == {"order": 1}
    assert facts["steps"][0]["cmd"] == {"sku": "TEA-1"}
    assert facts["steps"][0]["output"] == [{"reservation": "R-1"}]
    assert facts["steps"][1]["error"] == "card declined"


def test_a_payload_with_broken_json_is_shown_as_it_is_stored(url: str) -> None:
    execute(url, "UPDATE saga SET input_json = '{broken' WHERE saga_id = 1")
    shown = sagalog("--url", url, "show", 1, "--payloads")
    assert shown.status == 0
    assert "(stored, but no JSON) {broken" in shown.out
    assert sagalog("--url", url, "show", 1, "--payloads", "--json").json["input_json"] == "{broken"


def test_watch_shows_counts_and_the_latest_sagas(url: str) -> None:
    shown = sagalog("--url", url, "watch", "--looks", 2, "--every", 0.1)
    assert shown.status == 0
    assert shown.out.count("failed_compensation 1") == 2
    assert shown.out.count("place_order") == 4


def test_watch_as_lines_tells_each_saga_once_until_it_changes(url: str) -> None:
    told = sagalog("--url", url, "watch", "--looks", 3, "--every", 0.1, "--output", "jsonl")
    assert sorted(saga["saga_id"] for saga in told.lines) == [1, 2, 3, 4]


def test_resolving_a_step_and_then_its_saga_is_audited(url: str) -> None:
    said = ("--note", "looked at the bank's side", "--actor", "grace", "--yes")
    refused = sagalog("--url", url, "resolve", 2, "--state", "compensated", *said)
    assert refused.status == 1
    assert "sagalog resolve-step" in refused.err
    step = sagalog("--url", url, "resolve-step", 2, 0, "--state", "failed", *said)
    assert (step.status, step.out.strip()) == (0, "step 0 of saga 2 is failed")
    saga = sagalog("--url", url, "resolve", 2, "--state", "compensated", *said, "--json")
    assert (saga.status, saga.json["state"]) == (0, "compensated")
    audit = sagalog("--url", url, "show", 2, "--json").json["audit"]
    assert [(row["action"], row["actor"], row["note"]) for row in audit] == [
        ("resolve_step", "grace", "looked at the bank's side"),
        ("resolve", "grace", "looked at the bank's side"),
    ]
    shown = sagalog("--url", url, "show", 2).out
    assert "looked at the bank's side" in shown
    assert "grace" in shown


def test_cancel_asks_for_the_undoing_and_is_audited(url: str) -> None:
    done = sagalog("--url", url, "cancel", 3, "--note", "the customer called", "--yes")
    assert (done.status, done.out.strip()) == (0, "saga 3 is running and is asked to be undone")
    with log_at(url) as log:
        assert log.get(3).cancel_reason == "the customer called"
        (row,) = log.audit(3)
    assert row.action == "cancel"
    assert row.actor
    refused = sagalog("--url", url, "cancel", 4, "--note", "too late", "--yes")
    assert refused.status == 1
    assert "has ended" in refused.err


def test_the_actor_is_the_user_of_the_operating_system_unless_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    sagalog("--url", url, "cancel", 3, "--note", "why", "--yes")
    with log_at(url) as log:
        assert log.audit(3)[0].actor == "ada"


def test_a_dry_run_counts_what_prune_then_deletes(url: str) -> None:
    limits = ("--keep-last", 0, "--older-than", 0)
    dry = sagalog("--url", url, "prune", *limits, "--dry-run", "--json")
    assert dry.json == {"prunable": 1, "deleted": 0, "dry_run": True}
    assert sagalog("--url", url, "prune", *limits, "--dry-run").out.strip() == "would delete 1 saga"
    with log_at(url) as log:
        assert len(log.find()) == 4
    done = sagalog("--url", url, "prune", *limits, "--yes")
    assert (done.status, done.out.strip()) == (0, "deleted 1 saga")
    with log_at(url) as log:
        assert [saga.saga_id for saga in log.find()] == [4, 3, 2]
    assert sagalog("--url", url, "prune", *limits).out.strip() == "deleted 0 sagas"


def test_diag_tells_the_state_of_the_log_and_what_to_type_next(url: str) -> None:
    soon = int((datetime.now(UTC) + timedelta(hours=1)).timestamp() * 1000)
    execute(
        url,
        "INSERT INTO saga_executor (executor_id, label, started_at, lease_until) "
        "VALUES ('e1', 'web-1', 0, :soon), ('e2', NULL, 0, 1000)",
        soon=soon,
    )
    facts: dict[str, Any] = sagalog("--url", url, "diag", "--json").json
    assert facts["revision"] == facts["head"] == HEAD
    counts = {row["state"]: row["count"] for row in facts["states"]}
    assert counts == {"compensated": 1, "completed": 1, "failed_compensation": 1, "running": 1}
    assert all(0 <= row["oldest_age"] < 600 for row in facts["states"])
    assert [(row["executor_id"], row["alive"]) for row in facts["executors"]] == [("e1", True), ("e2", False)]
    assert facts["size"] > 10_000
    needs = facts["needs_person"]
    assert needs["count"] == 1
    assert needs["sagas"][0]["name"] == EVIL
    proposed = needs["sagas"][0]["next"][-1]
    assert "resolve-step 2 0 --state 'succeeded|failed|compensated' --note TEXT" in proposed
    shown = sagalog("--url", url, "diag")
    assert shown.status == 0
    for words in ("running", "web-1", "ran out", "need a person", "resolve-step 2 0"):
        assert words in shown.out


def test_what_diag_proposes_can_be_typed(url: str) -> None:
    for state in ("compensated", "abandoned"):
        (need,) = sagalog("--url", url, "diag", "--json").json["needs_person"]["sagas"]
        words = shlex.split(need["next"][-1])
        assert words[:2] == ["sagalog", "--url"]
        choice = words.index("--state") + 1
        assert state in words[choice].split("|")
        words[choice] = state
        done = sagalog("--url", url, *words[3:], "--yes")
        assert done.status == 0, done.err
    assert sagalog("--url", url, "diag", "--json").json["needs_person"] == {"count": 0, "sagas": []}


def test_diag_fails_a_probe_only_when_a_person_is_needed(url: str) -> None:
    assert sagalog("--url", url, "diag").status == 0
    assert sagalog("--url", url, "diag", "--exit-code").status == 1
    execute(url, "UPDATE saga SET state = 'abandoned' WHERE state = 'failed_compensation'")
    healthy = sagalog("--url", url, "diag", "--exit-code")
    assert healthy.status == 0
    assert "Nothing needs a person." in healthy.out


def proposed(told: str) -> list[str]:
    """The words after `sagalog` of the command at the end of a line."""
    return shlex.split(told.partition("sagalog ")[2])


def test_diag_points_to_sagas_that_have_been_open_for_long(url: str) -> None:
    assert "--open-longer-than" not in sagalog("--url", url, "diag").out
    execute(url, "UPDATE saga SET started_at = 1000 WHERE saga_id = 3")
    (line,) = (line for line in sagalog("--url", url, "diag").out.splitlines() if line.startswith("Some have been"))
    typed = sagalog("--url", url, *proposed(line)[2:], "--json")
    assert proposed(line)[0] == "--url"
    assert [saga["saga_id"] for saga in typed.json] == [3]


def test_diag_names_ten_that_need_a_person_and_how_to_list_the_rest(url: str) -> None:
    with log_at(url) as log:
        for _ in range(11):
            log.mark_failed_compensation(log.create_saga("place_order", None), "no answer")
    shown = sagalog("--url", url, "diag").out
    assert shown.count("no answer") == 10
    (line,) = (line for line in shown.splitlines() if line.startswith("  ... and 2 more: "))
    assert proposed(line)[0] == "--url"
    assert len(sagalog("--url", url, *proposed(line)[2:], "--json").json) == 12
    in_environment = sagalog("diag", env={"SAGALOG_URL": url}).out
    assert "... and 2 more: sagalog list --state failed_compensation\n" in in_environment


def test_show_tells_how_long_a_request_may_be_under_way(url: str) -> None:
    execute(url, "UPDATE saga_step SET deadline_at = 4102444800000 WHERE saga_id = 2")
    assert "may be under way until 2100-01-01 00:00:00Z" in sagalog("--url", url, "show", 2).out
    refused = sagalog("--url", url, "resolve-step", 2, 0, "--state", "failed", "--note", "why", "--yes")
    assert refused.status == 1
    assert "under way" in refused.err


def test_the_tables_may_be_placed_elsewhere(database_url: str) -> None:
    placed = ("--url", database_url, "--prefix", "app_")
    if database_url.startswith("postgresql"):
        execute(database_url, "CREATE SCHEMA ops")
        placed += ("--schema", "ops")
    assert sagalog(*placed, "upgrade").status == 0
    placement = {"prefix": "app_", "schema": "ops" if "--schema" in placed else None}
    fill(database_url, **placement)
    assert len(sagalog(*placed, "list", "--json").json) == 4
    assert sagalog(*placed, "diag", "--json").json["size"] > 0
    assert sagalog("--url", database_url, "check").status == 1
    env = {"SAGALOG_URL": database_url, "SAGALOG_PREFIX": "app_", "SAGALOG_SCHEMA": placement["schema"]}
    assert sagalog("list", "--json", env=env).status == 0


def test_the_database_may_be_named_in_the_environment_or_pyproject(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(sagalog("list", "--json", env={"SAGALOG_URL": url}).json) == 4
    elsewhere = tmp_path / "project"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert sagalog("list").status == 2
    (elsewhere / "pyproject.toml").write_text(f'[tool.sagalog]\nurl = "{url}"\n')
    assert len(sagalog("list", "--json").json) == 4
    other = sagalog("--url", "other.db", "list")
    assert "other.db" in other.err
