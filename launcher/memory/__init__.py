"""In: a model's shape and how it is trained. Out: `Memory`, bytes of one device at its fullest, in parts. Pure.

A step has a few moments at which memory can be fullest; `estimate` counts what is there at each and answers with the
fullest. Read `request` (question and answer), `states` (what stays from step to step), `activations` (a layer), then here.
"""

from __future__ import annotations

from collections.abc import Iterator

from launcher.cluster import GIB
from launcher.memory.activations import experts_back_bytes, kept_bytes, norm_bytes, passing_bytes, untouched_bytes
from launcher.memory.request import Logits, Memory, MemoryRequest, tokens_at_once, unmasked
from launcher.memory.states import (
    adapter_bytes,
    gradients_bytes,
    linear_parameters,
    optimizer_bytes,
    trained_dtype_bytes,
    weights_bytes,
)

__all__ = [
    "ALLOCATOR_RESERVE",
    "CPU_CONTEXT_BYTES",
    "CUDA_CONTEXT_BYTES",
    "GIB",
    "Logits",
    "Memory",
    "MemoryRequest",
    "always_bytes",
    "casts_bytes",
    "dequantized_bytes",
    "embedding_norm_bytes",
    "ends_bytes",
    "estimate",
    "kept_bytes",
    "logits_bytes",
    "mask_bytes",
    "norm_bytes",
    "passing_bytes",
    "tokens_at_once",
    "trained_dtype_bytes",
    "unmasked",
    "untouched_bytes",
    "update_bytes",
]

# Interpreter, torch, transformers and PEFT in one rank (facts: 390 MB after PEFT, 490 MB with the Trainer).
CPU_CONTEXT_BYTES = round(0.45 * GIB)
# CUDA context, cuBLAS and NCCL: about what nvidia-smi shows beyond torch's own count; and what the allocator holds
# beyond what is in use, as a share of all that comes and goes. Constants of experience, not measured on these cards.
CUDA_CONTEXT_BYTES = round(0.6 * GIB)
ALLOCATOR_RESERVE = 0.06
_ZERO3_LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters: so many stay gathered for the next use
_ZERO3_SUB_GROUP = 10**9  # and its sub_group_size: so many of a rank's parameters make a step of their own

# Activations, logits, buffers and gradients at a moment. All else is always there.
_Moment = tuple[int, int, int, int]


def estimate(request: MemoryRequest) -> Memory:
    """The memory of one device, in parts. A device map's is that of all its devices together."""
    activations, logits, buffers, gradients = max(_moments(request), key=sum)
    context = CPU_CONTEXT_BYTES
    if request.kind == "cuda":
        context = CUDA_CONTEXT_BYTES + round(ALLOCATOR_RESERVE * (gradients + activations + logits + buffers))
    return Memory(
        weights_bytes=weights_bytes(request),
        adapter_bytes=adapter_bytes(request),
        gradients_bytes=gradients,
        optimizer_bytes=optimizer_bytes(request),
        activations_bytes=activations,
        logits_bytes=logits,
        buffers_bytes=buffers,
        context_bytes=context,
    )


def _moments(request: MemoryRequest) -> Iterator[_Moment]:
    """The moments of a step at which memory can be fullest, in their order."""
    shape = request.shape
    # Gradients fill up during the last backward pass; with accumulation they are there from the second micro batch on.
    gradients = gradients_bytes(request)
    before = gradients if request.accumulation > 1 or request.strategy == "zero3" else 0  # ZeRO-3 reserves their room
    loss, loss_back = logits_bytes(request)
    always, written_out = always_bytes(request), dequantized_bytes(request)
    width = shape.mlp_width * request.compute_dtype_bytes + shape.hidden_size * request.stream_bytes
    kept = kept_bytes(request)
    # Where the MLP's activation is undone no weight is written out.
    passing = max(passing_bytes(request) - written_out, request.num_tokens * width)
    layers = (
        _layer_inputs_bytes(request)
        if request.gradient_checkpointing
        else shape.num_layers * kept - untouched_bytes(request)
    )
    layers += embedding_norm_bytes(request)
    activations = layers + ends_bytes(request) + mask_bytes(request)
    again = kept if request.gradient_checkpointing else 0
    casts, head_cast, layer_casts = casts_bytes(request)
    embedding, head, held, layer = _gathered_bytes(request)

    # The first layers are gathered; the head is gathered; the loss is there; the backward pass begins.
    yield 0, 0, always + 2 * embedding + (2 if held else 1) * layer, before
    yield activations, 0, always + written_out + casts + held + 2 * head + layer, before
    yield activations, loss, always + casts + held + (2 * head or layer), before
    yield activations, loss_back, always + (head_cast if again else casts) + held + head, before
    if norm := norm_bytes(request):
        yield layers + again, 0, always + written_out + casts + held + layer + norm, before
    # The last layer goes backward; the one before it is gathered, while gradients leave.
    below = layers - layers // shape.num_layers
    always_back = always + written_out + held + (layer_casts if again else casts - head_cast)
    always_back += embedding if held and request.full else 0  # the gradient of a tied head waits for the embedding's
    passing_layers = (3 if request.full else 2) * layer
    headed = max(before, _gradient_share(request, shape.head_parameters))
    yield layers + again + passing, 0, always_back + passing_layers, headed
    yield below, 0, always_back + (4 if request.full else 3) * layer, headed
    yield from _experts_going_back(request, layer, always_back, before)
    # The first layer goes backward: what the others kept is gone, their gradients are there. Then the embedding.
    first = request.num_tokens * shape.hidden_size * request.stream_bytes
    missing = _gradient_share(request, shape.layer_parameters + shape.embedding_parameters)
    always_first = always_back - (0 if again else casts - head_cast - layer_casts)
    yield first + kept + passing, 0, always_first + passing_layers, max(before, gradients - missing)
    yield 0, 0, always + held + (2 * embedding if request.full else 0) + layer, gradients
    # The optimizer steps. ZeRO-1 has dropped the gradients of other ranks' parameters by then.
    yield 0, 0, always + update_bytes(request), gradients // (request.shards if request.strategy == "zero1" else 1)


def logits_bytes(request: MemoryRequest) -> tuple[int, int]:
    """The logits while the loss is computed, and when the backward pass begins.

    There in the compute dtype, in fp32, and as log-softmax; then the log-softmax and two gradients, all fp32. In parts: those of a part,
    with its gradient, and of all tokens the hidden states, those chosen of them and their gradient (`worker/headloss.py`).
    """
    c, tokens, vocabulary = request.compute_dtype_bytes, request.num_tokens, request.shape.vocab_size
    if request.logits != "parts":
        return tokens * vocabulary * (c + 8 if c < 4 else 8), tokens * vocabulary * 12
    stream = request.shape.hidden_size * request.stream_bytes
    at_once = min(tokens, tokens_at_once(vocabulary, request.kind))
    return at_once * (vocabulary * (c + 4 if c < 4 else 4) + stream) + 3 * tokens * stream, 2 * tokens * stream


def _experts_going_back(request: MemoryRequest, layer: int, always: int, before: int) -> Iterator[_Moment]:
    """Experts are most of their layer, and their gradients are there as one tensor each before FSDP takes them, with what the layer keeps.

    Those of the last product, a third of them, while the activation of the MLP is undone; those of all, with what attention kept. In
    the second layer from the bottom or from the top, where another layer arrives and the gradients of a third leave.
    """
    shape = request.shape
    if not layer or not request.full or "mlp.experts" not in shape.modules:
        return
    stream = request.num_tokens * shape.hidden_size * request.stream_bytes
    each, given = (stream, stream) if request.gradient_checkpointing else (kept_bytes(request), 0)
    weights = shape.modules["mlp.experts"] * request.compute_dtype_bytes
    undone = kept_bytes(request) + passing_bytes(request) + weights // 3
    for below in (1, shape.num_layers - 2):
        gone = shape.head_parameters + (shape.num_layers - 1 - below) * shape.layer_parameters
        gradients = max(before, _gradient_share(request, gone))
        for own in (undone, experts_back_bytes(request) + weights):
            yield max(0, below) * each + given + own, 0, always + 3 * layer, gradients


def _gradient_share(request: MemoryRequest, parameters: int) -> int:
    """The gradients of some of the base's parameters, where they are trained."""
    return gradients_bytes(request) * parameters // request.trainable_parameters if request.full else 0


def _layer_inputs_bytes(request: MemoryRequest) -> int:
    """What checkpointing keeps: the input of each layer."""
    return request.shape.num_layers * request.num_tokens * request.shape.hidden_size * request.stream_bytes


def embedding_norm_bytes(request: MemoryRequest) -> int:
    """What a norm of the embedding keeps where a gradient goes through it: its input in fp32, and beside it the looked-up values."""
    if not request.norms_embedding or not (request.full or request.gradient_checkpointing):
        return 0
    looked_up = 0 if request.full or request.compute_dtype_bytes == 4 else request.compute_dtype_bytes
    return request.num_tokens * request.shape.hidden_size * (4 + looked_up)


def ends_bytes(request: MemoryRequest) -> int:
    """What is kept behind the layers: the input of the last norm, and where they are trained that of its weight and the head."""
    shape, s = request.shape, request.stream_bytes
    per_value = 4 if shape.rms_norm or request.kind == "cuda" else s
    if request.full:
        per_value += request.compute_dtype_bytes + (s if shape.rms_norm else 0)
    return request.num_tokens * shape.hidden_size * per_value


def mask_bytes(request: MemoryRequest) -> int:
    """The one mask that all layers make theirs from, a byte a pair of tokens."""
    row = request.num_tokens if request.batching == "packed" else request.sequence_length
    return request.num_tokens * row if request.masked else 0


def always_bytes(request: MemoryRequest) -> int:
    """Buffers that are there at every moment, such as DDP's buckets."""
    shape = request.shape
    buffers = 0
    trained = request.trainable_parameters * trained_dtype_bytes(request)
    if request.strategy == "ddp" and request.num_processes > 1:
        buffers += trained
    if request.strategy.startswith("zero"):
        buffers += shape.hidden_size**2 * request.compute_dtype_bytes  # the bucket that transformers chooses for `auto`
    return buffers


def dequantized_bytes(request: MemoryRequest) -> int:
    """The largest quantised matrix, written out in the compute dtype while its layer computes."""
    sizes = (in_features * out_features for in_features, out_features in request.shape.linears.values())
    return max(sizes, default=0) * request.compute_dtype_bytes if request.quantization != "none" else 0


def casts_bytes(request: MemoryRequest) -> tuple[int, int, int]:
    """Copies of trained weights that autocast makes and keeps: of all layers and the head, of the head, of one layer.

    They live until the forward pass ends, and on where the backward pass needs them; checkpointing makes a layer's anew.
    """
    shape, c = request.shape, request.compute_dtype_bytes
    if c == 4 or request.hands_over:
        return 0, 0, 0
    if not request.full:
        return request.trainable_parameters * c, 0, request.trainable_parameters * c // shape.num_layers
    if not request.autocast:
        return 0, 0, 0
    head = shape.vocab_size * shape.hidden_size * c
    layer = linear_parameters(shape) * c
    return shape.num_layers * layer + head, head, layer


def _gathered_bytes(request: MemoryRequest) -> tuple[int, int, int, int]:
    """Whole weights in the compute dtype where they lie sharded: embedding, head, what stays whole, and one layer.

    FSDP2 gathers into one flat buffer and copies out of it. On the way back a layer is there whole while the next one
    arrives, and with full training the gradients leave through a third such buffer. A head that is the embedding
    stays whole from the beginning to the end. ZeRO-3 keeps what it gathered until it has too much.
    """
    shape, c = request.shape, request.compute_dtype_bytes
    if request.strategy == "zero3":
        return 0, 0, min(shape.num_parameters, _ZERO3_LIVE_PARAMETERS) * c, 0
    if request.strategy != "fsdp":
        return 0, 0, 0, 0
    end, layer = shape.vocab_size * shape.hidden_size * c, shape.layer_parameters * c
    return (end, 0, end, layer) if shape.tie_word_embeddings else (end, end, 0, layer)


def update_bytes(request: MemoryRequest) -> int:
    """What the step needs beside: nothing in fused AdamW and in the 8-bit ones.

    ZeRO copies gradients in half precision to fp32: of all that a rank steps on, under ZeRO-3 of a group at a time,
    which is full with the parameter that exceeds 10⁹ values (stage3.py, `_prepare_sub_group`, `_release_sub_group`).
    """
    copied = request.strategy.startswith("zero") and request.compute_dtype_bytes < 4
    if request.optimizer != "adamw" or request.elsewhere != "none" or not copied:
        return 0
    values = request.trainable_parameters // request.shards
    if request.strategy != "zero3":
        return 4 * values
    largest = max(request.shape.modules.values()) // request.shards
    # Flattened in half precision first.
    return (4 + request.compute_dtype_bytes) * min(values, _ZERO3_SUB_GROUP + largest)
