"""Where Python hears a signal, one place after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SAGALOG = Path(__file__).parent.parent / "sagalog"


@contextmanager
def interrupted_at(number: int, *places: str, look: Callable[[], None] | None = None) -> Iterator[None]:
    """Raise KeyboardInterrupt in this thread, once: where a function is entered, or a call of one of C's is over.

    Args:
        number: At the n-th of them.
        places: Files and folders of the library whose code is meant.
        look: Is called at each before.
    """
    within = tuple(str(SAGALOG / place) for place in places)
    passed = 0

    def heard(frame: FrameType, kind: str, _: object) -> None:
        nonlocal passed
        if kind not in ("call", "c_return") or not frame.f_code.co_filename.startswith(within):
            return
        if look is not None:
            look()
        passed += 1
        if passed == number:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(heard)
    try:
        yield
    finally:
        sys.setprofile(None)
