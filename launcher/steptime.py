"""In: how a model is trained, and what its devices can do. Out: `StepTime`, seconds of one optimizer step, in parts. Pure.

A roofline by kind of layer: a matrix product takes the longer of its arithmetic at a fraction of the card's peak and its
bytes at a fraction of the card's bandwidth; norms, activations and the loss are bytes alone; and what the GPU does in less time
than Python needs to ask for it takes that. Collectives go at the speed of the slowest link of the ring. The fractions are one
number for a class of cards; `Speed.basis` says whether it is by measurements (ours or published ones) or assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from launcher.cluster import Cluster, Device, card_of
from launcher.families import family
from launcher.memory import MemoryRequest, trained_dtype_bytes
from launcher.modelshape import ModelShape, adapted_in_a_layer
from launcher.recipe.schema import Adapter

# Share of the peak that matrix products of a training step reach, by compute capability: where others have published steps, so that
# planned ones agree with them (`benchmarks/published_steps.py`), else assumed. `benchmarks/step_time.py` measures a card that is at hand.
_PUBLISHED_FRACTION = {"8.0": 0.72, "9.0": 0.6}
_ASSUMED_FRACTION = {"7.0": 0.45, "7.5": 0.45, "8.6": 0.6, "8.9": 0.55, "12.0": 0.5}
_FRACTION_OTHERWISE = 0.45
_BANDWIDTH_FRACTION = 0.75  # of the nominal figure, for reading and writing long tensors
_LINK_FRACTION = {"nvlink": 0.75, "pcie": 0.5}  # PCIe: consumer cards copy through host memory
_NETWORK_BYTES_S = 12.5e9  # between hosts, where nothing else is known: 100 Gbit/s
PCIE_BYTES_S = 12e9  # to host memory, for what is offloaded
_HOST_BANDWIDTH = 40e9  # bytes/s of an optimizer step in host memory
# A core with AVX2 or better, as benchmarks/step_time.py measures it: large fp32 products, and copies.
_CORE_FLOPS, _CORE_BANDWIDTH = 9.0e10, 1.5e10
_CPU_FRACTION = 0.85
# Python, autograd and PEFT between two kernels, and the operations of a layer and of an adapted module, forward.
_SECONDS_PER_OP: dict[str, float] = {"cuda": 7e-6, "cpu": 14e-6}
_OPS_PER_LAYER, _OPS_PER_ADAPTER = 36, 7
# The Trainer's own work in a step, with logging: what small models take beyond the rest (benchmarks/results/step_time_*).
SECONDS_PER_STEP = {"cuda": 0.0, "cpu": 0.025}
_UNKNOWN_FLOPS, _UNKNOWN_BANDWIDTH = 15e12, 400e9  # reached by a card that gpus.yaml does not have


class StepTime(BaseModel):
    """Seconds of one optimizer step with every row at the longest length, in parts that follow one another.

    Args:
        tokens: of that step over all ranks, padding and all.
        basis: the fraction of which peak was taken, and whether that was measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    forward_s: float
    backward_s: float
    recompute_s: float
    optimizer_s: float
    communication_s: float
    tokens: int
    basis: str

    @property
    def total_s(self) -> float:
        """All parts together."""
        return sum(self.parts().values())

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.total_s

    def of_rows(self, factor: float) -> StepTime:
        """The time of a rank that has so many times the rows, in a step of as many tokens."""
        worked = {name: getattr(self, name) * factor for name in ("forward_s", "backward_s", "recompute_s")}
        return self.model_copy(update=worked)

    def parts(self) -> dict[str, float]:
        """The parts by the word for each."""
        return {name.removesuffix("_s"): value for name, value in self if name.endswith("_s")}


@dataclass(frozen=True)
class Speed:
    """What one rank can count on: FLOP/s of matrix products, bytes/s of its memory and of the slowest link to its neighbours."""

    flops: float
    bandwidth: float
    link: float
    seconds_per_op: float
    basis: str


def speed_of(device: Device, cluster: Cluster, dtype: str) -> Speed:
    """The speed of a device as part of a cluster, computing in `dtype`."""
    if device.kind == "cpu":
        cores = max(1, device.cores)
        basis = f"{_CPU_FRACTION:.0%} of {cores} × {_CORE_FLOPS / 1e9:.0f} GFLOP/s, measured on an EPYC"
        bandwidth = cores * _CORE_BANDWIDTH
        return Speed(cores * _CORE_FLOPS * _CPU_FRACTION, bandwidth, bandwidth / 4, _SECONDS_PER_OP["cpu"], basis)
    known = card_of(device)
    if known is None:
        basis = f"{device.name} is not in gpus.yaml: {_UNKNOWN_FLOPS / 1e12:.0f} TFLOP/s assumed"
        link = PCIE_BYTES_S
        return Speed(_UNKNOWN_FLOPS, _UNKNOWN_BANDWIDTH, link, _SECONDS_PER_OP["cuda"], basis)
    # fp32 runs as tf32 on the tensor cores only where somebody asks for it.
    peak = {"bf16": known.bf16 or known.fp16, "fp16": known.fp16}.get(dtype, known.fp32) * 1e12
    published = _PUBLISHED_FRACTION.get(known.capability)
    fraction = published or _ASSUMED_FRACTION.get(known.capability, _FRACTION_OTHERWISE)
    link = known.link_gb_s * 1e9 * _LINK_FRACTION[known.link]
    if cluster.num_nodes > 1:
        link = min(link, _NETWORK_BYTES_S)
    basis = f"{fraction:.0%} of {peak / 1e12:.0f} TFLOP/s, {'by published steps' if published else 'assumed'} for {known.name}"
    if cluster.num_nodes > 1:
        basis += f"; {link * 8 / 1e9:.0f} Gbit/s between hosts, assumed"
    bandwidth = known.bandwidth_gb_s * 1e9 * _BANDWIDTH_FRACTION
    return Speed(peak * fraction, bandwidth, link, _SECONDS_PER_OP["cuda"], basis)


def step_time(request: MemoryRequest, speed: Speed, accumulation: int, num_replicas: int) -> StepTime:
    """The time of one optimizer step.

    Args:
        accumulation: micro batches of a rank in a step.
        num_replicas: ranks that each work on rows of their own.
    """
    layers = request.shape.num_layers
    forward, backward = layer_seconds(request, speed)
    loss_forward, loss_backward = head_seconds(request, speed)
    recompute = layers * forward if request.gradient_checkpointing else 0.0
    whole_forward = layers * forward + loss_forward
    whole_backward = layers * backward + loss_backward
    exposed = _communication(request, speed, accumulation, whole_forward + recompute + whole_backward)
    return StepTime(
        forward_s=accumulation * whole_forward,
        backward_s=accumulation * whole_backward,
        recompute_s=accumulation * recompute,
        optimizer_s=optimizer_seconds(request, speed) + SECONDS_PER_STEP[request.kind],
        communication_s=exposed,
        tokens=request.num_tokens * accumulation * num_replicas,
        basis=speed.basis,
    )


def layer_seconds(request: MemoryRequest, speed: Speed) -> tuple[float, float]:
    """Seconds of one layer, forward and backward: what the device takes, or Python where that is longer."""
    ops = (_OPS_PER_LAYER + _OPS_PER_ADAPTER * len(_adapted(request))) * speed.seconds_per_op
    forward, backward = _device_seconds(request, speed)
    return max(forward, ops), max(backward, 1.5 * ops)


def _device_seconds(request: MemoryRequest, speed: Speed) -> tuple[float, float]:
    """Seconds that a device computes on one layer, forward and backward."""
    forward = backward = 0.0
    adapted = _adapted(request)
    for name, (in_features, out_features) in request.shape.linears.items():
        once = _product(request, speed, in_features, out_features)
        forward += once + _dequantize(request, speed, in_features * out_features)
        # Backward: the gradient of the input, and of the weight where it is trained.
        backward += once * (2 if request.full else 1) + _dequantize(request, speed, in_features * out_features)
        if name in adapted:
            extra = _adapter(request, speed, in_features, out_features)
            forward += extra
            backward += 2 * extra
    experts_forward, experts_backward = _experts(request, speed)
    attention = _attention(request, speed)
    elementwise = request.num_tokens * _elementwise_bytes(request.shape, request.compute_dtype_bytes) / speed.bandwidth
    # Flash attention's backward pass computes the scores again: 2.5 times the products of the forward pass.
    return (
        forward + experts_forward + attention + elementwise,
        backward + experts_backward + 2.5 * attention + 1.5 * elementwise,
    )


def _product(request: MemoryRequest, speed: Speed, in_features: int, out_features: int) -> float:
    """Seconds of (tokens, in) × (in, out): two operations an element, or its bytes."""
    tokens, size = request.num_tokens, request.compute_dtype_bytes
    flops = 2 * tokens * in_features * out_features
    moved = size * (in_features * out_features + tokens * (in_features + out_features))
    return max(flops / speed.flops, moved / speed.bandwidth)


def _dequantize(request: MemoryRequest, speed: Speed, elements: int) -> float:
    """Seconds in which a quantized weight is written out in the precision of the computation."""
    stored = {"none": 0.0, "int8": 1.0, "nf4": 0.5}[request.quantization]
    return elements * (stored + request.compute_dtype_bytes) / speed.bandwidth if stored else 0.0


def _adapter(request: MemoryRequest, speed: Speed, in_features: int, out_features: int) -> float:
    """Seconds of LoRA's two thin products: the bytes of input (twice under dropout), of the result and of the sum."""
    adapter = request.adapter or Adapter()
    reads = (2 if adapter.dropout else 1) * in_features + 3 * out_features
    return request.num_tokens * reads * request.compute_dtype_bytes / speed.bandwidth


def _experts(request: MemoryRequest, speed: Speed) -> tuple[float, float]:
    """Seconds of fused experts, which are no linear layers: the parameters that a token passes."""
    shape = request.shape
    if "mlp.experts" not in shape.modules:
        return 0.0, 0.0
    shared, _ = shape.linears.get("mlp.shared_expert.down_proj", (0, 0))
    active = 3 * shape.hidden_size * (shape.mlp_width - shared)
    forward = 2 * request.num_tokens * active / speed.flops
    return forward, forward * (2 if request.full else 1)


def _attention(request: MemoryRequest, speed: Speed) -> float:
    """Seconds of scores and their product with the values, forward: half of them are masked, and kernels skip those."""
    shape = request.shape
    width = shape.num_heads * shape.head_dim
    flops = 4 * request.num_tokens * request.sequence_length * width
    if not family(shape.family).eager_attention:
        if request.batching == "packed" and request.masked:
            # Every token against every other one of the pack, and a mask read for every head.
            pairs = request.num_tokens**2
            mask = pairs * shape.num_heads * request.compute_dtype_bytes
            return max(4 * pairs * width / speed.flops, mask / speed.bandwidth)
        return flops / 2 / speed.flops
    # Written out: every score is computed, and read and written about four times (product, mask, fp32 softmax, cast).
    scores = request.num_tokens * request.sequence_length * shape.num_heads
    return flops / speed.flops + scores * 4 * (request.compute_dtype_bytes + 4) / speed.bandwidth


def _elementwise_bytes(shape: ModelShape, size: int) -> int:
    """Bytes that norms, rotary embedding, residuals and the activation of one layer move, a token."""
    norms = 2 * shape.hidden_size * (6 * 4 + 2 * size)  # in fp32: square, mean, product, cast
    residuals = 2 * shape.hidden_size * 3 * size
    rotary = (shape.num_heads + shape.num_kv_heads) * shape.head_dim * 6 * size
    return norms + residuals + rotary + shape.mlp_width * 5 * size


def head_seconds(request: MemoryRequest, speed: Speed) -> tuple[float, float]:
    """Seconds of the head's product and of cross entropy over the vocabulary in fp32."""
    shape = request.shape
    product = _product(request, speed, shape.hidden_size, shape.vocab_size)
    scores = request.num_tokens * shape.vocab_size / speed.bandwidth
    size = request.compute_dtype_bytes
    # Forward: cast, log-softmax (read and written), the picked one; backward: its gradient, the cast back.
    return product + scores * (size + 4 * 4), product * (2 if request.full else 1) + scores * (4 * 3 + size)


def optimizer_seconds(request: MemoryRequest, speed: Speed) -> float:
    """AdamW reads parameter, gradient and two moments and writes three of them, in fp32; in host memory where it is offloaded."""
    elements = request.trainable_parameters / request.shards
    if request.elsewhere != "none":
        return elements * (28 / _HOST_BANDWIDTH + 4 / PCIE_BYTES_S)
    return elements * 28 / speed.bandwidth


def _communication(request: MemoryRequest, speed: Speed, accumulation: int, computing: float) -> float:
    """Seconds in which collectives are not hidden behind a micro batch's computation of `computing` seconds.

    Volumes of a ring, a rank: all-reduce 2 (n - 1) / n, all-gather and reduce-scatter (n - 1) / n of the bytes.
    """
    num = request.num_processes
    fetched = 0.0
    if request.elsewhere == "parameters":  # each rank fetches its share, forward and backward
        fetched = 2 * request.shape.num_parameters * request.layer_dtype_bytes / num / PCIE_BYTES_S
    if num == 1 or request.strategy in ("single", "device_map"):
        return accumulation * max(fetched - computing, 0.1 * fetched)
    ring = (num - 1) / num / speed.link
    # Gradients and gathered weights travel in the precision they have on the device: adapters in fp32.
    trained = request.trainable_parameters * trained_dtype_bytes(request)
    latency = 20e-6 * math.sqrt(num) * request.shape.num_layers
    if request.strategy == "ddp":
        return max(latency, 2 * ring * trained - 0.6 * computing)
    if request.strategy in ("zero1", "zero2"):
        # The second stage reduces after every micro batch; then the new weights are gathered once.
        reductions = accumulation if request.strategy == "zero2" else 1
        return max(latency, reductions * (ring * trained - 0.6 * computing)) + ring * trained
    weights = request.shape.num_parameters * request.layer_dtype_bytes
    gathered = ring * 2 * weights + ring * trained + fetched
    # Forward and backward gather each layer while the one before it computes; a tenth is never hidden.
    return accumulation * (max(gathered - computing, 0.1 * gathered) + 3 * latency)


def _adapted(request: MemoryRequest) -> set[str]:
    """Names of the linear layers of a layer that have an adapter."""
    return set() if request.full else adapted_in_a_layer(request.shape, (request.adapter or Adapter()).targets)
