"""What `import sagalog` costs on top of SQLAlchemy and Pydantic, in CPU time of a fresh process.

Byte code is cached, as an installed package has it, whatever the environment
says. Pydantic loads half of itself with an application's first model, so that
is part of what sagalog comes on top of.

    python benchmarks/importing.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser

from common import print_table, verdict

LIMIT_MS = 60
CODE = """
import time
started = time.process_time()
import pydantic, sqlalchemy, sqlalchemy.orm
class Order(pydantic.BaseModel):
    number: int
before = time.process_time()
import sagalog
print((before - started) * 1000, (time.process_time() - before) * 1000)
"""


def import_once(cache: str) -> tuple[float, float]:
    """Milliseconds of CPU for SQLAlchemy and Pydantic, and for sagalog on top."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = cache
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    below, above = map(float, run.stdout.split())
    return below, above


def main() -> None:
    """Import in so many fresh processes and print the table; the first one fills the cache."""
    parser = ArgumentParser(description="What importing sagalog costs.")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as cache:
        import_once(cache)
        below, above = zip(*(import_once(cache) for _ in range(options.rounds)), strict=True)
    rows = []
    for name, times, limit in (("SQLAlchemy and Pydantic", below, None), ("sagalog", above, LIMIT_MS)):
        lower, median, upper = statistics.quantiles(times, n=4)
        judged = ("", "") if limit is None else (str(limit), verdict(median, limit))
        rows.append((name, f"{median:.0f}", *judged, f"{lower:.0f} - {upper:.0f}"))
    print_table(("import of", "ms CPU", "limit", "", "quartiles"), rows)


if __name__ == "__main__":
    main()
