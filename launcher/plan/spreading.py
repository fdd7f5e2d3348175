"""One model over several unlike devices: what a layer costs on each of them, the best placement for a schedule, and its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.cluster import Cluster, Device
from launcher.memory import CUDA_CONTEXT_BYTES, Memory, MemoryRequest, estimate
from launcher.modelshape import ModelShape
from launcher.placement import Layers, Place, Placement, Schedule, Stage, cost_of, place
from launcher.plan.model import Dtype, StagePlan
from launcher.plan.moments import moments
from launcher.recipe.device_maps import DeviceMap
from launcher.steptime import StepTime, head_seconds, layer_seconds, speed_of


@dataclass(frozen=True)
class Spread:
    """A model on its devices: stages in the order of the layers, and what a step costs."""

    stages: tuple[StagePlan, ...]
    memory: Memory
    time: StepTime


def ends_together(shape: ModelShape) -> bool:
    """Whether embedding and head have to share a device: tied weights, or code that looks its tables up outside of any hook."""
    return shape.tie_word_embeddings or shape.remote_code


@dataclass(frozen=True)
class Way:
    """How the stages are run.

    Args:
        micro_batches: of one optimizer step.
        recompute: whether layers are computed again in the backward pass; None decides for each device.
        spared: share of every budget that is left free.
    """

    schedule: Schedule
    micro_batches: int
    recompute: bool | None
    spared: float


def spread(
    request: MemoryRequest, cluster: Cluster, dtype: Dtype, way: Way, device_map: DeviceMap | None
) -> Spread | None:
    """The best placement, or that of the device map; None where it does not fit.

    Raises:
        ValueError: the device map's ranges are not those of this model.
    """
    schedule, micro_batches, recompute = way.schedule, way.micro_batches, way.recompute
    if schedule == "pipelined" and ends_together(request.shape) and len(cluster.devices) > 1:
        return None
    layers, places = (
        _layers(request),
        [_place(request, device, cluster, dtype, way.spared) for device in cluster.devices],
    )
    ranges = device_map.ranges() if device_map is not None else None
    if ranges is not None:
        found = cost_of(layers, places, schedule, micro_batches, recompute, ranges)
    else:
        found = place(layers, places, schedule, micro_batches, recompute)
    if found is None:
        return None
    stages = tuple(_planned(stage, cluster.devices, request) for stage in found.stages)
    return Spread(stages, _together(request, stages), _time(found, way, request, cluster, dtype))


def _layers(request: MemoryRequest) -> Layers:
    """Bytes of the parts that are placed."""
    keeping = request.model_copy(update={"gradient_checkpointing": False})
    recomputing = request.model_copy(update={"gradient_checkpointing": True})
    return Layers(
        num=request.shape.num_layers,
        keeping=moments(keeping, recompute=False),
        recomputing=moments(recomputing, recompute=True),
        ends_together=ends_together(request.shape),
    )


def _place(request: MemoryRequest, device: Device, cluster: Cluster, dtype: Dtype, spared: float) -> Place:
    """What a device offers, less what a process takes there before any layer."""
    speed = speed_of(device, cluster, dtype)
    forward, backward = layer_seconds(request, speed)
    passed = request.num_tokens * request.shape.hidden_size * request.stream_bytes
    return Place(
        budget_bytes=round((device.memory_bytes - device.reserved_bytes) * (1 - spared)) - _context_bytes(device),
        keep_s=forward + backward,
        recompute_s=2 * forward + backward,
        embedding_s=passed / speed.bandwidth,
        head_s=sum(head_seconds(request, speed)),
        hand_over_s=2 * passed / speed.link,
    )


def _context_bytes(device: Device) -> int:
    """What a process takes on a device before any layer."""
    return CUDA_CONTEXT_BYTES if device.kind == "cuda" else 0


def _planned(stage: Stage, devices: Sequence[Device], request: MemoryRequest) -> StagePlan:
    """A stage as the plan keeps it."""
    device = devices[stage.device]
    is_first, is_last = stage.start == 0, stage.stop == request.shape.num_layers
    head = is_first if ends_together(request.shape) else is_last
    return StagePlan(
        device=stage.device,
        first=stage.start,
        stop=stage.stop,
        embedding=is_first,
        head=head,
        recompute=stage.recompute,
        memory_bytes=stage.memory_bytes + _context_bytes(device),
        seconds=stage.seconds,
    )


def _together(request: MemoryRequest, stages: Sequence[StagePlan]) -> Memory:
    """The memory of all devices together; how much activations are depends on where layers are computed again."""
    memory = estimate(request)
    rest = memory.total_bytes - memory.activations_bytes
    used = sum(stage.memory_bytes for stage in stages)
    return memory.model_copy(update={"activations_bytes": max(0, used - rest)})


def _time(found: Placement, way: Way, request: MemoryRequest, cluster: Cluster, dtype: Dtype) -> StepTime:
    """Seconds of a step.

    Naive: every micro batch goes through all stages alone. Pipelined: the first goes through all of them, then one leaves
    the slowest stage at a time.
    """
    forward = backward = recompute = 0.0
    for stage in found.stages:
        speed = speed_of(cluster.devices[stage.device], cluster, dtype)
        ahead, back = layer_seconds(request, speed)
        num = stage.stop - stage.start
        forward += num * ahead
        backward += num * back
        recompute += num * ahead if stage.recompute else 0.0
    through = sum(stage.seconds for stage in found.stages)
    slowest = max(stage.seconds for stage in found.stages)
    naive = way.schedule == "naive" or len(found.stages) == 1
    total = way.micro_batches * through if naive else through + (way.micro_batches - 1) * slowest
    share = total / max(through, 1e-12)  # computing on the critical path, spread over its parts
    waiting = through - forward - backward - recompute
    return StepTime(
        forward_s=share * forward,
        backward_s=share * backward,
        recompute_s=share * recompute,
        optimizer_s=0.0,
        communication_s=share * waiting,
        tokens=request.num_tokens * way.micro_batches,
        basis="; ".join(
            dict.fromkeys(speed_of(cluster.devices[stage.device], cluster, dtype).basis for stage in found.stages)
        ),
    )
