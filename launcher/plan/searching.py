"""In: what a recipe leaves open of strategy, micro batch and gradient checkpointing. Out: the fastest way that fits, and the others.

Every combination is priced, memory and time, and nothing is tried on a device: the same recipe, hardware and version give the
same choice everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.cluster import Cluster, Device
from launcher.memory import Memory, MemoryRequest, estimate
from launcher.modelshape import ModelShape
from launcher.plan.model import Alternative, Dtype, budget_bytes
from launcher.recipe import Recipe
from launcher.steptime import StepTime, speed_of, step_time

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# What an automatic choice leaves free: the allocator's gaps, and the error of the estimate.
FREE_SHARE = 0.1
# Estimates of time are no better than this: among ways so close to the fastest the simplest is taken.
_AS_FAST = 1.03
# From plain to involved; the order in which equally fast strategies are preferred.
SIMPLEST_FIRST = ("single", "ddp", "device_map", "fsdp", "zero2", "zero1", "zero3")


@dataclass(frozen=True)
class Option:
    """One way to train."""

    strategy: str
    gradient_checkpointing: bool
    micro_batch: int


@dataclass(frozen=True)
class Candidate:
    """An option with what it costs."""

    option: Option
    memory: Memory
    time: StepTime
    fits: bool


@dataclass(frozen=True)
class Question:
    """All that does not depend on the option."""

    recipe: Recipe
    cluster: Cluster
    shape: ModelShape
    dtype: Dtype
    trained: int

    def num_processes(self, strategy: str) -> int:
        """Ranks that a strategy starts: a naive device map is one process over all devices."""
        naive = strategy == "device_map" and self.recipe.strategy.schedule == "naive"
        return 1 if naive else self.cluster.num_devices

    def num_replicas(self, strategy: str) -> int:
        """Ranks with rows of their own: a device map is one model, however many processes it takes."""
        return 1 if strategy == "device_map" else self.cluster.num_devices

    def weights_dtype(self, strategy: str) -> Dtype:
        """Precision in which the base lies in memory: alone in half precision, small updates of trained weights are lost."""
        # DeepSpeed keeps an fp32 copy of its own.
        if self.recipe.adapter.type != "full" or strategy.startswith("zero"):
            return self.dtype
        return "fp32"

    def price(self, option: Option) -> Candidate:
        """Memory and time of an option."""
        request = self._request(option)
        memory = estimate(request)
        num_replicas = self.num_replicas(option.strategy)
        accumulation = max(1, self.recipe.train.global_batch // (num_replicas * option.micro_batch))
        slowest = max(
            (
                step_time(request, speed_of(d, self.cluster, self.dtype), accumulation, num_replicas)
                for d in self._kinds()
            ),
            key=lambda time: time.total_s,
        )
        budget = budget_bytes(option.strategy, self.cluster)
        if self.recipe.train.micro_batch == "auto":
            budget = round(budget * (1 - FREE_SHARE))
        return Candidate(option, memory, slowest, memory.total_bytes <= budget)

    def _kinds(self) -> Sequence[Device]:
        """One device of each kind: a thousand hosts are mostly alike."""
        return list({device.name: device for device in self.cluster.devices}.values())

    def _request(self, option: Option) -> MemoryRequest:
        recipe = self.recipe
        return MemoryRequest(
            shape=self.shape,
            trainable_parameters=self.trained,
            full=recipe.adapter.type == "full",
            adapter=recipe.adapter,
            quantization=recipe.model.quantization,
            weights_dtype_bytes=BYTES[self.weights_dtype(option.strategy)],
            compute_dtype_bytes=BYTES[self.dtype],
            optimizer=recipe.train.optimizer,
            micro_batch=option.micro_batch,
            sequence_length=recipe.data.max_length,
            gradient_checkpointing=option.gradient_checkpointing,
            strategy=option.strategy,
            offload=recipe.strategy.offload,
            num_processes=self.cluster.num_devices,
            kind=self.cluster.kind,
        )


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the best of each other kind."""

    chosen: Candidate
    others: tuple[Candidate, ...]

    def alternatives(self) -> tuple[Alternative, ...]:
        """The chosen one and the others, as the plan keeps them."""
        return tuple(
            Alternative(
                strategy=candidate.option.strategy,
                gradient_checkpointing=candidate.option.gradient_checkpointing,
                micro_batch=candidate.option.micro_batch,
                step_s=candidate.time.total_s,
                memory_bytes=candidate.memory.total_bytes,
                fits=candidate.fits,
            )
            for candidate in (self.chosen, *self.others)
        )


def choose(question: Question, options: Sequence[Option]) -> Choice:
    """The fastest option that fits; where none does, the one that needs least.

    Within the error of the estimate the simplest strategy wins, then to keep activations, then the larger micro batch.
    """
    priced = [question.price(option) for option in options]
    fitting = [candidate for candidate in priced if candidate.fits]
    if fitting:
        limit = min(candidate.time.total_s for candidate in fitting) * _AS_FAST
        chosen = min((candidate for candidate in fitting if candidate.time.total_s <= limit), key=_plainness)
    else:
        chosen = min(priced, key=lambda candidate: (candidate.memory.total_bytes, _plainness(candidate)))
    best: dict[tuple[str, bool], Candidate] = {}
    for candidate in sorted(priced, key=_order):
        best.setdefault((candidate.option.strategy, candidate.option.gradient_checkpointing), candidate)
    key = (chosen.option.strategy, chosen.option.gradient_checkpointing)
    return Choice(chosen, tuple(candidate for kind, candidate in best.items() if kind != key))


def _plainness(candidate: Candidate) -> tuple[int, bool, int]:
    option = candidate.option
    return SIMPLEST_FIRST.index(option.strategy), option.gradient_checkpointing, -option.micro_batch


def _order(candidate: Candidate) -> tuple[bool, float, tuple[int, bool, int]]:
    """What fits first, then the faster; what does not fit by how little it needs."""
    cost = candidate.time.total_s if candidate.fits else float(candidate.memory.total_bytes)
    return not candidate.fits, cost, _plainness(candidate)
