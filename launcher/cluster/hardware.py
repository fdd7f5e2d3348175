"""`hardware:` of a recipe in, a `Cluster` out: `8xA800-80GB`, `2xcpu`, a list of cards, or `auto` for what is here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from launcher.cluster.cards import Card, matching, same_card, split_name, unknown_card
from launcher.cluster.hostfile import Slots, choose, read_hostfile
from launcher.cluster.machine import cpu_cluster, host_memory_bytes, usable_cores
from launcher.cluster.model import GIB, MIB, Cluster, Device, Node
from launcher.cluster.nvidia import nvidia_devices
from launcher.errors import UsageError, counted

_UNIT_BYTES = {"mib": MIB, "gib": GIB, "mb": 10**6, "gb": 10**9}
# Ten times more than any machine has; beyond it a mistyped number would fill the memory with devices.
_MOST_DEVICES = 1000


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
        UsageError: an unknown card, an unreadable item, more processes than devices, or more devices than a machine has.
        RecipeError: mistakes in the hostfile.
    """
    if nproc is not None:
        _possible(nproc, f"--nproc {nproc}")
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
    you_set = f"hardware: {hardware if isinstance(hardware, str) else '[' + ', '.join(hardware) + ']'}"
    parts = [_parse_item(item, you_set) for item in items]
    if not parts:
        raise UsageError(you_set, "the list is empty", "name a card in it, such as `[RTX 3090]`")
    kinds = {device.kind for _, device in parts}
    if len(kinds) > 1:
        raise UsageError(you_set, "cards and CPU ranks in one cluster", "name cards only, or CPU ranks only: `2xcpu`")
    num_devices = _possible(sum(num for num, _ in parts), you_set)
    if kinds == {"cpu"}:
        return cpu_cluster(nproc or num_devices, you_set)
    return _cut([device for num, device in parts for _ in range(num)], nproc, you_set)


def _on_hosts(each: Cluster, hosts: Sequence[Slots], hostfile: str) -> Cluster:
    """A node for each host, with those of these devices that its slots take."""
    devices = [device.model_copy(update={"uuid": None}) for device in each.devices]  # each host has its own cards
    for slots in hosts:
        if slots.num > len(devices):
            found = (
                f"{slots.host} has {counted(slots.num, 'slot')}, {each.source} has {counted(len(devices), 'device')}"
            )
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
        cluster = _cut(devices, nproc, remark)
        node = cluster.nodes[0].model_copy(update={"memory_bytes": host_memory_bytes()})
        return cluster.model_copy(update={"nodes": (node,)})
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
        raise UsageError(
            f"--nproc {nproc}",
            f"{source} has {counted(len(devices), 'card')}",
            f"--nproc {len(devices)}, or leave --nproc out",
        )
    kept = [device.model_copy(update={"index": index}) for index, device in enumerate(devices[:nproc])]
    return Cluster(nodes=(Node(host="localhost", devices=tuple(kept)),), source=source)


def _possible(num_devices: int, you_set: str) -> int:
    """The number of devices of a machine, unless no machine has so many."""
    if num_devices > _MOST_DEVICES:
        to_type = f"name what one machine has, {_MOST_DEVICES:,} at most; name several machines with --hostfile FILE"
        raise UsageError(you_set, "no machine has so many devices", to_type)
    return num_devices


def _parse_item(item: str, you_set: str) -> tuple[int, Device]:
    """One item such as `8xA800-80GB` or `RTX 3060 Ti 8GiB reserved=921MiB`: how many, of what."""
    match = re.fullmatch(r"\s*(?:([0-9]+)\s*[xX×*]\s*)?(.*?)((?:\s+\w+=\S*)*)\s*", item, re.DOTALL)
    assert match is not None, "every group may be empty"
    digits, name, options = (match[1] or "1").lstrip("0"), match[2], match[3].split()
    if not digits or not name:
        raise UsageError(you_set, f"`{item}` names no device", "write it as `8xA800-80GB`, `RTX 3090` or `2xcpu`")
    num = int(digits) if len(digits) < len(str(_MOST_DEVICES)) + 1 else _MOST_DEVICES + 1
    if name.lower() == "cpu":
        if options:
            found = f"`{options[0]}` says something of a card, and `cpu` is none"
            raise UsageError(you_set, found, f"write `{f'{num}x' if match[1] else ''}cpu`")
        return _possible(num, you_set), Device(name="cpu", kind="cpu", memory_bytes=0, bf16=True, index=0)
    model, memory_gib = split_name(name)
    known = matching(model, memory_gib)
    if known is None:
        raise unknown_card(name, you_set)
    return _possible(num, you_set), Device(
        name=known.name,
        kind="cuda",
        memory_bytes=round(known.memory_gib * GIB),
        reserved_bytes=_reserved_bytes(options, known, you_set),
        bf16=known.bf16 is not None,
        index=0,
    )


def _reserved_bytes(options: Sequence[str], of: Card, you_set: str) -> int:
    """`reserved=921MiB` in bytes; 0 when there is no option."""
    if not options:
        return 0
    such_as = f"write `{of.name} reserved=921MiB`"
    reserved = [re.fullmatch(r"reserved=([0-9]+(?:\.[0-9]+)?)(MiB|GiB|MB|GB)", text, re.IGNORECASE) for text in options]
    for text, match in zip(options, reserved, strict=True):
        if match is None:
            raise UsageError(
                you_set, f"`{text}` is no option of a card", f"the only one is what others hold: {such_as}"
            )
    if len(options) > 1:
        raise UsageError(you_set, f"`{' '.join(options)}` says twice what others hold of a card", such_as)
    assert reserved[0] is not None, "checked above"
    num_bytes = float(reserved[0][1]) * _UNIT_BYTES[reserved[0][2].lower()]
    if num_bytes >= of.memory_gib * GIB:
        raise UsageError(you_set, f"`{options[0]}` leaves nothing of the {of.memory_gib:g} GiB of a {of.name}", such_as)
    return round(num_bytes)
