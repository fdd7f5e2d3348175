"""ZeRO-1, 2 and 3 by real DeepSpeed on gloo ranks; skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from launcher.worker import zero
from launcher.worker.checkpoint.slices import Slices
from tests.worker.conftest import Job
from tests.worker.test_sharding import SAME, goes_on_to_the_last_bit, learns_what_one_rank_learns

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed")
LORA, FULL = ("adapter.modules_to_save=[lm_head]", "train.gradient_checkpointing=true"), ("adapter.type=full",)
LEAST = ("zero1-full", "zero2-full", "zero3-full")
WAYS = pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        pytest.param(strategy, settings, id=name, marks=() if name in LEAST else pytest.mark.slow)
        for strategy in ("zero1", "zero2", "zero3")
        for settings, name in ((LORA, f"{strategy}-lora"), (FULL, f"{strategy}-full"))
    ],
)


@WAYS
def test_it_learns_what_one_rank_learns(job: Job, tmp_path: Path, strategy: str, settings: tuple[str, ...]) -> None:
    learns_what_one_rank_learns(job, tmp_path / "one", (f"strategy.type={strategy}",), settings)


@pytest.mark.slow
@WAYS
def test_it_goes_on_to_the_last_bit(job: Job, tmp_path: Path, strategy: str, settings: tuple[str, ...]) -> None:
    goes_on_to_the_last_bit(job, tmp_path / "whole", (f"strategy.type={strategy}",), settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("zero2", ("model.dtype=bf16",)),
        ("zero3", ("model.dtype=bf16", "adapter.type=full")),
        ("zero3", ("adapter.type=dora",)),  # loaded whole by each rank
        ("zero1", ("train.optimizer=adamw_8bit",)),
    ],
)
def test_other_ways_go_on_to_the_last_bit(job: Job, tmp_path: Path, strategy: str, settings: tuple[str, ...]) -> None:
    goes_on_to_the_last_bit(job, tmp_path / "whole", (f"strategy.type={strategy}",), settings)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_a_quantised_base_learns(job: Job, strategy: str) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised bases need the extra bitsandbytes")
    sizes = ("model.config.hidden_size=64", "model.config.intermediate_size=128")
    assert job.start(f"strategy.type={strategy}", "model.quantization=nf4", *sizes) == [0, 0], job.logs()
    evals = [event["loss"] for event in job.events("eval")]
    assert evals[-1] < evals[0]


def test_an_engine_of_another_stage_is_found(job: Job) -> None:
    plan = job.plan("strategy.type=zero2")
    model = torch.nn.Linear(4, 4)
    assert zero.what_is_wrong(model, model, plan) == "the model is trained by Linear, not by DeepSpeed"


@pytest.mark.compiles
@pytest.mark.skipif(shutil.which("c++") is None, reason="offloading compiles an operator with a C++ compiler")
@pytest.mark.parametrize("part", ["optimizer", "parameters"])
def test_what_is_offloaded_learns_the_same(job: Job, tmp_path: Path, part: str) -> None:
    here, offloaded = (
        Job(job.server, job.recipe, tmp_path / "here"),
        ("strategy.type=zero3", f"strategy.offload={part}"),
    )
    assert here.start(*SAME, "strategy.type=zero3") == [0, 0], here.logs()
    assert job.start(*SAME, *offloaded) == [0, 0], job.logs()
    # DeepSpeed's Adam on the host rounds otherwise than torch's.
    assert list(job.losses().values()) == pytest.approx(list(here.losses().values()), abs=2e-4)


@pytest.mark.compiles
@pytest.mark.skipif(
    shutil.which("c++") is None or not Path("/usr/include/libaio.h").exists(),
    reason="a disk needs an operator that is compiled with a C++ compiler and libaio",
)
@pytest.mark.parametrize("part", ["optimizer", "parameters"])
def test_what_lies_on_a_disk_learns_the_same_and_goes_on(job: Job, tmp_path: Path, part: str) -> None:
    # DeepSpeed keeps in memory what is smaller than a megabyte: a rank's part of a matrix has to be larger.
    sizes = ("adapter.type=full", "model.config.intermediate_size=16400", "model.config.num_hidden_layers=1")
    constant = ("train.lr=1e-3", "train.schedule=constant", "train.warmup=0")  # so a run that is shorter learns as fast
    settings = (*SAME, *sizes, *constant, "strategy.type=zero3", f"strategy.offload={part}")
    disk = f"strategy.nvme_path={tmp_path / 'disk'}"
    (tmp_path / "disk").mkdir()
    here = Job(job.server, job.recipe, tmp_path / "here")
    assert here.start(*settings) == [0, 0], here.logs()
    assert job.start(*settings, disk, "train.max_steps=2") == [0, 0], job.logs()
    assert [*(tmp_path / "disk").rglob("*.swp")] == [], "nothing is left of a run that has ended"
    assert job.start(*settings, disk, "checkpoint.async=true", resume=True) == [0, 0], job.logs()
    assert list(job.losses().values()) == pytest.approx(list(here.losses().values()), abs=2e-4)
    shapes = [Slices(each.run.checkpoints / "step-4").shapes for each in (here, job)]
    assert shapes[0] == shapes[1]
