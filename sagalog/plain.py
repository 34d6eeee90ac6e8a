"""Which values JSON surely gives back as they are, so that they need not be read back to be sure."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

_NONE = type(None)
_SIMPLE = (str, int, float, bool)
_LEAVES = frozenset((*_SIMPLE, _NONE))
_JSON = (Any, dict, list, dict[str, Any], list[Any])
_HARMLESS = {"frozen", "title"}


def plain_check(kind: Any) -> Callable[[Any], bool]:
    """What tells of a value whether its JSON reads back, as `kind`, to the same; False where it is not sure.

    Sure are simple values and JSON values where they are annotated, and models of them without anything that could
    change them on the way: another name, a constraint, a validator, a serializer, a setting.

    Args:
        kind: An annotation.
    """
    if kind is None:
        return lambda value: value is None
    if kind in _SIMPLE:
        return lambda value: type(value) is kind
    if kind in _JSON and kind is not Any:
        plain = typing.get_origin(kind) or kind
        return lambda value: type(value) is plain and _is_json(value)
    if not _is_plain_model(kind):
        return lambda value: False
    fields = [
        (name, _is_simple(field.annotation), _classes(field.annotation)) for name, field in kind.model_fields.items()
    ]

    def is_plain(value: Any) -> bool:
        # What is read back has every field set, which its handler may ask for.
        if type(value) is not kind or len(value.__pydantic_fields_set__) != len(fields):
            return False
        held = value.__dict__
        for name, simple, classes in fields:
            item = held.get(name)
            if not (type(item) in classes and (simple or _is_json(item))):
                return False
        return len(held) == len(fields)

    return is_plain


def unchangeable_check(kind: Any) -> Callable[[Any], bool]:
    """The same of what nobody can change either, so that it may be handed on as it is.

    Args:
        kind: An annotation.
    """
    if (
        _is_plain_model(kind)
        and kind.model_config.get("frozen")
        and all(_is_simple(field.annotation) for field in kind.model_fields.values())
    ):
        return plain_check(kind)
    return lambda value: False


def _is_simple(kind: Any) -> bool:
    """Whether a field's values are simple ones of one class, or None."""
    others = [part for part in _parts(kind) if part is not _NONE]
    return len(others) == 1 and others[0] in _SIMPLE


def _parts(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _classes(kind: Any) -> frozenset[Any]:
    """The classes that a plain field's values are of."""
    if kind is Any:
        return frozenset((*_LEAVES, dict, list))
    return frozenset(typing.get_origin(part) or part for part in _parts(kind))


def _is_json(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str or not (type(item) in _LEAVES or _is_json(item)):
                return False
        return True
    if kind is list:
        for item in value:  # noqa: SIM110 - all() of a generator takes twice the time
            if not (type(item) in _LEAVES or _is_json(item)):
                return False
        return True
    return kind in _LEAVES


def _is_plain_model(kind: Any) -> bool:
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or not kind.__pydantic_complete__:
        return False
    decorators = kind.__pydantic_decorators__
    changed = (
        any(getattr(decorators, one.name) for one in dataclasses.fields(decorators))
        or any(getattr(kind, name) is not getattr(BaseModel, name) for name in ("__init__", "model_post_init"))
        or any("__get_pydantic_core_schema__" in vars(base) for base in kind.__mro__ if base is not BaseModel)
        or kind.__private_attributes__
        or not set(kind.model_config) <= _HARMLESS
    )
    return not changed and all(
        (field.annotation in _JSON or _is_simple(field.annotation))
        and not (field.metadata or field.exclude or field.exclude_if)
        and (field.alias, field.validation_alias, field.serialization_alias) == (None, None, None)
        for field in kind.model_fields.values()
    )
