"""A plan that does not fit in, the error with changes that make it fit out, each of which was itself planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from launcher.cluster import GIB, named
from launcher.errors import DoesNotFitError, RecipeError, counted
from launcher.plan.changes import AUTO_PLACEMENT, COARSER, OTHER, SAME, Change, ladders
from launcher.plan.deciding import Deciding
from launcher.plan.host import fits_host, host_memory
from launcher.plan.model import Plan, budget_bytes, lacking_bytes
from launcher.plan.searching import Option, Question
from launcher.plan.spreading import needs
from launcher.recipe.rules import broken_rules

_MOST = 6  # as many as are read
_SAME_TIME = 0.02


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
    fits = [_line(remedy, width, plan) for remedy in remedies]
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
        price: SAME, COARSER or OTHER (`launcher.plan.changes`).
        host_bytes: what is offloaded to the memory of each host.
    """

    override: str
    price: int
    memory_bytes: int
    step_s: float
    host_bytes: int


def _remedies(plan: Plan) -> list[Remedy]:
    """Changes that make the plan fit, cheapest first, each of them planned.

    Pairs of them where no single one does, or none that leaves what is learned as it is: two such changes come before one that does not.
    What takes host memory is not enough where nobody knows how much there is.
    """
    known, has_room = ladders(plan), all(node.memory_bytes for node in plan.cluster.nodes)
    alone = [_mildest(plan, [(change,) for change in ladder]) for ladder in known]
    found = [remedy for remedy in alone if remedy]
    useless = [
        ladder for ladder, remedy in zip(known, alone, strict=True) if not remedy
    ]  # by itself; what helps alone needs no other
    for price in (SAME, COARSER, OTHER):
        if any(remedy.price <= price and (has_room or not remedy.host_bytes) for remedy in found):
            break
        for one, other in combinations(useless, 2):
            if one[-1].keys & other[-1].keys or max(one[0].price, other[0].price) != price:
                continue
            remedy = _mildest(plan, [(first, second) for first in one for second in other])
            found += [remedy] if remedy else []
    cheapest = sorted(found, key=lambda remedy: (remedy.price, remedy.step_s))
    different = {(remedy.memory_bytes, remedy.step_s): remedy for remedy in reversed(cheapest)}
    return sorted(different.values(), key=lambda remedy: (remedy.price, remedy.step_s))[:_MOST]


def _mildest(plan: Plan, choices: Sequence[Sequence[Change]]) -> Remedy | None:
    """The first of these choices that fits; none of them where the last, which needs least, does not."""
    least = _tried(plan, choices[-1])
    if least is None:
        return None
    return next((remedy for changes in choices[:-1] if (remedy := _tried(plan, changes))), least)


def _tried(plan: Plan, changes: Sequence[Change]) -> Remedy | None:
    """The plan with these changes, if it may be asked for and fits."""
    changed, device_map = plan.recipe, plan.device_map
    for change in changes:
        changed = change.made(changed)
    if AUTO_PLACEMENT in changes and device_map is not None:
        device_map = device_map.model_copy(update={"placement": "auto"})
    if broken_rules(changed):
        return None
    try:
        other = Deciding(changed, plan.cluster, plan.shape, device_map).plan(plan.name)
    except RecipeError:
        return None
    if lacking_bytes(other) > 0 or not fits_host(other):
        return None
    return Remedy(
        override=" ".join(change.typed for change in changes),
        price=max(change.price for change in changes),
        memory_bytes=other.memory.total_bytes,
        step_s=other.time.total_s,
        host_bytes=host_memory(other).offloaded_bytes,
    )


def _line(remedy: Remedy, width: int, plan: Plan) -> str:
    """A remedy as it is read: what to type, memory of the fullest device, time, and what it takes of each host."""
    typed = f"    {remedy.override:<{width}} {remedy.memory_bytes / GIB:6.1f} GiB   "
    host = f"   {remedy.host_bytes / GIB:,.1f} GiB of host memory" if remedy.host_bytes else ""
    return f"{typed}{_times(remedy.step_s / plan.time.total_s)}{host}".rstrip()


def _times(ratio: float) -> str:
    """`1.29 × the time`; small differences are below what an estimate can tell. Nothing of a placement that is none."""
    if ratio == 0:
        return ""
    return "same time" if abs(ratio - 1) < _SAME_TIME else f"{ratio:.2f} × the time"
