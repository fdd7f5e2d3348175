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
from launcher.placement import Layers, Place, Placement, Search
from launcher.plan.model import Dtype, StagePlan
from launcher.plan.moments import moments
from launcher.plan.pacing import Pacing, Part, Way, ends_together
from launcher.plan.refining import refined
from launcher.recipe.device_maps import DeviceMap
from launcher.steptime import StepTime, head_seconds, layer_seconds, speed_of


@dataclass(frozen=True)
class Spread:
    """A model on its devices: stages in the order of the layers, and what a step costs."""

    stages: tuple[StagePlan, ...]
    memory: Memory
    time: StepTime


def spread(
    request: MemoryRequest, cluster: Cluster, dtype: Dtype, way: Way, device_map: DeviceMap | None
) -> Spread | None:
    """The best placement, or that of the device map; None where it does not fit.

    Raises:
        ValueError: the device map's ranges are not those of this model.
    """
    if way.schedule == "pipelined" and ends_together(request.shape) and len(cluster.devices) > 1:
        return None
    search = search_of(request, cluster, dtype, way)
    ranges = device_map.ranges() if device_map is not None else None
    given = as_parts(ranges, request.shape.num_layers, len(cluster.devices)) if ranges is not None else None
    found = search.best() if given is None else search.given(given)
    if found is None:
        return None
    pacing = Pacing(request, cluster, dtype, way)
    if given is None and way.schedule == "pipelined":
        found = refined(search, found, lambda placement: pacing.total(_parts(placement)))
    stages = _planned(found, pacing, cluster)
    return Spread(stages, _together(request, stages, cluster, way), pacing.time(_parts(found)))


def _parts(placement: Placement) -> list[Part]:
    return [Part(stage.device, stage.stop - stage.start, stage.recompute) for stage in placement.stages]


def as_parts(ranges: Sequence[tuple[int, int]], num_layers: int, num_devices: int) -> list[tuple[int, int]]:
    """(device, number of layers) of ranges that somebody has written down.

    Raises:
        ValueError: they are not those of all layers, or of more devices than there are.
    """
    if not ranges or len(ranges) > num_devices or ranges[-1][1] != num_layers - 1:
        raise ValueError(f"{len(ranges)} ranges up to layer {ranges[-1][1] if ranges else 0} for {num_layers} layers")
    return [(device, last + 1 - first) for device, (first, last) in enumerate(ranges)]


def search_of(request: MemoryRequest, cluster: Cluster, dtype: Dtype, way: Way) -> Search:
    """What places the layers of a request on these devices."""
    places = [_place(request, device, cluster, dtype, way) for device in cluster.devices]
    return Search(_layers(request), places, way.schedule, way.micro_batches, way.recompute, way.order)


def needs(
    request: MemoryRequest, cluster: Cluster, dtype: Dtype, way: Way, ranges: Sequence[tuple[int, int]]
) -> list[tuple[Device, int]]:
    """Each device of a placement by hand, and the least bytes that it needs, what the process takes included."""
    parts = as_parts(ranges, request.shape.num_layers, len(cluster.devices))
    found = search_of(request, cluster, dtype, way).least_bytes(parts)
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


def _planned(found: Placement, pacing: Pacing, cluster: Cluster) -> tuple[StagePlan, ...]:
    """The stages as the plan keeps them."""
    planned = [
        StagePlan(
            device=device,
            first=stage.start,
            stop=stage.stop,
            embedding=at == 0,
            head=pacing.has_head(at, len(found.stages)),
            recompute=stage.recompute,
            memory_bytes=stage.memory_bytes + _context_bytes(cluster.devices[stage.device], pacing.way),
            seconds=stage.seconds,
        )
        for at, (stage, device) in enumerate(zip(found.stages, _in_order(found, cluster.devices), strict=True))
    ]
    return _timed(planned, pacing)


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


def _timed(stages: Sequence[StagePlan], pacing: Pacing) -> tuple[StagePlan, ...]:
    """The same stages with their times."""
    seconds = pacing.seconds(_as_placed(stages))
    return tuple(
        stage.model_copy(update={"seconds": forward + backward, "forward_s": forward, "waits": waiting})
        for stage, (forward, backward), waiting in zip(stages, seconds, pacing.waits(seconds), strict=True)
    )


def _as_placed(stages: Sequence[StagePlan]) -> list[Part]:
    return [Part(stage.device, stage.stop - stage.first, stage.recompute) for stage in stages]


def time_of_stages(
    stages: Sequence[StagePlan], way: Way, request: MemoryRequest, cluster: Cluster, dtype: Dtype
) -> StepTime:
    """Seconds of a step of stages as they are placed, for a request that may be of other rows than they were placed for."""
    return Pacing(request, cluster, dtype, way).time(_as_placed(stages))


def _together(request: MemoryRequest, stages: Sequence[StagePlan], cluster: Cluster, way: Way) -> Memory:
    """The memory of all devices together; how much activations are depends on where layers are computed again."""
    contexts = sum(_context_bytes(cluster.devices[stage.device], way) for stage in stages)
    memory = estimate(request)
    memory = memory.model_copy(update={"context_bytes": contexts or memory.context_bytes})
    rest = memory.total_bytes - memory.activations_bytes
    used = sum(stage.memory_bytes for stage in stages)
    return memory.model_copy(update={"activations_bytes": max(0, used - rest)})
