"""In: what a recipe leaves open of strategy, micro batch and gradient checkpointing. Out: the fastest way that fits, and the others.

Every combination is priced, memory and time, and nothing is tried on a device: the same recipe, hardware and version give the
same choice everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.cluster import Cluster, Device
from launcher.families import family
from launcher.memory import Logits, Memory, MemoryRequest, estimate
from launcher.modelshape import ModelShape, trains_head
from launcher.pipeline import Order
from launcher.placement import Schedule
from launcher.plan.model import (
    DTYPE_BYTES,
    Alternative,
    Attention,
    Batching,
    Decision,
    Dtype,
    Plan,
    StagePlan,
    budget_bytes,
)
from launcher.plan.pacing import Way
from launcher.plan.spreading import spread, time_of_stages
from launcher.recipe import Recipe
from launcher.recipe.device_maps import DeviceMap
from launcher.shares import most_rows, rows_of_a_step, shares_by_speed
from launcher.steptime import StepTime, speed_of, step_time

# What an automatic choice leaves free: the allocator's gaps, and the error of the estimate.
FREE_SHARE = 0.1
# Estimates of time are no better than this: among ways so close to the fastest the simplest is taken.
_AS_FAST = 1.03
# From plain to involved; the order in which equally fast strategies are preferred.
SIMPLEST_FIRST = ("single", "ddp", "device_map", "fsdp", "zero2", "zero1", "zero3")


@dataclass(frozen=True)
class Option:
    """One way to train.

    Args:
        gradient_checkpointing: of every device; None under a device map leaves it to each.
        schedule: of a device map.
    """

    strategy: str
    gradient_checkpointing: bool | None
    micro_batch: int
    schedule: Schedule | None = None


@dataclass(frozen=True)
class Candidate:
    """An option with what it costs; `stages` of a device map; `device` where only one of several is used.

    Args:
        memory: of the device that has least to spare.
        because: why it cannot be.
        shares, rank_bytes: of every rank its share of a step's tokens and its memory, where cards are unlike in speed; else empty.
    """

    option: Option
    memory: Memory
    time: StepTime
    fits: bool
    stages: tuple[StagePlan, ...] = ()
    device: str | None = None
    because: str = ""
    shares: tuple[float, ...] = ()
    rank_bytes: tuple[int, ...] = ()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether any layer is computed again."""
        if self.option.gradient_checkpointing is None:
            return any(stage.recompute for stage in self.stages)
        return self.option.gradient_checkpointing


@dataclass(frozen=True)
class Question:
    """All that does not depend on the option."""

    recipe: Recipe
    cluster: Cluster
    shape: ModelShape
    dtype: Dtype
    batching: Batching
    trained: int
    device_map: DeviceMap | None = None
    attention: Attention = "sdpa"

    @property
    def order(self) -> Order:
        """The order of passes, where stages are pipelined."""
        asked = self.recipe.strategy.pipeline
        return "1f1b" if asked == "auto" else asked

    def num_processes(self, candidate: Candidate) -> int:
        """Ranks that are started: a naive device map is one process over all devices, a pipeline one for each stage."""
        if candidate.option.strategy != "device_map":
            return self.cluster.num_devices
        return len(candidate.stages) if candidate.option.schedule == "pipelined" and candidate.stages else 1

    def num_replicas(self, strategy: str) -> int:
        """Ranks with rows of their own: a device map is one model, however many processes it takes."""
        return 1 if strategy == "device_map" else self.cluster.num_devices

    def accumulation(self, option: Option) -> int:
        """Micro batches of a rank in a step."""
        return max(1, self.recipe.train.global_batch // (self.num_replicas(option.strategy) * option.micro_batch))

    def weights_dtype(self, strategy: str) -> Dtype:
        """Precision in which the base lies in memory: alone in half precision, small updates of trained weights are lost."""
        # DeepSpeed keeps an fp32 copy of its own.
        if self.recipe.adapter.type != "full" or strategy.startswith("zero"):
            return self.dtype
        return "fp32"

    def logits(self, strategy: str) -> Logits:
        """How the loss gets its logits: known families alone hand them from the head to the loss, and most as they are.

        Under FSDP2 the head stays gathered while layers go backward, and on the last device of a device map something of up to 6 % of it
        is there beside it; neither is in the plan's moments yet, so they do without.
        """
        known = family(self.shape.family)
        if self.shape.remote_code or not known.loss_at_labels or strategy == "device_map":
            return "whole"
        whole_head = known.changes_logits or strategy == "fsdp" or trains_head(self.shape, self.recipe.adapter)
        return "labels" if whole_head else "parts"

    def price(self, option: Option, to_the_brim: bool = False) -> Candidate:
        """Memory and time of an option.

        Args:
            to_the_brim: nothing has to be left free, as where the micro batch is set.
        """
        request = self.request(option)
        num_replicas, accumulation = self.num_replicas(option.strategy), self.accumulation(option)
        if option.schedule is not None:
            return self._spread(option, request, accumulation, to_the_brim)
        times = {
            device.name: step_time(request, speed_of(device, self.cluster, self.dtype), accumulation, num_replicas)
            for device in self._kinds()
        }
        spared = FREE_SHARE if self.recipe.train.micro_batch == "auto" and not to_the_brim else 0.0
        # One row a micro batch is one row on every card, and rows as they come are as many on each.
        if len(times) > 1 and num_replicas > 1 and option.micro_batch > 1 and self.batching != "padded":
            shares = shares_by_speed([times[device.name].total_s for device in self.cluster.devices])
            if shares:
                return self._shared(option, request, times, shares, spared)
        memory, slowest = estimate(request), max(times.values(), key=lambda time: time.total_s)
        budget = round(budget_bytes(option.strategy, self.cluster) * (1 - spared))
        return Candidate(option, memory, slowest, memory.total_bytes <= budget)

    def _shared(
        self,
        option: Option,
        request: MemoryRequest,
        times: Mapping[str, StepTime],
        shares: tuple[float, ...],
        spared: float,
    ) -> Candidate:
        """Unlike cards, each with its share of the rows: memory of each, and the time of the one that is done last."""
        devices, rows = self.cluster.devices, most_rows(shares, option.micro_batch)
        memory = {num: estimate(request.model_copy(update={"micro_batch": num})) for num in set(rows)}
        free = [round((device.memory_bytes - device.reserved_bytes) * (1 - spared)) for device in devices]
        tightest = min(range(len(devices)), key=lambda rank: free[rank] - memory[rows[rank]].total_bytes)
        fits = memory[rows[tightest]].total_bytes <= free[tightest]
        accumulation = self.accumulation(option)
        of_step = zip(devices, rows_of_a_step(shares, option.micro_batch, accumulation), strict=True)
        slowest = max(
            (times[device.name].of_rows(num / option.micro_batch / accumulation) for device, num in of_step),
            key=lambda time: time.total_s,
        )
        rank_bytes = tuple(memory[num].total_bytes for num in rows)
        return Candidate(option, memory[rows[tightest]], slowest, fits, shares=shares, rank_bytes=rank_bytes)

    def _spread(
        self, option: Option, request: MemoryRequest, micro_batches: int, to_the_brim: bool = False
    ) -> Candidate:
        """The best placement of a device map. A pipeline has to have work for all of its stages."""
        way = self.way(option)
        found = spread(request, self.cluster, self.dtype, way, self.device_map)
        # Where nothing smaller may be chosen: as full as it gets.
        if found is None and (to_the_brim or self.recipe.train.micro_batch != "auto"):
            found = spread(request, self.cluster, self.dtype, replace(way, spared=0.0), self.device_map)
        if found is None or (option.schedule == "pipelined" and len(found.stages) > micro_batches):
            endless = StepTime(
                forward_s=math.inf, backward_s=0, recompute_s=0, optimizer_s=0, communication_s=0, tokens=1, basis=""
            )
            return Candidate(option, estimate(request), endless, fits=False)
        return Candidate(option, found.memory, found.time, True, found.stages)

    def way(self, option: Option) -> Way:
        """How the stages of a device map are run."""
        assert option.schedule is not None
        placed_by_hand = self.device_map is not None and self.device_map.ranges() is not None
        spared = 0.0 if placed_by_hand and self.recipe.train.micro_batch != "auto" else FREE_SHARE
        return Way(option.schedule, self.accumulation(option), option.gradient_checkpointing, spared, self.order)

    def _kinds(self) -> Sequence[Device]:
        """One device of each kind: a thousand hosts are mostly alike."""
        return list({device.name: device for device in self.cluster.devices}.values())

    def request(self, option: Option) -> MemoryRequest:
        """What the memory of an option is asked for."""
        recipe = self.recipe
        return MemoryRequest(
            shape=self.shape,
            trainable_parameters=self.trained,
            full=recipe.adapter.type == "full",
            adapter=recipe.adapter,
            quantization=recipe.model.quantization,
            weights_dtype_bytes=DTYPE_BYTES[self.weights_dtype(option.strategy)],
            compute_dtype_bytes=DTYPE_BYTES[self.dtype],
            optimizer=recipe.train.optimizer,
            micro_batch=option.micro_batch,
            sequence_length=recipe.data.max_length,
            batching=self.batching,
            accumulation=self.accumulation(option),
            gradient_checkpointing=bool(option.gradient_checkpointing),
            flash=self.attention == "flash_attention_2",
            logits=self.logits(option.strategy),
            strategy=option.strategy,
            offload=recipe.strategy.offload,
            offload_to_disk=recipe.strategy.nvme_path is not None,
            num_processes=self.cluster.num_devices,
            kind=self.cluster.kind,
            shares_keys=self.cluster.has_flash(self.dtype),
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
                gradient_checkpointing=candidate.gradient_checkpointing,
                micro_batch=candidate.option.micro_batch,
                step_s=candidate.time.total_s,
                memory_bytes=candidate.memory.total_bytes,
                fits=candidate.fits,
                schedule=candidate.option.schedule,
                device=candidate.device,
                because=candidate.because,
            )
            for candidate in (self.chosen, *self.others)
        )


def time_of_rows(plan: Plan, length: float) -> StepTime:
    """The time of a step of a plan whose rows have `length` tokens on average, as prepare found them."""
    data = plan.recipe.data.model_copy(update={"max_length": max(1, round(length))})
    recipe = plan.recipe.model_copy(update={"data": data})
    question = Question(
        recipe,
        plan.cluster,
        plan.shape,
        plan.dtype,
        plan.batching,
        plan.trainable_parameters,
        plan.device_map,
        plan.attention,
    )
    option = Option(plan.strategy, plan.gradient_checkpointing, plan.micro_batch, plan.schedule)
    if plan.schedule is None:
        return question.price(option).time
    way = question.way(replace(option, gradient_checkpointing=None))
    return time_of_stages(plan.stages, way, question.request(option), plan.cluster, plan.dtype)


def choose(question: Question, options: Sequence[Option]) -> Choice:
    """The fastest option that fits; where none does, the one that needs least.

    Within the error of the estimate the simplest strategy wins, then to keep activations, then the larger micro batch.
    """
    priced = [question.price(option) for option in options]
    fitting = [candidate for candidate in priced if candidate.fits]
    if not fitting and question.recipe.train.micro_batch == "auto":  # else nothing had to be left free to begin with
        priced = [question.price(option, to_the_brim=True) for option in options]
        fitting = [candidate for candidate in priced if candidate.fits]
    if fitting:
        limit = min(candidate.time.total_s for candidate in fitting) * _AS_FAST
        chosen = min((candidate for candidate in fitting if candidate.time.total_s <= limit), key=_plainness)
    else:
        chosen = min(priced, key=lambda candidate: (candidate.memory.total_bytes, _plainness(candidate)))
    best: dict[tuple[object, ...], Candidate] = {}
    for candidate in sorted(priced, key=_order):
        best.setdefault(_kind(candidate), candidate)
    others = (candidate for kind, candidate in best.items() if kind != _kind(chosen))
    return Choice(chosen, tuple(other for other in others if other.time.total_s < math.inf))


def why_strategy(choice: Choice, num_devices: int) -> str:
    """Why a strategy, in words; the figures stand in the plan's alternatives."""
    if num_devices == 1:
        return "there is one device"
    if all(other.option.strategy == choice.chosen.option.strategy for other in choice.others):
        return f"a copy of the model on each of {num_devices} devices"
    if not choice.chosen.fits:
        return "needs least memory, and that is still too much"
    fitting = [
        other for other in choice.others if other.fits and other.option.strategy != choice.chosen.option.strategy
    ]
    if not fitting:
        return "nothing else fits"
    fastest = min(other.time.total_s for other in fitting)
    if fastest < choice.chosen.time.total_s:
        return "the simplest of those that are as fast as any"
    return "the fastest that fits"


def why_shares(question: Question, chosen: Candidate) -> Decision:
    """What each of unlike cards gets of a step, and why."""
    names = [device.name for device in question.cluster.devices]
    rows = most_rows(chosen.shares, chosen.option.micro_batch)
    parts = dict(zip(names, zip(chosen.shares, rows, strict=True), strict=True))
    value = ", ".join(f"{name} {share:.0%} ({num} rows at most)" for name, (share, num) in parts.items())
    each = " each" if len(names) > len(parts) else ""
    because = f"of a step's tokens{each}, so that no card waits for a slower one; speeds are the plan's estimates"
    return Decision(key="shares", value=value, because=because)


def _kind(candidate: Candidate) -> tuple[object, ...]:
    """What tells alternatives apart; of each kind the best is shown."""
    return candidate.option.strategy, candidate.option.gradient_checkpointing, candidate.option.schedule


def _plainness(candidate: Candidate) -> tuple[int, bool, bool, int]:
    option = candidate.option
    pipelined = option.schedule == "pipelined"
    return SIMPLEST_FIRST.index(option.strategy), pipelined, candidate.gradient_checkpointing, -option.micro_batch


def _order(candidate: Candidate) -> tuple[bool, float, tuple[int, bool, bool, int]]:
    """What fits first, then the faster; what does not fit by how little it needs."""
    cost = candidate.time.total_s if candidate.fits else float(candidate.memory.total_bytes)
    return not candidate.fits, cost, _plainness(candidate)
