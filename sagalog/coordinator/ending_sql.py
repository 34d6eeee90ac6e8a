"""SQL that ends a transaction, told by its first words."""

from __future__ import annotations

import re
from collections.abc import Iterator

_SKIPPED = re.compile(r"(?:\s|;|--[^\r\n]*)+")
_WORD = re.compile(r"\w+")
_COMMENT = re.compile(r"/\*|\*/")
_ENDS = {"COMMIT", "END", "ABORT"}


def ends_transaction(statement: str, *, comments_nest: bool) -> bool:
    """Whether a statement commits or rolls back the transaction that it is sent in, or prepares it.

    Args:
        statement: The SQL; of several in one, the first counts.
        comments_nest: Whether one comment may hold another, as on Postgres.
    """
    words = _words_of(statement, comments_nest=comments_nest)
    first = next(words, "")
    if first == "ROLLBACK":  # [WORK] TO a savepoint
        return "TO" not in (next(words, ""), next(words, ""))
    return first in _ENDS or (first == "PREPARE" and next(words, "") == "TRANSACTION")


def _words_of(statement: str, *, comments_nest: bool) -> Iterator[str]:
    """Its words in capitals, up to what is no word."""
    place = 0
    while True:
        if skipped := _SKIPPED.match(statement, place):
            place = skipped.end()
        if statement.startswith("/*", place):
            place = _after_comment(statement, place + 2, nest=comments_nest)
        elif word := _WORD.match(statement, place):
            place = word.end()
            yield word[0].upper()
        else:
            return


def _after_comment(statement: str, place: int, *, nest: bool) -> int:
    depth = 1
    for mark in _COMMENT.finditer(statement, place):
        if mark[0] == "*/":
            depth -= 1
        elif nest:
            depth += 1
        if depth == 0:
            return mark.end()
    return len(statement)
