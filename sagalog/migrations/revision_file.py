"""Writing the revision of a host's own that calls sagalog's step.

The file is made by Alembic from the host's own template. Where the step
begins is read from the revisions that the host already has, so that a later
version of the library is brought by one more of them.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alembic.script import ScriptDirectory
from alembic.util import CommandError, rev_id

from sagalog.errors import RevisionRefused
from sagalog.migrations.host import ENDS, Step
from sagalog.placement import Placement
from sagalog.schema import HEAD

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import Script

_ASKED = "writing a revision for the saga log"


class _Brought(NamedTuple):
    """How far a revision of the host's brings the saga log."""

    to: str
    script: Script


def write_host_revision(
    config: Config,
    *,
    from_: str | None = None,
    to: str | None = None,
    schema: str | None = None,
    prefix: str = "",
    message: str | None = None,
    head: str = "head",
    revision_id: str | None = None,
    version_path: str | Path | None = None,
) -> Path:
    """Write one revision into a host's Alembic environment that brings the saga log's tables, and takes them back.

    The host's plain ``alembic upgrade head`` then brings both. After an update of
    the library, which may know newer revisions of its tables, it is called again.
    No database is opened, and the host's env.py is not run.

    Args:
        config: The host's `alembic.config.Config`.
        from_: Where the step begins; by default where the host's revisions leave off, "base" if none brings the log.
        to: Where it ends; by default this library's newest revision.
        schema: The schema of the tables (Postgres), if not the default one.
        prefix: What the tables' names begin with.
        message: The revision's message.
        head: The host's revision that it follows, as for ``alembic revision``; needed if there are several heads.
        revision_id: The id of the new revision, if not one of Alembic's making.
        version_path: The folder for the file, if the host has several.

    Returns:
        The path of the file.

    Raises:
        RevisionRefused: The host's revisions bring all that this library knows, the step does not
            continue them, or Alembic cannot write it; no file is left.
    """
    placement = Placement(schema, prefix)
    try:
        directory = ScriptDirectory.from_config(config)
        step = _next_step(directory, placement, from_, to or HEAD, head)
        path = _write(directory, config, step, placement, message, head, revision_id, version_path)
    except CommandError as error:
        raise RevisionRefused(_ASKED, str(error).rstrip("."), hint="That is Alembic's own answer.") from error
    return path


def _next_step(directory: ScriptDirectory, placement: Placement, from_: str | None, to: str, head: str) -> Step:
    for name, end in (("from_", from_ or "base"), ("to", to)):
        if end not in ENDS:
            raise RevisionRefused(
                _ASKED, f"there is no revision {end!r} for {name}", found=end, hint=f"Known: {', '.join(ENDS)}."
            )
    last = _furthest(directory, placement)
    if last is not None:
        _refuse_other_branch(directory, last, head)
        if from_ not in (None, last.to):
            raise RevisionRefused(
                _ASKED,
                f"it cannot begin at {from_}: revision {last.script.revision} brings the saga log to {last.to}",
                found=last.to,
                hint="Leave from_ out, and it begins there.",
            )
    begin = last.to if last else from_ or "base"
    if ENDS.index(to) <= ENDS.index(begin):
        by = f"revision {last.script.revision} brings the saga log to" if last else "the step begins at"
        newest = begin == HEAD
        raise RevisionRefused(
            _ASKED,
            f"{by} {begin}, " + ("and this sagalog has nothing newer" if newest else f"which is not below {to}"),
            found=begin,
            hint="After an update of sagalog there may be more." if newest else f"The newest revision is {HEAD}.",
        )
    return Step(begin, to, up=True)


def _refuse_other_branch(directory: ScriptDirectory, last: _Brought, head: str) -> None:
    before = {script.revision for script in directory.walk_revisions(head=head)}
    if last.script.revision not in before:
        raise RevisionRefused(
            _ASKED,
            f"revision {last.script.revision}, which brings the saga log to {last.to}, does not come before {head!r}",
            found=last.to,
            hint="Name a head of its branch as the head.",
        )


def _furthest(directory: ScriptDirectory, placement: Placement) -> _Brought | None:
    brought = [
        _Brought(to, script)
        for script in directory.walk_revisions()
        for to in _brings(script, placement)
    ]  # fmt: skip
    for to, script in brought:
        if to not in ENDS:
            raise RevisionRefused(
                _ASKED,
                f"revision {script.revision} brings the saga log to {to}, which this sagalog does not know",
                found=to,
                hint="Update the sagalog package.",
            )
    return max(brought, key=lambda each: ENDS.index(each.to), default=None)


def _brings(script: Script, placement: Placement) -> Iterator[str]:
    """The upper ends of the steps at this placement that a revision of the host's calls, however it imports them."""
    try:
        tree = ast.parse(Path(script.path).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # a host without sources
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        given = {each.arg: _value(each.value, script.module) for each in call.keywords if each.arg}
        if len(call.args) > 1:
            given.setdefault("to", _value(call.args[1], script.module))
        from_, to = given.get("from_"), given.get("to")
        if not (isinstance(from_, str) and isinstance(to, str) and to.startswith("sagalog_")):
            continue
        upwards = from_ == "base" or from_ < to
        if upwards and Placement(given.get("schema"), given.get("prefix") or "") == placement:
            yield to


def _value(node: ast.expr, module: Any) -> Any:
    """What an argument is: a literal, or a constant of the revision's module."""
    if isinstance(node, ast.Name):
        return getattr(module, node.id, None)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _write(
    directory: ScriptDirectory,
    config: Config,
    step: Step,
    placement: Placement,
    message: str | None,
    head: str,
    revision_id: str | None,
    version_path: str | Path | None,
) -> Path:
    call = _call("upgrade", step.from_, step.to, placement)
    script = directory.generate_revision(
        revision_id or rev_id(),
        message or f"saga log to {step.to}",
        head=head,
        version_path=version_path,
        config=config,
        imports="import sagalog.migrations",
        upgrades=call,
        downgrades=_call("downgrade", step.to, step.from_, placement),
    )
    assert script is not None
    path = Path(script.path)
    if not any(True for _ in _brings(script, placement)):
        path.unlink()
        raise RevisionRefused(
            _ASKED,
            "the host's script.py.mako has no place for upgrades",
            hint=f"Make an empty revision with `alembic revision`, and write into its upgrade(): {call}",
        )
    return path


def _call(way: str, from_: str, to: str, placement: Placement) -> str:
    given = {"from_": from_, "to": to, **placement._asdict()}
    arguments = ", ".join(f"{name}={json.dumps(value)}" for name, value in given.items() if value)
    return f"sagalog.migrations.{way}(op, {arguments})"
