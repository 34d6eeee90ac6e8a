"""Where Python hears a signal, one place after the other."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SAGALOG = Path(__file__).parent.parent / "sagalog"


class Limit(Exception):
    """As some servers raise in their handler of a signal, once a task takes too long."""


@contextmanager
def interrupted_at(
    number: int,
    *places: str,
    error: type[BaseException] = KeyboardInterrupt,
    function: str | None = None,
    look: Callable[[], None] | None = None,
) -> Iterator[list[str]]:
    """Raise an exception in this thread, once: where a function is entered, or a call of one of C's is over.

    Args:
        number: At the n-th of them.
        places: Files and folders of the library whose code is meant.
        error: What is raised.
        function: Only in functions of this name.
        look: Is called at each before.

    Yields:
        What will hold the function in which it was raised.
    """
    within = tuple(str(SAGALOG / place) for place in places)
    passed = 0
    fired: list[str] = []

    def heard(frame: FrameType, kind: str, _: object) -> None:
        nonlocal passed
        code = frame.f_code
        if kind not in ("call", "c_return") or not code.co_filename.startswith(within):
            return
        if kind == "call" and code.co_flags & inspect.CO_GENERATOR:
            return  # into one that goes on with an exception none comes
        if function is not None and code.co_name != function:
            return
        if look is not None:
            look()
        passed += 1
        if passed == number:
            sys.setprofile(None)
            fired.append(code.co_qualname)
            raise error

    sys.setprofile(heard)
    try:
        yield fired
    finally:
        sys.setprofile(None)
