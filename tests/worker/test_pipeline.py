"""Pipelined stages on real gloo ranks: the same gradients and curve as one rank, checkpoints that any of them goes on from."""

from __future__ import annotations

import json
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
from tests.worker.test_training import copy_until

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


def test_what_a_model_raises_is_what_is_reported(rank_server: subprocess.Popen[str], tmp_path: Path) -> None:
    assert in_ranks(rank_server, tmp_path / "found", "failing", 1) == ["as large as can be"]


# Six micro batches a step; four steps an epoch, of which the last has rows for two micro batches.
STEPS = ("model.config.num_hidden_layers=4", "train.global_batch=12", "train.max_steps=6", "checkpoint.every_steps=3")
EVEN = ("adapter.dropout=0", "model.config.attention_dropout=0.0", *STEPS)


@pytest.fixture
def three_stages(tmp_path: Path) -> tuple[str, ...]:
    """A device map over three devices with unlike numbers of layers."""
    file = tmp_path / "three.yaml"
    file.write_text("devices: [3xcpu]\nschedule: pipelined\nplacement: [0-0, 1-2, 3-3]\n")
    return ("strategy.type=device_map", f"strategy.device_map={file}", "strategy.pipeline=gpipe")


def same_run(one: Job, other: Job, steps: range, atol: float = 2e-5) -> None:
    """Losses, gradient norms, evaluations and what is saved at the end agree to rounding."""
    for event, key in (("log", "loss"), ("log", "grad_norm"), ("log", "lr"), ("eval", "loss")):
        first, second = (
            {found["step"]: found[key] for found in job.events(event) if found["step"] in steps} for job in (one, other)
        )
        assert first
        assert second == pytest.approx(first, rel=1e-4, abs=atol), (event, key)
    folders = [job.run.checkpoints / f"step-{steps[-1]}" for job in (one, other)]
    name = "adapter_model.safetensors" if (folders[0] / "adapter_model.safetensors").is_file() else None
    saved = [weights_of(folder, name) for folder in folders]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.allclose(saved[0][key], saved[1][key], atol=1e-4) for key in saved[0])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_learns_what_one_rank_learns_and_each_goes_on_from_the_other(
    job: Job, tmp_path: Path, three_stages: tuple[str, ...]
) -> None:
    settings = (*EVEN, "adapter.modules_to_save=[embed_tokens, lm_head]")
    one, three, back, on = (Job(job.server, job.recipe, tmp_path / name) for name in ("one", "three", "back", "on"))
    assert one.start(*settings, "hardware=1xcpu") == [0], one.logs()
    again = "train.gradient_checkpointing=true"
    assert job.start(*settings, *PIPELINED, again) == [0, 0], job.logs()
    assert three.start(*settings, *three_stages) == [0, 0, 0], three.logs()
    for pipelined in (job, three):
        same_run(one, pipelined, range(1, 7))
        files = [
            sorted(path.name for path in (each.run.checkpoints / "step-6").glob("adapter*"))
            for each in (one, pipelined)
        ]
        assert files[0] == files[1]
    assert "each rank loads all of it" not in job.logs() + three.logs()
    copy_until(one, on, 3)
    assert on.start(*settings, *three_stages, resume=True) == [0, 0, 0], on.logs()
    same_run(one, on, range(4, 7))
    copy_until(three, back, 3)
    assert back.start(*settings, "hardware=1xcpu", resume=True) == [0], back.logs()
    same_run(one, back, range(4, 7))
    done = verb("export", three)
    assert done.returncode == 0, done.stderr
    merged = load_trained(one.run, None, quantized=False).model.merge_and_unload().state_dict()
    exported = load_file(three.run.export / "model.safetensors")
    assert exported.keys() == merged.keys()
    assert all(torch.allclose(exported[name], merged[name], atol=1e-5) for name in merged)


def test_full_training_learns_what_one_rank_learns_and_is_saved_in_files_that_transformers_reads(
    job: Job, tmp_path: Path
) -> None:
    settings = (*EVEN, "adapter.type=full", "train.lr=1e-3", "train.max_grad_norm=0.5", "train.max_steps=3")
    one = Job(job.server, job.recipe, tmp_path / "one")
    assert one.start(*settings, "hardware=1xcpu") == [0], one.logs()
    assert job.start(*settings, *PIPELINED) == [0, 0], job.logs()
    same_run(one, job, range(1, 4))
    saved = job.run.checkpoints / "step-3"
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in saved.glob("model-*.safetensors")}
    assert len(set(index["weight_map"].values())) == 2, "one of each stage"


@pytest.mark.parametrize("more", [("adapter.r=3",), ("adapter.type=full", "strategy.pipeline=gpipe")], ids=str)
def test_going_on_is_exact_to_the_last_bit(job: Job, tmp_path: Path, more: tuple[str, ...]) -> None:
    goes_on_to_the_last_bit(job, tmp_path / "whole", PIPELINED, (*more, "train.micro_batch=2"))
