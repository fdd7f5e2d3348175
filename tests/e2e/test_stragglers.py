"""A rank that is slower than the others is named, though all steps of all ranks take the same time."""

from __future__ import annotations

from pathlib import Path

import pytest
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


SLOW_LAYER = """\
import time
original = module.{trainer}.{step}
def step(self, *args, **kwargs):
    if self.state.global_step == {since}:
        layer = next(part for part in self.model.modules() if type(part).__name__.endswith("LlamaDecoderLayer"))
        forward = layer.forward
        def slow(*args, **kwargs):
            time.sleep(0.15)
            return forward(*args, **kwargs)
        layer.forward = slow
    return original(self, *args, **kwargs)
module.{trainer}.{step} = step
"""
LAYER_OF = {
    "fsdp": ("launcher.worker.training", {"trainer": "PlannedTrainer", "step": "training_step", "since": 0}),
    "zero3": ("launcher.worker.training", {"trainer": "PlannedTrainer", "step": "training_step", "since": 0}),
    "device_map": ("launcher.worker.pipeline.loop", {"trainer": "PipelinedTrainer", "step": "_step", "since": 4}),
}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3", "device_map"])
def test_a_rank_that_stays_behind_is_named(
    launch: Launcher, sabotage: Sabotage, recipe: Path, tmp_path: Path, strategy: str
) -> None:
    if strategy == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    module, where = LAYER_OF.get(strategy, ("launcher.worker.training", {}))
    slow = sabotage.module(module, SLOW_LAYER.format(**where) if where else SLOW)
    options = [f"strategy.type={strategy}", "train.max_steps=18", "checkpoint.every_steps=100"]
    if strategy == "device_map":
        options += ["strategy.schedule=pipelined"]
        recipe.write_text(recipe.read_text().replace("num_hidden_layers: 1", "num_hidden_layers: 2"))
    done = launch(recipe, "--run-dir", "run", *options, **slow)

    assert done.returncode == 0, done.stderr
    run = RunDir(tmp_path / "run")
    (straggler,) = report_of(run.path)["stragglers"]
    assert straggler["rank"] == 1
    assert straggler["behind"] > 0.15
    (event,) = [event for event in read_events(run)[0] if event["event"] == "straggler"]
    assert event["text"] in done.stdout
    board = EventAccumulator(str(run.tensorboard)).Reload()
    own = [[entry.value for entry in board.Scalars(f"speed_per_rank/own_seconds_a_step_{rank}")] for rank in (0, 1)]
    since = where.get("since", 0) + 1
    assert all(0.15 < slower < 1 for slower in own[1][since:])
    # What rank 0 waits for rank 1 is none of its own time.
    assert sum(own[0][since:]) < sum(own[1][since:]) - 0.1 * len(own[1][since:])
    assert board.Scalars("stragglers/behind_1")
