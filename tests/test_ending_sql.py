"""Which SQL ends a transaction, and is refused in a transactional handler."""

from __future__ import annotations

import pytest

from sagalog.coordinator.ending_sql import ends_transaction


@pytest.mark.parametrize(
    "statement",
    ["COMMIT", " end;", ";commit", "-- so\rcommit work", "/* a */ /* b */ROLLBACK", "rollback and chain", "Abort",
     "prepare /* it */ transaction 'a'", "ROLLBACK WORK"],
)  # fmt: skip
@pytest.mark.parametrize("comments_nest", [True, False])
def test_what_ends_a_transaction_is_told_by_its_first_words(statement: str, comments_nest: bool) -> None:
    assert ends_transaction(statement, comments_nest=comments_nest)


@pytest.mark.parametrize(
    "statement",
    ["", "SELECT 1 -- commit", "endow", "ROLLBACK /* c */ TO SAVEPOINT a", "rollback work to a", "PREPARE commit AS",
     "/* COMMIT", "'commit'", "(select 1)", "-- commit", "/* a */"],
)  # fmt: skip
def test_what_ends_no_transaction_is_left_alone(statement: str) -> None:
    assert not ends_transaction(statement, comments_nest=True)


def test_a_comment_in_a_comment_hides_a_commit_where_comments_nest() -> None:
    statement = "/* a /* b */ COMMIT */ SELECT 1"
    assert not ends_transaction(statement, comments_nest=True)
    assert ends_transaction(statement, comments_nest=False)
