"""A plan that does not fit in, the error with changes that make it fit out, each of which was itself planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from launcher.cluster import GIB, named
from launcher.errors import DoesNotFitError, RecipeError, counted
from launcher.plan.deciding import Deciding
from launcher.plan.model import Plan, budget_bytes, lacking_bytes
from launcher.plan.searching import Option, Question
from launcher.plan.spreading import needs
from launcher.recipe.rules import broken_rules

_SHORTEST_ROW = 64  # nobody halves data.max_length below this to save memory
_MOST = 6  # as many as are read
_SAME = 0.02
_AUTO = "placement: auto in the device map"


def does_not_fit(plan: Plan) -> DoesNotFitError:
    """The error with its remedies, each of which was planned and fits."""
    ranges = plan.device_map.ranges() if plan.device_map is not None else None
    if ranges is not None:
        placed = ", ".join(f"{first}-{last}" for first, last in ranges)
        you_set, found = f"placement: [{placed}], {plan.name} on {plan.cluster.source}", _overfull(plan, ranges)
    else:
        you_set, found = f"{plan.name} on {plan.cluster.source}", _needed(plan)
    if plan.device_map is not None and plan.device_map.spill == "host":
        found += "; a layer that `spill: host` keeps in host memory gets no gradient, so it can chat and is not trained"
    remedies = _remedies(plan)
    width = max((len(remedy.override) for remedy in remedies), default=0)
    fits = [
        f"    {remedy.override:<{width}} {remedy.memory_bytes / GIB:6.1f} GiB   {_times(remedy.step_s / plan.time.total_s)}".rstrip()
        for remedy in remedies
    ]
    to_type = (
        "\n".join(["fits, cheapest first:", *fits])
        if fits
        else "no one or two changes make it fit: use a smaller model or more memory"
    )
    return DoesNotFitError(you_set, found, to_type)


def _needed(plan: Plan) -> str:
    """What is needed of what there is, and of what most."""
    devices, free = plan.cluster.devices, budget_bytes(plan.strategy, plan.cluster) / GIB
    tightest = devices[plan.tightest]
    room = (tightest.memory_bytes - tightest.reserved_bytes) / GIB
    where = f"a device with {room:.1f} GiB free ({tightest.name})"
    if plan.strategy == "device_map" and len(devices) > 1:
        where = f"{counted(len(devices), 'device')} with {free:.1f} GiB free together ({named(devices)})"
    parts = plan.memory.parts()
    largest = max(parts, key=lambda part: parts[part])
    return (
        f"{plan.memory.total_bytes / GIB:.1f} GiB needed on {where}; "
        f"largest part: {largest} {parts[largest] / GIB:.1f} GiB"
    )


def _overfull(plan: Plan, ranges: Sequence[tuple[int, int]]) -> str:
    """Which devices of a placement by hand are too full, at the least that it needs."""
    question = Question(
        plan.recipe, plan.cluster, plan.shape, plan.dtype, plan.batching, plan.trainable_parameters, plan.device_map
    )
    asked = plan.recipe.train.gradient_checkpointing
    option = Option(plan.strategy, None if asked == "auto" else asked, plan.micro_batch, plan.schedule)
    found = []
    each = needs(question.request(option), plan.cluster, plan.dtype, question.way(option), ranges)
    for (device, needed), (first, last) in zip(each, ranges, strict=True):
        free = device.memory_bytes - device.reserved_bytes
        if needed > free:
            layers = f"layers {first}–{last}" if last > first else f"layer {first}"
            found.append(f"{device.name} needs {needed / GIB:.1f} GiB for {layers} and has {free / GIB:.1f} GiB free")
    return "; ".join(found) or "a pipeline of so many stages lacks micro batches"


@dataclass(frozen=True)
class Remedy:
    """Overrides that make a plan fit, as they are typed, and what the changed plan costs.

    Args:
        price: 0 where the same is learned, 1 where numbers get coarser, 2 where something else is learned.
    """

    override: str
    price: int
    memory_bytes: int
    step_s: float


_Change = tuple[str, str, dict[str, Any]]  # as typed, section, update


def _remedies(plan: Plan) -> list[Remedy]:
    """Changes that make the plan fit, cheapest first; pairs of them where no single one does. Each was planned."""
    changes = _changes(plan)
    found = [remedy for change in changes if (remedy := _tried(plan, (change,)))]
    if not found:
        pairs = [pair for pair in combinations(changes, 2) if pair[0][0].split("=")[0] != pair[1][0].split("=")[0]]
        found = [remedy for pair in pairs if (remedy := _tried(plan, pair))]
    cheapest = sorted(found, key=lambda remedy: (remedy.price, remedy.step_s))
    different = {(remedy.memory_bytes, remedy.step_s): remedy for remedy in reversed(cheapest)}
    return sorted(different.values(), key=lambda remedy: (remedy.price, remedy.step_s))[:_MOST]


def _changes(plan: Plan) -> list[_Change]:
    """What a person could change, each as an override."""
    recipe = plan.recipe
    changes: list[_Change] = []
    if plan.device_map is not None and plan.device_map.ranges() is not None:
        changes.append((_AUTO, "", {}))
    if not plan.gradient_checkpointing:
        changes.append(("train.gradient_checkpointing=true", "train", {"gradient_checkpointing": True}))
    half, rows = plan.micro_batch // 2, plan.micro_batch * plan.accumulation
    while half >= 1:
        if rows % half == 0:
            changes.append((f"train.micro_batch={half}", "train", {"micro_batch": half}))
        half //= 2
    if plan.micro_batch > 1 and recipe.train.micro_batch != "auto":
        changes.append(("train.micro_batch=auto", "train", {"micro_batch": "auto"}))
    length = recipe.data.max_length // 2
    if length >= _SHORTEST_ROW:
        changes.append((f"data.max_length={length}", "data", {"max_length": length}))
    if recipe.train.optimizer == "adamw" and not plan.strategy.startswith("zero"):
        changes.append(("train.optimizer=adamw_8bit", "train", {"optimizer": "adamw_8bit"}))
    if recipe.adapter.type == "full":
        changes.append(("adapter.type=lora", "adapter", {"type": "lora"}))
    elif recipe.model.quantization == "none":
        changes += [(f"model.quantization={q}", "model", {"quantization": q}) for q in ("int8", "nf4")]
    if plan.cluster.num_devices > 1 and plan.strategy != "device_map" and recipe.model.quantization == "none":
        names = [name for name in ("fsdp", "zero2", "zero3") if name != plan.strategy]
        changes += [(f"strategy.type={name}", "strategy", {"type": name}) for name in names]
    if plan.strategy.startswith("zero") and recipe.strategy.offload == "none":
        changes += [(f"strategy.offload={what}", "strategy", {"offload": what}) for what in ("optimizer", "parameters")]
    return changes


def _tried(plan: Plan, changes: Sequence[_Change]) -> Remedy | None:
    """The plan with these changes, if it may be asked for and fits."""
    changed, device_map = plan.recipe, plan.device_map
    for typed, section, update in changes:
        if typed == _AUTO and device_map is not None:
            device_map = device_map.model_copy(update={"placement": "auto"})
            continue
        changed = changed.model_copy(update={section: getattr(changed, section).model_copy(update=update)})
    if broken_rules(changed):
        return None
    try:
        other = Deciding(changed, plan.cluster, plan.shape, device_map).plan(plan.name)
    except RecipeError:
        return None
    if lacking_bytes(other) > 0:
        return None
    override = " ".join(typed for typed, _, _ in changes)
    return Remedy(override, max(_price(typed) for typed, _, _ in changes), other.memory.total_bytes, other.time.total_s)


def _price(typed: str) -> int:
    key = typed.partition("=")[0]
    return {"model.quantization": 1, "train.optimizer": 1, "data.max_length": 2, "adapter.type": 2}.get(key, 0)


def _times(ratio: float) -> str:
    """`1.29 × the time`; small differences are below what an estimate can tell. Nothing of a placement that is none."""
    if ratio == 0:
        return ""
    return "same time" if abs(ratio - 1) < _SAME else f"{ratio:.2f} × the time"
