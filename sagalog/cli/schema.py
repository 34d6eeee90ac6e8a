"""`upgrade`, `downgrade`, `current`, `check`: the schema of the tables."""

from typing import Annotated

import typer

from sagalog.cli.options import Json, Output, Yes, ask, revision
from sagalog.cli.output import Form, form_of, plain, print_json, print_lines
from sagalog.cli.settings import settings_of
from sagalog.cli.usage import bad_usage
from sagalog.schema import BASE, HEAD


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command()(upgrade)
    app.command()(downgrade)
    app.command()(current)
    app.command()(check)


def upgrade(
    context: typer.Context,
    to: Annotated[str, typer.Argument(metavar="REVISION", callback=revision, help="Where to.")] = "head",
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Bring the tables to the newest revision.

    Or to one that is named. A SQLite file that is not there is made; tables of the earlier program are adopted. What
    a deploy calls: it never asks, several may run at once, and what fails leaves nothing behind.
    """
    from sagalog import migrations
    from sagalog.cli.connect import make_missing_file, opened_engine

    if to == "base":
        raise bad_usage(f"upgrade leads forward; the first revision is {BASE}. `downgrade base` drops the tables.")
    settings = settings_of(context)
    form = form_of(context, as_json, output)
    make_missing_file(settings)
    with opened_engine(settings, writing=True) as engine:
        before = migrations.current(engine, **settings.placement)
        migrations.upgrade(engine, to, **settings.placement)
        after = migrations.current(engine, **settings.placement)
    _tell_move(form, before, after)


def downgrade(
    context: typer.Context,
    to: Annotated[
        str, typer.Argument(metavar="REVISION", callback=revision, help='Where to; "base" drops the tables.')
    ],
    yes: Yes = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Take the tables back to a revision.

    What only later revisions can hold is lost.
    """
    from sagalog import migrations
    from sagalog.cli.connect import opened_engine, url_of
    from sagalog.urls import shown_url

    if to == "head":
        raise bad_usage("downgrade leads back; give the revision to go back to.")
    settings = settings_of(context)
    form = form_of(context, as_json, output)
    with opened_engine(settings, writing=True) as engine:
        before = migrations.current(engine, **settings.placement)
        lost = "every saga in it" if to == "base" else "what only later revisions can hold"
        ask(f"Take {shown_url(url_of(settings))} from {before} back to {to}, and lose {lost}?", yes=yes)
        migrations.downgrade(engine, to, **settings.placement)
        after = migrations.current(engine, **settings.placement)
    _tell_move(form, before, after)


def _tell_move(form: Form, before: str | None, after: str | None) -> None:
    if form is not Form.TABLE:
        print_json(form, {"before": before, "revision": after, "head": HEAD})
    elif before == after:
        print_lines([plain(f"at {after or 'no revision'} already")])
    else:
        print_lines([plain(f"{before or 'no revision'} -> {after or 'no revision'}")])


def current(context: typer.Context, as_json: Json = False, output: Output = None) -> None:
    """Print the revision of the tables."""
    from sagalog import migrations
    from sagalog.cli.connect import opened_engine

    settings = settings_of(context)
    form = form_of(context, as_json, output)
    with opened_engine(settings) as engine:
        revision = migrations.current(engine, **settings.placement)
    if form is not Form.TABLE:
        print_json(form, {"revision": revision, "head": HEAD})
        return
    print_lines([plain(f"{revision or 'no revision'}{' (head)' if revision == HEAD else ''}")])


def check(context: typer.Context, as_json: Json = False, output: Output = None) -> None:
    """See that this library can work on the tables.

    Exits with 1 if it cannot, and says what to do. Nothing is written.
    """
    from sagalog import migrations
    from sagalog.cli.connect import opened_engine
    from sagalog.cli.health import durability_of
    from sagalog.urls import shown_url

    settings = settings_of(context)
    form = form_of(context, as_json, output)
    with opened_engine(settings) as engine:
        migrations.check(engine, **settings.placement)
        revision = migrations.current(engine, **settings.placement)
        name = shown_url(engine.url)
        durability = durability_of(engine)
    if form is not Form.TABLE:
        facts = {"ok": True, "database": name, "revision": revision, "head": HEAD, "durability": durability}
        print_json(form, facts)
        return
    print_lines([plain(f"{name} is at {revision}, and fits this library."), plain(f"durability: {durability}")])
