"""In: how a model is trained. Out: what a device that holds some of its layers has at each moment of a step. Pure.

The same figures as of a whole model (`launcher.memory`), by layer: what is there for good, what a layer keeps, what works at it.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.families import family
from launcher.memory import (
    ALLOCATOR_RESERVE,
    MemoryRequest,
    always_bytes,
    casts_bytes,
    dequantized_bytes,
    embedding_norm_bytes,
    ends_bytes,
    estimate,
    kept_bytes,
    logits_bytes,
    mask_bytes,
    norm_bytes,
    passing_bytes,
    trained_dtype_bytes,
    untouched_bytes,
    update_bytes,
)
from launcher.placement import Moment


@dataclass(frozen=True)
class _Part:
    """Bytes of one layer, of the embedding or of the head.

    Args:
        stored: weights, adapter and optimizer state; and gradients, where the micro batch before has left them.
        missing: gradients that come with the first micro batch.
        update: what the optimizer needs beside while it steps.
    """

    stored: int
    missing: int
    update: int


def moments(request: MemoryRequest, recompute: bool) -> tuple[Moment, ...]:
    """The moments at which one of several devices can be fullest.

    In their order: all layers have gone forward; the loss is there and the backward pass begins; the last layer of the device goes
    backward; the first does; the optimizer steps. What comes and goes leaves gaps in a card's allocator.
    """
    layer, embedding, head = _parts(request)
    shape, again = request.shape, int(recompute)
    stream = request.num_tokens * shape.hidden_size * request.stream_bytes
    kept, passing = kept_bytes(request), max(passing_bytes(request), norm_bytes(request))
    once = always_bytes(request) + mask_bytes(request) + _positions_bytes(request)
    casts, head_cast, layer_cast = casts_bytes(request)
    casts = (casts - head_cast) // shape.num_layers  # of each layer; a layer that is computed again makes its own again
    flying = stream if recompute else kept
    embedded = embedding_norm_bytes(request) - (0 if recompute else untouched_bytes(request))
    (loss, loss_back), behind = logits_bytes(request), ends_bytes(request) + head_cast

    def moment(keeps: int, works: int, first: int, last: int, each: int) -> Moment:
        return Moment(
            layer=layer.stored + _gapped(request, each),
            flying=_gapped(request, keeps),
            working=_gapped(request, works),
            embedding=embedding.stored + _gapped(request, first),
            head=head.stored + _gapped(request, last),
        )

    there = 0 if recompute else casts
    once_in_layers = once + dequantized_bytes(request)
    last_layer = once_in_layers + passing + again * (kept + layer_cast)
    first_layer = once_in_layers + passing + kept + stream + layer_cast - layer.missing
    step = [part.missing + part.update for part in (layer, embedding, head)]
    return (
        moment(flying, once, embedded, loss + behind, casts),
        moment(flying, once, embedded, loss_back + behind, there),
        moment(flying, last_layer, embedded, head.missing, there),
        moment(0, first_layer, 0, head.missing, layer.missing),
        moment(0, 0, step[1], step[2], step[0]),
    )


def _parts(request: MemoryRequest) -> tuple[_Part, _Part, _Part]:
    """A layer, the embedding and the head: what lies there for good, shared out over them."""
    shape, whole = request.shape, estimate(request)
    embedding, head = trained_ends(request)
    each = (request.trainable_parameters - embedding - head) / shape.num_layers
    ends = [size * request.weights_dtype_bytes for size in (shape.embedding_parameters, shape.head_parameters)]
    trained = max(1, request.trainable_parameters)
    state, update = (whole.adapter_bytes + whole.optimizer_bytes) / trained, update_bytes(request) / trained
    gradient = trained_dtype_bytes(request)
    before = gradient * (1 + _gaps(request)) if request.accumulation > 1 else 0

    def part(weights: float, num: float) -> _Part:
        missing = 0 if before else gradient * num
        return _Part(round(weights + (state + before) * num), round(missing), round(update * num))

    layer = part((whole.weights_bytes - sum(ends)) / shape.num_layers, each)
    return layer, part(ends[0], embedding), part(ends[1], head)


def trained_ends(request: MemoryRequest) -> tuple[int, int]:
    """Parameters of embedding and head that are trained: all of them, those saved in full, or none."""
    shape, known = request.shape, family(request.shape.family)
    ends = (known.embedding, shape.embedding_parameters), (known.head, shape.head_parameters)
    if request.full:
        return ends[0][1], ends[1][1]
    saved = request.adapter.modules_to_save if request.adapter is not None else ()
    embedding, head = (size if any(name.endswith(word) for word in saved) else 0 for name, size in ends)
    return embedding, head


def _positions_bytes(request: MemoryRequest) -> int:
    """Cosines and sines of one row's positions, which every device has once."""
    shape = request.shape
    row = request.num_tokens if request.batching == "packed" else request.sequence_length
    return 2 * row * shape.head_dim * request.compute_dtype_bytes if family(shape.family).rotary is not None else 0


def _gaps(request: MemoryRequest) -> float:
    """The share of what comes and goes that a card's allocator holds beyond it."""
    return ALLOCATOR_RESERVE if request.kind == "cuda" else 0.0


def _gapped(request: MemoryRequest, num_bytes: int) -> int:
    return round(num_bytes * (1 + _gaps(request)))
