"""What a checkpoint of a plan is: how large, what has to be the same to continue it, and what may be other than before."""

from __future__ import annotations

from typing import Any

from launcher.cluster import MIB
from launcher.plan.model import DTYPE_BYTES, Decision, Plan

# Random states, the Trainer's counters, the tokenizer: 0.1 MiB a rank and as much as a tokenizer has.
_BESIDE_BYTES = 16 * MIB
_ADAM_8BIT_BYTES = 2.03  # as in memory.py: two bytes and the constants of their blocks
World = dict[str, Any]


def checkpoint_bytes(plan: Plan) -> int:
    """Bytes of one checkpoint: what is trained, and its optimizer's state.

    Adapters are fp32, under ZeRO in the plan's precision, and AdaLoRA's are written twice (`worker/checkpoint/`). AdamW keeps two values
    a parameter in the parameter's precision, ZeRO two in fp32 and an fp32 copy of weights in half precision.
    """
    full = plan.recipe.adapter.type == "full"
    is_zero = plan.strategy.startswith("zero")
    weights = DTYPE_BYTES[plan.weights_dtype] if full or is_zero else 4
    state = 2.0 * (4 if is_zero else weights) if plan.recipe.train.optimizer == "adamw" else _ADAM_8BIT_BYTES
    if is_zero and (weights < 4 or plan.recipe.train.optimizer != "adamw"):
        state += 4
    copies = 2 if plan.recipe.adapter.type == "adalora" else 1
    return round(plan.trainable_parameters * (copies * weights + state)) + _BESIDE_BYTES


def identity(plan: Plan) -> dict[str, Any]:
    """What has to be the same for a checkpoint to be continued: weights, optimizer state and order of rows depend on it."""
    recipe = plan.recipe
    return {
        "model.path": recipe.model.path,
        "model.config": recipe.model.config,
        "model.revision": recipe.model.revision,
        "model.quantization": recipe.model.quantization,
        "adapter.type": recipe.adapter.type,
        "adapter.r": recipe.adapter.r,
        "adapter.init_r": recipe.adapter.init_r,
        "adapter.alpha": recipe.adapter.alpha,
        "adapter.targets": plan.targets if isinstance(plan.targets, str) else list(plan.targets),
        "adapter.modules_to_save": list(recipe.adapter.modules_to_save),
        "data.batching": plan.batching,
        **({"data.shuffle_rows": recipe.data.shuffle_rows} if recipe.data.streaming else {}),
        "train.optimizer": recipe.train.optimizer,
        "train.seed": recipe.train.seed,
        "train.global_batch": recipe.train.global_batch,
        **({"model.code_sha256": plan.code.sha256} if plan.code is not None else {}),
    }


def other_world(plan: Plan, world: World) -> str | None:
    """Why a checkpoint of these ranks (`manifest.Manifest.world`) cannot be continued by the plan's; None where it can."""
    before, now = (world["strategy"], world["num_processes"]), (plan.strategy, plan.num_processes)
    partitions = before[0].startswith("zero") or now[0].startswith("zero")
    if before == now or plan.recipe.train.optimizer == "adamw" or not partitions:
        return None
    found = f"{plan.recipe.train.optimizer} under ZeRO keeps its moments in blocks that end where a rank's part ends, so only"
    return f"{found} {_ranks(*before)} can read what they wrote; now it is {_ranks(*now)}"


def what_changed(plan: Plan, world: World) -> Decision | None:
    """What is other than in a checkpoint of these ranks, and what is not; None where nothing is."""
    before, now = (world["strategy"], world["num_processes"]), (plan.strategy, plan.num_processes)
    sizes = {
        "micro batch": (world["micro_batch"], plan.micro_batch),
        "accumulation": (world["accumulation"], plan.accumulation),
    }
    if before == now and all(old == new for old, new in sizes.values()):
        return None
    if before[0] != now[0]:
        value = f"{_ranks(*now)}, was {_ranks(*before)}: "
    else:
        value = f"{_ranks('', now[1])}, was {before[1]}: " if before != now else ""
    value += ", ".join(f"{name} {old} → {new}" if old != new else f"{name} {new}" for name, (old, new) in sizes.items())
    because = f"the global batch of {plan.global_batch} and the order of rows stay"
    if before[1] != now[1]:
        because += "; dropout, where there is some, draws other numbers"
    return Decision(key="resume", value=value, because=because)


def _ranks(strategy: str, num: int) -> str:
    """`ddp on 2 ranks`."""
    ranks = f"{num} rank{'s' if num > 1 else ''}"
    return f"{strategy} on {ranks}" if strategy else ranks
