"""The testing kit: databases in memory, and databases of your own made empty for a test; a saga crashed everywhere.

The pytest fixtures `saga_log`, `async_saga_log`, `saga_engine` and
`async_saga_engine` are made of these, and are there once sagalog is installed.
"""

from typing import TYPE_CHECKING

from sagalog.testing.fixtures import MemoryDatabase, start_empty

if TYPE_CHECKING:
    from sagalog.testing.crashing import Crash, crash_points

__all__ = ["Crash", "MemoryDatabase", "crash_points", "start_empty"]


def __getattr__(name: str) -> object:
    # The fixtures need no coordinator, and whoever uses them alone does not wait for it.
    if name in ("Crash", "crash_points"):
        from sagalog.testing import crashing

        return getattr(crashing, name)
    raise AttributeError(f"module 'sagalog.testing' has no attribute {name!r}")
