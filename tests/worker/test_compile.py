"""`train.compile`: layers that torch has compiled learn what the others do, in micro batches of every shape. Asked for by `-m compiles`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launcher import supervise
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
        ("hardware=1xcpu", "model.quantization=int8"),
    ],
    ids=" ".join,
)
def test_compiled_layers_learn_the_same(job: Job, tmp_path: Path, how: tuple[str, ...]) -> None:
    if any("quantization" in text for text in how):
        pytest.importorskip("bitsandbytes", reason="quantised bases need the extra bitsandbytes")
    assert set(job.start(*COMMON, *how)) == {0}, job.logs()
    compiled = Job(job.server, job.recipe, tmp_path / "compiled")
    kernels = f"import os; os.environ['TORCHINDUCTOR_CACHE_DIR'] = {str(tmp_path / 'kernels')!r}"
    codes = compiled.start(*COMMON, *how, "train.compile=true", fault=kernels, struck=[0, 1])
    assert set(codes) == {0}, compiled.logs()
    assert curve(compiled) == pytest.approx(curve(job), abs=2e-5)
    assert list((tmp_path / "kernels").rglob("*.so")), "something was compiled"


@pytest.mark.compiles
def test_attempt_compiled_layers_over_nf4_after_an_evaluation(job: Job, tmp_path: Path) -> None:
    """Why the rule is there: an operator of bitsandbytes is refused, or no adapter gets a gradient. Should this learn one day, it goes."""
    pytest.importorskip("bitsandbytes", reason="quantised bases need the extra bitsandbytes")
    sizes = ("model.config.hidden_size=64", "model.config.intermediate_size=128")
    plan = job.prepare(*COMMON, *sizes, "hardware=1xcpu", "model.quantization=nf4")
    train = plan.recipe.train.model_copy(update={"compile": True})
    compiled = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"train": train})})
    supervise.write_run(compiled, job.run, True)
    kernels = f"import os; os.environ['TORCHINDUCTOR_CACHE_DIR'] = {str(tmp_path / 'kernels')!r}"
    assert job.ranks(compiled, fault=kernels, struck=[0]) == [1]
    assert "trainable tensors got no gradient" in job.logs() or "torch.library.opcheck" in job.logs()
