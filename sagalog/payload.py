"""Python values to JSON text and back; refused before any SQL if JSON or a database cannot hold them."""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

from pydantic import (
    PydanticUndefinedAnnotation,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import from_json, to_json

from sagalog.errors import PayloadError, where

T = TypeVar("T")

Payload: TypeAlias = Any
"""A Pydantic model, a dataclass, or a JSON value: the one place where sagalog takes anything."""

JsonValue: TypeAlias = Any
"""What JSON text reads back as: None, bool, int, float, str, list, dict."""

MAX_SAGA_ID = 2**63 - 1
MAX_STEP_INDEX = 2**31 - 1

# Shorter text nests less deep, and holds shorter integers, than can be read back.
_LONGEST_UNCHECKED = 390
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_HELD = "JSON text can hold None, bool, finite numbers, text without U+0000, lists, dicts, Pydantic models, dataclasses"


def encode(value: Payload, asked: str, saga_id: int | None = None, step_index: int | None = None) -> str:
    """JSON text of a payload.

    Raises:
        PayloadError: JSON or a database cannot hold it. The message names the
            type and the reason, never the value.
    """
    if value is None:
        return "null"
    try:
        text = to_json(value).decode()  # NaN and infinity as such words
        # Whatever could read back as something else than what was given; only such text is checked further.
        # One letter is found to be missing in a fifth of the time that a word takes.
        if (
            len(text) > _LONGEST_UNCHECKED
            or "null" in text
            or ("N" in text and "NaN" in text)
            or ("I" in text and "Infinity" in text)
            or ("\\" in text and "\\u0000" in text)
        ):
            _check_it_reads_back(value, text)
        return text
    except Exception as error:  # a class's own serializer may raise anything
        # Not chained: what pydantic-core says may quote the value.
        reason = str(error) if isinstance(error, _Unreadable) else f"it cannot be written as JSON ({_kind(error)})"
        problem = f"a payload of type {type(value).__name__} cannot be stored: {reason}"
    raise PayloadError(
        f"{asked} of {where(saga_id, step_index)}",
        problem,
        saga_id=saga_id,
        step_index=step_index,
        found=type(value).__name__,
        hint=f"{_HELD}.",
    )


class _Unreadable(ValueError):
    """A reason that quotes nothing of the payload."""


def _kind(error: BaseException) -> str:
    text = str(error)
    for sign, kind in (
        ("surrogate", "a lone surrogate"),
        ("UnicodeEncodeError", "a lone surrogate"),
        ("unknown type", "an object of a type it does not know"),
        ("Circular", "it contains itself"),
        ("depth", "nesting too deep"),
        ("recursion", "nesting too deep"),
        ("digits", "an integer too long to be read back"),
        ("utf-8", "bytes that are not UTF-8"),
    ):
        if sign in text:
            return kind
    return type(error).__name__


def _check_it_reads_back(value: Payload, text: str) -> None:
    try:
        back = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        if "NaN" in str(error) or "Infinity" in str(error) or "NaN" in text or "Infinity" in text:
            raise _Unreadable("NaN or infinity") from None
        raise _Unreadable("nesting too deep, or an integer too long, to be read back") from None
    if "\\u0000" in text and _any_leaf(back, lambda leaf: isinstance(leaf, str) and "\x00" in leaf):
        raise _Unreadable("U+0000 in a text")
    if to_json(back).decode() != text:
        raise _Unreadable("it reads back as another value")
    # Python values, for the JSON ones may hold null where a model held NaN.
    if "null" in text and _any_leaf(
        _adapter(Any).dump_python(value), lambda leaf: isinstance(leaf, float) and not math.isfinite(leaf)
    ):
        raise _Unreadable("NaN or infinity")


def _any_leaf(value: JsonValue, wanted: Any) -> bool:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            pending.extend(item)
        elif wanted(item):
            return True
    return False


def decode(text: str | None, column: str, saga_id: int | None, step_index: int | None = None) -> JsonValue:
    """The plain JSON value of a stored text; None for NULL and for the earlier program's empty text.

    Raises:
        PayloadError: The stored text is not JSON; saga, step and column are named.
    """
    if not text:
        return None
    try:
        return from_json(text)
    except (ValueError, TypeError):
        raise _stored_badly("is not JSON", column, saga_id, step_index) from None


def decode_as(kind: type[T], text: str | None, column: str, saga_id: int | None, step_index: int | None = None) -> T:
    """The stored text as `kind`, validated by Pydantic.

    Raises:
        PayloadError: The stored text is not JSON, or does not fit `kind`.
    """
    try:
        decoded: T = _adapter(kind).validator.validate_json(text or "null")
    except Exception as error:  # a class's own validator may raise anything, and Pydantic wraps a ValueError only
        found = f"{error.error_count()} errors" if isinstance(error, ValidationError) else type(error).__name__
        problem = f"does not fit {getattr(kind, '__name__', kind)} ({found})"
    else:
        return decoded
    raise _stored_badly(problem, column, saga_id, step_index)


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if isinstance(kind, type):
        return _adapter_of(kind, "")
    try:
        return _adapter_of(kind, repr(kind))
    except TypeError:  # it cannot be hashed, or it is no annotation at all
        return TypeAdapter(kind)


@lru_cache(maxsize=512)
def _adapter_of(kind: Any, written: str) -> TypeAdapter[Any]:
    """Of a union its order counts as well, which its equality does not tell."""
    return TypeAdapter(kind)


def _stored_badly(problem: str, column: str, saga_id: int | None, step_index: int | None) -> PayloadError:
    return PayloadError(
        f"reading {where(saga_id, step_index)}",
        f"the stored {column} {problem}",
        saga_id=saga_id,
        step_index=step_index,
        found=column,
        hint=f"The record's {column} holds the stored text; other sagas are not affected.",
    )


def unreadable(kind: Any) -> str | None:
    """Why values of an annotation cannot be had back from JSON; None if they can."""
    try:
        _adapter(kind)
    except (PydanticUserError, PydanticUndefinedAnnotation, TypeError) as error:
        return f"Pydantic cannot read it ({type(error).__name__})"
    return None


def same_json(one: str, other: str) -> bool:
    """Whether two JSON texts say the same; an object's keys have no order, and what is no JSON is like nothing else."""
    try:
        sorted_one, sorted_other = (json.dumps(from_json(text), sort_keys=True) for text in (one, other))
    except ValueError:
        return False
    return sorted_one == sorted_other


def printable(reason: str) -> str:
    """A reason that every database can hold: U+0000 and lone surrogates become U+FFFD, so a failure is never lost."""
    return _UNSTORABLE.sub("\ufffd", str(reason))


def check_text(value: str, what: str, asked: str, saga_id: int | None = None, step_index: int | None = None) -> str:
    """A name, key or note as given.

    Raises:
        PayloadError: It is no str, is empty, or holds U+0000 or a lone surrogate.
    """
    if isinstance(value, str) and value.isascii() and value.isprintable() and not value.isspace() and value:
        return value
    if not isinstance(value, str):
        problem = f"the {what} is a {type(value).__name__}, not a str"
    elif not value or value.isspace():
        problem = f"the {what} is empty"
    elif _UNSTORABLE.search(value):
        problem = f"the {what} holds U+0000 or a lone surrogate"
    else:
        return value
    raise PayloadError(
        f"{asked} of {where(saga_id, step_index)}",
        problem,
        saga_id=saga_id,
        step_index=step_index,
        found=type(value).__name__,
        hint=f"Give a {what} in plain text.",
    )


def check_integer(value: int, what: str, lowest: int, highest: int, asked: str) -> int:
    """An int, and no bool, within bounds; otherwise `PayloadError`, before any SQL."""
    if isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest:
        return value
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    found = "out of range" if is_integer else f"a {type(value).__name__}"
    raise PayloadError(
        asked, f"the {what} is {found}", found=found, hint=f"A {what} is an int from {lowest} to {highest}."
    )


def check_limit(value: int | None, asked: str) -> None:
    """How many of something are wanted: an int from 0, or None for all."""
    if value is not None:
        check_integer(value, "limit", 0, MAX_SAGA_ID, asked)


def check_step(saga_id: int, step_index: int, asked: str) -> None:
    """Both parts of a step's key."""
    if (
        type(saga_id) is int
        and type(step_index) is int
        and 0 < saga_id <= MAX_SAGA_ID
        and 0 <= step_index <= MAX_STEP_INDEX
    ):
        return
    check_saga_id(saga_id, asked)
    check_step_index(step_index, asked)


def check_saga_id(value: int, asked: str) -> int:
    """A saga_id: 1 to 2**63-1."""
    return check_integer(value, "saga_id", 1, MAX_SAGA_ID, asked)


def check_step_index(value: int, asked: str) -> int:
    """A step_index: 0 to 2**31-1."""
    return check_integer(value, "step_index", 0, MAX_STEP_INDEX, asked)
