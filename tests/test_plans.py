"""No query scans a table that grows: the plans, on both databases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text

from sagalog import SagaLog, SagaOutcome


@pytest.fixture
def statements(migrated_url: str) -> Any:
    """Runs calls on an engine and collects the statements with their parameters."""
    engine = create_engine(migrated_url)
    log = SagaLog(engine)
    seen: list[tuple[str, Any]] = []
    with engine.begin() as connection:
        _fill(connection)

    @event.listens_for(engine, "before_cursor_execute")
    def _see(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if not statement.lstrip().upper().startswith(("EXPLAIN", "PRAGMA")):
            seen.append((statement, parameters))

    yield engine, log, seen
    engine.dispose()


def _fill(connection: Any) -> None:
    on_postgres = connection.dialect.name == "postgresql"
    numbers = (
        "SELECT n FROM generate_series(1, 20000) AS t(n)"
        if on_postgres
        else "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 20000) SELECT n FROM t"
    )
    connection.execute(
        text(
            "INSERT INTO saga (saga_id, name, state, started_at, terminal_at, input_json) "
            "SELECT n, 's', CASE WHEN n % 4000 = 0 THEN 'running' ELSE 'completed' END, n, n, 'null' "
            f"FROM ({numbers}) AS numbers"
        )
    )
    connection.execute(
        text(
            "INSERT INTO saga_step (saga_id, step_index, name, state, cmd_json, started_at) "
            "SELECT saga_id, 0, 'c', 'succeeded', 'null', 1 FROM saga"
        )
    )
    connection.execute(text("ANALYZE"))


def test_no_operation_scans_a_table(statements: Any) -> None:
    engine, _log, seen = statements
    joined = engine.connect()
    work = SagaLog(joined)
    work.max_saga_id()
    work.create_saga("s", None, key="k")
    work.start_step(4000, 1, "c", None)
    work.finish_step(4000, 1, None)
    work.start_step(4000, 2, "c", None)
    work.fail_step(4000, 2, "r")
    work.compensate_step(4000, 3, None)
    work.append_recovery_step(4000, 4, "c", None, None)
    work.next_step_index(4000)
    work.mark_step_compensated(4000, 1)
    work.mark_all_succeeded_steps_compensated(4000)
    work.mark_compensating(4000)
    work.terminate(4000, SagaOutcome.compensated("r"))
    work.unresolved_sagas()
    work.unresolved_sagas(limit=2)
    work.snapshot_recent(50)
    work.get(4000)
    work.find(state="running")
    work.find(state="failed_compensation")
    work.find(key="k")
    work.find(name="s", before=100)
    work.mark_failed_compensation(8000, "r")
    work.resolve_step(8000, 0, "compensated", note="n", actor="a")
    work.resolve(8000, "compensated", note="n", actor="a")
    work.audit(8000)
    work.request_cancel(12000, "r")
    joined.rollback()
    scanned = []
    for statement, parameters in list(seen):
        if not statement.lstrip().startswith(("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")):
            continue
        if "saga" not in statement or "sagalog_version" in statement or "pg_catalog" in statement:
            continue
        if engine.dialect.name == "sqlite":
            plan = "\n".join(row[3] for row in joined.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters))
            full = [
                line
                for line in plan.splitlines()
                if line.startswith("SCAN saga") and "USING" not in line and "saga_audit" not in line
            ]
        else:
            plan = "\n".join(row[0] for row in joined.exec_driver_sql(f"EXPLAIN {statement}", parameters))
            full = [
                line
                for line in plan.splitlines()
                if "Seq Scan on saga" in line and "audit" not in line and "meta" not in line
            ]
        if full:
            scanned.append((statement, plan))
    joined.rollback()
    joined.close()
    assert scanned == []
    assert len(seen) > 25


def test_the_partial_indexes_are_used(sqlite_path: Path) -> None:
    engine = create_engine(f"sqlite:///{sqlite_path}")
    with engine.begin() as connection:
        _fill(connection)
    with SagaLog.open(sqlite_path) as log:
        sql = log._bind._sql  # type: ignore[attr-defined]
        for statement, index in (
            (sql.unresolved_sagas(False), "saga_unresolved_idx"),
            (sql.snapshot_recent, "saga_recent_idx"),
            (sql.first_prunable, "saga_recent_idx"),
            (sql.prunable, "saga_recent_idx"),
            (sql.find(frozenset(), "failed"), "saga_unresolved_idx"),
            (sql.find(frozenset(), "abandoned"), "saga_attention_idx"),
            (sql.find(frozenset({"name"}), None), "saga_name_idx"),
            (sql.saga_of_key, "saga_key_idx"),
        ):
            query, _ = statement.sqlite
            with engine.connect() as connection:
                plan = [
                    row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", (1,) * query.count("?"))
                ]
            assert any(index in line for line in plan), (index, plan)
    engine.dispose()
