"""A run without its terminal, watched and stopped from another one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.rundir import RunDir, read_events
from tests.e2e.conftest import Launcher, all_gone, is_alive, report_of
from tests.e2e.test_signals import LONG


@pytest.fixture
def run(launch: Launcher, tmp_path: Path) -> Iterator[RunDir]:
    """The run of a detached launcher, which is stopped at the test's end if it was not before."""
    run = RunDir(tmp_path / "run")
    yield run
    if run.owner() is not None:
        launch("stop", run.path)


def test_a_detached_run_outlives_its_terminal_and_is_watched_from_another(
    launch: Launcher, recipe: Path, run: RunDir, tmp_path: Path
) -> None:
    terminal = launch.start_in_terminal(
        recipe, "--run-dir", run.path, LONG, "checkpoint.every_steps=100000", "--detach"
    )
    assert terminal.process.wait(60) == 0, terminal.stdout
    assert "goes on without this terminal" in terminal.stdout
    assert terminal.terminal is not None
    terminal.terminal.close()  # SIGHUP to whatever is still in it

    watcher = launch.start("attach", run.path)
    watcher.wait_for_event(run.path, "log")
    watcher.wait_for(lambda: "train  " in watcher.stdout)
    status = launch("status", run.path, "--json")
    told = json.loads(status.stdout)
    assert (told["state"], told["max_steps"], len(told["ranks"])) == ("running", 100_000, 2), status.stdout
    assert told["losses"][0] > 0
    assert told["seconds_left"] > 0
    shown = launch("status", run.path).stdout
    assert "0–1 on " in shown
    assert ": train, step" in shown
    assert f"{run.path}  running  step" in launch("runs", tmp_path).stdout

    left = launch.start("attach", run.path)
    left.wait_for(lambda: "train  " in left.stdout)
    left.process.send_signal(signal.SIGINT)
    assert left.process.wait(10) == 0
    assert "goes on; come back" in left.stdout
    assert watcher.process.poll() is None

    followed = launch.start("logs", run.path, "-f", "--rank", "1")
    beats = [json.loads(path.read_text()) for path in run.heartbeats.glob("[0-9]*.json")]
    processes = {(beat["pid"], beat["started"]) for beat in beats}
    assert all(map(is_alive, processes))
    stopped = launch("stop", run.path, "--save")
    assert stopped.returncode == 0, stopped.stderr
    assert all_gone(processes, 0.5)
    assert watcher.process.wait(10) == 130
    assert followed.process.wait(10) == 0
    assert "stopped      every process of this run has ended; step-" in watcher.stdout
    assert report_of(run.path)["result"] == "interrupted"
    assert launch("status", run.path).stdout.splitlines()[1].split() == ["state", "interrupted"]
    assert "launch stop --save" in run.launcher_log.read_text()


def test_what_refuses_a_run_is_read_before_the_terminal_is_given_back(
    launch: Launcher, recipe: Path, finished_run: Path
) -> None:
    done = launch(recipe, "--run-dir", finished_run, "--detach")
    assert done.returncode == 4
    assert "holds a run already" in done.stderr
    assert done.stderr.count("error:") == 1
    assert "detached" not in done.stdout
    (finished_run / "logs" / "launcher.log").unlink()


def test_a_run_that_has_ended_tells_what_it_did(launch: Launcher, finished_run: Path) -> None:
    shown = launch("report", finished_run).stdout
    result = next(line for line in shown.splitlines() if line.startswith("result"))
    assert result.split(maxsplit=1)[1] == "done, step 4 of 4"
    for label in ("loss", "time", "tokens/s", "memory", "saved"):
        assert f"\n{label:<12} " in shown, label
    assert "step-4, step-2" in shown
    logs = launch("logs", finished_run).stdout
    names = [line.strip("= ") for line in logs.splitlines() if line.startswith("== ")]
    assert names[-1].endswith(("-rank0", "-rank1")), names
    refused = launch("attach", finished_run)
    assert refused.returncode == 2
    assert "launch report" in refused.stderr
    missing = launch("logs", finished_run, "--rank", "7")
    assert missing.returncode == 2
    assert "ranks: 0, 1" in missing.stderr


def test_a_launcher_that_was_killed_is_told_from_one_that_runs(launch: Launcher, recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    started = launch.start(recipe, "--run-dir", run.path, LONG)
    started.wait_for_event(run.path, "log")
    os.kill(started.process.pid, signal.SIGKILL)
    started.process.wait()
    assert read_events(run)[0]
    shown = launch("status", run.path).stdout
    assert shown.splitlines()[1].split() == ["state", "killed"]
    assert f"launch resume {run.path.name}" in shown
