"""The Plan itself: plain values, frozen, JSON both ways. Made by `deciding`, read by everything after it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.cluster import Cluster
from launcher.errors import UsageError
from launcher.memory import Logits, Memory, unmasked
from launcher.modelshape import ModelShape
from launcher.native import Native
from launcher.pipeline import Order
from launcher.placement import Schedule
from launcher.recipe import Recipe
from launcher.recipe.device_maps import DeviceMap
from launcher.remotecode import RemoteCode
from launcher.rundir import RunDir
from launcher.steptime import StepTime

Dtype = Literal["bf16", "fp16", "fp32"]
DTYPE_BYTES: dict[Dtype, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
Batching = Literal["padded", "bucketed", "packed"]
Attention = Literal["sdpa", "flash_attention_2"]
Targets = tuple[str, ...] | Literal["all-linear"]


class Decision(BaseModel):
    """A value that was derived, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    value: str
    because: str


class Alternative(BaseModel):
    """A way to train that was priced: seconds of a step with all rows at their longest, bytes of the fullest device.

    `device`: the one that is used alone, where the plan has several. `because`: why it cannot be, where that is known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: str
    gradient_checkpointing: bool
    micro_batch: int
    step_s: float
    memory_bytes: int
    fits: bool
    schedule: Schedule | None = None
    device: str | None = None
    because: str = ""


class StagePlan(BaseModel):
    """Layers [first, stop) on one device of a device map.

    Args:
        device: its place among the cluster's devices.
        embedding, head: whether these lie here too, the head with the last norm.
        recompute: whether its layers are computed again in the backward pass.
        memory_bytes: at its fullest; seconds: of one micro batch, forward and backward; forward_s: its part of them.
        waits: share of a step in which the device has nothing to compute.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: int
    first: int
    stop: int
    embedding: bool
    head: bool
    recompute: bool
    memory_bytes: int
    seconds: float
    forward_s: float = 0.0
    waits: float = 0.0


class Rehearsal(BaseModel):
    """What a rehearsal takes from the model that it rehearses.

    Args:
        folder: where its tokenizer and its own code are; None where they are not here.
        native: what that tokenizer is converted for.
        notes: what is not as in the real run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str | None = None
    native: Native | None = None
    notes: tuple[str, ...] = ()


class Plan(BaseModel):
    """All that a run is, before it starts.

    Args:
        weights_dtype: precision in which the base weights lie in memory (dtype is that of the computation).
        targets: module names that get an adapter; `all-linear`; or empty for full training.
        micro_batch, accumulation, global_batch: rows; global = num_processes × micro × accumulation.
        attention: which of transformers' implementations computes packs; all else is the model's own choice.
        logits: of which tokens the head computes them in training (`launcher.memory`).
        memory: bytes of one device, the fullest; where cards are unlike in speed, of the one that has least to spare.
        shares, rank_bytes: of every rank its share of a step's tokens and the bytes of its device, where cards are unlike in
            speed; else empty. `micro_batch` is then the mean.
        time: seconds of a step with every row at data.max_length.
        alternatives: the chosen way, then the best of every other kind that was open.
        fixes: what is mended about the model's own classes, by name (`launcher.compat`).
        deepspeed: DeepSpeed's JSON, None where it is not used.
        code: the model's own .py files that are executed; None for none, and where they have not been fetched yet.
        device_map: what strategy.device_map names.
        schedule: naive or pipelined under a device map, else None; stages: in the order of the layers, and then of the ranks.
        pipeline: the order of forward and backward passes where it is pipelined, else None; accumulation is then the micro
            batches of a step, which go through all stages.
        resume_from: checkpoint folder below the run directory, None for a fresh start.
        rehearsal: what this is the rehearsal of, None for a run in earnest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    name: str
    recipe: Recipe
    cluster: Cluster
    shape: ModelShape
    strategy: str
    backend: str
    num_processes: int
    dtype: Dtype
    weights_dtype: Dtype
    targets: Targets
    trainable_parameters: int
    micro_batch: int
    accumulation: int
    global_batch: int
    gradient_checkpointing: bool
    batching: Batching
    attention: Attention = "sdpa"
    logits: Logits = "whole"
    memory: Memory
    time: StepTime
    shares: tuple[float, ...] = ()
    rank_bytes: tuple[int, ...] = ()
    alternatives: tuple[Alternative, ...]
    decisions: tuple[Decision, ...]
    schedule: Schedule | None = None
    pipeline: Order | None = None
    device_map: DeviceMap | None = None
    stages: tuple[StagePlan, ...] = ()
    fixes: tuple[str, ...] = ()
    deepspeed: dict[str, Any] | None = None
    code: RemoteCode | None = None
    resume_from: str | None = None
    rehearsal: Rehearsal | None = None

    @property
    def kind(self) -> str:
        """cuda or cpu."""
        return self.cluster.kind

    @property
    def unmasked(self) -> bool:
        """Whether padded rows come without a mask."""
        return unmasked(self.logits, self.batching, self.strategy)

    @property
    def waiting(self) -> float:
        """The bubble: share of a step in which the devices of a device map have nothing to compute, their mean."""
        return sum(stage.waits for stage in self.stages) / len(self.stages) if self.stages else 0.0

    @property
    def fullest_bytes(self) -> int:
        """What the fullest rank takes: under a pipeline its fullest stage."""
        if self.pipeline is None:
            return max((self.memory.total_bytes, *self.rank_bytes))
        return max(stage.memory_bytes for stage in self.stages)

    def bytes_of(self, rank: int) -> int:
        """What the device of a rank takes."""
        return self.rank_bytes[rank] if self.rank_bytes else self.memory.total_bytes

    @property
    def tightest(self) -> int:
        """The place among the cluster's devices of the one that has least to spare."""
        devices = self.cluster.devices
        free = [device.memory_bytes - device.reserved_bytes for device in devices]
        return min(range(len(devices)), key=lambda place: free[place] - self.bytes_of(place))

    def device_of(self, rank: int) -> int:
        """The place among the cluster's devices of a rank's own; the first one for the one rank of a naive device map."""
        if self.pipeline is not None:
            return self.stages[rank].device
        return min(rank, self.cluster.num_devices - 1)

    @property
    def needs_bitsandbytes(self) -> bool:
        """Whether weights or optimizer state are quantised."""
        return self.recipe.model.quantization != "none" or self.recipe.train.optimizer != "adamw"


def read_plan(run: RunDir) -> Plan:
    """The plan of a run directory.

    Raises:
        UsageError: it is torn, or of another version.
    """
    try:
        return Plan.model_validate_json(run.plan.read_text(encoding="utf-8"))
    except ValidationError:
        raise UsageError(
            f"run {run.path}",
            "its plan.json is torn, or was written by another version",
            f"write it again: launch resume {run.path}",
        ) from None


def steps_per_epoch(plan: Plan, num_rows: int) -> int:
    """Optimizer steps in which every training row is seen once; of a stream, whose rows nobody counts, a tenth of all steps."""
    if plan.recipe.data.streaming:
        return max(1, total_steps(plan, num_rows) // 10)
    return -(-num_rows // plan.global_batch)


def window_steps(plan: Plan) -> int:
    """Optimizer steps that share the rows that a stream has read ahead."""
    return max(1, plan.recipe.data.shuffle_rows // plan.global_batch)


def total_steps(plan: Plan, num_rows: int) -> int:
    """Optimizer steps of the whole run."""
    train = plan.recipe.train
    return train.max_steps or max(1, round(steps_per_epoch(plan, num_rows) * train.epochs))


def budget_bytes(strategy: str, cluster: Cluster) -> int:
    """What a plan's memory may come to: the free bytes of the smallest device.

    A device map splits the weights; until it is placed layer by layer the sum over all devices is what has to suffice.
    """
    free = [device.memory_bytes - device.reserved_bytes for device in cluster.devices]
    return sum(free) if strategy == "device_map" else min(free)


def lacking_bytes(plan: Plan) -> int:
    """How many bytes the plan is short of; negative where it fits."""
    if plan.rank_bytes:
        devices = zip(plan.cluster.devices, plan.rank_bytes, strict=True)
        return max(needed - (device.memory_bytes - device.reserved_bytes) for device, needed in devices)
    lacking = plan.memory.total_bytes - budget_bytes(plan.strategy, plan.cluster)
    if plan.strategy == "device_map":  # enough together is not enough: no device may be over its own budget
        return -1 if plan.stages else max(1, lacking)
    return lacking
