"""In: `hardware:` of a recipe (`8xA800-80GB`, `2xcpu`, a list of cards, `auto`), nvidia-smi, /proc, a hostfile. Out: a `Cluster`.

`model` is what a cluster is, `cards` what a card can do (gpus.yaml), `machine` what is here, `nvidia` its cards, `hardware` what a
recipe names, `of_map` what a device map names, `hostfile` the nodes of several machines, `slurm` those of a job.
"""

from __future__ import annotations

from launcher.cluster.cards import Card, card, card_names, card_of, same_card
from launcher.cluster.hardware import found_on_this_machine, on_this_machine, resolve_cluster, this_machine
from launcher.cluster.machine import (
    available_memory_bytes,
    host_memory_bytes,
    is_here,
    oom_kills,
    process_limit,
    usable_cores,
)
from launcher.cluster.model import GIB, MIB, Cluster, Device, Node, named
from launcher.cluster.nvidia import driver_version, nvidia_on_the_bus
from launcher.cluster.of_map import cluster_of_map
from launcher.cluster.slurm import nodes_of_job

__all__ = [
    "GIB",
    "MIB",
    "Card",
    "Cluster",
    "Device",
    "Node",
    "available_memory_bytes",
    "card",
    "card_names",
    "card_of",
    "cluster_of_map",
    "driver_version",
    "found_on_this_machine",
    "host_memory_bytes",
    "is_here",
    "named",
    "nodes_of_job",
    "nvidia_on_the_bus",
    "on_this_machine",
    "oom_kills",
    "process_limit",
    "resolve_cluster",
    "same_card",
    "this_machine",
    "usable_cores",
]
