"""A run that stands still is ended, and the person reads who is waited for and where everybody is."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

from launcher.rundir import RunDir, read_events, read_json
from tests.e2e.conftest import Launcher, Sabotage, all_gone, report_of

HOST = socket.gethostname()
SHORT = "launch.stall_seconds=4"
FOUND_WITHIN = 20.0
# A thread that waits for a lock which it holds itself.
DEADLOCK = "import threading; open('stuck', 'w'); lock = threading.Lock(); lock.acquire(); lock.acquire()"


def test_a_stopped_rank_is_found_and_named(launch: Launcher, recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    started = launch.start(recipe, "--run-dir", run.path, "train.max_steps=100000", SHORT)
    started.wait_for(lambda: (read_json(run.heartbeat(1)) or {}).get("step", 0) > 10)
    processes = started.descendants()
    os.kill(read_json(run.heartbeat(1))["pid"], signal.SIGSTOP)
    stopped = time.monotonic()

    assert started.process.wait(FOUND_WITHIN + 20) == 124
    assert time.monotonic() - stopped < FOUND_WITHIN
    assert all_gone(processes, 0.5)
    assert f"rank 1 ({HOST}, cpu) at step " in started.stderr.splitlines()[0]
    assert "more than launch.stall_seconds: 4: its process is stopped (SIGSTOP, Ctrl-Z or a debugger)" in started.stderr
    failure = report_of(run.path)["failure"]
    assert (failure["rank"], failure["exit_code"]) == (1, 124)
    waiting, blamed = sorted(failure["waits"])
    assert blamed.startswith("rank 1 (step ")
    assert blamed.endswith(") is stopped")
    assert "waits for others at" in waiting
    assert "launcher/worker/__main__.py" in run.stacks(0).read_text()
    assert [event["rank"] for event in read_events(run)[0] if event["event"] == "stalled"] == [1]


def test_a_deadlock_in_code_of_the_user_is_found_and_shown(
    launch: Launcher, sabotage: Sabotage, recipe: Path, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    started = launch.start(recipe, "--run-dir", run.path, SHORT, **sabotage.step(3, DEADLOCK))
    started.wait_for((tmp_path / "stuck").exists)
    stuck = time.monotonic()

    assert started.process.wait(FOUND_WITHIN + 20) == 124
    assert time.monotonic() - stuck < FOUND_WITHIN
    failure = report_of(run.path)["failure"]
    assert (failure["rank"], failure["step"], failure["phase"]) == (1, 3, "train")
    assert failure["where"].endswith("in training_step")
    assert "sitecustomize.py" in failure["where"]
    assert "ranks" in started.stderr
    assert "safe       step-2 is complete" in started.stderr
