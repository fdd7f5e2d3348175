"""A plan in, out what its ranks take of a host's memory: to load the weights, for what is offloaded, for checkpoints under way."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from launcher.memory import CPU_CONTEXT_BYTES
from launcher.plan.continuing import checkpoint_bytes
from launcher.plan.deepspeed import swap_buffers_bytes
from launcher.plan.model import DTYPE_BYTES, Dtype, Plan

_STORED: dict[Dtype, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_HALF = 2  # bytes of a public weight that nobody has looked at yet
# ZeRO-Offload keeps of a trained parameter two moments, a copy of it and its gradient, all fp32; and its gradient as it came, or under
# ZeRO-2 the weight on its way back (DeepSpeed 0.19, stage3.py and stage_1_and_2.py).
_OFFLOADED_BYTES = 16


@dataclass(frozen=True)
class HostMemory:
    """Bytes on the host that has most ranks.

    Args:
        each_bytes: of every rank, when it takes most; `copied`: whether that is a copy of the weights while they are loaded.
        offloaded_bytes, checkpoint_bytes: of all ranks of the host together.
    """

    num_ranks: int
    each_bytes: int
    copied: bool
    offloaded_bytes: int
    checkpoint_bytes: int

    @property
    def total_bytes(self) -> int:
        """All ranks of the host."""
        return self.num_ranks * self.each_bytes + self.offloaded_bytes + self.checkpoint_bytes


def host_memory(plan: Plan, stored: Collection[str] = ()) -> HostMemory:
    """What the plan takes of a host.

    On a CPU that is the plan's own figure, offloaded or not. With cards a rank maps the weights from the file and shares them where they
    have the wanted precision (2 MiB of 223 were a process's own, transformers 5.23), else it has a copy of its own (446 of 446).

    Args:
        stored: precisions in the safetensors files (`F32`, …; `pickle` for other files); none where nobody has looked.
    """
    num_ranks = min(plan.num_processes, max(len(node.devices) for node in plan.cluster.nodes))
    here = num_ranks / plan.num_processes
    writing = checkpoint_bytes(plan) if plan.recipe.checkpoint.async_ else 0
    if plan.kind == "cpu":
        each = plan.memory.total_bytes // (num_ranks if plan.pipeline else 1)
        return HostMemory(num_ranks, each, False, round(here * swap_buffers_bytes(plan)), writing)
    copied = _copied(plan, stored)
    weights = plan.shape.num_parameters * DTYPE_BYTES[plan.weights_dtype]
    offload = plan.recipe.strategy.offload
    offloaded = 0 if offload == "none" else (_OFFLOADED_BYTES + DTYPE_BYTES[plan.dtype]) * plan.trainable_parameters
    offloaded += weights if offload == "parameters" else 0
    if plan.recipe.strategy.nvme_path is not None:
        offloaded = swap_buffers_bytes(plan)
    each = CPU_CONTEXT_BYTES + (weights if copied else 0)
    return HostMemory(num_ranks, each, copied, round(here * offloaded), writing)


def fits_host(plan: Plan) -> bool:
    """Whether its hosts have so much; where nobody knows what they have it is taken to be enough."""
    known = [node.memory_bytes for node in plan.cluster.nodes if node.memory_bytes]
    return not known or plan.kind == "cpu" or host_memory(plan).total_bytes <= min(known)


def _copied(plan: Plan, stored: Collection[str]) -> bool:
    """Whether each rank has a copy of all weights in host memory for a while.

    FSDP's and ZeRO-3's ranks read shares of single tensors (`worker/byshard.py`); quantised weights, and those of a device map, go to
    the card one by one. A model's own code, DoRA's norms and experts that are stored apart have it all at once.
    """
    whole = plan.shape.remote_code or "pickle" in stored
    merged = "mlp.experts" in plan.shape.modules
    if plan.pipeline is not None:
        return False
    if plan.strategy in ("fsdp", "zero3"):
        return whole or merged or plan.recipe.adapter.type == "dora"
    if plan.recipe.model.quantization != "none" or (plan.schedule == "naive" and not plan.shape.remote_code):
        return False
    if stored:
        return set(stored) != {_STORED[plan.weights_dtype]}
    read = plan.shape.stored_bytes / plan.shape.num_parameters or _HALF
    return merged or round(read) != DTYPE_BYTES[plan.weights_dtype]
