"""The whole story. The exit status is 0 if everything seen was as it should be, and 1 if not."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from sqlalchemy import create_engine

from examples.demo.adopting import adopt
from examples.demo.killed import be_killed
from examples.demo.looking import show_log
from examples.demo.postgres import postgres_database, submit_in_a_transaction
from examples.demo.showing import Observer
from examples.demo.trading import open_outside, recover, trade
from sagalog import SagaLog


def tell(see: Observer, folder: Path) -> None:
    """All parts."""
    see.head("1. A file of an earlier program is adopted")
    adopt(see, folder / "earlier.db")

    orders, outside = os.fspath(folder / "orders.db"), open_outside(folder / "outside.db")
    see.head("2. A shop takes orders, and is killed in the middle of five")
    trade(see, orders, outside)
    see.head("3. A second process recovers them, and money and stock are counted")
    recover(see, orders, outside)

    see.head("4. The same on Postgres; and an order inside the shop's own transaction")
    with postgres_database(see) as url:
        if url is not None:
            trade_on_postgres(see, url.render_as_string(hide_password=False), folder)

    see.head("5. What the log holds")
    with SagaLog.open(orders) as log:
        show_log(see, log, outside)


def trade_on_postgres(see: Observer, url: str, folder: Path) -> None:
    """Parts 2 and 3 once more, and what only a database that the shop's own tables share can do."""
    outside = open_outside(folder / "outside-of-postgres.db")
    with see.only_checks():
        trade(see, url, outside)
        recover(see, url, outside)
    engine = create_engine(url)
    try:
        submit_in_a_transaction(see, engine, outside)
    finally:
        engine.dispose()


def main() -> int:
    """Tell it; returns the exit status."""
    began = time.monotonic()
    see = Observer()
    with tempfile.TemporaryDirectory(prefix="sagalog-demo-") as folder:
        tell(see, Path(folder))
    verdict = f"What is marked WRONG was not as it should be: {see.failures} of it"
    if see.failures == 0:
        verdict = "Everything was as it should be"
    print(f"\n{verdict}, in {time.monotonic() - began:.1f} s.")
    return 0 if see.failures == 0 else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="A walk through sagalog.")
    parser.add_argument("--shop", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().shop:
        be_killed()
    sys.exit(main())
