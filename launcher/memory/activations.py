"""What one layer keeps for the backward pass, and what it needs beyond that while it runs. Bytes of a micro batch.

Read off the classes of transformers 5.23, PEFT 0.21 and torch 2.13, and held against them (`benchmarks/memory_honesty.py`).
Letters: T tokens, h hidden size, m width of the MLP, c bytes of a computed value, s bytes of one between the layers.
"""

from __future__ import annotations

from launcher.families import family
from launcher.memory.request import MemoryRequest
from launcher.modelshape import ModelShape, adapted_in_a_layer
from launcher.recipe.schema import Adapter

ADAPTER_DTYPE_BYTES = 4  # trained weights beside a frozen base are fp32 (worker/adapters.py)
# A CUDA kernel keeps the mask of dropout as one byte a value; on a CPU it is the fp32 noise that was multiplied.
_DROPOUT_MASK_BYTES = {"cuda": 1, "cpu": 4}
_GELU_IN_PYTHON = 4  # `mlp_tensors` of gelu_new, see modelshape.layouts


def kept_bytes(request: MemoryRequest) -> int:
    """What one layer keeps until its backward pass."""
    per_token = _norms(request) + _mlp(request) + _inputs(request)
    # DoRA scales the answers of matrix and adapter, and keeps both.
    per_token += 2 * request.compute_dtype_bytes * sum(answer for _, answer in _scaled(request))
    return request.num_tokens * per_token + _attention_bytes(request)


def norm_bytes(request: MemoryRequest) -> int:
    """What DoRA holds beside while it takes the norm of the largest matrix: it sends the unit matrix through the adapter, and adds
    the two; unit matrix, adapter, weights, their sum and its square are fp32 (peft/tuners/lora/dora.py)."""
    return max((4 * given * given + 4 * 4 * given * answer for given, answer in _scaled(request)), default=0)


def _scaled(request: MemoryRequest) -> list[tuple[int, int]]:
    """Width of input and answer of each matrix of a layer that DoRA scales."""
    adapter, linears = request.adapter or Adapter(), request.shape.linears
    if request.full or adapter.type != "dora":
        return []
    return [linears[name] for name in adapted_in_a_layer(request.shape, adapter.targets) if name in linears]


def passing_bytes(request: MemoryRequest) -> int:
    """What a layer holds beside all it keeps, at the fullest moment of its own backward pass, computing it again included.

    The largest of three: the activation of the MLP is undone (three values of its width: the gradient that came, the
    two that go on; the input of the last projection is gone); an adapter on the widest projection computes (its input as
    it came, in fp32, and again after dropout, and five values of the stream); written-out attention scores, three times.
    """
    shape, c = request.shape, request.compute_dtype_bytes
    width, stream = shape.mlp_width * _answer_bytes(request), shape.hidden_size * request.stream_bytes
    fullest = [3 * width + stream - (width if request.full else 0)]
    if not request.full and c < ADAPTER_DTYPE_BYTES and not request.hands_over:
        adapter = request.adapter or Adapter()
        wanted = adapted_in_a_layer(shape, adapter.targets)
        widest = max((size for name, (size, _) in shape.linears.items() if name in wanted), default=0)
        fullest.append(widest * (ADAPTER_DTYPE_BYTES * (2 if adapter.dropout else 1) + c) + 5 * shape.hidden_size * c)
    if _writes_scores(shape):
        fullest.append(8 * _scores(request))
    return request.num_tokens * max(fullest)


def experts_back_bytes(request: MemoryRequest) -> int:
    """What a layer of experts holds when the gradients of all their weights are there: the activation of the MLP is gone, and the
    gradients of its input, of each expert's copy of the tokens and of the stream have come."""
    shape, c = request.shape, request.compute_dtype_bytes
    came = (2 - shape.mlp_tensors) * shape.mlp_width * c + (_active_experts(shape) + 1) * shape.hidden_size * c
    return kept_bytes(request) + request.num_tokens * (came - _trained_experts(shape) * c)


def untouched_bytes(request: MemoryRequest) -> int:
    """What the first layer does not keep, because nothing below it is trained and no gradient has to go there.

    That is its first norm, and where the MLP stands beside attention and not behind it (one norm for both), the MLP.
    """
    shape = request.shape
    if request.full or request.gradient_checkpointing:
        return 0
    norm = _norms(request) // max(1, _num_norms(shape))
    wanted = adapted_in_a_layer(shape, (request.adapter or Adapter()).targets)
    beside = _num_norms(shape) == 1 and not any(name.startswith("mlp") for name in wanted)
    return request.num_tokens * (norm + (_mlp(request) if beside else 0))


def _num_norms(shape: ModelShape) -> int:
    """Norms of the whole stream in one layer: modules with a weight (LayerNorm: and a bias) as long as it is wide."""
    size = shape.hidden_size if shape.rms_norm else 2 * shape.hidden_size
    return sum(name not in shape.linears and found == size for name, found in shape.modules.items())


def _norms(request: MemoryRequest) -> int:
    """RMSNorm keeps its input in fp32 and, where its weight is trained, what it was multiplied with.

    LayerNorm keeps its input alone: in fp32 where CUDA's autocast computes it so, else as it is.
    """
    shape, trained = request.shape, 1 if request.full else 0
    heads = any(name.endswith(("q_norm", "q_layernorm")) for name in shape.modules)
    values = _num_norms(shape) * shape.hidden_size
    of_heads = (shape.num_heads + shape.num_kv_heads) * shape.head_dim if heads else 0
    if shape.rms_norm:
        return values * (4 + trained * request.stream_bytes) + of_heads * (4 + trained * request.compute_dtype_bytes)
    return (values + of_heads) * (4 if request.kind == "cuda" else request.stream_bytes)


def _attention_bytes(request: MemoryRequest) -> int:
    """Query, key, value, output and a number a head; with a mask one bias for all heads, and keys for every head.

    Without a mask the flash kernel shares the keys of a group itself; elsewhere they are repeated (`worker/attention.py`). A value cut
    out of a fused projection keeps all of it. Attention that is written out keeps the softmax in fp32 and its cast; torch's own
    fallback, to which one key head under Falcon's code leads, computes in fp32 all over.
    """
    shape, c, tokens = request.shape, request.compute_dtype_bytes, request.num_tokens
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if _falls_back(shape):
        return tokens * (q_size * 4 * (3 if request.masked else 1) + _scores(request) * 4)
    if _writes_scores(shape):
        return tokens * (4 * q_size * c + _scores(request) * (4 if c == 4 else 4 + c))
    keys = 2 * (q_size if request.masked or not request.shares_keys else kv_size) * c
    fused = (
        (q_size + kv_size) * c
        if "self_attn.qkv_proj" in shape.linears and not request.masked and request.shares_keys
        else 0
    )
    mask = tokens * _row(request) * c if request.masked else 0
    return tokens * (2 * q_size * c + keys + fused + 4 * shape.num_heads) + mask


def _falls_back(shape: ModelShape) -> bool:
    """Whether torch computes attention without a kernel of its own: the heads of keys differ, and nothing says so."""
    return family(shape.family).layout == "falcon" and shape.num_kv_heads < shape.num_heads


def _writes_scores(shape: ModelShape) -> bool:
    return family(shape.family).eager_attention or _falls_back(shape)


def _row(request: MemoryRequest) -> int:
    """Tokens that one token may look at, before any mask."""
    return request.num_tokens if request.batching == "packed" else request.sequence_length


def _scores(request: MemoryRequest) -> int:
    """Attention scores of a token, over all heads."""
    return request.shape.num_heads * _row(request)


def _mlp(request: MemoryRequest) -> int:
    """What the activation function keeps; Phi's gelu_new takes a power, which CUDA's autocast computes in fp32."""
    shape, c = request.shape, request.compute_dtype_bytes
    takes_power = family(shape.family).layout == "phi" and shape.mlp_tensors == _GELU_IN_PYTHON
    if takes_power and request.kind == "cuda":
        return shape.mlp_width * (3 * 4 + c)
    active = _active_experts(shape)
    # Each expert's answer, which is weighted; and where it is trained, what chooses them keeps the input of all.
    experts = (active + (request.full and active > 0)) * shape.hidden_size * c
    experts += _trained_experts(shape) * c if request.full else 0
    wider = (_answer_bytes(request) - c) * shape.mlp_width
    return shape.mlp_tensors * shape.mlp_width * c + experts + wider


def _answer_bytes(request: MemoryRequest) -> int:
    """Bytes of a value that the MLP's first layer answers: a 4-bit layer answers in the precision that it was asked in."""
    return 4 if request.quantization == "nf4" and request.norms_in_fp32 else request.compute_dtype_bytes


def _trained_experts(shape: ModelShape) -> int:
    """Inputs of the two products of the experts that a token goes through: kept where their weights are trained."""
    active = _active_experts(shape)
    return active * (shape.hidden_size + shape.intermediate_size)


def _active_experts(shape: ModelShape) -> int:
    """Experts that a token goes through, beside a shared one."""
    shared, _ = shape.linears.get("mlp.shared_expert.down_proj", (0, 0))
    return (shape.mlp_width - shared) // shape.intermediate_size if "mlp.experts" in shape.modules else 0


def _inputs(request: MemoryRequest) -> int:
    """Inputs of linear layers whose weight or adapter is trained, a token.

    Query, key and value (gate and up) have one input; they share it where nothing makes a copy of its own: a cast under
    autocast (LayerNorm's output is fp32 there on cards), or an adapter's dropout, whose mask comes on top.
    """
    shape, value_bytes = request.shape, request.compute_dtype_bytes
    if request.full:
        wanted, dropout, shared = set(shape.linears), False, not request.autocast
        shared = shared and (shape.rms_norm or value_bytes == 4 or request.kind == "cpu")
    else:
        adapter = request.adapter or Adapter()
        wanted, dropout = adapted_in_a_layer(shape, adapter.targets), adapter.dropout > 0
        shared = not dropout and (value_bytes == ADAPTER_DTYPE_BYTES or request.hands_over)
    kept = 0
    seen = set()
    last = {_block(name): name for name in shape.linears}  # attention's and MLP's own output projection
    for name, (in_features, _) in shape.linears.items():
        block = _block(name)
        key = (block, name == last[block])
        if name not in wanted or (shared and key in seen):
            continue
        seen.add(key)
        # With autograd's own copy of it: the input of attention's output projection is what attention keeps anyway.
        is_attention_output = key[1] and not block.startswith("mlp")
        kept += in_features * (0 if is_attention_output and (request.full or shared) else value_bytes)
        kept += in_features * _DROPOUT_MASK_BYTES[request.kind] if dropout else 0
    if (request.strategy == "zero3" or request.quantization == "int8") and not request.full:
        # The linear layers of DeepSpeed and of bitsandbytes keep any input; attention's own output is kept anyway.
        inputs = {(_block(name), name == last[_block(name)]): size for name, (size, _) in shape.linears.items()}
        normed = 4 if request.norms_in_fp32 else value_bytes
        for (block, ends), size in inputs.items():
            kept += size * (normed if not ends else value_bytes if block.startswith("mlp") else 0)
    return kept


def _block(name: str) -> str:
    """The part of a layer that a linear layer belongs to: attention or the MLP."""
    return name.rpartition(".")[0]
