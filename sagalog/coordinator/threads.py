"""A thread for each call of a sync handler from an event loop.

Daemons: one that hangs neither keeps its process from ending nor, in a pool, others from beginning.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Any


def in_thread(function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
    """Call a function in a thread of its own, in the caller's context; what becomes of it is the future's."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    context = copy_context()

    def tell(value: Any, error: BaseException | None) -> None:
        if future.done():
            return  # cancelled: nobody waits for it any more
        if error is None:
            future.set_result(value)
        elif isinstance(error, StopIteration):  # no future can hold it
            future.set_exception(RuntimeError(f"the function raised {error!r}"))
        else:
            future.set_exception(error)

    def run() -> None:
        value, raised = None, None
        try:
            value = context.run(function, *args)
        except BaseException as error:
            raised = error
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, value, raised)

    try:
        threading.Thread(target=run, name="sagalog-handler", daemon=True).start()
    except RuntimeError:  # the process may have no more threads now
        run()
    return future
