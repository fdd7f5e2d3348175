"""Layers on devices in; the seconds of each stage, and of a step of them all, out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.cluster import Cluster, Device
from launcher.memory import MemoryRequest
from launcher.modelshape import ModelShape
from launcher.pipeline import Order, flow
from launcher.placement import Schedule
from launcher.plan.model import Dtype
from launcher.steptime import SECONDS_PER_STEP, StepTime, head_seconds, layer_seconds, optimizer_seconds, speed_of


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


@dataclass(frozen=True)
class Pace:
    """What a device takes for a micro batch, in seconds; (forward, backward) of a layer and of the head.

    Args:
        embedding: of looking the tokens up; hand_over: of the hidden states on their way to it or from it, one way.
        step: of the optimizer, for each trained parameter.
    """

    layer: tuple[float, float]
    head: tuple[float, float]
    embedding: float
    hand_over: float
    step: float
    basis: str


@dataclass(frozen=True)
class Part:
    """A stage: a device by its place in the cluster, how many layers, whether they are computed again."""

    device: int
    num: int
    recompute: bool


def ends_together(shape: ModelShape) -> bool:
    """Whether embedding and head have to share a device: tied weights, or code that looks its tables up outside of any hook."""
    return shape.tie_word_embeddings or shape.remote_code


class Pacing:
    """The times of one request on all devices, whatever lies where."""

    def __init__(self, request: MemoryRequest, cluster: Cluster, dtype: Dtype, way: Way) -> None:
        self.request, self.way = request, way
        kinds: dict[tuple[object, ...], Pace] = {}
        self.paces = []
        for device in cluster.devices:
            kind = (device.name, device.kind, device.memory_bytes, device.cores)
            if kind not in kinds:
                kinds[kind] = self._pace(device, cluster, dtype)
            self.paces.append(kinds[kind])

    def _pace(self, device: Device, cluster: Cluster, dtype: Dtype) -> Pace:
        request, speed = self.request, speed_of(device, cluster, dtype)
        passed = request.num_tokens * request.shape.hidden_size * request.stream_bytes
        return Pace(
            layer=layer_seconds(request, speed),
            head=head_seconds(request, speed),
            embedding=passed / speed.bandwidth,
            hand_over=passed / speed.link,
            step=optimizer_seconds(request, speed) / max(1, request.trainable_parameters),
            basis=speed.basis,
        )

    def has_head(self, at: int, num: int) -> bool:
        """Whether the head lies on this stage of so many."""
        return at == (0 if ends_together(self.request.shape) else num - 1)

    def seconds(self, parts: Sequence[Part]) -> list[tuple[float, float]]:
        """(forward, backward) of each stage for a micro batch; together those that the search places by."""
        return [self._of_stage(at, parts) for at in range(len(parts))]

    def _of_stage(self, at: int, parts: Sequence[Part]) -> tuple[float, float]:
        part, pace, last = parts[at], self.paces[parts[at].device], len(parts) - 1
        handing = self._hand_overs(at, last) * pace.hand_over
        forward = part.num * pace.layer[0] + handing + pace.embedding * (at == 0)
        backward = part.num * (pace.layer[1] + part.recompute * pace.layer[0]) + handing
        if self.has_head(at, len(parts)):
            forward, backward = forward + pace.head[0], backward + pace.head[1]
        return forward, backward

    def _hand_overs(self, at: int, last: int) -> int:
        """How often hidden states come or go: where the ends lie together they go back to the first."""
        there_and_back = ends_together(self.request.shape) and last > 0
        return (at < last) + (at > 0) + there_and_back * ((at == 0) + (at == last))

    def waits(self, seconds: Sequence[tuple[float, float]]) -> tuple[float, ...]:
        """The share of a step in which each stage has nothing to compute."""
        if self.way.schedule == "pipelined":
            return flow(seconds, self.way.micro_batches, self.way.order).waits
        through = sum(map(sum, seconds))
        return tuple(1 - sum(each) / through for each in seconds)

    def total(self, parts: Sequence[Part]) -> float:
        """Seconds of a step."""
        return self._computing(self.seconds(parts)) + self._optimizer(parts)

    def time(self, parts: Sequence[Part]) -> StepTime:
        """The same by kind: what is computed on the way that takes longest, shared out as it is over all stages."""
        seconds, together = self.seconds(parts), len(parts)
        through, forward, backward, again, handing = sum(map(sum, seconds)), 0.0, 0.0, 0.0, 0.0
        for at, part in enumerate(parts):
            pace = self.paces[part.device]
            handing += 2 * self._hand_overs(at, together - 1) * pace.hand_over
            forward += part.num * pace.layer[0] + pace.embedding * (at == 0)
            backward += part.num * pace.layer[1]
            again += part.recompute * part.num * pace.layer[0]
            if self.has_head(at, together):
                forward, backward = forward + pace.head[0], backward + pace.head[1]
        share = self._computing(seconds) / max(through, 1e-12)
        return StepTime(
            forward_s=share * forward,
            backward_s=share * backward,
            recompute_s=share * again,
            optimizer_s=self._optimizer(parts),
            communication_s=share * handing,
            tokens=self.request.num_tokens * self.way.micro_batches,
            basis="; ".join(dict.fromkeys(self.paces[part.device].basis for part in parts)),
        )

    def _computing(self, seconds: Sequence[tuple[float, float]]) -> float:
        """All micro batches one after the other through all stages, or as they flow through a pipeline."""
        if self.way.schedule == "pipelined":
            return flow(seconds, self.way.micro_batches, self.way.order).seconds
        return self.way.micro_batches * sum(map(sum, seconds))

    def _optimizer(self, parts: Sequence[Part]) -> float:
        """Each device steps through what is trained there: one after the other, in a pipeline all at once."""
        each = [self._trained(at, parts) * self.paces[part.device].step for at, part in enumerate(parts)]
        return (sum(each) if self.way.schedule == "naive" else max(each)) + SECONDS_PER_STEP[self.request.kind]

    def _trained(self, at: int, parts: Sequence[Part]) -> float:
        """Trained parameters of a stage: the layers have like shares, and of full training the ends theirs."""
        request, shape = self.request, self.request.shape
        embedding, head = (shape.embedding_parameters, shape.head_parameters) if request.full else (0, 0)
        of_layer = (request.trainable_parameters - embedding - head) / shape.num_layers
        return parts[at].num * of_layer + embedding * (at == 0) + head * self.has_head(at, len(parts))
