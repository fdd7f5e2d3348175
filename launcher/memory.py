"""In: a model's shape and how it is trained. Out: `Memory`, bytes of one device at its fullest, in parts. Pure.

The formulas count what autograd keeps for the backward pass by kind of layer, as read off transformers 5.23 and PEFT
0.21 and measured on small models on a CPU. Only families with written-out attention keep what grows with the square
of the length.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from launcher.families import family
from launcher.modelshape import ModelShape, adapted_modules
from launcher.recipe.schema import Adapter

GIB = 2**30
# Interpreter, torch, transformers and PEFT in one rank (facts: 390 MB after PEFT, 490 MB with the Trainer).
_CPU_CONTEXT_BYTES = round(0.45 * GIB)
# CUDA context, cuBLAS and NCCL: about what nvidia-smi shows beyond torch's own count; and what the allocator holds
# beyond what is in use, as a share of all that comes and goes. Constants of experience, not measured on these cards.
_CUDA_CONTEXT_BYTES = round(0.6 * GIB)
_ALLOCATOR_RESERVE = 0.06
# adamw keeps two fp32 values a parameter, bitsandbytes two bytes and their block constants.
_OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03}
# int8: a byte a weight (and a fp32 scale a row, added below). nf4: half a byte and, a block of 64, a one-byte scale
# that is itself scaled in blocks of 256 (double quantization).
_QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
_ADAPTER_DTYPE_BYTES = 4  # PEFT keeps adapters in fp32 over a half-precision base
# A CUDA kernel keeps the mask of dropout as one byte a value; on a CPU it is the fp32 noise that was multiplied.
_DROPOUT_MASK_BYTES = {"cuda": 1, "cpu": 4}
_ACTIVE_EXPERTS = 2  # Mixtral's num_experts_per_tok
_ZERO_BUCKET_ELEMENTS = 5 * 10**8  # DeepSpeed's own default for reduce_bucket_size


class MemoryRequest(BaseModel):
    """One way to train a model. Bytes are a value's; `sequence_length` in tokens, `micro_batch` in rows of that length.

    `weights_dtype_bytes` is that of the base as it lies in memory (what is quantized is counted apart), `adapter` says
    which inputs have to be kept; None is LoRA on the family's own targets without dropout.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: ModelShape
    trainable_parameters: int
    full: bool
    adapter: Adapter | None = None
    quantization: Literal["none", "int8", "nf4"] = "none"
    weights_dtype_bytes: int = 2
    compute_dtype_bytes: int = 2
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    micro_batch: int
    sequence_length: int
    gradient_checkpointing: bool = False
    strategy: Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp", "device_map"] = "single"
    offload: Literal["none", "optimizer", "parameters"] = "none"
    num_processes: int = 1
    kind: Literal["cuda", "cpu"] = "cuda"

    @property
    def num_tokens(self) -> int:
        """Tokens of a micro batch, padding and all."""
        return self.micro_batch * self.sequence_length

    @property
    def layer_dtype_bytes(self) -> int:
        """Bytes of a weight while its layer computes: FSDP2 keeps trained weights in fp32 and gathers them in the compute dtype."""
        gathered_smaller = self.strategy == "fsdp" and self.full
        return self.compute_dtype_bytes if gathered_smaller else self.weights_dtype_bytes

    @property
    def stream_bytes(self) -> int:
        """Bytes of a value between the layers: fp32 weights under autocast keep it in fp32."""
        return max(self.layer_dtype_bytes, self.compute_dtype_bytes)


class Memory(BaseModel):
    """Bytes of the fullest device at its fullest moment, in parts that are there together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights_bytes: int
    adapter_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    buffers_bytes: int
    context_bytes: int

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The parts by the word for each: weights, adapter, gradients, …, context."""
        return {name.removesuffix("_bytes"): value for name, value in self}


def estimate(request: MemoryRequest) -> Memory:
    """The memory of one device, in parts. A device map's is that of all its devices together."""
    shards = request.num_processes if request.strategy in ("zero1", "zero2", "zero3", "fsdp") else 1
    params_sharded = request.strategy in ("zero3", "fsdp")
    grads_sharded = params_sharded or request.strategy == "zero2"
    weights = 0 if request.offload == "parameters" else _weights_bytes(request) // (shards if params_sharded else 1)
    trained_dtype_bytes = request.weights_dtype_bytes if request.full else _ADAPTER_DTYPE_BYTES
    trained = request.trainable_parameters * trained_dtype_bytes
    gradients = trained // (shards if grads_sharded else 1)
    logits = _logits_bytes(request)
    activations = _activations_bytes(request, logits)
    buffers = _buffers_bytes(request, trained)
    adapter = 0 if request.full else trained // (shards if params_sharded else 1)
    optimizer = _optimizer_bytes(request, shards)
    context = _CPU_CONTEXT_BYTES
    if request.kind == "cuda":
        context = _CUDA_CONTEXT_BYTES + round(_ALLOCATOR_RESERVE * (gradients + activations + logits + buffers))
    return Memory(
        weights_bytes=weights,
        adapter_bytes=adapter,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=activations,
        logits_bytes=logits,
        buffers_bytes=buffers,
        context_bytes=context,
    )


def _weights_bytes(request: MemoryRequest) -> int:
    """The base: linear layers as they are quantized; embedding, norms, biases and head in the weights' dtype."""
    shape = request.shape
    if request.quantization == "none":
        return shape.num_parameters * request.weights_dtype_bytes
    quantized = shape.num_layers * _linear_parameters(shape)
    scales = (
        4 * shape.num_layers * sum(out for _, out in shape.linears.values()) if request.quantization == "int8" else 0
    )
    rest = (shape.num_parameters - quantized) * request.weights_dtype_bytes
    return round(quantized * _QUANTIZED_BYTES[request.quantization]) + scales + rest


def _linear_parameters(shape: ModelShape) -> int:
    """Weights of the linear layers of one layer."""
    return sum(in_features * out_features for in_features, out_features in shape.linears.values())


def _optimizer_bytes(request: MemoryRequest, shards: int) -> int:
    """The optimizer's state; DeepSpeed adds an fp32 copy of what is trained in half precision."""
    if request.offload != "none":
        return 0
    per_parameter = _OPTIMIZER_BYTES[request.optimizer]
    if request.strategy.startswith("zero") and request.compute_dtype_bytes == 2:
        per_parameter += 4
    return round(request.trainable_parameters * per_parameter) // shards


def _logits_bytes(request: MemoryRequest) -> int:
    """Logits in the compute dtype; of the loss in fp32 the log-softmax and, in the backward pass, two gradients."""
    return request.num_tokens * request.shape.vocab_size * (request.compute_dtype_bytes + 4 * 3)


def _activations_bytes(request: MemoryRequest, logits_bytes: int) -> int:
    """What the layers keep. With checkpointing: their inputs, and one layer computed again.

    That one layer comes when the logits have gone: only what it needs beyond their room counts.
    """
    shape = request.shape
    layer = request.num_tokens * layer_bytes_per_token(request)
    ends = request.num_tokens * shape.hidden_size * (4 + (2 * request.stream_bytes if request.full else 0))
    if request.gradient_checkpointing:
        inputs = shape.num_layers * request.num_tokens * shape.hidden_size * request.stream_bytes
        return inputs + ends + max(0, layer - logits_bytes)
    return shape.num_layers * layer + ends


def layer_bytes_per_token(request: MemoryRequest) -> int:
    """Bytes that one layer keeps for the backward pass, a token.

    Norms keep their input in fp32, and their output where their own weight is trained. Attention keeps query, key,
    value (with a padding mask: one for each query head), its output and a number a head; written out, the softmax in
    fp32 and its cast. An MLP keeps what its activation needs. A linear layer keeps its input only where its weight or
    an adapter on it is trained.
    """
    shape, value_bytes = request.shape, request.compute_dtype_bytes
    q_size = shape.num_heads * shape.head_dim
    num_norms = sum(name not in shape.linears and size in _norm_sizes(shape) for name, size in shape.modules.items())
    norms = num_norms * shape.hidden_size * (4 + (request.stream_bytes if request.full and shape.rms_norm else 0))
    if any(name.endswith(("q_norm", "q_layernorm")) for name in shape.modules):
        norms += (q_size + shape.num_kv_heads * shape.head_dim) * (4 + (request.stream_bytes if request.full else 0))
    attention = 4 * q_size * value_bytes + 4 * shape.num_heads
    if family(shape.family).eager_attention:
        attention += shape.num_heads * request.sequence_length * (4 if value_bytes == 4 else 4 + value_bytes)
    active = _ACTIVE_EXPERTS if "mlp.experts" in shape.modules else 1
    mlp = active * shape.mlp_tensors * shape.intermediate_size * value_bytes
    return norms + attention + mlp + _kept_inputs_bytes(request)


def _norm_sizes(shape: ModelShape) -> tuple[int, ...]:
    """Parameters of a norm over the hidden size: a weight, with LayerNorm also a bias."""
    return (shape.hidden_size,) if shape.rms_norm else (2 * shape.hidden_size,)


def _kept_inputs_bytes(request: MemoryRequest) -> int:
    """Inputs of linear layers whose weight or adapter is trained, a token.

    Query, key and value (gate and up) have one input; they share it where nothing makes a copy of its own: a cast under
    autocast, or an adapter's dropout, whose mask comes on top.
    """
    shape, value_bytes = request.shape, request.compute_dtype_bytes
    if request.full:
        wanted, dropout, shared = set(shape.linears), False, request.layer_dtype_bytes == value_bytes
    else:
        adapter = request.adapter or Adapter()
        wanted, dropout = _adapted_in_a_layer(shape, adapter), adapter.dropout > 0
        shared = not dropout and value_bytes == _ADAPTER_DTYPE_BYTES
    kept = 0
    seen = set()
    last = {name.rpartition(".")[0]: name for name in shape.linears}  # attention's and MLP's own output projection
    for name, (in_features, _) in shape.linears.items():
        block = name.rpartition(".")[0]
        key = (block, name == last[block])
        if name not in wanted or (shared and key in seen):
            continue
        seen.add(key)
        # With autograd's own copy of it: the input of attention's output projection is what attention keeps anyway.
        is_attention_output = key[1] and not block.startswith("mlp")
        kept += in_features * (0 if is_attention_output and (request.full or shared) else value_bytes)
        kept += in_features * _DROPOUT_MASK_BYTES[request.kind] if dropout else 0
    return kept


def _adapted_in_a_layer(shape: ModelShape, adapter: Adapter) -> set[str]:
    """Names, from the layer on, of the linear layers of the first layer that have an adapter."""
    prefix = f"{family(shape.family).layers}.0."
    return {name.removeprefix(prefix) for name in adapted_modules(shape, adapter.targets) if name.startswith(prefix)}


def _buffers_bytes(request: MemoryRequest, trained_bytes: int) -> int:
    """What communication, casts and dequantization hold beside the model."""
    shape = request.shape
    largest = max((in_features * out_features for in_features, out_features in shape.linears.values()), default=0)
    buffers = 0
    if request.quantization != "none":
        buffers += largest * request.compute_dtype_bytes
    if request.full and request.layer_dtype_bytes > request.compute_dtype_bytes and not request.gradient_checkpointing:
        buffers += (shape.num_parameters - shape.embedding_parameters) * request.compute_dtype_bytes
    if request.strategy == "ddp" and request.num_processes > 1:
        buffers += trained_bytes
    if request.strategy in ("zero1", "zero2"):
        buffers += min(trained_bytes, _ZERO_BUCKET_ELEMENTS * request.compute_dtype_bytes)
    if request.strategy in ("zero3", "fsdp"):
        # Two layers gathered at once (this and the next), the gradients of one, and embedding and head.
        ends = shape.embedding_parameters + shape.head_parameters
        share = shape.layer_parameters if request.full else request.trainable_parameters // shape.num_layers
        gathered = (2 * shape.layer_parameters + ends) * request.layer_dtype_bytes
        buffers += gathered + share * request.compute_dtype_bytes
    return buffers
