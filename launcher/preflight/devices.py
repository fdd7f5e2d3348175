"""The cards that a plan is for against those that are here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.cluster import GIB, Cluster, Device, same_card, usable_cores
from launcher.errors import UsageError
from launcher.plan import Plan
from launcher.preflight.finding import Finding
from launcher.recipe.device_maps import find_device_map


def devices(plan: Plan, found: Cluster) -> Iterator[Finding]:
    """Whether there are as many cards, with as much free memory, and the same ones."""
    source = plan.cluster.source
    planned = source if source.startswith("hardware:") else f"hardware: auto ({source})"
    if plan.kind == "cpu":
        yield Finding("ok", planned, f"{plan.num_processes} ranks on {usable_cores()} cores")
        return
    if found.kind == "cpu":
        text = "this machine has no GPU that nvidia-smi shows"
        yield Finding("error", planned, text, rehearsal(plan) or "run on what is here: hardware=auto")
        return
    if found.num_devices < plan.cluster.num_devices:
        text = f"{plan.cluster.num_devices} devices planned, {found.num_devices} here"
        text += f" ({', '.join(device.name for device in found.devices)})" if plan.device_map is not None else ""
        to_type = f"use what is here: hardware=auto, or add --nproc {found.num_devices}"
        yield Finding("error", planned, text, rehearsal(plan) or to_type)
        return
    for wanted, here, needed in _pairs(plan, found):
        free = here.memory_bytes - here.reserved_bytes
        if not same_card(wanted, here):
            text = f"{here.name} is here instead of {wanted.name}"
            # Layers are placed for these very cards.
            level, to_type = ("error", rehearsal(plan)) if plan.stages else ("warning", "")
            yield Finding(level, planned, text, to_type or "plan for it: hardware=auto")  # type: ignore[arg-type]
        elif free < needed:
            text = f"{here.name} has {free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB are planned"
            free_it = "end what uses the card (nvidia-smi shows it), or "
            to_type = "say in the device map what others hold of it: reserved=…MiB" if plan.stages else ""
            yield Finding("error", planned, text, free_it + (to_type or "plan for it: hardware=auto"))


def _pairs(plan: Plan, found: Cluster) -> Iterator[tuple[Device, Device, int]]:
    """Each card that is planned with, the one that is here for it, and the bytes planned on it."""
    by_uuid = {device.uuid: device for device in found.devices if device.uuid is not None}
    if not plan.stages:
        for wanted, here in zip(plan.cluster.devices, found.devices, strict=False):
            yield wanted, here, plan.memory.total_bytes
    for stage in plan.stages:
        wanted = plan.cluster.devices[stage.device]
        here = by_uuid.get(wanted.uuid or "", found.devices[stage.device])
        yield wanted, here, stage.memory_bytes


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
