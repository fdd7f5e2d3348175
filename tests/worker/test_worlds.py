"""Checkpoints continued on other numbers of ranks, under other strategies: the losses stay those of one uninterrupted run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from launcher import manifest
from launcher.errors import PreflightError
from launcher.worker.checkpoint.slices import Slices
from tests.worker.conftest import Job
from tests.worker.test_training import copy_until

# A constant learning rate: how long a leg is meant to last changes nothing.
SAME = (
    "adapter.dropout=0",
    "model.config.attention_dropout=0.0",
    "train.schedule=constant",
    "train.warmup=0",
    "train.eval_every_steps=2",
    "checkpoint.every_steps=2",
)
WAYS = pytest.mark.parametrize(
    "settings",
    [
        ("adapter.r=3", "adapter.modules_to_save=[lm_head]", "data.eval.rows=3"),
        (
            "adapter.type=full",
            "train.lr=1e-3",
            "checkpoint.max_shard_size=1MB",
            "model.config.tie_word_embeddings=true",
        ),
    ],
    ids=["lora", "full"],
)
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed")


def goes_through(job: Job, folder: Path, worlds: list[str], settings: tuple[str, ...], within: float = 2e-5) -> None:
    """Train two steps in each world (`ddp@2`), from the checkpoint of the one before; compare with one rank that is never interrupted."""
    steps = 2 * len(worlds)
    whole = Job(job.server, job.recipe, folder)
    assert whole.start(*SAME, *settings, "hardware=1xcpu", f"train.max_steps={steps}") == [0], whole.logs()
    for place, world in enumerate(worlds, 1):
        strategy, _, ranks = world.partition("@")
        how = (f"strategy.type={strategy}", f"hardware={ranks}xcpu", f"train.max_steps={2 * place}")
        codes = job.start(*SAME, *settings, *how, resume=place > 1)
        assert codes == [0] * int(ranks), f"{world}\n{job.logs()}"
        newest, skipped = manifest.newest_valid(job.run)
        assert newest is not None
        assert (newest.step, skipped) == (2 * place, [])
    assert list(job.losses()) == list(range(1, steps + 1))
    assert list(job.losses().values()) == pytest.approx(list(whole.losses().values()), abs=within)
    evals = [[event["loss"] for event in each.events("eval")] for each in (job, whole)]
    assert evals[0] == pytest.approx(evals[1], abs=within)


@pytest.mark.parametrize("settings", [pytest.param(WAYS.args[1][0], marks=pytest.mark.slow), WAYS.args[1][1]])
def test_any_of_these_worlds_goes_on_where_another_was(job: Job, tmp_path: Path, settings: tuple[str, ...]) -> None:
    goes_through(job, tmp_path / "whole", ["ddp@2", "single@1", "ddp@4", "fsdp@2", "fsdp@4", "single@1"], settings)


@pytest.mark.slow
@needs_deepspeed
@WAYS
def test_zero_goes_on_where_any_other_was(job: Job, tmp_path: Path, settings: tuple[str, ...]) -> None:
    worlds = ["zero1@2", "zero2@4", "zero3@2", "zero3@4", "zero3@1", "zero1@4", "fsdp@2", "zero3@2", "ddp@2", "zero2@1"]
    goes_through(job, tmp_path / "whole", worlds, settings)


@pytest.mark.slow
@needs_deepspeed
@WAYS
def test_fp32_copies_of_half_precision_weights_go_along(job: Job, tmp_path: Path, settings: tuple[str, ...]) -> None:
    settings = (*settings, "model.dtype=bf16")
    goes_through(
        job, tmp_path / "whole", ["zero3@2", "zero2@2", "single@1", "zero3@1", "fsdp@2"], settings, within=0.03
    )
    zero, last = (Slices(job.run.checkpoints / f"step-{step}") for step in (4, 10))
    kinds = {name: set(zero.kinds(name)) for name in zero.shapes}
    assert set(map(frozenset, kinds.values())) == {frozenset({"master", "exp_avg", "exp_avg_sq"})}
    assert all(set(last.kinds(name)) == {"exp_avg", "exp_avg_sq"} for name in kinds)


def test_a_plan_says_what_is_other_than_before(finished: Job, job: Job) -> None:
    copy_until(finished, job, 4)
    plan = job.prepare("strategy.type=fsdp", "hardware=4xcpu", "train.micro_batch=1", resume=True)
    told = [decision for decision in plan.decisions if decision.key == "resume"]
    assert [decision.value for decision in told] == [
        "fsdp on 4 ranks, was ddp on 2 ranks: micro batch 2 → 1, accumulation 2"
    ]
    assert told[0].because.startswith("the global batch of 8 and the order of rows stay; dropout")
    same = job.prepare(resume=True)
    assert not [decision for decision in same.decisions if decision.key == "resume"]


def test_blocks_of_eight_bits_stay_with_their_ranks(finished: Job, job: Job) -> None:
    pytest.importorskip("bitsandbytes", reason="8-bit optimizers need the extra bitsandbytes")
    settings = ("train.optimizer=adamw_8bit", "train.max_steps=2", "checkpoint.every_steps=2", "data.eval=null")
    assert job.start(*settings) == [0, 0], job.logs()
    found = "adamw_8bit under ZeRO keeps its moments in blocks .* only ddp on 2 ranks can read what they wrote; now it is zero2 on 2"
    with pytest.raises(PreflightError, match=found):
        job.prepare(*settings, "strategy.type=zero2", resume=True)
    assert job.start(*settings, "train.max_steps=3", "hardware=1xcpu", resume=True) == [0], job.logs()
