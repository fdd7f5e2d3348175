"""Export of what is not the quickstart's plain LoRA: ranks that were taken away, a quantised base, full weights in shards."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.worker.conftest import Job


def verb(name: str, job: Job, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", name, str(job.folder), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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


def test_full_weights_come_in_shards_of_the_size_that_was_asked(job: Job) -> None:
    sizes = ("model.config.hidden_size=128", "model.config.vocab_size=2048")  # embedding and head: a MiB each
    settings = (
        "adapter.type=full",
        "train.lr=1e-3",
        "train.max_steps=2",
        "hardware=1xcpu",
        "checkpoint.max_shard_size=1MB",
    )
    assert job.start(*sizes, *settings) == [0], job.logs()
    done = verb("export", job, "--step", "2")
    assert done.returncode == 0, done.stderr
    for folder in (job.run.export, job.run.checkpoints / "step-2"):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert len(files) >= 3
        assert all((folder / name).is_file() for name in files)
