"""Copies of a run directory: what goes there, what comes back, and what is never written over."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from launcher import mirror
from launcher.rundir import RunDir


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """The launcher's directory and cache."""
    run = RunDir(tmp_path / "here" / "a 'run'")
    run.create()
    run.plan.write_text("the plan")
    (run.checkpoints / "step-2").mkdir()
    (run.checkpoints / "step-2" / "weights").write_text("of step 2")
    monkeypatch.setenv("LAUNCH_CACHE", str(tmp_path / "here" / "cache"))
    (tmp_path / "here" / "cache" / "data-1" / "train").mkdir(parents=True)
    (tmp_path / "here" / "cache" / "data-1" / "train" / "rows").write_text("rows")
    return run


def grow(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text)


def sent(here: RunDir) -> io.BytesIO:
    stream = io.BytesIO()
    mirror.give(here, ["run/plan.json", "run/checkpoints/step-2", "cache/data-1"], stream)
    stream.seek(0)
    return stream


def test_a_copy_is_made_and_made_anew(here: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, stream = RunDir(tmp_path / "there" / "run"), sent(here)
    monkeypatch.setenv("LAUNCH_CACHE", str(tmp_path / "there" / "cache"))
    assert mirror.occupied(there) == ""
    mirror.take(there, "node-b", stream)
    assert there.plan.read_text() == "the plan"
    assert (tmp_path / "there" / "cache" / "data-1" / "train" / "rows").read_text() == "rows"

    there.heartbeat(1).write_text("of an earlier attempt")
    (there.checkpoints / "step-1").mkdir()
    stream.seek(0)
    mirror.take(there, "node-b", stream)
    assert sorted(path.name for path in there.checkpoints.iterdir()) == ["step-2"]
    assert not there.heartbeat(1).exists()
    assert [path.name for path in (tmp_path / "there" / "cache").iterdir()] == ["data-1"]


def test_a_folder_of_somebody_elses_is_left_alone(here: RunDir, tmp_path: Path) -> None:
    with pytest.raises(
        FileExistsError, match="holds checkpoints, errors, heartbeat and 3 more that are not this run's"
    ):
        mirror.take(here, "node-b", sent(here))
    assert (here.checkpoints / "step-2" / "weights").exists()
    (tmp_path / "file").write_text("")
    assert mirror.occupied(RunDir(tmp_path / "file")) == "cannot be read: Not a directory"


def test_hosts_that_share_a_directory_among_themselves_alone_are_found(
    here: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, stream = RunDir(tmp_path / "there"), sent(here)
    monkeypatch.setattr(mirror, "rename_or_yield", lambda *_: there.copy.write_text("node-c"))
    with pytest.raises(FileExistsError, match="is shared with another host of this run, but not with the launcher's"):
        mirror.take(there, "node-b", stream)


@pytest.mark.parametrize("name", ["../out", "run/../../out", "/out", "run", "elsewhere/out"])
def test_nothing_is_written_beside_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("LAUNCH_CACHE", str(tmp_path / "cache"))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        made.addfile(tarfile.TarInfo(name))
    stream.seek(0)
    with pytest.raises(ValueError, match="is no name of a run directory or cache"):
        mirror.take(RunDir(tmp_path / "run"), "node-b", stream)


def test_what_changes_in_a_copy_comes_back_once(here: RunDir, tmp_path: Path) -> None:
    back = RunDir(tmp_path / "back")
    back.create()
    log = here.rank_log("node-b", 2)
    log.write_text("of an earlier attempt\n")
    copy = mirror.Mirror(here)

    def bring_back() -> int:
        changes = list(copy.changes())
        for change in changes:
            mirror.put(back, change)
        return len(changes)

    here.heartbeat(2).write_text('{"step": 1}')
    (here.heartbeats / ".2.json.tmp").write_text("half")
    grow(log, "first\nsec")
    assert bring_back() == 2
    assert bring_back() == 1, "the rest of the line, which may be the last"
    assert bring_back() == 0
    here.heartbeat(2).write_text('{"step": 22}')
    grow(log, "ond\n")
    assert bring_back() == 2
    assert back.heartbeat(2).read_text() == '{"step": 22}'
    assert back.rank_log("node-b", 2).read_text() == "first\nsecond\n"
    assert [path.name for path in back.heartbeats.iterdir()] == ["2.json"]


@pytest.mark.parametrize("name", ["../x", "logs/../../x", "plan.json", "logs/.bashrc", "/etc/x", "checkpoints/x"])
def test_a_node_writes_to_no_other_file_of_the_launchers(tmp_path: Path, name: str) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    before = sorted(tmp_path.rglob("*"))
    mirror.put(run, {"name": name, "text": "owned", "appended": False})
    assert sorted(tmp_path.rglob("*")) == before
