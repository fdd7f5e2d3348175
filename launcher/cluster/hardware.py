"""`hardware:` of a recipe in, a `Cluster` out: `8xA800-80GB`, `2xcpu`, a list of cards, or `auto` for what is here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from launcher.cluster.cards import matching, same_card, split_name, unknown_card
from launcher.cluster.hostfile import Slots, choose, read_hostfile
from launcher.cluster.machine import cpu_cluster, nvidia_devices, usable_cores
from launcher.cluster.model import GIB, MIB, Cluster, Device, Node
from launcher.errors import UsageError

_UNIT_BYTES = {"mib": MIB, "gib": GIB, "mb": 10**6, "gb": 10**9}


def resolve_cluster(
    hardware: str | tuple[str, ...],
    nproc: int | None = None,
    hostfile: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
) -> Cluster:
    """The cluster that `hardware:` names, cut to `nproc` processes (on a CPU: made of `nproc` ranks).

    With a hostfile `hardware` is what each of its hosts has, of which it gives so many slots.

    Args:
        include, exclude: which hosts and slots of the hostfile, in DeepSpeed's words (`launcher.cluster.hostfile`).

    Raises:
        UsageError: an unknown card, an unreadable item, or more processes than devices.
        RecipeError: mistakes in the hostfile.
    """
    if hostfile is not None:
        if nproc is not None:
            to_type = "leave --nproc out, or take some of them: --include node-a:0,1"
            raise UsageError(f"--nproc {nproc}", "the hostfile says how many each host has", to_type)
        return _on_hosts(resolve_cluster(hardware), choose(read_hostfile(hostfile), include, exclude), hostfile)
    if include is not None or exclude is not None:
        flag = "--include" if include is not None else "--exclude"
        raise UsageError(f"{flag} {include or exclude}", "there is no hostfile to choose from", "add --hostfile FILE")
    if hardware == "auto":
        return this_machine(nproc)
    items = (hardware,) if isinstance(hardware, str) else hardware
    shown = hardware if isinstance(hardware, str) else "[" + ", ".join(hardware) + "]"
    parts = [_parse_item(item, f"hardware: {shown}") for item in items]
    if not parts:
        raise UsageError(
            "hardware: []", "the list is empty", "name a card, such as `hardware: [RTX 3090]`, or `hardware: auto`"
        )
    kinds = {device.kind for _, device in parts}
    if len(kinds) > 1:
        raise UsageError(
            f"hardware: {shown}", "cards and CPU ranks in one cluster", "name cards only, or `hardware: 2xcpu`"
        )
    if kinds == {"cpu"}:
        return cpu_cluster(nproc or sum(num for num, _ in parts), f"hardware: {shown}")
    devices = [device for num, device in parts for _ in range(num)]
    return _cut(devices, nproc, f"hardware: {shown}")


def _on_hosts(each: Cluster, hosts: Sequence[Slots], hostfile: str) -> Cluster:
    """A node for each host, with those of these devices that its slots take."""
    devices = [device.model_copy(update={"uuid": None}) for device in each.devices]  # each host has its own cards
    for slots in hosts:
        if slots.num > len(devices):
            found = f"{slots.host} has {slots.num} slots, {each.source} has {len(devices)} devices"
            raise UsageError(slots.where, found, f"write {slots.host} slots={len(devices)}, or name other hardware")
    nodes = [
        Node(host=slots.host, devices=tuple(devices[number] for number in slots.used), where=slots.where)
        for slots in hosts
    ]
    return Cluster(nodes=tuple(nodes), source=f"{each.source}, on the hosts of {hostfile}")


def this_machine(nproc: int | None = None) -> Cluster:
    """The cards of this machine, else its CPU: `nproc` ranks, by default two where there are two usable cores.

    Raises:
        UsageError: more processes than cards.
    """
    devices, remark = nvidia_devices()
    if devices:
        return _cut(devices, nproc, remark)
    return cpu_cluster(nproc or min(2, usable_cores()), f"this machine's CPU ({remark})")


def found_on_this_machine() -> Cluster:
    """What is really here, whatever the recipe names; for preflight."""
    return this_machine(None)


def on_this_machine(cluster: Cluster) -> Cluster:
    """The same cluster, its cards known by their uuid where all of them are here: nvidia-smi may show them in another order."""
    here, uuids = list(found_on_this_machine().devices), {}
    # Of cards that are alike the one with most room is for whom most was planned.
    by_room = sorted(enumerate(cluster.devices), key=lambda numbered: numbered[1].reserved_bytes)
    for number, wanted in by_room:
        alike = [device for device in here if device.uuid is not None and same_card(device, wanted)]
        if not alike:
            return cluster
        found = min(alike, key=lambda device: device.reserved_bytes)
        here.remove(found)
        uuids[number] = found.uuid
    devices = [device.model_copy(update={"uuid": uuids[number]}) for number, device in enumerate(cluster.devices)]
    return cluster.model_copy(update={"nodes": (cluster.nodes[0].model_copy(update={"devices": tuple(devices)}),)})


def _cut(devices: Sequence[Device], nproc: int | None, source: str) -> Cluster:
    """One node with the first `nproc` of these devices, numbered from 0."""
    if nproc is not None and nproc > len(devices):
        cards_word = "card" if len(devices) == 1 else "cards"
        raise UsageError(
            f"--nproc {nproc}",
            f"{source} has {len(devices)} {cards_word}",
            f"--nproc {len(devices)}, or leave --nproc out",
        )
    kept = [device.model_copy(update={"index": index}) for index, device in enumerate(devices[:nproc])]
    return Cluster(nodes=(Node(host="localhost", devices=tuple(kept)),), source=source)


def _parse_item(item: str, you_set: str) -> tuple[int, Device]:
    """One item such as `8xA800-80GB` or `RTX 3060 Ti 8GiB reserved=921MiB`: how many, of what."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX×*]\s*)?(.*?)((?:\s+\w+=\S*)*)\s*", item)
    assert match is not None, "every group may be empty"
    num, name = int(match[1] or 1), match[2]
    if num < 1 or not name:
        raise UsageError(
            you_set, f"`{item}` names no device", "write it as `8xA800-80GB`, `RTX 3090`, `2xcpu` or `auto`"
        )
    reserved_bytes = _reserved_bytes(match[3].split(), you_set)
    if name.lower() == "cpu":
        return num, Device(name="cpu", kind="cpu", memory_bytes=0, bf16=True, index=0)
    model, memory_gib = split_name(name)
    known = matching(model, memory_gib)
    if known is None:
        raise unknown_card(name, model, you_set)
    return num, Device(
        name=known.name,
        kind="cuda",
        memory_bytes=round(known.memory_gib * GIB),
        reserved_bytes=reserved_bytes,
        bf16=known.bf16 is not None,
        index=0,
    )


def _reserved_bytes(options: Sequence[str], you_set: str) -> int:
    """`reserved=921MiB` in bytes; 0 when there is no option."""
    reserved_bytes = 0
    for option in options:
        match = re.fullmatch(r"reserved=(\d+(?:\.\d+)?)(MiB|GiB|MB|GB)", option, re.IGNORECASE)
        if match is None:
            raise UsageError(
                you_set, f"`{option}` is no option of a card", "the only option is such as `reserved=921MiB`"
            )
        reserved_bytes = round(float(match[1]) * _UNIT_BYTES[match[2].lower()])
    return reserved_bytes
