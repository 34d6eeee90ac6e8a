"""Whether a value comes back from its JSON text as what it was: what would be taken for something else is refused."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from datetime import UTC, date, datetime, time, timedelta
from enum import Enum
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from pydantic import AliasChoices, BaseModel, Secret, SecretBytes, SecretStr
from pydantic.fields import FieldInfo

from sagalog.errors import PayloadError, where

_SECRET = (SecretStr, SecretBytes, Secret)
_TIMES = (date, time, timedelta)  # a datetime is a date


def check_had_back(
    kind: Any,
    value: Any,
    back: Any,
    again: Callable[[Any], Any],
    asked: str,
    saga_id: int | None = None,
    step_index: int | None = None,
) -> None:
    """Refuse what would be taken for something else once it is read back.

    Args:
        kind: As what it is read back.
        value: The value.
        back: What is read back of it.
        again: What is read back of that, once it is written.
        asked: What it is for.
        saga_id: The saga, for the message.
        step_index: The step, for the message.

    Raises:
        PayloadError: It holds a secret, or one of several classes that look alike in JSON.
    """
    try:
        changed = None if _alike(value, back) else _changed_by_json(kind, value, back, again)
    except Exception as error:  # a class of the application's that cannot be compared
        changed = f"it cannot be compared with what is read back ({type(error).__name__})"
    if changed is not None:
        raise PayloadError(
            f"{asked} of {where(saga_id, step_index)}",
            f"a {type(value).__name__} cannot be had back from the log: {changed}",
            saga_id=saga_id,
            step_index=step_index,
            found=type(value).__name__,
            hint="Tell classes that look alike apart by Field(discriminator=...), name a secret in place of it, and "
            "let each field be read from where it is written, as what is written: see alias=, ser_json_bytes=, "
            "dataclasses.field(init=), and validators that change a value again.",
        )


def _alike(value: Any, back: Any) -> bool:
    """Whether two are of one class, and equal: most are, and nothing else need be asked."""
    try:
        return type(value) is type(back) and bool(_content_of(value) == _content_of(back))
    except Exception:
        return False  # a class of the application's that cannot be compared


def _content_of(value: Any) -> Any:
    """What is compared of a value; of a model not what was set, nor what is private: neither is in JSON."""
    if isinstance(value, BaseModel):
        return value.__dict__, value.__pydantic_extra__
    return getattr(value, "__dict__", value)


def _changed_by_json(kind: Any, value: Any, back: Any, again: Callable[[Any], Any]) -> str | None:
    """What would be taken for something else; None if only plain values have become the JSON ones.

    A plain value that its class normalises is what the log holds of it, unless it is another one each time.
    """
    pending, normalised = [(kind, value, back)], None
    while pending:
        said, one, other = pending.pop()
        if isinstance(one, _SECRET):
            if one != other:
                return "it holds a secret, of which only a mask is written"
        elif _is_record(one) and _is_record(other):
            if type(one) is not type(other) and (not _is_kind_of(one, other) or _names(said, type(one))):
                return _reads_as(one, other)
            lost = _lost(one, other)
            if lost is not None:
                return f"the {lost!r} of a {type(one).__name__} is not read back"
            pending.extend(
                (_said_of(other, name), item, getattr(other, name, None))
                for name, item in _items_of(one)
                if not _is_left_out(one, name)
            )
        elif isinstance(one, bytes) and isinstance(other, bytes):
            if one != other:
                return "its bytes are written in one way, and read in another"
        elif isinstance(one, Enum) and isinstance(other, Enum):
            if one is not other:
                return _reads_as(one, other)
        elif isinstance(one, _TIMES) and type(one) is type(other):
            if _moment_of(one) != _moment_of(other):
                return _reads_as(one, other)
        elif isinstance(other, float) and isinstance(one, int) and not math.isfinite(other):
            return "a number is too large for a float"
        elif isinstance(one, set | frozenset | deque):
            kept = isinstance(other, set | frozenset | deque)
            if one != other and any(isinstance(item, _SECRET) or (kept and _is_more(item)) for item in one):
                return f"what a {type(one).__name__} holds reads back as something else"
        elif _is_record(one) and isinstance(other, dict):
            pending.extend((said, item, other.get(name)) for name, item in _items_of(one))
        elif isinstance(one, dict) and isinstance(other, dict):
            if len(one) != len(other) or any(isinstance(key, bytes) and key not in other for key in one):
                return "the keys of a dict are not read back as they are"
            pending.extend((said, *items) for items in zip(one.values(), other.values(), strict=True))
        elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
            if hasattr(one, "_fields") and hasattr(other, "_fields") and type(one) is not type(other):
                return _reads_as(one, other)
            if len(one) != len(other):
                normalised = f"a {type(one).__name__} reads back as one of another length"
            pending.extend((said, *items) for items in zip(one, other, strict=False))
        elif type(one) is type(other) and _is_changed(one, other):
            normalised = _reads_as(one, other)
    return None if normalised is None or _alike(back, again(back)) else normalised


def _is_changed(one: Any, other: Any) -> bool:
    """Whether two plain values of a class are not equal, by what the class itself says of that."""
    if type(one).__eq__ is object.__eq__:  # type: ignore[comparison-overlap]
        return False
    try:
        return bool(one != other) and bool(one == one)
    except Exception:  # an array, say
        return False


def _moment_of(value: Any) -> Any:
    """What a date or time is compared by: in the hour that a clock is set back over, no two of two zones are equal."""
    is_aware = isinstance(value, datetime) and value.utcoffset() is not None
    return value.astimezone(UTC) if is_aware else value


def _reads_as(one: Any, other: Any) -> str:
    name, read = type(one).__name__, type(other).__name__
    return f"a {name} reads back as {'another one' if type(one) is type(other) else f'a {read}'}"


def _lost(one: Any, other: Any) -> str | None:
    """A field that is written under a name by which it is not read, or not read at all, though it holds something."""
    for name, item in _items_of(one):
        if not _is_read(one, other, name) and item != getattr(other, name, None):
            return name
    return None


def _is_read(one: Any, other: Any, name: str) -> bool:
    """Whether a field of a record is read, by the class of what is read back, from where it is written."""
    kind: Any = type(other)
    if is_dataclass(other) and not any(field.name == name and field.init for field in fields(other)):
        return False
    of_one, of_other = (getattr(each, "__pydantic_fields__", None) for each in (type(one), kind))
    if of_one is None or of_other is None:
        return is_dataclass(other) and _is_read_by_name(_hints_of(kind).get(name), name)
    field, held = of_one.get(name), of_other.get(name)
    if field is None and held is None:
        return name in (getattr(other, "__pydantic_extra__", None) or {})
    if _is_left_out(one, name):
        return True  # as its class says
    if field is None or held is None:
        return False
    config = getattr(kind, "model_config", None) or getattr(kind, "__pydantic_config__", None) or {}
    by_name = config.get("populate_by_name") or config.get("validate_by_name")
    read, written = held.validation_alias, field.serialization_alias or name
    if read is None or (by_name and written == name):
        return written == name
    names = read.choices if isinstance(read, AliasChoices) else [read]
    return config.get("validate_by_alias") is not False and written in names


def _is_left_out(record: Any, name: str) -> bool:
    """Whether its class says that a field is not written."""
    field = (getattr(type(record), "__pydantic_fields__", None) or {}).get(name)
    return field is not None and bool(field.exclude or field.exclude_if)


def _is_more(value: Any) -> bool:
    """Whether JSON holds less of a value than it is."""
    return _is_record(value) or isinstance(value, bytes | Enum)


def _is_read_by_name(annotation: Any, name: str) -> bool:
    """Whether a field of a plain dataclass, which is written by its name, is read by it."""
    described = [more for more in getattr(annotation, "__metadata__", ()) if isinstance(more, FieldInfo)]
    return all(more.validation_alias in (None, name) for more in described)


@lru_cache(maxsize=512)
def _hints_of(kind: Any) -> dict[str, Any]:
    try:
        return get_type_hints(kind, include_extras=True)
    except Exception:  # a name that cannot be looked up from here
        return {}


def _is_kind_of(one: Any, other: Any) -> bool:
    """Whether a record is of the other one's class, or of the same generic one with other parameters."""
    return isinstance(one, type(other)) or _origin_of(one) is _origin_of(other)


def _origin_of(value: Any) -> Any:
    """The class of a value; of a generic model, whatever its parameters are, the generic one."""
    described = getattr(type(value), "__pydantic_generic_metadata__", None)
    return (described and described["origin"]) or type(value)


def _names(annotation: Any, kind: type[Any]) -> bool:
    """Whether an annotation names a class, and so tells it from others."""
    pending, seen = [annotation], set[int]()
    while pending:
        one = pending.pop()
        if one is kind:
            return True
        if id(one) not in seen:  # an alias may name itself
            seen.add(id(one))
            pending += [*get_args(one), getattr(one, "__value__", None), getattr(one, "__supertype__", None)]
    return False


def _said_of(record: Any, name: str) -> Any:
    """A field's annotation."""
    kind: Any = type(record)
    described = getattr(kind, "__pydantic_fields__", {}).get(name)
    return _hints_of(kind).get(name) if described is None else described.annotation


def _is_record(value: Any) -> bool:
    return isinstance(value, BaseModel) or (is_dataclass(value) and not isinstance(value, type))


def _items_of(record: Any) -> list[tuple[str, Any]]:
    if is_dataclass(record):
        return [(field.name, getattr(record, field.name, None)) for field in fields(record)]
    held = [(name, getattr(record, name, None)) for name in type(record).model_fields]
    return held + list((record.__pydantic_extra__ or {}).items())
