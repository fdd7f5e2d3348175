"""A plan that does not fit in, the error with changes that make it fit out, each of which was itself planned."""

from __future__ import annotations

from typing import Any

from launcher.errors import DoesNotFitError, RecipeError
from launcher.plan.deciding import GIB, Deciding
from launcher.plan.model import Plan, budget_bytes, lacking_bytes
from launcher.recipe.rules import broken_rules

_SHORTEST_ROW = 64  # nobody halves data.max_length below this to save memory


def does_not_fit(plan: Plan) -> DoesNotFitError:
    """The error with its remedies, each of which was planned and fits."""
    devices, free = plan.cluster.devices, budget_bytes(plan.strategy, plan.cluster) / GIB
    smallest = min(devices, key=lambda device: device.memory_bytes - device.reserved_bytes)
    where = f"a device with {free:.1f} GiB free ({smallest.name})"
    if plan.strategy == "device_map":
        where = f"{len(devices)} devices with {free:.1f} GiB free together ({' + '.join(d.name for d in devices)})"
    parts = plan.memory.parts()
    largest = max(parts, key=lambda part: parts[part])
    found = (
        f"{plan.memory.total_bytes / GIB:.1f} GiB needed on {where}; "
        f"largest part: {largest} {parts[largest] / GIB:.1f} GiB"
    )
    fits = [f"    {override:<44}{gib:6.1f} GiB" for override, gib in _remedies(plan)]
    to_type = (
        "\n".join(["fits, least change first:", *fits])
        if fits
        else "no single change makes it fit: use a smaller model or more memory"
    )
    return DoesNotFitError(f"{plan.name} on {plan.cluster.source}", found, to_type)


def _remedies(plan: Plan) -> list[tuple[str, float]]:
    """Overrides that make the plan fit, with the GiB they lead to."""
    recipe = plan.recipe
    candidates: list[tuple[str, str, dict[str, Any]]] = []
    if not plan.gradient_checkpointing:
        candidates.append(("train.gradient_checkpointing=true", "train", {"gradient_checkpointing": True}))
    if plan.micro_batch > 1:
        candidates.append(("train.micro_batch=1", "train", {"micro_batch": 1}))
    half = recipe.data.max_length // 2
    if half >= _SHORTEST_ROW:
        candidates.append((f"data.max_length={half}", "data", {"max_length": half}))
    if recipe.adapter.type == "full":
        candidates.append(("adapter.type=lora", "adapter", {"type": "lora"}))
    elif recipe.model.quantization == "none":
        candidates += [(f"model.quantization={q}", "model", {"quantization": q}) for q in ("int8", "nf4")]
    found = []
    for override, section, update in candidates:
        changed = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=update)})
        if broken_rules(changed):
            continue
        try:
            other = Deciding(changed, plan.cluster, plan.shape).plan(plan.name)
        except RecipeError:
            continue
        if lacking_bytes(other) <= 0:
            found.append((override, other.memory.total_bytes / GIB))
    return found
