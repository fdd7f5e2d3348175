"""What checkpoint.init_from names: a checkpoint that is there, and holds what the recipe trains."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.errors import LaunchError
from launcher.manifest import folders
from launcher.modelshape import shape_of
from launcher.plan import Plan
from launcher.preflight.finding import Finding
from launcher.recipe.schema import Model
from launcher.rundir import RunDir, read_json

_ALL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def beginning(plan: Plan, run_dir: Path) -> Iterator[Finding]:
    """Whether the run can begin with it; nothing where the run has checkpoints of its own to go on from."""
    named = plan.recipe.checkpoint.init_from
    if named is None or folders(RunDir(run_dir)):
        return
    what, folder = f"checkpoint.init_from: {named}", Path(named)
    if not os.path.isdir(folder):
        inside = "give a folder that holds model*.safetensors or adapter_model.safetensors: checkpoint.init_from=DIR"
        yield Finding("error", what, "there is no such folder", inside)
        return
    problems = list(_all_weights(plan, folder) if plan.recipe.adapter.type == "full" else _adapter(plan, folder))
    for found, to_type in problems:
        yield Finding("error", what, found, to_type)
    if not problems:
        yield Finding("ok", what, "is there, and holds what is trained")


def _all_weights(plan: Plan, folder: Path) -> Iterator[tuple[str, str]]:
    """What stands against beginning with all weights of a folder, and what to type."""
    if not any(next(folder.glob(pattern), None) for pattern in _ALL_WEIGHTS):
        adapter = any((folder / name).is_file() for name in _ADAPTERS)
        yield (
            ("holds an adapter, the recipe trains all weights", "adapter.type=lora, or a checkpoint of full training")
            if adapter
            else ("holds no weights", "give a folder that holds model*.safetensors: checkpoint.init_from=DIR")
        )
        return
    try:
        there = shape_of(Model(path=str(folder)), folder)
    except LaunchError as error:
        yield error.found, error.to_type
        return
    if there.num_parameters != plan.shape.num_parameters:
        found = f"has {there.num_parameters:,} parameters, {plan.shape.name} has {plan.shape.num_parameters:,}"
        yield found, "give a checkpoint of this model, or train that one: model.path=DIR"


def _adapter(plan: Plan, folder: Path) -> Iterator[tuple[str, str]]:
    """What stands against beginning with the adapter of a folder, and what to type."""
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict) or not any((folder / name).is_file() for name in _ADAPTERS):
        holds = "holds no adapter (adapter_config.json and adapter_model.safetensors)"
        yield holds, "give the folder of one: checkpoint.init_from=DIR, or train all weights: adapter.type=full"
        return
    if not (folder / _ADAPTERS[0]).is_file() and plan.strategy in ("fsdp", "zero3", "device_map"):
        yield f"holds {_ADAPTERS[1]}, which cannot be read by shard", "strategy.type=ddp for once, and go on from there"
    for key, theirs, ours, to_type in _differences(plan, config):
        yield f"has {key} {_shown(theirs)}, the recipe {_shown(ours)}", to_type


def _differences(plan: Plan, config: dict[str, Any]) -> Iterator[tuple[str, Any, Any, str]]:
    """(PEFT's key, its value, the recipe's, what to type) of what has to be the same and is not."""
    adapter = plan.recipe.adapter
    flags = {"rslora": "use_rslora", "dora": "use_dora"}
    kind = next((name for name, flag in flags.items() if config.get(flag)), str(config.get("peft_type", "")).lower())
    if kind != adapter.type:
        yield "peft_type", kind, adapter.type, f"adapter.type={kind}"
        return
    if config.get("r") != adapter.r:
        yield "r", config.get("r"), adapter.r, f"adapter.r={config.get('r')}"
    if config.get("lora_alpha") != adapter.alpha:
        yield "lora_alpha", config.get("lora_alpha"), adapter.alpha, f"adapter.alpha={config.get('lora_alpha')}"
    for key, ours, name in (
        ("target_modules", plan.targets, "adapter.targets"),
        ("modules_to_save", adapter.modules_to_save, "adapter.modules_to_save"),
    ):
        theirs = config.get(key) or ()
        if isinstance(theirs, str) or isinstance(ours, str):
            continue  # a pattern, or all-linear: compared tensor by tensor when it is loaded
        if set(theirs) != set(ours):
            yield key, sorted(theirs), sorted(ours), f"{name}=[{', '.join(sorted(theirs))}]"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
