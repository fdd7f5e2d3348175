"""In: `hardware:` of a recipe (`8xA800-80GB`, `2xcpu`, a list of cards, `auto`), nvidia-smi, /proc, a hostfile. Out: a `Cluster`.

`model` is what a cluster is, `cards` what a card can do (gpus.yaml), `machine` what is here, `hardware` what a recipe names,
`hostfile` the nodes of several machines.
"""

from __future__ import annotations

from launcher.cluster.cards import Card, card, card_names, card_of
from launcher.cluster.hardware import found_on_this_machine, resolve_cluster, this_machine
from launcher.cluster.machine import host_memory_bytes
from launcher.cluster.model import GIB, MIB, Cluster, Device, Node

__all__ = [
    "GIB",
    "MIB",
    "Card",
    "Cluster",
    "Device",
    "Node",
    "card",
    "card_names",
    "card_of",
    "found_on_this_machine",
    "host_memory_bytes",
    "resolve_cluster",
    "this_machine",
]
