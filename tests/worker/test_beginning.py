"""checkpoint.init_from: a run that begins with a checkpoint of ours, of transformers' Trainer, or of PEFT."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import PreflightError
from launcher.preflight.beginning import beginning
from launcher.worker.checkpoint.slices import Slices
from tests.worker.conftest import Job

# transformers alone: two steps on random tokens.
TRAINER = """
import sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
torch.manual_seed(0)
rows = [{"input_ids": (ids := torch.randint(3, 300, (12,))), "labels": ids} for _ in range(8)]
arguments = TrainingArguments(sys.argv[2], max_steps=2, per_device_train_batch_size=4, save_steps=2, use_cpu=True,
                              report_to="none", learning_rate=1e-3, weight_decay=0.1, disable_tqdm=True)
Trainer(AutoModelForCausalLM.from_pretrained(sys.argv[1]), arguments, train_dataset=rows).train()
"""
ONE_STEP = ("train.max_steps=1", "train.warmup=0", "adapter.dropout=0", "model.config.attention_dropout=0.0")
FULL = ("adapter.type=full", "train.lr=1e-3")


def begun(job: Job) -> str:
    (event,) = job.events("begun")
    return str(event["what"])


def evals(job: Job) -> list[float]:
    return [event["loss"] for event in job.events("eval")]


@pytest.fixture(scope="module")
def of_trainer(rank_server, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers' Trainer leaves of the model of the tiny recipe."""
    folder = tmp_path_factory.mktemp("trainer")
    job = Job(rank_server, tiny_recipe, folder / "run")
    job.prepare(*ONE_STEP, *FULL)
    model = json.loads(job.run.prepared.read_text())["model_dir"]
    subprocess.run([sys.executable, "-c", TRAINER, model, str(folder / "out")], check=True, capture_output=True)
    return folder / "out" / "checkpoint-2"


def test_weights_and_moments_of_transformers_trainer(job: Job, of_trainer: Path, tmp_path: Path) -> None:
    curves = []
    ways = ["single@1", "fsdp@2", *(["zero2@2", "zero3@2"] if importlib.util.find_spec("deepspeed") else [])]
    for way in ways:
        how = (f"strategy.type={way[:-2]}", f"hardware={way[-1]}xcpu")
        one = Job(job.server, job.recipe, tmp_path / way)
        assert set(one.start(*ONE_STEP, *FULL, *how, f"checkpoint.init_from={of_trainer}")) == {0}, one.logs()
        assert begun(one) == "weights and moments"
        state = Slices(one.run.checkpoints / "step-1")
        assert all(float(state.rest(name)["step"]) == 3 for name in state.shapes), "two of theirs, one of ours"
        curves.append([*one.losses().values(), *evals(one)])
    assert all(curve == pytest.approx(curves[0], abs=2e-5) for curve in curves)
    fresh = Job(job.server, job.recipe, tmp_path / "fresh")
    assert fresh.start(*ONE_STEP, *FULL, "hardware=1xcpu") == [0], fresh.logs()
    assert abs(evals(fresh)[0] - curves[0][1]) > 1e-3, "it did not begin with other weights"


def test_an_adapter_of_peft_and_a_checkpoint_of_ours(finished: Job, job: Job, tmp_path: Path) -> None:
    saved = finished.run.checkpoints / "step-8"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(saved / name, adapter / name)
    settings = ("train.max_steps=1", "train.eval_every_steps=1")
    found = []
    for folder, how, told in (
        (adapter, ("hardware=1xcpu",), "weights; the optimizer begins anew: it has no optimizer's state"),
        (saved, ("strategy.type=device_map", "strategy.schedule=pipelined"), "weights and moments"),
        (saved, ("strategy.type=fsdp",), "weights and moments"),
    ):
        one = Job(job.server, job.recipe, tmp_path / how[0])
        assert set(one.start(*settings, *how, f"checkpoint.init_from={folder}")) == {0}, one.logs()
        assert {event["what"] for event in one.events("begun")} == {told}
        assert evals(one)[0] == pytest.approx(evals(finished)[-1], abs=2e-5)
        found.append(Slices(one.run.checkpoints / "step-1"))
    steps = [{float(state.rest(name)["step"]) for name in state.shapes} for state in found]
    assert steps == [{1.0}, {9.0}, {9.0}]

    tensors = load_file(adapter / "adapter_model.safetensors")
    dropped = sorted(tensors)[0]
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != dropped}, adapter / "adapter_model.safetensors"
    )
    assert job.start(*settings, "hardware=1xcpu", f"checkpoint.init_from={adapter}") == [PreflightError.exit_code]
    assert f"lacks {dropped}" in job.logs()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    change(folder, peft_type="LORA", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=None)
    return folder


def change(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **values}))


@pytest.mark.parametrize(
    ("changed", "settings", "found", "to_type"),
    [
        ({"r": 16}, (), "has r 16, the recipe 4", "adapter.r=16"),
        ({"lora_alpha": 32}, (), "has lora_alpha 32, the recipe 8.0", "adapter.alpha=32"),
        ({"use_dora": True}, (), "has peft_type dora, the recipe lora", "adapter.type=dora"),
        (
            {"target_modules": ["o_proj"]},
            ("adapter.targets=[q_proj, v_proj]",),
            "has target_modules o_proj, the recipe q_proj, v_proj",
            "adapter.targets=[o_proj]",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            (),
            "has modules_to_save lm_head, the recipe none",
            "adapter.modules_to_save=[lm_head]",
        ),
        (
            {},
            FULL,
            "holds an adapter, the recipe trains all weights",
            "adapter.type=lora, or a checkpoint of full training",
        ),
    ],
)
def test_another_adapter_is_refused_before_anything_starts(
    job: Job, adapter: Path, changed: dict[str, Any], settings: tuple[str, ...], found: str, to_type: str
) -> None:
    plan = job.plan(*settings, f"checkpoint.init_from={adapter}")
    if not settings:
        assert [finding.level for finding in beginning(plan, job.folder)] == ["ok"]
    change(adapter, **changed)
    (finding,) = beginning(plan, job.folder)
    assert (finding.level, finding.found, finding.to_type) == ("error", found, to_type)
    (job.run.checkpoints / "step-4").mkdir(parents=True)
    assert not list(beginning(plan, job.folder)), "the run has one of its own to go on from"


def test_another_model_is_refused_before_anything_starts(job: Job, of_trainer: Path) -> None:
    plan = job.plan(*FULL, "model.config.num_hidden_layers=3", f"checkpoint.init_from={of_trainer}")
    (finding,) = beginning(plan, job.folder)
    assert finding.level == "error"
    assert finding.found == "has 41,120 parameters, llama has 51,424"
    (finding,) = beginning(job.plan(f"checkpoint.init_from={of_trainer}"), job.folder)
    assert finding.found.startswith("holds no adapter")
    (finding,) = beginning(job.plan("checkpoint.init_from=/no/such"), job.folder)
    assert finding.found == "there is no such folder"
