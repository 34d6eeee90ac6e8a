"""The application: what stands before a command, and the groups of commands."""

from dataclasses import replace
from typing import Annotated

import typer

from sagalog.cli import acting, coordinating, diag, looking, schema, scripts, show
from sagalog.cli.output import Form, chosen_form
from sagalog.cli.settings import read_settings
from sagalog.cli.usage import GLOBAL_OPTIONS, SagalogGroup

# Rich's help and tracebacks would double what `sagalog --help` costs.
app = typer.Typer(
    name="sagalog",
    cls=SagalogGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (diag, looking, show, acting, coordinating, schema, scripts):
    group.register(app)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("sagalog"))
        raise typer.Exit


@app.callback()
def _before(
    context: typer.Context,
    url: Annotated[
        str | None,
        typer.Option(envvar="SAGALOG_URL", show_envvar=True, help="A SQLAlchemy URL, or the path of a SQLite file."),
    ] = None,
    schema: Annotated[
        str | None, typer.Option(envvar="SAGALOG_SCHEMA", help="The schema of the tables, on Postgres.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(envvar="SAGALOG_PREFIX", help="What the names of the tables begin with.")
    ] = None,
    app: Annotated[
        str | None,
        typer.Option(
            envvar="SAGALOG_APP", metavar="MODULE:NAME", help="The application's coordinator, for what needs it."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; also allowed after the command.")] = False,
    output: Annotated[
        Form | None, typer.Option("--output", help="The form of the output; also allowed after the command.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Look after the log of an application's sagas. Begin with `diag`.

    The database is that of --url, else of SAGALOG_URL, else `url` in [tool.sagalog] of the pyproject.toml here;
    --schema and --prefix likewise.
    """
    settings = read_settings(url, schema, prefix, app)
    context.obj = replace(settings, output=chosen_form(as_json, output), typed=_typed(context))


def _typed(context: typer.Context) -> tuple[tuple[str, str], ...]:
    """The options that were typed, with their values."""
    words: list[tuple[str, str]] = []
    for option in GLOBAL_OPTIONS:
        source = context.get_parameter_source(option.removeprefix("--"))
        value = context.params.get(option.removeprefix("--"))
        if source is not None and source.name == "COMMANDLINE" and value:
            words.append((option, value))
    return tuple(words)
