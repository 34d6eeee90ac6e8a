"""`sql` and `alembic-revision`: the migrations written down, for those who run them in another way."""

import contextlib
import io
from pathlib import Path
from typing import Annotated

import typer

from sagalog.cli.options import Json, Output, revision
from sagalog.cli.output import Form, form_of, plain, print_json, print_lines
from sagalog.cli.settings import settings_of
from sagalog.cli.usage import bad_usage
from sagalog.schema import HEAD, REVISIONS

_DIALECTS = ("sqlite", "postgresql")


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command()(sql)
    app.command("alembic-revision")(alembic_revision)


def sql(
    context: typer.Context,
    from_: Annotated[
        str, typer.Option("--from", metavar="REVISION", callback=revision, help="Where the tables are.")
    ] = "base",
    to: Annotated[
        str, typer.Option("--to", metavar="REVISION", callback=revision, help="Where to; an earlier one leads back.")
    ] = "head",
    dialect: Annotated[
        str | None,
        typer.Option(metavar="|".join(_DIALECTS), autocompletion=lambda: list(_DIALECTS), help="If there is no URL."),
    ] = None,
) -> None:
    """Print the SQL of a migration; no database is opened.

    For those who hand SQL to somebody else. The SQL looks at nothing: it fits tables that are at --from, and adopts
    no tables of the earlier program.
    """
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    from sagalog import migrations

    settings = settings_of(context)
    ends = ("base", *REVISIONS)
    start, end = (HEAD if name == "head" else name for name in (from_, to))
    if start == end:
        raise bad_usage(f"--from and --to are both {start}; there is nothing to print.")
    printed = io.StringIO()
    options = {"as_sql": True, "output_buffer": printed, "transactional_ddl": True}
    target = MigrationContext.configure(dialect_name=_dialect(context, dialect), opts=options)
    way = migrations.upgrade if ends.index(start) < ends.index(end) else migrations.downgrade
    with target.begin_transaction():
        way(Operations(target), end, from_=start, **settings.placement)
    typer.echo(printed.getvalue().strip())


def _dialect(context: typer.Context, named: str | None) -> str:
    if named is None:
        from sagalog.cli.connect import url_of

        return url_of(settings_of(context)).get_backend_name()
    if named not in _DIALECTS:
        raise bad_usage(f"--dialect {named}: sagalog works on {' and '.join(_DIALECTS)}.")
    return named


def alembic_revision(
    context: typer.Context,
    config: Annotated[Path, typer.Option("--config", "-c", help="The application's Alembic file.")] = Path(
        "alembic.ini"
    ),
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="REVISION",
            callback=revision,
            help="Where the step begins, if not where the last one ended.",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="REVISION", callback=revision, help="Where it ends, if not at the newest."),
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="The revision's message.")] = None,
    head: Annotated[str, typer.Option(help="The application's revision that it follows.")] = "head",
    rev_id: Annotated[str | None, typer.Option(metavar="ID", help="The new revision's id.")] = None,
    version_path: Annotated[Path | None, typer.Option(help="The folder for the file, if there are several.")] = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Write a revision into your application's own Alembic.

    It calls sagalog's step, both ends pinned, so that plain `alembic upgrade head` brings your tables and sagalog's.
    Call it again after an update of sagalog that brings newer revisions. No database is opened.
    """
    from alembic.config import Config

    from sagalog.migrations import write_host_revision

    form = form_of(context, as_json, output)
    pyproject = config.parent / "pyproject.toml"
    if not (config.exists() or pyproject.exists()):
        raise bad_usage(f"there is no file {config}; name the application's Alembic file with --config.")
    environment = Config(config, toml_file=pyproject if pyproject.exists() else None)
    if not environment.get_alembic_option("script_location"):
        raise bad_usage(f"{config} names no script_location; name the application's Alembic file with --config.")
    with contextlib.redirect_stdout(io.StringIO()):  # Alembic tells what it generates
        path = write_host_revision(
            environment,
            from_=from_,
            to=HEAD if to == "head" else to,
            message=message,
            head=head,
            revision_id=rev_id,
            version_path=version_path,
            **settings_of(context).placement,
        )
    if form is Form.TABLE:
        print_lines([plain(f"wrote {path}"), "Look at it, and run `alembic upgrade head`."])
    else:
        print_json(form, {"path": str(path)})
