"""What may be wrong around a log: who can read its file, where the file lies, how durable a commit is."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Engine

from sagalog.cli.connect import file_of

_WAL_RESET_FIXED = (3, 51, 3)
_SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")
_NETWORK = frozenset(
    "9p afs ceph cifs fuse.ceph fuse.glusterfs fuse.s3fs fuse.sshfs glusterfs lustre nfs nfs4 smb3 smbfs".split()  # noqa: SIM905
)
_MOUNTS = Path("/proc/self/mountinfo")


def product_of(engine: Engine) -> str:
    """The database product and its version."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            return f"SQLite {connection.exec_driver_sql('SELECT sqlite_version()').scalar()}"
        return f"PostgreSQL {connection.exec_driver_sql('SHOW server_version').scalar()}"


def durability_of(engine: Engine) -> str:
    """What a commit survives, as far as it can be seen from outside the application."""
    if engine.dialect.name == "sqlite":
        file = file_of(engine.url)
        if file is None:
            return "unknown"
        synchronous, journal = _sqlite_settings(file)
        return f"synchronous {synchronous} unless an application sets its own, journal {journal}"
    return ", ".join(f"{name} {value}" for name, value in _postgres_settings(engine).items())


def wal_size_of(engine: Engine) -> int | None:
    """The bytes of a SQLite file's write-ahead log, which come on top of the file's own; None where there is none."""
    file = file_of(engine.url) if engine.dialect.name == "sqlite" else None
    try:
        return None if file is None else file.with_name(f"{file.name}-wal").stat().st_size
    except OSError:
        return None


def warnings_of(engine: Engine) -> list[str]:
    """What an operator should know; each says what follows from it, and what to do."""
    if engine.dialect.name != "sqlite":
        return list(_postgres_warnings(engine))
    file = file_of(engine.url)
    return [] if file is None else list(_sqlite_warnings(file))


def _sqlite_warnings(file: Path) -> Iterator[str]:
    if file.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
        yield f"Everybody on this machine can read {file}, payloads included: chmod 600 {file}"
    synchronous, journal = _sqlite_settings(file)
    if journal == "wal" and sqlite3.sqlite_version_info < _WAL_RESET_FIXED:
        yield (
            f"SQLite {sqlite3.sqlite_version}, which this Python uses, has the rare write-ahead-log reset bug: it can "
            "damage a file that several processes write. Use SQLite 3.51.3 or later."
        )
    if synchronous in ("OFF", "NORMAL"):
        yield (
            f"synchronous is {synchronous} unless an application sets it: a power cut may take the last commits. "
            "Send PRAGMA synchronous = FULL on each connection."
        )
    system = filesystem_of(file)
    if system in _NETWORK:
        yield (
            f"{file} lies on a network file system ({system}), where SQLite's locks do not hold. "
            "Move it to a local disk."
        )


def _sqlite_settings(file: Path) -> tuple[str, str]:
    # A connection as it comes: what an application gets that sets nothing.
    connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)
    try:
        (journal,) = connection.execute("PRAGMA journal_mode").fetchone()
        (synchronous,) = connection.execute("PRAGMA synchronous").fetchone()
    finally:
        connection.close()
    return _SYNCHRONOUS[synchronous], journal


def _postgres_settings(engine: Engine) -> dict[str, str]:
    names = ("synchronous_commit", "fsync", "full_page_writes")
    with engine.connect() as connection:
        return {name: str(connection.exec_driver_sql(f"SHOW {name}").scalar()) for name in names}


def _postgres_warnings(engine: Engine) -> Iterator[str]:
    settings = _postgres_settings(engine)
    if settings["synchronous_commit"] == "off":
        yield "synchronous_commit is off: a crash of the server may take the last commits. Set it to on for this role."
    for name in ("fsync", "full_page_writes"):
        if settings[name] == "off":
            yield f"{name} is off on this server: a crash of its machine may damage the database. Set it to on."


def filesystem_of(file: Path, mounts: str | None = None) -> str | None:
    """The kind of file system that a file lies on, where Linux tells it.

    Args:
        file: The file.
        mounts: The text of `/proc/self/mountinfo`; read if it is not given.
    """
    if mounts is None:
        try:
            mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return None
    place = os.path.realpath(file)
    found, longest = None, -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].encode("latin-1", "replace").decode("unicode_escape")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= longest:
            found, longest = after.split(" ")[0], len(point)
    return found
