"""A disk that runs full while a run trains: older checkpoints stay, and the recipe says whether the run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import manifest
from launcher.rundir import RunDir, read_events
from tests.e2e.conftest import Launcher, report_of

LONG = ("train.max_steps=100000", "checkpoint.every_steps=100000", "train.log_every_steps=20")


def fill(folder: Path) -> Path:
    """Take all the room there is."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError:
            pass
    return ballast


@pytest.mark.parametrize("how", ["warn", "stop"])
def test_a_disk_runs_full(launch: Launcher, recipe: Path, mounted: Callable[[str], Path], how: str) -> None:
    disk = mounted("size=64m")
    run = RunDir(disk / "run")
    started = launch.start(recipe, "--run-dir", run.path, f"checkpoint.on_failure={how}", *LONG)
    started.wait_for_event(run.path, "log")
    run.save_now.touch()
    first = started.wait_for_event(run.path, "save")["step"]
    ballast = fill(disk)
    run.save_now.touch()  # an empty file needs none
    if how == "stop":
        assert started.process.wait(60) == 1
        assert "no space left on the device" in started.stderr
        assert "launch resume" in started.stderr
        newest, skipped = manifest.newest_valid(run)
        assert newest is not None
        assert (newest.step, skipped) == (first, [])
        return
    started.wait_for(lambda: not run.save_now.exists())
    os.truncate(ballast, 0)
    started.wait_for_event(run.path, "log")
    run.save_now.touch()
    started.wait_for(lambda: len([event for event in read_events(run)[0] if event["event"] == "save"]) > 1)
    told = launch("stop", run.path, "--save")
    assert told.returncode == 0
    assert started.process.wait(20) == 130
    verdicts = [manifest.verify(folder) for folder in manifest.folders(run)]
    assert [verdict.problem for verdict in verdicts] == [None, None]
    assert "not saved    at step" in started.stdout
    assert len(report_of(run.path)["not_saved"]) == 1
