"""A fork: the child must not inherit a lock that nobody will release, nor use the parent's connection."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Forks(Protocol):
    """What is told of a fork."""

    def before_fork(self) -> None:
        """Wait until no thread is inside."""
        ...

    def after_fork_in_parent(self) -> None:
        """Go on."""
        ...

    def after_fork_in_child(self) -> None:
        """Begin anew."""
        ...


_told: WeakSet[Forks] = WeakSet()
_forking: list[Forks] = []


def tell_of_forks(bind: Forks) -> None:
    """From now on, until it is gone."""
    _told.add(bind)


def tell_no_more(bind: Forks) -> None:
    """Its end: there is nothing to be told."""
    _told.discard(bind)


def _before_fork() -> None:
    _forking[:] = list(_told)
    for bind in _forking:
        bind.before_fork()


def _after_fork(name: str) -> None:
    for bind in _forking:
        getattr(bind, name)()
    _forking.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=lambda: _after_fork("after_fork_in_parent"),
        after_in_child=lambda: _after_fork("after_fork_in_child"),
    )
