"""A fork: the child must not inherit a lock that nobody will release, nor use the parent's connection."""

from __future__ import annotations

import os
import threading
from typing import Any, Protocol
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


def leave_to_parent(*inherited: Any) -> None:
    """In a forked child: keep the parent's connections referenced; to close them would end the parent's locks."""
    _inherited.append(inherited)


class Generation:
    """How many forks lie between this process and the one that loaded sagalog; asking the system costs a call each."""

    number = 0


_inherited: list[Any] = []
_told: WeakSet[Forks] = WeakSet()
_forking: list[Forks] = []
_one_fork = threading.Lock()
_telling = threading.Lock()


def tell_of_forks(bind: Forks) -> None:
    """From now on, until it is gone."""
    with _telling:
        _told.add(bind)


def tell_no_more(bind: Forks) -> None:
    """Its end: there is nothing to be told."""
    with _telling:
        _told.discard(bind)


def _before_fork() -> None:
    _one_fork.acquire()  # what another thread's fork waited for would be released with this one's
    with _telling:
        told = list(_told)
    for bind in told:
        bind.before_fork()
        _forking.append(bind)


def _after_fork_in_parent() -> None:
    try:
        for bind in _forking:
            bind.after_fork_in_parent()
    finally:
        _forking.clear()
        _one_fork.release()


def _after_fork_in_child() -> None:
    # All, not only those told before: a server that forks from C calls this hook alone.
    global _one_fork, _telling
    Generation.number += 1
    _one_fork, _telling = threading.Lock(), threading.Lock()
    _forking.clear()
    for bind in list(_told):
        bind.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
