"""`train.compile`: layers that torch has compiled learn what the others do, in micro batches of every shape."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.worker.conftest import Job
from tests.worker.test_training import curve

needs_a_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_compiled_layers_learn_the_same(job: Job, tmp_path: Path, checkpointing: str) -> None:
    settings = (
        "adapter.dropout=0",
        "model.config.attention_dropout=0.0",
        "train.max_steps=5",
        "adapter.targets=[q_proj]",
    )
    settings += ("hardware=1xcpu", f"train.gradient_checkpointing={checkpointing}")
    assert job.start(*settings) == [0], job.logs()
    compiled = Job(job.server, job.recipe, tmp_path / "compiled")
    kernels = f"import os; os.environ['TORCHINDUCTOR_CACHE_DIR'] = {str(tmp_path / 'kernels')!r}"
    assert compiled.start(*settings, "train.compile=true", fault=kernels, struck=[0]) == [0], compiled.logs()
    assert curve(compiled) == pytest.approx(curve(job), abs=2e-5)
    assert list((tmp_path / "kernels").rglob("*.so")), "something was compiled"
