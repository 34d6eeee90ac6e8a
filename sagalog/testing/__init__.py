"""The testing kit: databases in memory, and databases of your own made empty for a test.

The pytest fixtures `saga_log`, `async_saga_log`, `saga_engine` and
`async_saga_engine` are made of these, and are there once sagalog is installed.
"""

from sagalog.testing.fixtures import MemoryDatabase, start_empty

__all__ = ["MemoryDatabase", "start_empty"]
