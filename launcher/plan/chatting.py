"""In: what a run has trained, and a device map. Out: where its layers lie to talk to it, with room for what is said. Pure.

Nothing is kept for a backward pass, so a layer is its weights and its share of the cache of keys and values, and its time is how
long its weights take to be read, once a token. What fits on no device may lie in host memory: those are the first layers, which
are fetched to the first device each time, so that nothing goes back and forth between the devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict

from launcher.cluster import GIB, Cluster, Device
from launcher.errors import DoesNotFitError, RecipeError, UsageError
from launcher.families import family
from launcher.memory import ALLOCATOR_RESERVE, CUDA_CONTEXT_BYTES, MemoryRequest, estimate
from launcher.placement import Layers, Moment, Place, Placement, Search
from launcher.plan.mapped import range_problems
from launcher.plan.model import DTYPE_BYTES, Plan, StagePlan
from launcher.plan.pacing import ends_together
from launcher.plan.searching import FREE_SHARE
from launcher.plan.spreading import as_parts
from launcher.recipe.device_maps import DeviceMap
from launcher.steptime import PCIE_BYTES_S, Speed, head_seconds, layer_seconds, speed_of

CONTEXT_TOKENS = 4096  # room for question and answer together, where nobody asks for another
# A long question is read in pieces, so that what a layer works with does not grow with it.
PIECE_TOKENS = 512
_NOBODY_SAYS_MORE = 2**17  # where a config has no longest row
_ROUND = 256  # so many tokens more or less are not worth a word


class ChatPlan(BaseModel):
    """A trained model on the devices of a device map.

    Args:
        stages: in the order of the layers; their seconds are of one token.
        context: tokens that there is room for, question and answer; longest: the most that there could be on these devices, and that
            the model was made for.
        cache_bytes: keys and values of `context` tokens, on all devices together.
        in_host: so many of the first layers lie in host memory; host_bytes: their weights.
        piece: tokens of a question that are read at once; None where the model reads it as a whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cluster: Cluster
    stages: tuple[StagePlan, ...]
    context: int
    longest: int
    cache_bytes: int
    in_host: int
    host_bytes: int
    piece: int | None

    @property
    def tokens_per_second(self) -> float:
        """Of an answer: one device after the other computes each token."""
        return 1 / sum(stage.seconds for stage in self.stages)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of one layer, of the ends, and of the cache of one layer and token; `stored` is weights and adapter."""

    stored: int
    embedding: int
    head: int
    cached: int


def chat_plan(plan: Plan, cluster: Cluster, device_map: DeviceMap | None, context: int | None = None) -> ChatPlan:
    """The fastest placement with room for so many tokens, with as few layers in host memory as can be, none unless the map allows it.

    Args:
        context: where nobody asks for so many, 4,096, or the model's own longest row where that is shorter.

    Raises:
        RecipeError: the device map has ranges of another model, or of more devices.
        UsageError: the model was not made for so many tokens.
        DoesNotFitError: it does not fit; quantised layers do not lie in host memory.
    """
    if problems := list(range_problems(device_map, cluster, plan.shape)):
        raise RecipeError(problems)
    num, most = plan.shape.num_layers, plan.shape.positions
    if context is None:
        context = min(CONTEXT_TOKENS, most or CONTEXT_TOKENS)
    elif most is not None and context > most:
        found = f"{plan.shape.name} was made for {most:,} tokens at most, as its config says"
        raise UsageError(f"--context {context}", found, f"--context {most}")
    for in_host in range(num + 1 if _may_spill(plan, device_map) else 1):
        for spared in (FREE_SHARE, 0.0):  # cards are filled to the last byte only where that spares the host
            found_so = _placed(plan, cluster, device_map, context, in_host, spared)
            if found_so is not None:
                longest = _most_tokens(plan, cluster, device_map, most or _NOBODY_SAYS_MORE)
                return _as_planned(plan, cluster, found_so, context, max(context, longest), in_host)
    raise _too_much(plan, cluster, device_map, context)


def _may_spill(plan: Plan, device_map: DeviceMap | None) -> bool:
    """Whether layers may lie in host memory, from where quantised ones cannot be fetched."""
    return device_map is not None and device_map.spill == "host" and plan.recipe.model.quantization == "none"


def _most_tokens(plan: Plan, cluster: Cluster, device_map: DeviceMap | None, below: int) -> int:
    """The largest context, in steps of 256, for which there is room; 0 for none."""
    in_hosts = (0, plan.shape.num_layers) if _may_spill(plan, device_map) else (0,)
    low, high = 0, below // _ROUND
    while low < high:
        middle = (low + high + 1) // 2
        fits = any(_placed(plan, cluster, device_map, middle * _ROUND, in_host, 0.0) for in_host in in_hosts)
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * _ROUND


def _placed(
    plan: Plan, cluster: Cluster, device_map: DeviceMap | None, context: int, in_host: int, spared: float
) -> Placement | None:
    """The best placement with so many layers in host memory; None where it does not fit.

    Args:
        spared: share of every card that is left free.
    """
    sizes, request = _sizes(plan), _request(plan, _piece(plan, context))
    working = _working_bytes(request, context)
    # Layers in host memory are computed on the first device, one after the other: cache for all of them, room for one.
    fetched = in_host * sizes.cached * context + sizes.stored + working if in_host else 0
    moment = Moment(
        layer=sizes.stored + sizes.cached * context,
        working=working,
        embedding=sizes.embedding + fetched,
        head=sizes.head + _logits_bytes(request),
    )
    layers = Layers(
        num=plan.shape.num_layers - in_host,
        keeping=(moment,),
        recomputing=(moment,),
        input_bytes=0,
        logits_bytes=0,
        ends_together=ends_together(plan.shape),
    )
    places = [
        replace(_place(plan, device, cluster, in_host * sizes.stored), budget_bytes=_budget_bytes(device, spared))
        for device in cluster.devices
    ]
    ranges = device_map.ranges() if device_map is not None else None
    search = Search(layers, places, "naive", recompute=False)
    if ranges is not None and in_host == 0:
        return search.given(as_parts(ranges, plan.shape.num_layers, len(places)))
    return search.best()


def _too_much(plan: Plan, cluster: Cluster, device_map: DeviceMap | None, context: int) -> DoesNotFitError:
    """What is needed of what there is, and what would fit: each remedy was planned."""
    sizes, num = _sizes(plan), plan.shape.num_layers
    weights, cache = num * sizes.stored + sizes.embedding + sizes.head, num * sizes.cached * context
    free = sum(device.memory_bytes - device.reserved_bytes for device in cluster.devices)
    by_hand = device_map is not None and device_map.ranges() is not None
    by_itself = device_map.model_copy(update={"placement": "auto"}) if device_map is not None else None
    remedies = []
    if fewer := _most_tokens(plan, cluster, device_map, context):
        remedies.append(f"--context {fewer}")
    if by_hand and _placed(plan, cluster, by_itself, context, 0, 0.0) is not None:
        remedies.append("placement: auto in the device map")
    if plan.recipe.model.quantization != "none":
        remedies.append("cards with more memory: quantised layers are not kept in host memory")
    elif (device_map is None or device_map.spill == "none") and _with_spill(plan, cluster, context):
        remedies.append(f"spill: host{' and placement: auto' if by_hand else ''} in the device map")
    return DoesNotFitError(
        f"to talk to {plan.name} on {' + '.join(device.name for device in cluster.devices)}",
        f"{weights / GIB:.1f} GiB of weights and {cache / GIB:.1f} GiB of cache for {context:,} tokens "
        f"on {free / GIB:.1f} GiB free together",
        ", or ".join(remedies)
        or "use cards with more memory: there is no room for embedding, head and the cache of a short talk",
    )


def _with_spill(plan: Plan, cluster: Cluster, context: int) -> bool:
    """Whether there is room with all layers in host memory."""
    return _placed(plan, cluster, None, context, plan.shape.num_layers, 0.0) is not None


def _as_planned(plan: Plan, cluster: Cluster, found: Placement, context: int, longest: int, in_host: int) -> ChatPlan:
    """What is found, with the layers counted from the first in host memory on."""
    sizes, last, stages = _sizes(plan), len(found.stages) - 1, []
    for at, stage in enumerate(found.stages):
        is_first = at == 0
        stages.append(
            StagePlan(
                device=stage.device,
                first=stage.start + in_host,
                stop=stage.stop + in_host,
                embedding=is_first,
                head=is_first if ends_together(plan.shape) else at == last,
                recompute=False,
                memory_bytes=stage.memory_bytes + CUDA_CONTEXT_BYTES,
                seconds=stage.seconds,
                forward_s=stage.seconds,
                waits=0.0,
            )
        )
    return ChatPlan(
        cluster=cluster,
        stages=tuple(stages),
        context=context,
        longest=longest,
        cache_bytes=plan.shape.num_layers * sizes.cached * context,
        in_host=in_host,
        host_bytes=in_host * sizes.stored,
        piece=None if plan.shape.remote_code else PIECE_TOKENS,
    )


def _piece(plan: Plan, context: int) -> int:
    """Tokens that are read at once: a model's own code takes a question as a whole."""
    return context if plan.shape.remote_code else min(PIECE_TOKENS, context)


def _request(plan: Plan, tokens: int) -> MemoryRequest:
    """What reading so many tokens asks for: nothing is trained, and the model computes in the precision that its weights have."""
    recipe, stored = plan.recipe, DTYPE_BYTES[plan.weights_dtype]
    return MemoryRequest(
        shape=plan.shape,
        trainable_parameters=plan.trainable_parameters,
        full=recipe.adapter.type == "full",
        adapter=recipe.adapter,
        quantization=recipe.model.quantization,
        weights_dtype_bytes=stored,
        compute_dtype_bytes=stored if recipe.model.quantization == "none" else DTYPE_BYTES[plan.dtype],
        micro_batch=1,
        sequence_length=tokens,
    )


def _sizes(plan: Plan) -> _Sizes:
    """What lies on a device for good, by layer."""
    shape, request = plan.shape, _request(plan, 1)
    whole = estimate(request)
    ends = [size * request.weights_dtype_bytes for size in (shape.embedding_parameters, shape.head_parameters)]
    stored = (whole.weights_bytes + whole.adapter_bytes - sum(ends)) // shape.num_layers
    cached = 2 * shape.num_kv_heads * shape.head_dim * request.compute_dtype_bytes
    return _Sizes(stored, ends[0], ends[1], cached)


def _working_bytes(request: MemoryRequest, context: int) -> int:
    """What the layer at work needs beside its weights and cache, reading a piece behind as much as there is room for.

    The cache of one layer grows by being copied; where its keys are fewer than the heads, they are repeated behind a mask.
    """
    shape, c, tokens = request.shape, request.compute_dtype_bytes, request.num_tokens
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    around = 2 * shape.hidden_size * c + 4 * shape.hidden_size
    widest = max((size for size, _ in shape.linears.values()), default=0)
    adapter = 0 if request.full or c == 4 else 4 * widest
    scores = shape.num_heads * context * (4 + c) if family(shape.family).eager_attention else context * (1 + c)
    mlp = tokens * (around + 3 * shape.mlp_width * c + adapter)
    repeated = 2 * q_size * context * c if kv_size < q_size else 0
    attention = tokens * (around + 2 * (q_size + kv_size) * c + adapter + scores) + repeated + kv_size * context * c
    written_out = (
        max((a * b for a, b in shape.linears.values()), default=0) * c if request.quantization != "none" else 0
    )
    return round((max(mlp, attention) + written_out) * (1 + ALLOCATOR_RESERVE))


def _logits_bytes(request: MemoryRequest) -> int:
    """Those of the last token, four times in fp32 while one is picked; a model's own code computes those of all."""
    shape = request.shape
    of_all = request.num_tokens * shape.vocab_size * request.compute_dtype_bytes if shape.remote_code else 0
    return of_all + 4 * 4 * shape.vocab_size


def _budget_bytes(device: Device, spared: float = 0.0) -> int:
    return round((device.memory_bytes - device.reserved_bytes) * (1 - spared)) - CUDA_CONTEXT_BYTES


def _place(plan: Plan, device: Device, cluster: Cluster, host_bytes: int) -> Place:
    """A device and its times, of one token.

    Args:
        host_bytes: what is fetched from host memory for each token, where the device is the first.
    """
    request = _request(plan, 1)
    dtype = plan.weights_dtype if plan.recipe.model.quantization == "none" else plan.dtype
    speed: Speed = speed_of(device, cluster, dtype)
    forward, _ = layer_seconds(request, speed)
    return Place(
        budget_bytes=_budget_bytes(device),
        keep_s=forward,
        recompute_s=forward,
        embedding_s=host_bytes / PCIE_BYTES_S,
        head_s=head_seconds(request, speed)[0],
        hand_over_s=request.shape.hidden_size * request.compute_dtype_bytes / speed.link,
    )
