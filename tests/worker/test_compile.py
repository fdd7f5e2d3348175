"""`train.compile`: layers that torch has compiled learn what the others do, in micro batches of every shape. Asked for by `-m compiles`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.worker.conftest import Job
from tests.worker.test_training import curve

COMMON = ("adapter.dropout=0", "model.config.attention_dropout=0.0", "train.max_steps=5", "adapter.targets=[q_proj]")


@pytest.mark.compiles
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize(
    "how",
    [
        ("hardware=1xcpu", "train.gradient_checkpointing=false"),
        ("hardware=1xcpu", "train.gradient_checkpointing=true"),
        ("hardware=2xcpu", "strategy.type=ddp", "data.batching=packed"),
        ("hardware=2xcpu", "strategy.type=fsdp", "adapter.type=full"),
    ],
    ids=" ".join,
)
def test_compiled_layers_learn_the_same(job: Job, tmp_path: Path, how: tuple[str, ...]) -> None:
    assert set(job.start(*COMMON, *how)) == {0}, job.logs()
    compiled = Job(job.server, job.recipe, tmp_path / "compiled")
    kernels = f"import os; os.environ['TORCHINDUCTOR_CACHE_DIR'] = {str(tmp_path / 'kernels')!r}"
    codes = compiled.start(*COMMON, *how, "train.compile=true", fault=kernels, struck=[0, 1])
    assert set(codes) == {0}, compiled.logs()
    assert curve(compiled) == pytest.approx(curve(job), abs=2e-5)
    assert list((tmp_path / "kernels").rglob("*.so")), "something was compiled"
