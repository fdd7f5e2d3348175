"""Every family with a class in transformers: PEFT trains what the plan counted, and two real steps of the product go through."""

from __future__ import annotations

import json
import math
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from launcher import supervise
from launcher.cluster import resolve_cluster
from launcher.families import family_of
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan
from launcher.recipe import load_recipe
from launcher.worker.adapters import peft_config
from launcher.worker.prepare import prepare
from launcher.worker.prepared import write_prepared
from tests.test_modelshape import CONFIGS, TINY, real_model
from tests.worker.conftest import Job

SMALL = {name: config for name, config in CONFIGS.items() if config.get("vocab_size") == TINY["vocab_size"]}
UNKNOWN = {
    "olmo2": {"model_type": "olmo2", **TINY},
    "gpt_neox": {"model_type": "gpt_neox", **{key: TINY[key] for key in TINY if key != "num_key_value_heads"}},
}
QUICK = ("mixtral", "falcon-rw", "gemma3_text", "olmo2")
EACH = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*SMALL, *UNKNOWN)
    if "as transformers says" not in name
]


def recipe_of(folder: Path, config: dict[str, Any], data: Path) -> Path:
    file = folder / "family.yaml"
    sections = {
        "model": {"config": config},
        "data": {"path": str(data), "max_length": 48},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.1},
        "train": {"max_steps": 2, "lr": 5e-3, "global_batch": 4, "micro_batch": 2, "log_every_steps": 1},
        "hardware": "1xcpu",
    }
    file.write_text(json.dumps(sections))
    return file


def plan_of(recipe: Path, *overrides: str) -> Plan:
    loaded = load_recipe(recipe, overrides)
    cluster = resolve_cluster(loaded.recipe.hardware)
    return make_plan("family", loaded.recipe, cluster, shape_of(loaded.recipe.model, recipe.parent))


def adapted(plan: Plan) -> dict[str, int]:
    """Names and sizes of what PEFT trains by the plan's own settings; the model is never in memory."""
    import peft
    import torch

    assert plan.recipe.model.config is not None
    model = real_model(plan.recipe.model.config)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # what PEFT thinks of tied heads does not change what it counts
        trained = peft.get_peft_model(model, peft_config(plan, 100))
    return {name: value.numel() for name, value in trained.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("name", [*SMALL, "olmo2"])
def test_the_plan_counts_what_peft_trains(tmp_path: Path, tiny_data: Path, name: str, targets: str) -> None:
    recipe = recipe_of(tmp_path, {**SMALL, **UNKNOWN}[name], tiny_data)
    plan = plan_of(recipe, f"adapter.targets={targets}")
    trained = adapted(plan)
    assert sum(trained.values()) == plan.trainable_parameters
    assert not [name for name in trained if "lm_head" in name or "embed" in name or "experts" in name]


@pytest.mark.parametrize("kind", ["dora", "adalora", "rslora"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_all_linear_means_the_same_in_a_mixture_whatever_the_adapter(
    tmp_path: Path, tiny_data: Path, name: str, kind: str
) -> None:
    """Left to PEFT it is attention, router and experts under LoRA, an error under DoRA or with dropout, attention in AdaLoRA."""
    plan = plan_of(recipe_of(tmp_path, SMALL[name], tiny_data), "adapter.targets=all-linear", f"adapter.type={kind}")
    assert plan.targets[:4] == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert "experts are stacked" in next(d.because for d in plan.decisions if d.key == "adapter.targets")
    assert sum(adapted(plan).values()) == plan.trainable_parameters


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_family_gets_every_linear_layer_but_the_head_and_is_told_so(
    tmp_path: Path, tiny_data: Path, name: str
) -> None:
    import torch

    assert family_of(UNKNOWN[name]).name == "unknown"
    plan = plan_of(recipe_of(tmp_path, UNKNOWN[name], tiny_data))
    assert plan.targets == "all-linear"
    assert f"{name} is no family known here" in next(d.because for d in plan.decisions if d.key == "adapter.targets")
    assert "as if it were a Llama" in plan.shape.source
    linears = {key for key, module in real_model(UNKNOWN[name]).named_modules() if isinstance(module, torch.nn.Linear)}
    pairs = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in adapted(plan)}
    assert pairs == linears - {"lm_head"}


@pytest.mark.parametrize("name", EACH)
def test_two_steps_train_a_family(
    rank_server: subprocess.Popen[str], tmp_path: Path, tiny_data: Path, name: str
) -> None:
    job = Job(rank_server, recipe_of(tmp_path, {**SMALL, **UNKNOWN}[name], tiny_data), tmp_path / "run")
    plan = plan_of(job.recipe)
    job.run.create()
    supervise.write_run(plan, job.run, resuming=False)
    write_prepared(job.run, prepare(plan, job.run))
    assert job.ranks(plan) == [0], job.logs()
    assert sorted(job.losses()) == [1, 2]
    assert all(math.isfinite(loss) for loss in job.losses().values())
    with safe_open(job.run.checkpoints / "step-2" / "adapter_model.safetensors", framework="pt") as file:
        sizes = {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
        moved = any(file.get_tensor(key).any() for key in sizes if "lora_B" in key)
    assert moved, "lora_B starts as zero and is still zero"
    if name != "gpt_neox":  # which is counted as if it were a Llama, and says so
        assert sum(sizes.values()) == plan.trainable_parameters
