"""FSDP2 on real gloo ranks: the same curve as one rank, checkpoints that go on to the last bit, and proof that it is sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedConfig

from launcher.errors import PreflightError
from launcher.worker import sharding, weights
from launcher.worker.checkpoint import Staging, files
from tests.worker.conftest import Job
from tests.worker.test_training import copy_until

SAME = ("adapter.dropout=0", "model.config.attention_dropout=0.0", "train.max_steps=4", "checkpoint.every_steps=2")
FSDP = ("strategy.type=fsdp", "hardware=2xcpu")
SHORT = ("train.max_steps=4", "checkpoint.every_steps=2", "train.eval_every_steps=2")


def learns_what_one_rank_learns(job: Job, folder: Path, how: tuple[str, ...], settings: tuple[str, ...]) -> None:
    """Compare losses and evaluations of a strategy with those of one rank."""
    one = Job(job.server, job.recipe, folder)
    assert one.start(*SAME, *settings, "hardware=1xcpu") == [0], one.logs()
    assert set(job.start(*SAME, *how, *settings)) == {0}, job.logs()
    assert list(job.losses().values()) == pytest.approx(list(one.losses().values()), abs=2e-5)
    evals = [[event["loss"] for event in each.events("eval")] for each in (job, one)]
    assert evals[0] == pytest.approx(evals[1], abs=2e-5)
    assert "each rank loads all of it" not in job.logs()
    name = "adapter_model.safetensors" if one.plan(*settings).targets else None
    first, second = (weights_of(each.run.checkpoints / "step-4", name) for each in (one, job))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)


def weights_of(folder: Path, name: str | None) -> dict[str, torch.Tensor]:
    """The adapter in a file, or all weights as transformers reads them."""
    if name is not None:
        return load_file(folder / name)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return dict(model.named_parameters())


def goes_on_to_the_last_bit(job: Job, folder: Path, how: tuple[str, ...], settings: tuple[str, ...]) -> None:
    """Compare a run that was cut off in the middle and resumed with one that was not: losses, and every file of weights and optimizer.

    One writes its checkpoints while training waits, the other in the background.
    """
    whole = Job(job.server, job.recipe, folder)
    assert set(whole.start(*SHORT, *settings, *how)) == {0}, whole.logs()
    copy_until(whole, job, 2)
    assert set(job.start(*SHORT, *settings, *how, "checkpoint.async=true", resume=True)) == {0}, job.logs()
    assert job.losses() == {step: whole.losses()[step] for step in (3, 4)}
    assert job.events("eval")[-1]["loss"] == whole.events("eval")[-1]["loss"]
    saved = whole.run.checkpoints / "step-4"
    files = [path.name for path in saved.glob("*.safetensors")]
    assert any(name.startswith(("model", "adapter_model")) for name in files)
    assert all((job.run.checkpoints / "step-4" / name).read_bytes() == (saved / name).read_bytes() for name in files)


@pytest.mark.parametrize(
    "settings",
    [
        # Three rows of an adapter over four ranks: the last one has none.
        (
            "adapter.r=3",
            "adapter.modules_to_save=[embed_tokens]",
            "train.gradient_checkpointing=true",
            "hardware=4xcpu",
        ),
        ("adapter.type=full", "model.config.tie_word_embeddings=true"),
    ],
    ids=lambda settings: settings[0],
)
def test_fsdp_learns_what_one_rank_learns(job: Job, tmp_path: Path, settings: tuple[str, ...]) -> None:
    learns_what_one_rank_learns(job, tmp_path / "one", FSDP, settings)


@pytest.mark.parametrize(
    "settings",
    [
        ("adapter.modules_to_save=[lm_head]",),
        # Several files, of weights whose rows are not as many on each rank.
        ("adapter.type=full", "checkpoint.max_shard_size=1MB", "model.config.intermediate_size=4097"),
    ],
    ids=lambda settings: settings[0],
)
def test_fsdp_goes_on_to_the_last_bit(job: Job, tmp_path: Path, settings: tuple[str, ...]) -> None:
    goes_on_to_the_last_bit(job, tmp_path / "whole", FSDP, settings)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_model_that_is_not_sharded_as_planned_is_found(job: Job) -> None:
    plan = job.plan("strategy.type=fsdp")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    with pytest.raises(PreflightError, match=r"0\.weight is whole on every rank"):
        sharding.prove(plan, model, model)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(PreflightError, match=r"0\.weight is spread over 1 of 2 ranks"):
        sharding.prove(plan, model, model)
    sharding.prove(plan.model_copy(update={"num_processes": 1}), model, model)
    with pytest.raises(PreflightError, match="copies that do not know of each other"):
        sharding.prove(job.plan("strategy.type=ddp"), model, model)


@pytest.mark.usefixtures("one_rank")
def test_who_cannot_write_goes_on_gathering(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def gathered(model: torch.nn.Module, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in model.named_parameters():
            taken.append(name)
            yield name, parameter.detach()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "gathered", gathered)
    monkeypatch.setattr(files, "write_tensors", full_disk)
    plan = job.plan("strategy.type=fsdp", "adapter.type=full", "checkpoint.max_shard_size=1MB")
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(3)))
    model.config = PreTrainedConfig()
    folder = Staging(tmp_path)
    weights.write_weights(folder, model, plan)
    assert str(folder.error) == "No space left on device"
    assert taken == [name for name, _ in model.named_parameters()], "the other ranks would wait for ever"
