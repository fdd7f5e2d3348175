"""What a cluster is: plain values, frozen, JSON both ways."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

MIB = 2**20
GIB = 2**30


class Frozen(BaseModel):
    """Base of what is read once and never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Device(Frozen):
    """One card or one CPU rank.

    `index` counts the devices that a process sees (after CUDA_VISIBLE_DEVICES); `uuid` is the card's own, None in a
    profile. `memory_bytes` is the whole, `reserved_bytes` what others already hold of it (a display, another job).
    `cores`: of this host for each CPU rank, 0 for a card.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int
    reserved_bytes: int = 0
    bf16: bool
    index: int
    cores: int = 0
    uuid: str | None = None


class Node(Frozen):
    """One host and its devices, in the order of their local ranks; `where` is its file:line in a hostfile, empty without one."""

    host: str
    devices: tuple[Device, ...]
    where: str = ""


class Cluster(Frozen):
    """All nodes of a run; `source` says in words where the knowledge comes from."""

    nodes: tuple[Node, ...]
    source: str

    @property
    def num_nodes(self) -> int:
        """Number of hosts."""
        return len(self.nodes)

    @property
    def num_devices(self) -> int:
        """Number of devices over all hosts."""
        return sum(len(node.devices) for node in self.nodes)

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices, node by node."""
        return tuple(device for node in self.nodes for device in node.devices)

    def has_flash(self, dtype: str) -> bool:
        """Whether torch's flash attention runs in `dtype` on all devices: on a CPU in any, on cards in half precision from compute
        capability 8.0 on, which are those that have bf16."""
        return self.kind == "cpu" or (dtype != "fp32" and all(device.bf16 for device in self.devices))

    def ranks_of(self, node: int) -> range:
        """The ranks of one of several nodes, on which each device has one."""
        first = sum(len(each.devices) for each in self.nodes[:node])
        return range(first, first + len(self.nodes[node].devices))

    @property
    def named(self) -> str:
        """Its devices, and its hosts where there are several: `16 × A800-80GB on 2 hosts`."""
        hosts = f" on {self.num_nodes:,} hosts" if self.num_nodes > 1 else ""
        return f"{named(self.devices)}{hosts}"

    @property
    def kind(self) -> Literal["cuda", "cpu"]:
        """What computes: a cluster never mixes cards and CPU ranks."""
        return self.devices[0].kind


def named(devices: Iterable[Device]) -> str:
    """Devices in words, those of one name counted: `8 × A800-80GB`, `RTX 3060 Ti + 2 × RTX 3060 12GB`."""
    counts = Counter(device.name for device in devices)
    return " + ".join(name if num == 1 < len(counts) else f"{num:,} × {name}" for name, num in counts.items())
