"""Files of a run directory: written whole or not at all, one launcher at a time, events a line each."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import PreflightError, UsageError
from launcher.rundir import RunDir, append_event, open_run, read_events, read_json, write_atomic, write_json

HOLDER = """
import sys, time
from pathlib import Path
from launcher.rundir import RunDir
with RunDir(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


@pytest.fixture
def holder(run):
    """Another process that holds the run directory."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_naming_a_run_directory_creates_nothing_and_create_makes_what_ranks_write_to(tmp_path):
    run = RunDir(tmp_path / "deep" / "run")
    assert not run.path.exists()
    run.create()
    run.create()  # a resumed run does it again
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoints",
        "errors",
        "heartbeat",
        "logs",
        "tensorboard",
    ]


def test_every_file_has_the_name_that_the_docstring_gives_it():
    run = RunDir(Path("run"))
    named = [
        run.recipe, run.plan, run.prepared, run.environment, run.commands, run.events, run.logs, run.errors,
        run.heartbeats, run.tensorboard, run.checkpoints, run.report, run.export,
        run.rank_log("host", 3), run.node_log("host"), run.error(3), run.heartbeat(3),
    ]  # fmt: skip
    assert [str(path) for path in named] == [
        "run/recipe.yaml", "run/plan.json", "run/prepared.json", "run/environment.json", "run/commands.txt",
        "run/events.jsonl", "run/logs", "run/errors", "run/heartbeat", "run/tensorboard", "run/checkpoints",
        "run/report.json", "run/export",
        "run/logs/host-rank3.log", "run/logs/host-node.log", "run/errors/3.json", "run/heartbeat/3.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("in_the_way", "found"),
    [("run", "File exists"), ("run/logs", "File exists"), (".", "Not a directory")],
)
def test_a_file_in_the_way_is_an_error_with_something_to_type(tmp_path, in_the_way, found):
    base = tmp_path / "base"
    path = base / "run"
    file = base / in_the_way if in_the_way != "." else base
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    with pytest.raises(PreflightError) as caught:
        RunDir(path).create()
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        f"run directory {path}: cannot be written: {found}\n  name another one: launch.run_dir=/path/with/space"
    )


def test_a_read_only_folder_is_an_error(mounted):
    folder = mounted("ro")
    with pytest.raises(PreflightError, match="cannot be written: Read-only file system"):
        RunDir(folder / "run").create()
    with pytest.raises(PreflightError, match="cannot be written: Read-only file system"):
        RunDir(folder).create()


def test_a_second_launcher_is_refused_and_told_who_holds_the_directory(run, holder):
    with pytest.raises(PreflightError) as caught, run.locked():
        pytest.fail("got a lock that somebody else holds")
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        f"run directory {run.path}: is in use by process {holder.pid} on {socket.gethostname()}\n"
        "  wait for it, or name another one: launch.run_dir=DIR"
    )


def test_the_lock_goes_with_the_process_even_when_it_is_killed(run, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run.locked():
        assert (run.path / "run.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_who_works_in_a_directory(run, holder):
    assert run.owner() == f"process {holder.pid} on {socket.gethostname()}"
    holder.kill()
    holder.wait()
    assert run.owner() is None, "what the dead one has written there is no owner"
    assert RunDir(run.path / "none").owner() is None


def test_a_lock_that_is_given_back_can_be_taken_again(run):
    with run.locked():
        pass
    assert (run.path / "run.lock").read_text() == ""
    with pytest.raises(KeyError), run.locked():
        raise KeyError
    with run.locked():
        assert (run.path / "run.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_programs_that_the_holder_starts_do_not_keep_the_lock(run):
    with run.locked():
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with run.locked():
            pass
    finally:
        child.kill()
        child.wait()


def test_open_run_takes_a_path_from_where_you_are_or_from_home(run, monkeypatch):
    write_json(run.plan, {})
    assert open_run(run.path).path == run.path
    monkeypatch.chdir(run.path.parent)
    assert open_run("run").path == run.path
    monkeypatch.setenv("HOME", str(run.path.parent))
    assert open_run("~/run").path == run.path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("run", "holds no plan.json"),
        ("none", "there is no such folder"),
        ("~nobody-here/run", "there is no such folder"),
        ("file", "there is no such folder"),
    ],
)
def test_open_run_says_why_a_folder_is_no_run(run, monkeypatch, name, found):
    monkeypatch.chdir(run.path.parent)
    Path("file").write_text("")
    with pytest.raises(UsageError) as caught:
        open_run(name)
    assert str(caught.value) == f"run {name}: {found}\n  give the folder of a run; list them with: launch runs"


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "plan.json"
    write_json(path, {"a": "旧"})
    before = path.open(encoding="utf-8")
    write_json(path, {"a": "新"})
    with before:
        assert before.read() == '{\n "a": "旧"\n}\n'  # who had it open goes on reading the old one
    assert path.read_text(encoding="utf-8") == '{\n "a": "新"\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(mounted):
    folder = mounted("size=64k")
    write_atomic(folder / "plan.json", "old")
    with pytest.raises(OSError, match="No space left"):
        write_atomic(folder / "plan.json", "new" * 10**5)
    assert [path.name for path in folder.iterdir()] == ["plan.json"]
    assert (folder / "plan.json").read_text() == "old"


def test_what_a_crash_left_of_a_file_is_not_part_of_the_next(tmp_path):
    (tmp_path / f".plan.json.{os.getpid()}.tmp").write_text("half of")
    write_atomic(tmp_path / "plan.json", "new")
    assert (tmp_path / "plan.json").read_text() == "new"


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\xff\xfe", b'{"a": 1}{'])
def test_a_json_file_that_is_not_there_or_torn_reads_as_none(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") is None


def test_a_json_file_reads_as_it_was_written(tmp_path):
    value = {"loss": 1.5, "names": ["数据", None, True]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_events_are_read_from_where_one_stopped(run):
    assert read_events(run) == ([], 0)
    append_event(run, {"event": "start", "host": "主机"})
    events, offset = read_events(run)
    assert events == [{"event": "start", "host": "主机"}]
    assert read_events(run, offset) == ([], offset)
    append_event(run, {"event": "log\nin a line"})
    assert read_events(run, offset)[0] == [{"event": "log\nin a line"}]
    assert len(read_events(run)[0]) == 2


def test_a_line_that_is_still_being_written_is_read_when_it_is_whole(run):
    append_event(run, {"step": 1})
    with run.events.open("ab") as file:
        file.write(b'{"step"')
    events, offset = read_events(run)
    assert events == [{"step": 1}]
    with run.events.open("ab") as file:
        file.write(b": 2}\n")
    assert read_events(run, offset)[0] == [{"step": 2}]


@pytest.mark.parametrize("cut", [b'{"step": 2, "los', b'{"step": 2, "name": "\xe6\x95', b"{"])
def test_a_line_that_was_cut_costs_no_other_line(run, cut):
    append_event(run, {"step": 1})
    with run.events.open("ab") as file:
        file.write(cut)
    append_event(run, {"step": 3})
    append_event(run, {"step": 4})
    assert read_events(run)[0] == [{"step": 1}, {"step": 3}, {"step": 4}]


def test_lines_of_several_processes_do_not_mix(run):
    code = (
        "import sys; from pathlib import Path; from launcher.rundir import RunDir, append_event\n"
        "for step in range(200): append_event(RunDir(Path(sys.argv[1])), {'rank': sys.argv[2], 'step': step, 'fill': 'x' * 500})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(run.path), str(rank)]) for rank in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    lines = run.events.read_text().splitlines()
    assert sorted((json.loads(line)["rank"], json.loads(line)["step"]) for line in lines if line) == sorted(
        (str(rank), step) for rank in range(3) for step in range(200)
    )
