"""What is there from one step to the next: weights, adapter, gradients, optimizer state. Bytes of one device."""

from __future__ import annotations

from launcher.memory.activations import ADAPTER_DTYPE_BYTES
from launcher.memory.request import MemoryRequest
from launcher.modelshape import ModelShape

# adamw keeps two fp32 values a parameter, bitsandbytes two bytes and their block constants.
_OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03}
# int8: a byte a weight (and a fp32 scale a row, added below). nf4: half a byte and, a block of 64, a one-byte scale
# that is itself scaled in blocks of 256 (double quantization).
_QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}


def trained_dtype_bytes(request: MemoryRequest) -> int:
    """Bytes of a trained value and of its gradient."""
    return request.weights_dtype_bytes if request.full else ADAPTER_DTYPE_BYTES


def weights_bytes(request: MemoryRequest) -> int:
    """The base: linear layers as they are quantized; embedding, norms, biases and head in the weights' dtype."""
    if request.elsewhere == "parameters":
        return 0
    shape, shards = request.shape, request.shards if request.strategy in ("zero3", "fsdp") else 1
    if request.quantization == "none":
        return shape.num_parameters * request.weights_dtype_bytes // shards
    quantized = shape.num_layers * linear_parameters(shape)
    rows = sum(out for _, out in shape.linears.values())
    scales = 4 * shape.num_layers * rows if request.quantization == "int8" else 0
    rest = (shape.num_parameters - quantized) * request.weights_dtype_bytes
    return (round(quantized * _QUANTIZED_BYTES[request.quantization]) + scales + rest) // shards


def adapter_bytes(request: MemoryRequest) -> int:
    """The trained weights beside the base."""
    if request.full:
        return 0
    return (
        request.trainable_parameters
        * ADAPTER_DTYPE_BYTES
        // (request.shards if request.strategy in ("zero3", "fsdp") else 1)
    )


def gradients_bytes(request: MemoryRequest) -> int:
    """The gradients of a whole step.

    Where the optimizer is offloaded ZeRO-2 and ZeRO-3 take each to the host as soon as it is reduced (stage3.py, `partition_grads`): the
    largest is there as a whole.
    """
    if request.elsewhere != "none" and request.strategy in ("zero2", "zero3"):
        shape = request.shape
        largest = max(*shape.modules.values(), *shape.outer.values()) if request.full else 0
        return min(request.trainable_parameters, largest) * trained_dtype_bytes(request)
    shards = request.shards if request.strategy in ("zero2", "zero3", "fsdp") else 1
    return request.trainable_parameters * trained_dtype_bytes(request) // shards


def optimizer_bytes(request: MemoryRequest) -> int:
    """The optimizer's state; DeepSpeed steps on an fp32 copy of what is trained, whatever its precision."""
    if request.elsewhere != "none":
        return 0
    per_parameter = _OPTIMIZER_BYTES[request.optimizer]
    if request.strategy.startswith("zero"):
        per_parameter += 4
    return round(request.trainable_parameters * per_parameter) // request.shards


def linear_parameters(shape: ModelShape) -> int:
    """Weights of the linear layers of one layer."""
    return sum(in_features * out_features for in_features, out_features in shape.linears.values())
