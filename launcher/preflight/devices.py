"""The cards that a plan is for against those that are here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.cluster import GIB, Cluster, Device, named, same_card, usable_cores
from launcher.errors import UsageError, counted
from launcher.plan import Plan
from launcher.preflight.finding import Finding
from launcher.recipe.device_maps import find_device_map

_OTHERWISE = "run on what is here: hardware=auto"
_END = "end what uses the card (nvidia-smi shows it)"


def devices(plan: Plan, found: Cluster) -> Iterator[Finding]:
    """Whether there are as many cards, with as much free memory, and the same ones."""
    if plan.kind == "cpu":
        yield Finding("ok", _source(plan.cluster), f"{plan.num_processes} ranks on {usable_cores()} cores")
    elif plan.stages:
        needs = [(stage.device, stage.memory_bytes) for stage in plan.stages]
        yield from placed_cards(plan.cluster, needs, found, rehearsal(plan))
    else:
        yield from _any_cards(plan, found)


def placed_cards(
    cluster: Cluster, needs: Sequence[tuple[int, int]], found: Cluster, otherwise: str
) -> Iterator[Finding]:
    """Whether the cards that layers were placed on are here: these very ones, with as much free memory.

    Args:
        needs: place in the cluster of each card that is used, and bytes planned on it.
        otherwise: what to type where they are not.
    """
    missing = _missing(cluster, found)
    if missing is not None:
        yield Finding("error", _source(cluster), missing, otherwise or _OTHERWISE)
        return
    by_uuid = {device.uuid: device for device in found.devices if device.uuid is not None}
    for place, needed in needs:
        wanted = cluster.devices[place]
        here = by_uuid.get(wanted.uuid or "", found.devices[place])
        if not same_card(wanted, here):
            another = f"{here.name} is here instead of {wanted.name}"
            yield Finding("error", _source(cluster), another, otherwise or _OTHERWISE)
        elif (text := _too_full(here, needed)) is not None:
            to_type = f"{_END}, or say in the device map what others hold of it: reserved=…MiB"
            yield Finding("error", _source(cluster), text, to_type)


def _any_cards(plan: Plan, found: Cluster) -> Iterator[Finding]:
    """Whether so many cards are here with as much free memory; another make is a warning."""
    missing, source = _missing(plan.cluster, found), _source(plan.cluster)
    if missing is not None:
        to_type = f"use what is here: hardware=auto, or add --nproc {found.num_devices}"
        yield Finding("error", source, missing, to_type if found.kind == "cuda" else _OTHERWISE)
        return
    for rank, (wanted, here) in enumerate(zip(plan.cluster.devices, found.devices, strict=False)):
        if (text := _too_full(here, plan.bytes_of(rank))) is not None:
            yield Finding("error", source, text, f"{_END}, or plan for it: hardware=auto")
        elif not same_card(wanted, here):
            another = f"{here.name} is here instead of {wanted.name}"
            yield Finding("warning", source, another, "plan for it: hardware=auto")


def _source(cluster: Cluster) -> str:
    """Where the cards of a plan come from, as a key."""
    return cluster.source if cluster.source.startswith("hardware:") else f"hardware: auto ({cluster.source})"


def _missing(cluster: Cluster, found: Cluster) -> str | None:
    """What there is instead of so many cards; None where there are enough."""
    if found.kind == "cpu":
        return "this machine has no GPU that nvidia-smi shows"
    if found.num_devices < cluster.num_devices:
        return f"{counted(cluster.num_devices, 'device')} planned, {found.num_devices} here ({named(found.devices)})"
    return None


def _too_full(here: Device, needed: int) -> str | None:
    """What is free on a card, where that is less than is planned on it."""
    free = here.memory_bytes - here.reserved_bytes
    if free >= needed:
        return None
    return f"{here.name} has {free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB are planned"


def rehearsal(plan: Plan) -> str:
    """How to run a plan for a device map without its cards; nothing for another plan."""
    named = plan.recipe.strategy.device_map
    if plan.device_map is None or named is None:
        return ""
    file = Path(named)
    try:
        name = file.stem if find_device_map(file.stem).resolve() == file.resolve() else named
    except UsageError:
        name = named
    own = plan.device_map.recipe is not None and Path(plan.device_map.recipe).stem == plan.name
    recipe = "" if own else "RECIPE "
    return f"rehearse it here, small and on the CPU: launch {recipe}--device-map {name} --rehearse"
