"""One model over several unlike devices: what a layer costs on each of them, the best placement for a schedule, and its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.cluster import Cluster, Device
from launcher.memory import (
    ALLOCATOR_RESERVE,
    CPU_CONTEXT_BYTES,
    CUDA_CONTEXT_BYTES,
    Memory,
    MemoryRequest,
    estimate,
)
from launcher.modelshape import ModelShape
from launcher.pipeline import Order, flow
from launcher.placement import Layers, Place, Placement, Schedule, cost_of, needed_by, place
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
        order: of the passes in a pipeline.
    """

    schedule: Schedule
    micro_batches: int
    recompute: bool | None
    spared: float
    order: Order


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
    layers = _layers(request)
    places = [_place(request, device, cluster, dtype, way) for device in cluster.devices]
    ranges = device_map.ranges() if device_map is not None else None
    if ranges is not None:
        found = cost_of(layers, places, schedule, micro_batches, recompute, way.order, ranges)
    else:
        found = place(layers, places, schedule, micro_batches, recompute, way.order)
    if found is None:
        return None
    stages = _planned(found, way, request, cluster, dtype)
    return Spread(stages, _together(request, stages, cluster, way), _time(stages, way, request, cluster, dtype))


def needs(
    request: MemoryRequest, cluster: Cluster, way: Way, ranges: Sequence[tuple[int, int]]
) -> list[tuple[Device, int]]:
    """Each device of a placement by hand, and the least bytes that it needs, what the process takes included."""
    found = needed_by(
        _layers(request), len(cluster.devices), way.schedule, way.micro_batches, way.recompute, way.order, ranges
    )
    return [
        (device, needed + _context_bytes(device, way)) for device, needed in zip(cluster.devices, found, strict=False)
    ]


def _layers(request: MemoryRequest) -> Layers:
    """Bytes of the parts that are placed."""
    gaps = 1 + (ALLOCATOR_RESERVE if request.kind == "cuda" else 0)  # what comes and goes leaves some
    keeping = request.model_copy(update={"gradient_checkpointing": False})
    recomputing = request.model_copy(update={"gradient_checkpointing": True})
    return Layers(
        num=request.shape.num_layers,
        keeping=moments(keeping, recompute=False),
        recomputing=moments(recomputing, recompute=True),
        input_bytes=round(gaps * request.num_tokens * request.shape.hidden_size * request.stream_bytes),
        logits_bytes=round(gaps * estimate(request).logits_bytes),
        ends_together=ends_together(request.shape),
    )


def _place(request: MemoryRequest, device: Device, cluster: Cluster, dtype: Dtype, way: Way) -> Place:
    """What a device offers, less what a process takes there before any layer."""
    speed = speed_of(device, cluster, dtype)
    forward, backward = layer_seconds(request, speed)
    passed = request.num_tokens * request.shape.hidden_size * request.stream_bytes
    free = device.memory_bytes - device.reserved_bytes
    return Place(
        budget_bytes=round(free * (1 - way.spared)) - _context_bytes(device, way),
        keep_s=forward + backward,
        recompute_s=2 * forward + backward,
        embedding_s=passed / speed.bandwidth,
        head_s=sum(head_seconds(request, speed)),
        hand_over_s=2 * passed / speed.link,
    )


def _context_bytes(device: Device, way: Way) -> int:
    """What a process takes on a device before any layer; where that is host memory one process for all is counted elsewhere."""
    if device.kind == "cuda":
        return CUDA_CONTEXT_BYTES
    return CPU_CONTEXT_BYTES if way.schedule == "pipelined" else 0


def _planned(
    found: Placement, way: Way, request: MemoryRequest, cluster: Cluster, dtype: Dtype
) -> tuple[StagePlan, ...]:
    """The stages as the plan keeps them."""
    first, last = found.stages[0], found.stages[-1]
    planned = [
        StagePlan(
            device=device,
            first=stage.start,
            stop=stage.stop,
            embedding=stage is first,
            head=stage is (first if ends_together(request.shape) else last),
            recompute=stage.recompute,
            memory_bytes=stage.memory_bytes + _context_bytes(cluster.devices[stage.device], way),
            seconds=stage.seconds,
            forward_s=0.0,
            waits=0.0,
        )
        for stage, device in zip(found.stages, _in_order(found, cluster.devices), strict=True)
    ]
    return timed(planned, way, request, cluster, dtype)


def _in_order(found: Placement, devices: Sequence[Device]) -> list[int]:
    """The device of each stage, devices that are alike in their own order: the search takes any of them."""
    alike: dict[tuple[str, int, int], list[int]] = {}
    kinds = [(devices[stage.device].name, *_sizes(devices[stage.device])) for stage in found.stages]
    for kind, stage in zip(kinds, found.stages, strict=True):
        alike.setdefault(kind, []).append(stage.device)
    left = {kind: sorted(places) for kind, places in alike.items()}
    return [left[kind].pop(0) for kind in kinds]


def _sizes(device: Device) -> tuple[int, int]:
    return device.memory_bytes, device.reserved_bytes


def timed(
    stages: Sequence[StagePlan], way: Way, request: MemoryRequest, cluster: Cluster, dtype: Dtype
) -> tuple[StagePlan, ...]:
    """The same stages with their times for a request, which may be of other rows than they were placed for."""
    seconds = [_seconds(place, stages, request, cluster, dtype) for place in range(len(stages))]
    through = sum(forward + backward for forward, backward in seconds)
    waits = tuple(1 - sum(each) / through for each in seconds)
    if way.schedule == "pipelined":
        waits = flow(seconds, way.micro_batches, way.order).waits
    return tuple(
        stage.model_copy(update={"seconds": forward + backward, "forward_s": forward, "waits": waiting})
        for stage, (forward, backward), waiting in zip(stages, seconds, waits, strict=True)
    )


def _seconds(
    at: int, stages: Sequence[StagePlan], request: MemoryRequest, cluster: Cluster, dtype: Dtype
) -> tuple[float, float]:
    """Seconds of one stage, forward and backward, for a micro batch; together those that the search has placed it by."""
    stage, speed = stages[at], speed_of(cluster.devices[stages[at].device], cluster, dtype)
    layer_forward, layer_backward = layer_seconds(request, speed)
    passed = request.num_tokens * request.shape.hidden_size * request.stream_bytes
    is_first, is_last, num = at == 0, at == len(stages) - 1, stage.stop - stage.first
    hand_overs = (not is_last) + (not is_first)
    if ends_together(request.shape) and len(stages) > 1:
        hand_overs += is_first + is_last
    forward = num * layer_forward + hand_overs * passed / speed.link
    backward = num * (layer_backward + stage.recompute * layer_forward) + hand_overs * passed / speed.link
    if is_first:
        forward += passed / speed.bandwidth
    if stage.head:
        forward, backward = (a + b for a, b in zip((forward, backward), head_seconds(request, speed), strict=True))
    return forward, backward


def time_of_stages(
    stages: Sequence[StagePlan], way: Way, request: MemoryRequest, cluster: Cluster, dtype: Dtype
) -> StepTime:
    """Seconds of a step of stages as they are placed."""
    return _time(timed(stages, way, request, cluster, dtype), way, request, cluster, dtype)


def _together(request: MemoryRequest, stages: Sequence[StagePlan], cluster: Cluster, way: Way) -> Memory:
    """The memory of all devices together; how much activations are depends on where layers are computed again."""
    contexts = sum(_context_bytes(cluster.devices[stage.device], way) for stage in stages)
    memory = estimate(request)
    memory = memory.model_copy(update={"context_bytes": contexts or memory.context_bytes})
    rest = memory.total_bytes - memory.activations_bytes
    used = sum(stage.memory_bytes for stage in stages)
    return memory.model_copy(update={"activations_bytes": max(0, used - rest)})


def _time(stages: Sequence[StagePlan], way: Way, request: MemoryRequest, cluster: Cluster, dtype: Dtype) -> StepTime:
    """Seconds of a step, all micro batches one after the other through all stages, or as they flow through a pipeline."""
    forward = backward = recompute = 0.0
    for stage in stages:
        speed = speed_of(cluster.devices[stage.device], cluster, dtype)
        ahead, back = layer_seconds(request, speed)
        num = stage.stop - stage.first
        forward += num * ahead
        backward += num * back
        recompute += num * ahead if stage.recompute else 0.0
    through = sum(stage.seconds for stage in stages)
    total = way.micro_batches * through
    if way.schedule == "pipelined":
        times = [(stage.forward_s, stage.seconds - stage.forward_s) for stage in stages]
        total = flow(times, way.micro_batches, way.order).seconds
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
            dict.fromkeys(speed_of(cluster.devices[stage.device], cluster, dtype).basis for stage in stages)
        ),
    )
