"""A rank that is slower than the others is named, though all steps of all ranks take the same time."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.rundir import RunDir, read_events
from tests.e2e.conftest import Launcher, Sabotage, report_of

SLOW = """\
import time
original = module.PlannedTrainer.training_step
def training_step(self, *args, **kwargs):
    time.sleep(0.15)
    return original(self, *args, **kwargs)
module.PlannedTrainer.training_step = training_step
"""


def test_a_rank_that_stays_behind_is_named(launch: Launcher, sabotage: Sabotage, recipe: Path, tmp_path: Path) -> None:
    slow = sabotage.module("launcher.worker.training", SLOW)
    done = launch(recipe, "--run-dir", "run", "train.max_steps=16", "checkpoint.every_steps=100", **slow)

    assert done.returncode == 0, done.stderr
    run = RunDir(tmp_path / "run")
    (straggler,) = report_of(run.path)["stragglers"]
    assert straggler["rank"] == 1
    assert straggler["behind"] > 0.15
    (event,) = [event for event in read_events(run)[0] if event["event"] == "straggler"]
    assert event["text"] in done.stdout
    board = EventAccumulator(str(run.tensorboard)).Reload()
    own = [[entry.value for entry in board.Scalars(f"speed_per_rank/own_seconds_a_step_{rank}")] for rank in (0, 1)]
    assert all(0.15 < slower < 1 for slower in own[1][1:])
    # What rank 0 waits for rank 1 is none of its own time.
    assert sum(own[0][1:]) < sum(own[1][1:]) - 0.1 * len(own[1][1:])
    assert board.Scalars("stragglers/behind_1")
