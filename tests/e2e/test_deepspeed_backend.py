"""Ranks started by DeepSpeed's launcher of a node: what torchrun's ranks do, they do. Skipped where DeepSpeed is not installed."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
from pathlib import Path

import pytest

from launcher import manifest
from launcher.rundir import RunDir, read_events, read_json
from tests.e2e.conftest import Launcher, Sabotage, all_gone, report_of
from tests.e2e.test_signals import LONG, assert_stopped, processes_of, stop

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed")
DEEPSPEED = ("strategy.type=zero2", "launch.backend=deepspeed")


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "deepspeed" in name}


def test_it_learns_what_ranks_of_torchrun_learn_and_leaves_nothing(
    launch: Launcher, recipe: Path, tmp_path: Path
) -> None:
    before = shared_memory()
    for name, *settings in (("zero2", *DEEPSPEED), ("ddp", DEEPSPEED[1]), ("torchrun", DEEPSPEED[0])):
        done = launch(recipe, "--run-dir", name, *settings)
        assert done.returncode == 0, done.stdout + done.stderr
    zero2, ddp, torchrun = (report_of(tmp_path / name)["loss_last"] for name in ("zero2", "ddp", "torchrun"))
    assert zero2 == pytest.approx(torchrun, abs=1e-6)
    assert ddp == pytest.approx(torchrun, abs=1e-6)
    assert shared_memory() == before


@pytest.mark.slow
def test_a_killed_rank_is_named(launch: Launcher, sabotage: Sabotage, recipe: Path, tmp_path: Path) -> None:
    broken = sabotage.step(3, "os.kill(os.getpid(), 9)")
    done = launch(recipe, "--run-dir", "run", *DEEPSPEED, **broken)
    assert done.returncode == 128 + signal.SIGKILL, done.stdout + done.stderr
    failure = report_of(tmp_path / "run")["failure"]
    assert (failure["rank"], failure["step"]) == (1, 3)
    assert re.match(
        r"killed( by somebody)? \(SIGKILL\)", failure["cause"]
    )  # by somebody, where the kernel's own kills are counted
    assert "safe       step-2 is complete" in done.stderr


@pytest.mark.slow
def test_an_exception_is_named_and_not_the_rank_that_noticed(
    launch: Launcher, sabotage: Sabotage, recipe: Path, tmp_path: Path
) -> None:
    broken = sabotage.step(3, "raise ValueError('the seventh seal is broken')")
    done = launch(recipe, "--run-dir", "run", *DEEPSPEED, **broken)
    assert done.returncode == 1
    failure = report_of(tmp_path / "run")["failure"]
    assert (failure["rank"], failure["cause"]) == (1, "ValueError: the seventh seal is broken")


@pytest.mark.slow
def test_sigterm_to_every_process_saves_and_sigint_ends_all(launch: Launcher, recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    started = launch.start(recipe, "--run-dir", run.path, LONG, "checkpoint.every_steps=100000", *DEEPSPEED)
    started.wait_for_event(run.path, "log")
    processes = processes_of(started, run.path)
    for pid, _ in processes:  # as a scheduler does
        os.kill(pid, signal.SIGTERM)
    assert_stopped(started, stop(started, signal.SIGTERM), signal.SIGTERM, processes)
    assert manifest.newest_valid(run)[0] is not None

    started = launch.start("resume", run.path)
    started.wait_for(lambda: [event["event"] for event in read_events(run)[0]].count("train") == 2)
    processes = processes_of(started, run.path)
    assert_stopped(started, stop(started, signal.SIGINT), signal.SIGINT, processes)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["launcher", "node"])
def test_a_killed_launcher_leaves_no_rank(launch: Launcher, recipe: Path, tmp_path: Path, who: str) -> None:
    run = RunDir(tmp_path / "run")
    started = launch.start(recipe, "--run-dir", run.path, LONG, *DEEPSPEED)
    started.wait_for_event(run.path, "log")
    processes = processes_of(started, run.path)
    if who == "launcher":
        started.process.kill()
    else:
        os.kill(read_json(run.node_heartbeat(0))["pid"], signal.SIGKILL)
        assert started.process.wait(30) == 128 + signal.SIGKILL
    assert all_gone(processes, 15.0)
