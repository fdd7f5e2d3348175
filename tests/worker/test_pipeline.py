"""Pipelined stages on real gloo ranks: the same gradients and curve as one rank, checkpoints that any of them goes on from."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.worker.loading import load_trained
from tests.worker.conftest import Job, ask
from tests.worker.test_export import verb
from tests.worker.test_sharding import goes_on_to_the_last_bit, weights_of
from tests.worker.test_worlds import SAME

PIPELINED = ("strategy.type=device_map", "strategy.schedule=pipelined", "hardware=2xcpu")


def in_ranks(server: subprocess.Popen[str], folder: Path, function: str, num: int) -> list[Any]:
    """What a function of `pipeline_ranks.py` has left, a value of each rank."""
    folder.mkdir()
    codes = ask(server, function=f"tests.worker.pipeline_ranks:{function}", argument=str(folder), ranks=num)
    assert codes == [0] * num
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num)]


@pytest.mark.parametrize("num", [2, 3])
def test_gradients_are_those_of_the_unsplit_model(rank_server: subprocess.Popen[str], tmp_path: Path, num: int) -> None:
    found = in_ranks(rank_server, tmp_path / "found", "gradients", num)
    for case in (case for rank in found for case in rank):
        assert case["gradient"] < 2e-5, case
        assert abs(case["loss"]) < 2e-6, case
        assert abs(case["evaluated"]) < 2e-6, case
    unlike = [case["mean_of_means"] for case in found[0] if case["case"].endswith("step 0")]
    assert min(unlike) > 0.3, "where labels are spread unevenly the two ways to weigh them differ"


def test_buffers_are_those_of_the_micro_batches_in_flight(rank_server: subprocess.Popen[str], tmp_path: Path) -> None:
    for most, left in in_ranks(rank_server, tmp_path / "found", "buffers", 2):
        assert most <= 3, "sixteen micro batches, of which two are in flight"
        assert left == 0


def test_gradients_are_clipped_by_the_norm_of_all_stages_and_an_overflow_is_seen_by_all(
    rank_server: subprocess.Popen[str], tmp_path: Path
) -> None:
    for rank, (fine, overflowed) in enumerate(in_ranks(rank_server, tmp_path / "found", "clipping", 2)):
        assert fine == pytest.approx([0.5, 5.0, (3.0 + rank) / 5], rel=1e-5)
        assert overflowed[1] == math.inf


def test_what_a_model_raises_is_what_is_reported(rank_server: subprocess.Popen[str], tmp_path: Path) -> None:
    assert in_ranks(rank_server, tmp_path / "found", "failing", 1) == ["as large as can be"]


# Six micro batches a step; four steps an epoch, of which the last has rows for two micro batches.
SETTINGS = (*SAME, "model.config.num_hidden_layers=4", "train.global_batch=12")


@pytest.fixture
def three_stages(tmp_path: Path) -> tuple[str, ...]:
    """A device map over three devices with unlike numbers of layers."""
    file = tmp_path / "three.yaml"
    file.write_text("devices: [3xcpu]\nschedule: pipelined\nplacement: [0-0, 1-2, 3-3]\n")
    return ("strategy.type=device_map", f"strategy.device_map={file}", "strategy.pipeline=gpipe")


def goes_through(job: Job, one: Job, settings: tuple[str, ...], legs: list[tuple[str, ...]]) -> None:
    """Train two steps in each way, from the checkpoint of the one before; compare with one rank that is never interrupted."""
    steps = 2 * len(legs)
    assert one.start(*settings, "hardware=1xcpu", f"train.max_steps={steps}") == [0], one.logs()
    for place, leg in enumerate(legs, 1):
        codes = job.start(*settings, *leg, f"train.max_steps={2 * place}", resume=place > 1)
        assert set(codes) == {0}, job.logs()
    assert list(job.losses()) == list(range(1, steps + 1))
    for event, key in (("log", "loss"), ("log", "grad_norm"), ("eval", "loss")):
        found, wanted = ([found[key] for found in each.events(event)] for each in (job, one))
        assert found == pytest.approx(wanted, rel=1e-4, abs=2e-5), (event, key)
    assert "each rank loads all of it" not in job.logs()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_learns_what_one_rank_learns_and_its_merged_export_is_the_same(
    job: Job, tmp_path: Path, three_stages: tuple[str, ...]
) -> None:
    settings = (*SETTINGS, "adapter.modules_to_save=[embed_tokens, lm_head]")
    one = Job(job.server, job.recipe, tmp_path / "one")
    again = (*PIPELINED, "train.gradient_checkpointing=true")
    goes_through(job, one, settings, [("hardware=1xcpu",), again, three_stages])
    files = [{path.name for path in (each.run.checkpoints / "step-6").glob("adapter*")} for each in (one, job)]
    assert files[0] == files[1]
    done = verb("export", job)
    assert done.returncode == 0, done.stderr
    merged = load_trained(one.run, None, quantized=False).model.merge_and_unload().state_dict()
    exported = load_file(job.run.export / "model.safetensors")
    assert exported.keys() == merged.keys()
    assert all(torch.allclose(exported[name], merged[name], atol=1e-4) for name in merged)


def test_full_training_learns_what_one_rank_learns_and_one_rank_goes_on_from_it(job: Job, tmp_path: Path) -> None:
    settings = (*SETTINGS, "adapter.type=full", "train.lr=1e-3", "train.max_grad_norm=0.5")
    one = Job(job.server, job.recipe, tmp_path / "one")
    goes_through(job, one, settings, [PIPELINED, ("hardware=1xcpu",)])
    saved = job.run.checkpoints / "step-2"
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {path.name for path in saved.glob("model-*.safetensors")}
    assert len(files) == 2, "one of each stage"
    assert weights_of(saved, None).keys() == index["weight_map"].keys()


@pytest.mark.parametrize("more", [("adapter.r=3",), ("adapter.type=full", "strategy.pipeline=gpipe")], ids=str)
def test_going_on_is_exact_to_the_last_bit(job: Job, tmp_path: Path, more: tuple[str, ...]) -> None:
    goes_on_to_the_last_bit(job, tmp_path / "whole", PIPELINED, (*more, "train.micro_batch=2"))
