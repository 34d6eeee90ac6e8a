"""What is done and seen, on the terminal; with Rich if it is installed, in plain text otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec


class Observer:
    """Tells what is done and seen, and remembers whether all of it was as it should be."""

    def __init__(self) -> None:
        self.failures = 0
        self._only_checks = False

    def head(self, title: str) -> None:
        """Begin a part."""
        print(f"\n{title}\n{'-' * len(title)}")

    def say(self, line: str) -> None:
        """Tell what is done."""
        if not self._only_checks:
            print(f"  {line}")

    def expect(self, what: str, seen: object, expected: object) -> None:
        """Tell what is seen, and compare it."""
        if seen == expected:
            print(f"  [ok] {what}")
            return
        self.failures += 1
        print(f"  [WRONG] {what}\n      expected {expected!r}\n      seen     {seen!r}")

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show rows in columns."""
        if not self._only_checks:
            (_rich_table if find_spec("rich") else _plain_table)(heads, rows)

    @contextmanager
    def only_checks(self) -> Iterator[None]:
        """Tell nothing but what is compared."""
        self._only_checks = True
        try:
            yield
        finally:
            self._only_checks = False


def _rich_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for head in heads:
        table.add_column(head, no_wrap=head != heads[-1])  # the last column takes what room there is
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 132
    console.print(Padding(table, (0, 0, 0, 4), expand=False))


def _plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, ["-" * width for width in widths], *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"    {'  '.join(cells)}".rstrip())
