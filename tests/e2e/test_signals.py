"""Whoever stops a run, however and whenever: exit 130 in ten seconds, no process is left, and the run can go on later."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from launcher import manifest
from launcher.rundir import RunDir, read_events, read_json
from tests.e2e.conftest import Launcher, Process, Sabotage, Started, all_gone, report_of

LONG = "train.max_steps=100000"
EVERY_50 = "checkpoint.every_steps=50"
IGNORES_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
SECONDS = 10.0


def processes_of(started: Started, run_dir: Path) -> set[Process]:
    """Everything that `launch` has started, whatever session it is in; the recorded ranks are among them."""
    found = started.descendants()
    recorded = [read_json(path) for path in RunDir(run_dir).heartbeats.glob("*.json")]
    assert {(beat["pid"], beat["started"]) for beat in recorded if beat} <= found
    return found


def stop(started: Started, number: int) -> float:
    """Send a signal to the launcher alone; the seconds until it has ended."""
    sent = time.monotonic()
    started.process.send_signal(number)
    started.process.wait(SECONDS + 20)
    return time.monotonic() - sent


def assert_stopped(started: Started, took: float, number: int, processes: set[Process]) -> None:
    name = signal.Signals(number).name
    assert started.process.returncode == 130
    assert took < SECONDS
    assert all_gone(processes, 0.5)
    assert started.stderr.startswith(f"error: {name}: every process of this run has ended")
    assert "Traceback" not in started.stdout + started.stderr


def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_had_been(
    launch: Launcher, recipe: Path, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    # How long a run is meant to be changes no step of it.
    same = ("train.schedule=constant", "train.warmup=0", "adapter.dropout=0.1")
    started = launch.start(recipe, "--run-dir", run.path, LONG, "checkpoint.every_steps=100000", *same)
    started.wait_for_event(run.path, "log")
    run.save_now.touch()
    asked = started.wait_for_event(run.path, "save")["step"]
    assert not run.save_now.exists()
    processes = processes_of(started, run.path)
    assert len(processes) == 4, "torchrun, what its ranks are copies of, and two ranks"

    took = stop(started, signal.SIGTERM)

    assert_stopped(started, took, signal.SIGTERM, processes)
    newest, _ = manifest.newest_valid(run)
    assert newest is not None
    assert newest.step > asked
    assert f"step-{newest.step} is saved" in started.stderr
    assert "go on later with: launch resume run" in started.stderr
    assert f"saving       step-{asked}, as asked (save-now)" in started.stdout
    assert "SIGTERM: every rank saves when this step is done, then ends" in started.stdout
    report = report_of(run.path)
    assert (report["result"], report["exit_code"], report["failure"]) == ("interrupted", 130, None)
    assert (report["stopped_by"], report["stopped_early"], report["steps"]) == ("SIGTERM", False, newest.step)

    last = newest.step + 2
    resumed = launch("resume", run.path, f"train.max_steps={last}")
    assert resumed.returncode == 0, resumed.stderr
    assert f"step-{newest.step}: complete, verified" in resumed.stdout
    whole = launch(recipe, "--run-dir", "whole", f"train.max_steps={last}", "checkpoint.every_steps=100000", *same)
    assert whole.returncode == 0, whole.stderr
    assert losses(run) == losses(RunDir(tmp_path / "whole"))
    assert list(losses(run)) == list(range(1, last + 1))


def losses(run: RunDir) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in read_events(run)[0] if event["event"] == "log"}


def test_every_way_to_stop_a_run_that_is_not_here(launch: Launcher, recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    refused = launch("stop", recipe.parent)
    assert (refused.returncode, "holds no plan.json" in refused.stderr) == (2, True)

    def train(*args: str | Path) -> Started:
        since = len(read_events(run)[0])
        started = launch.start(*args, LONG, "checkpoint.every_steps=100000")
        started.wait_for(lambda: [event for event in read_events(run)[0][since:] if event["event"] == "log"])
        return started

    def stopped(started: Started, why: str) -> int:
        """The step that was saved."""
        assert started.process.wait(SECONDS) == 130, started.stderr
        assert "Traceback" not in started.stdout + started.stderr
        assert started.stderr.startswith(f"error: {why}: every process of this run has ended; step-")
        newest, _ = manifest.newest_valid(run)
        assert newest is not None
        return newest.step

    # A scheduler that tells one rank.
    started = train(recipe, "--run-dir", run.path)
    os.kill(read_json(run.heartbeat(1))["pid"], signal.SIGUSR1)
    first = stopped(started, "SIGUSR1")

    # One that tells every process there is.
    started = train("resume", run.path)
    processes = processes_of(started, run.path)
    for pid, _ in (started.itself, *processes):
        os.kill(pid, signal.SIGTERM)
    second = stopped(started, "SIGTERM")
    assert second > first
    assert all_gone(processes, 0.5)

    # A person at another terminal, with and without a checkpoint.
    started = train("resume", run.path)
    told = launch("stop", "run", "--save")
    third = stopped(started, "launch stop --save")
    assert third > second
    assert told.stdout.splitlines() == [
        f"stopped      every process of this run has ended; step-{third} is saved",
        "  go on      launch resume run",
    ]
    started = train("resume", run.path)
    processes = processes_of(started, run.path)
    told = launch("stop", "run")
    assert stopped(started, "SIGINT") == third
    assert all_gone(processes, 0.5)
    assert f"step-{third} is saved" in told.stdout
    again = launch("stop", "run")
    assert (again.returncode, "no launcher works there" in again.stderr) == (2, True)


def test_ctrl_c_in_a_terminal_reaches_the_launcher_alone(launch: Launcher, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = launch.start_in_terminal(recipe, "--run-dir", run, LONG, EVERY_50)
    started.wait_for_event(run, "save")
    processes = processes_of(started, run)
    assert started.terminal is not None

    sent = time.monotonic()
    started.terminal.type(b"\x03")
    assert started.process.wait(SECONDS) == 130

    assert time.monotonic() - sent < SECONDS
    assert all_gone(processes, 0.5)
    started.terminal.close()
    assert "SIGINT: every process of this run has ended" in started.stdout
    assert "Traceback" not in started.stdout
    # torchrun ended the ranks; none was interrupted in the middle of a step.
    assert not any("KeyboardInterrupt" in path.read_text() for path in (run / "logs").glob("*rank*.log"))


def test_a_closed_terminal_ends_the_run_even_where_ranks_do_not_react(
    launch: Launcher, sabotage: Sabotage, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stubborn = sabotage.module("launcher.worker.training", IGNORES_SIGINT, ranks=(0, 1))
    started = launch.start_in_terminal(recipe, "--run-dir", run, LONG, EVERY_50, **stubborn)
    started.wait_for_event(run, "save")
    processes = processes_of(started, run)
    assert started.terminal is not None

    closed = time.monotonic()
    started.terminal.close()  # SIGHUP, and nothing can be printed any more
    assert started.process.wait(SECONDS) == 130

    assert time.monotonic() - closed < SECONDS
    assert all_gone(processes, 0.5)
    assert report_of(run)["result"] == "interrupted"


def test_a_signal_while_preparing(launch: Launcher, recipe: Path, tmp_path: Path) -> None:
    rows = tmp_path / "many.jsonl"
    row = {"instruction": "Say it again " * 40, "output": "again " * 40}
    with rows.open("w") as file:
        for number in range(60_000):
            file.write(json.dumps({**row, "input": str(number)}) + "\n")
    cache = tmp_path / "cache"
    started = launch.start(recipe, f"data.path={rows}", "--run-dir", "run", LAUNCH_CACHE=str(cache))
    half_made = started.wait_for(lambda: list(cache.glob(".*")))
    processes = processes_of(started, tmp_path / "run")
    assert len(processes) >= 1

    took = stop(started, signal.SIGINT)

    assert_stopped(started, took, signal.SIGINT, processes)
    assert report_of(tmp_path / "run")["result"] == "interrupted"
    assert not any(folder.exists() for folder in half_made), "nothing half-made stays in the cache"


@pytest.mark.parametrize("num", [2, 4], ids=["importing", "born"])
def test_a_signal_while_ranks_start(launch: Launcher, recipe: Path, tmp_path: Path, num: int) -> None:
    """Torchrun and what its ranks are copies of, which imports; then two ranks that have joined nothing yet."""
    run = tmp_path / "run"
    started = launch.start(recipe, "--run-dir", run, LONG)
    processes = started.wait_for(lambda: len(found := started.descendants()) == num and found)
    if num == 2:
        started.wait_for(lambda: any(event["event"] == "start" for event in read_events(RunDir(run))[0]))

    took = stop(started, signal.SIGTERM)

    assert_stopped(started, took, signal.SIGTERM, processes)
    assert report_of(run)["steps"] == 0


def test_a_killed_launcher_leaves_no_rank(launch: Launcher, recipe: Path, tmp_path: Path) -> None:
    started, early = (launch.start(recipe, "--run-dir", tmp_path / name, LONG, EVERY_50) for name in ("run", "early"))
    # One as soon as its ranks exist, before they have run a line of ours; one in the midst of training.
    unborn = early.wait_for(lambda: len(found := early.descendants()) == 4 and found)
    early.process.kill()
    started.wait_for_event(tmp_path / "run", "train")
    processes = processes_of(started, tmp_path / "run")
    started.process.kill()

    assert all_gone(processes, 15)
    assert all_gone(unborn, 15)
    # The lock went with its owner: the run can go on.
    with RunDir(tmp_path / "run").locked():
        pass


def test_two_launches_side_by_side_and_a_third_on_a_directory_in_use(
    launch: Launcher, recipe: Path, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    one = launch.start(recipe, "--run-dir", tmp_path / "one", nohup=True)
    two = launch.start(recipe, "--run-dir", tmp_path / "two", stdout=writer)
    os.close(writer)
    one.wait_for_event(tmp_path / "one", "start")

    for refused in (launch("resume", "one"), launch(recipe, "--run-dir", "one")):
        assert refused.returncode == 4
        assert f"error: run directory {tmp_path / 'one'}: is in use by process {one.process.pid}" in refused.stderr
        assert "wait for it, or name another one: launch.run_dir=DIR" in refused.stderr
    one.process.send_signal(signal.SIGHUP)  # under nohup that is nothing
    os.close(reader)  # launch … | head -1

    for started, name in ((one, "one"), (two, "two")):
        assert started.process.wait(180) == 0, started.stderr
        assert started.stderr == ""
        assert report_of(tmp_path / name)["result"] == "done"
    assert report_of(tmp_path / "one")["loss_last"] == report_of(tmp_path / "two")["loss_last"]
