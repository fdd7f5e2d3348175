"""Export of what is not the quickstart's plain LoRA: ranks that were taken away, a quantised base, full weights in shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.errors import PreflightError
from launcher.worker.checkpoint import Staging
from launcher.worker.streaming import require_same, restream
from tests.worker.conftest import Job


def verb(name: str, job: Job, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", name, str(job.folder), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_adalora_is_merged_and_talks(job: Job) -> None:
    settings = ("adapter.type=adalora", "adapter.r=2", "adapter.init_r=6", "train.max_steps=8", "hardware=1xcpu")
    assert job.start(*settings) == [0], job.logs()
    done = verb("export", job)
    assert done.returncode == 0, done.stderr
    assert "same logits" in done.stdout
    assert "Warning" not in done.stderr
    told = verb("chat", job, "--prompt", "Add 2 and 3", "--max-new-tokens", "4")
    assert told.returncode == 0, told.stderr


def test_a_quantised_run_is_merged_into_full_precision(job: Job) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised bases need the extra bitsandbytes")
    sizes = ("model.config.hidden_size=64", "model.config.intermediate_size=128")
    assert job.start("model.quantization=nf4", *sizes, "train.max_steps=4", "hardware=1xcpu") == [0], job.logs()
    done = verb("export", job)
    assert done.returncode == 0, done.stderr
    config = json.loads((job.run.export / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"


@pytest.mark.parametrize("how", [pytest.param("single", marks=pytest.mark.slow), "fsdp"])
def test_full_weights_come_in_shards_of_the_size_that_was_asked(job: Job, how: str) -> None:
    sizes = ("model.config.hidden_size=128", "model.config.vocab_size=2048")  # embedding and head: a MiB each
    settings = (
        "adapter.type=full",
        "train.lr=1e-3",
        "train.max_steps=2",
        f"strategy.type={how}",
        f"hardware={1 if how == 'single' else 2}xcpu",
        "checkpoint.max_shard_size=2MB",
    )
    assert set(job.start(*sizes, *settings)) == {0}, job.logs()
    done = verb("export", job, "--step", "2", "--max-shard-size", "1MB")
    assert done.returncode == 0, done.stderr
    assert "every tensor is the checkpoint's" in done.stdout
    saved = job.run.checkpoints / "step-2"
    assert len(list(job.run.export.glob("model-*.safetensors"))) > len(list(saved.glob("model-*.safetensors"))) > 1
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (job.run.export, saved)]
    one, other = (dict(model.named_parameters()) for model in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    told = verb("chat", job, "--prompt", "Add 2 and 3", "--max-new-tokens", "4")
    assert told.returncode == 0, told.stderr


def test_streaming_takes_the_memory_of_a_few_tensors(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for part in range(4):  # 256 MiB in tensors of 8
        tensors = {f"layer.{part}.{place}": torch.full((2**21,), float(place)) for place in range(8)}
        Staging(source).tensors(f"model-{part}.safetensors", tensors)
    del tensors
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mib()
    assert restream(source, target, "50MB") == 256 * 2**20
    require_same(source, target)
    assert peak_mib() - before < 64
    assert len(list(target.glob("model-*-of-00007.safetensors"))) == 7
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["layer.3.7"] == "model-00007-of-00007.safetensors"

    with (target / "model-00003-of-00007.safetensors").open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"!")
    with pytest.raises(PreflightError, match="is not what the checkpoint has"):
        require_same(source, target)


def peak_mib() -> float:
    """The most memory that this process has had since it was last asked to forget it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
