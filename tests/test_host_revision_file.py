"""The file that `write_host_revision` writes: where it begins, what it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Host

from sagalog import RevisionRefused, migrations
from sagalog.migrations import revision_file
from sagalog.schema import HEAD


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host without a revision, on a file."""
    host = Host(tmp_path, f"sqlite:///{tmp_path / 'app.db'}")
    yield host
    host.engine.dispose()


def _files(host: Host) -> set[str]:
    return {path.name for path in (host.folder / "versions").glob("*.py")}


def test_both_ends_are_pinned_and_a_later_library_goes_on_from_there(host: Host) -> None:
    first = host.write(to="sagalog_0001").read_text()
    assert 'sagalog.migrations.upgrade(op, from_="base", to="sagalog_0001")' in first
    assert 'sagalog.migrations.downgrade(op, from_="sagalog_0001", to="base")' in first
    host.revision("something of the host's")
    second = host.write().read_text()
    assert f'sagalog.migrations.upgrade(op, from_="sagalog_0001", to="{HEAD}")' in second
    assert f'sagalog.migrations.downgrade(op, from_="{HEAD}", to="sagalog_0001")' in second
    host.upgrade()
    migrations.check(host.engine)
    host.downgrade("-1")
    assert host.saga_log() == "sagalog_0001"


def test_it_refuses_when_there_is_nothing_new(host: Host) -> None:
    host.write(revision_id="abc1")
    before = _files(host)
    with pytest.raises(RevisionRefused, match=rf"abc1 brings the saga log to {HEAD}, .* nothing newer"):
        host.write()
    assert _files(host) == before


def test_the_database_is_not_opened_and_env_py_not_run(host: Host) -> None:
    (host.folder / "env.py").write_text("raise AssertionError('env.py was run')\n")
    host.write()
    assert not Path(host.url.removeprefix("sqlite:///")).exists()


def test_the_message_the_id_and_the_place_are_the_hosts_to_choose(host: Host) -> None:
    path = host.write(message="Bring the sagas", revision_id="0001", schema="sagas", prefix="app_")
    assert path == host.folder / "versions" / "0001_bring_the_sagas.py"
    assert f'upgrade(op, from_="base", to="{HEAD}", schema="sagas", prefix="app_")' in path.read_text()
    assert 'from_="base"' in host.write().read_text(), "another placement is another log"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import sagalog.migrations\n", "from sagalog import migrations as sagas\n"),
        ("sagalog.migrations.upgrade(op, ", "from sagalog.migrations import upgrade as up; up(op, "),
        ('from_="base", to="sagalog_0002")', '"sagalog_0002", from_="base")'),
        ('to="sagalog_0002")', "to=TO)"),
    ],
    ids=["another import", "a name of its own", "positional", "a constant of the module"],
)
def test_a_step_is_recognised_however_the_host_wrote_it(host: Host, before: str, after: str) -> None:
    path = host.write(to="sagalog_0002")
    text = path.read_text()
    assert before in text
    text = text.replace(before, after, 1)
    if "as sagas" in after:
        text = text.replace("sagalog.migrations.", "sagas.")
    path.write_text(text + '\nTO = "sagalog_0002"\n')
    assert f'from_="sagalog_0002", to="{HEAD}"' in host.write().read_text()


def test_a_step_that_does_not_continue_the_hosts_is_refused(host: Host) -> None:
    host.write(to="sagalog_0002")
    before = _files(host)
    with pytest.raises(RevisionRefused, match=r"cannot begin at sagalog_0001.*Leave from_ out"):
        host.write(from_="sagalog_0001")
    with pytest.raises(RevisionRefused, match="not below sagalog_0001"):
        host.write(to="sagalog_0001")
    with pytest.raises(RevisionRefused, match="no revision 'sagalog_0099' for to"):
        host.write(to="sagalog_0099")
    with pytest.raises(RevisionRefused, match="no revision 'head' for from_"):
        host.write(from_="head")
    assert _files(host) == before


def test_revisions_of_a_newer_library_are_not_built_upon(host: Host) -> None:
    path = host.write()
    path.write_text(path.read_text().replace(HEAD, "sagalog_0099"))
    with pytest.raises(RevisionRefused, match=r"sagalog_0099, which this sagalog does not know.*Update"):
        host.write()


def test_a_template_without_a_place_for_it_is_refused_and_leaves_no_file(host: Host) -> None:
    template = host.folder / "script.py.mako"
    template.write_text(re.sub(r"\$\{upgrades.*\}", "pass", template.read_text()))
    with pytest.raises(RevisionRefused, match=r"no place for upgrades.*sagalog\.migrations\.upgrade\(op"):
        host.write()
    assert _files(host) == set()


def test_what_alembic_refuses_is_told_in_its_words(host: Host) -> None:
    with pytest.raises(RevisionRefused, match="Can't locate revision"):
        host.write(head="nowhere")
    host.config.set_main_option("script_location", str(host.folder / "nowhere"))
    with pytest.raises(RevisionRefused, match="nowhere"):
        host.write()


def test_a_library_with_one_more_revision_writes_one_more_file(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.write()
    monkeypatch.setattr(revision_file, "HEAD", "sagalog_9999")
    monkeypatch.setattr(revision_file, "ENDS", (*revision_file.ENDS, "sagalog_9999"))
    assert f'upgrade(op, from_="{HEAD}", to="sagalog_9999")' in host.write().read_text()
