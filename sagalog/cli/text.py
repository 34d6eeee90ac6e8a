"""Text from the database, made harmless for a terminal; moments, durations, sizes for people."""

from __future__ import annotations

import re
import unicodedata
from datetime import UTC, datetime, timedelta

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")


def harmless(text: object, keep: str = "") -> str:
    r"""A text in which nothing can steer a terminal: control characters become `\x1b`, `\n`, `\u202e`.

    Args:
        text: From a database, or an error.
        keep: Characters that stay as they are.
    """
    plain = str(text)
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(
        repr(char)[1:-1] if unicodedata.category(char) in _INVISIBLE and char not in keep else char for char in plain
    )


def shown_moment(moment: datetime | None) -> str:
    """A moment to the second, in UTC."""
    return "" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def shown_duration(duration: timedelta) -> str:
    """A duration in its two largest units, `3d 4h`; milliseconds only below a second."""
    seconds = duration.total_seconds()
    if seconds < 0:
        return "-" + shown_duration(-duration)
    if seconds < 1:
        return f"{int(seconds * 1000)}ms"
    parts = []
    rest = int(seconds)
    for unit in ("d", "h", "m", "s"):
        count, rest = divmod(rest, _UNITS[unit])
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])


def shown_size(size: int) -> str:
    """A number of bytes for people."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def sagas(count: int) -> str:
    """A number of sagas."""
    return "1 saga" if count == 1 else f"{count} sagas"


def read_duration(text: str) -> timedelta:
    """`90s`, `15m`, `2h`, `1d12h`.

    Raises:
        ValueError: It is no duration.
    """
    compact = text.replace(" ", "")
    parts = _DURATION.findall(compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact:
        raise ValueError(f"{text!r} is no duration; write it like 90s, 15m, 2h or 7d")
    try:
        return timedelta(seconds=sum(float(number) * _UNITS[unit] for number, unit in parts))
    except OverflowError:
        raise ValueError(f"{text!r} is too long") from None


def read_moment(text: str) -> datetime:
    """`2026-03-01`, `2026-03-01T12:00`, with or without an offset (UTC without), or how long ago: `2h`.

    Raises:
        ValueError: It is neither a moment nor a duration.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        try:
            return datetime.now(UTC) - read_duration(text)
        except (ValueError, OverflowError):
            raise ValueError(f"{text!r} is no moment; write it like 2026-03-01T12:00Z, or 2h for so long ago") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
