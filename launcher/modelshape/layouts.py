"""In: a transformers config and its family. Out: `Layout`, the parameters of the model by module, from no weight file.

One function a layout, read off the classes of transformers 5.23 and the remote code of the older families; a test
builds the native ones on the meta device and compares them to the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.families import Family


class MissingKeyError(Exception):
    """A config has none of the names that a dimension may have."""


@dataclass(frozen=True)
class Dims:
    """The dimensions of a config, whatever it calls them."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    num_experts: int = 0
    active_experts: int = 1
    shared_size: int = 0

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        """Width of all MLPs of a layer that one token goes through."""
        return self.active_experts * self.intermediate_size + self.shared_size


@dataclass
class Layout:
    """Modules of one layer (names from the layer on) and beside the layers (full names), with their parameters.

    `linears`: module -> (in, out), what LoRA can adapt. `modules`: every module with parameters of its own -> how many.
    `mlp_tensors`: how many values as wide as the MLP its activation keeps for the backward pass: 3 with a gate (both
    branches and the activated one), 1 for gelu in one kernel, 4 for gelu written out in Python (gelu_new).
    """

    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    modules: dict[str, int] = field(default_factory=dict)
    outer: dict[str, int] = field(default_factory=dict)
    mlp_tensors: int = 3
    rms_norm: bool = True

    def linear(self, name: str, in_features: int, out_features: int, bias: bool = False) -> None:
        """Adds a linear layer."""
        self.linears[name] = (in_features, out_features)
        self.modules[name] = in_features * out_features + (out_features if bias else 0)

    def norms(self, size: int, *names: str) -> None:
        """Adds norms: a weight each, and a bias where the layout has LayerNorm."""
        for name in names:
            self.modules[name] = size if self.rms_norm else 2 * size


def dims_of(config: Mapping[str, Any], family: Family) -> Dims:
    """The dimensions of a config.

    Raises:
        MissingKeyError: a dimension that has no default is not there.
    """
    get = _getter(config, family)
    hidden_size, num_heads = get("hidden_size", "n_embed"), get("num_attention_heads", "n_head")
    multi_query = family.layout == "falcon" and not config.get("new_decoder_architecture")
    kv_default = 1 if multi_query and config.get("multi_query", True) else num_heads
    kv_names = (
        ("multi_query_group_num",) if config.get("multi_query_attention") else ("num_key_value_heads", "num_kv_heads")
    )
    moe = family.layout == "moe"
    return Dims(
        num_layers=get("num_hidden_layers", "num_layers", "n_layer"),
        hidden_size=hidden_size,
        intermediate_size=_intermediate_size(config, family, hidden_size),
        num_heads=num_heads,
        num_kv_heads=kv_default if multi_query else get(*kv_names, default=kv_default),
        head_dim=get("head_dim", "kv_channels", default=hidden_size // num_heads),
        vocab_size=get("vocab_size", "padded_vocab_size"),
        tied=bool(config.get("tie_word_embeddings", family.defaults.get("tie_word_embeddings", False))),
        num_experts=get("num_local_experts", "num_experts") if moe else 0,
        active_experts=get("num_experts_per_tok") if moe else 1,
        shared_size=get("shared_expert_intermediate_size") if family.name == "qwen2_moe" else 0,
    )


def layout_of(config: Mapping[str, Any], family: Family, dims: Dims) -> Layout:
    """Every module of the model with its parameters.

    Raises:
        MissingKeyError: a key that the layout needs is not there.
    """
    layout = _LAYOUTS[family.layout](config, dims)
    layout.outer[family.embedding] = dims.vocab_size * dims.hidden_size
    layout.outer[family.norm] = dims.hidden_size * (1 if layout.rms_norm else 2)
    if not dims.tied:
        layout.outer[family.head] = dims.vocab_size * dims.hidden_size + (
            dims.vocab_size if family.layout == "phi" else 0
        )
    if family.layout == "bloom":
        layout.outer[family.others[0]] = 2 * dims.hidden_size
    return layout


def positions_of(config: Mapping[str, Any]) -> int | None:
    """How many positions a config says its model knows, stretched ones included; None where it does not say, or needs none (ALiBi)."""
    names = ("max_position_embeddings", "seq_length", "max_sequence_length", "n_positions")
    known: int | None = next((config[name] for name in names if isinstance(config.get(name), int)), None)
    if known is None or known < 1 or config.get("alibi") or config.get("model_type") == "bloom":
        return None
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    # Llama 3's kind and those that name the original length count the stretched positions themselves.
    if kind not in ("linear", "dynamic", "yarn") or not isinstance(factor, int | float) or not 1 <= factor < 1e6:
        return known
    original = rope.get("original_max_position_embeddings")
    return max(known, int((original if isinstance(original, int) else known) * factor))


def _getter(config: Mapping[str, Any], family: Family) -> Callable[..., int]:
    """Reads a whole number under any of its names; absent is the family's default, null the computed one."""

    def get(*names: str, default: int | None = None) -> int:
        value = next((config[name] for name in names if name in config), None)
        if value is None and not any(name in config for name in names):
            value = next((family.defaults[name] for name in names if name in family.defaults), None)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise MissingKeyError(names[0] if value is None else f"{names[0]} (it says {value!r})")
        return value

    return get


def _intermediate_size(config: Mapping[str, Any], family: Family, hidden_size: int) -> int:
    """Width of the MLP; families that need not say it have four times the hidden size."""
    get = _getter(config, family)
    if family.layout in ("bloom", "falcon", "chatglm", "phi"):
        fixed = 4 * hidden_size
        return (
            fixed
            if family.layout == "bloom"
            else get("ffn_hidden_size", "inner_hidden_size", "intermediate_size", default=fixed)
        )
    if family.layout == "chatglm2":
        return get("ffn_hidden_size")
    if family.name in ("qwen2_moe", "qwen3_moe"):
        return get("moe_intermediate_size")
    return get("intermediate_size") // (2 if family.layout == "qwen" else 1)


def _split(config: Mapping[str, Any], dims: Dims) -> Layout:
    """Llama and what descends from it: q, k, v, o, gate, up and down apart."""
    layout = Layout()
    model_type = config.get("model_type")
    _attention(layout, config, dims)
    mlp_bias = bool(config.get("mlp_bias", False)) and model_type == "llama"
    layout.linear("mlp.gate_proj", dims.hidden_size, dims.intermediate_size, mlp_bias)
    layout.linear("mlp.up_proj", dims.hidden_size, dims.intermediate_size, mlp_bias)
    layout.linear("mlp.down_proj", dims.intermediate_size, dims.hidden_size, mlp_bias)
    layout.norms(dims.hidden_size, "input_layernorm", "post_attention_layernorm")
    if model_type in ("gemma2", "gemma3_text"):
        layout.norms(dims.hidden_size, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    if model_type in ("qwen3", "gemma3_text"):
        layout.norms(dims.head_dim, "self_attn.q_norm", "self_attn.k_norm")
    return layout


def _attention(layout: Layout, config: Mapping[str, Any], dims: Dims) -> None:
    """Attention with q, k, v and o apart; which of them have a bias differs by family."""
    model_type = config.get("model_type")
    attention_bias = config.get("attention_bias")
    bias = {
        "mistral": False, "mixtral": False, "xverse": False, "qwen2": True, "qwen2_moe": config.get("qkv_bias", True),
        "glm": attention_bias is not False, "glm4": attention_bias is not False, "internlm": config.get("bias", True),
    }.get(str(model_type), attention_bias)  # fmt: skip
    layout.linear("self_attn.q_proj", dims.hidden_size, dims.q_size, bool(bias))
    layout.linear("self_attn.k_proj", dims.hidden_size, dims.kv_size, bool(bias))
    layout.linear("self_attn.v_proj", dims.hidden_size, dims.kv_size, bool(bias))
    layout.linear(
        "self_attn.o_proj",
        dims.q_size,
        dims.hidden_size,
        bool(bias) and model_type not in ("qwen2", "qwen2_moe", "glm", "glm4"),
    )


def _fused(config: Mapping[str, Any], dims: Dims) -> Layout:
    """GLM and Phi-3: gate and up in one matrix; Phi-3 also query, key and value."""
    layout = Layout()
    if config.get("model_type") == "phi3":
        layout.linear("self_attn.qkv_proj", dims.hidden_size, dims.q_size + 2 * dims.kv_size)
        layout.linear("self_attn.o_proj", dims.q_size, dims.hidden_size)
    else:
        _attention(layout, config, dims)
    layout.linear("mlp.gate_up_proj", dims.hidden_size, 2 * dims.intermediate_size)
    layout.linear("mlp.down_proj", dims.intermediate_size, dims.hidden_size)
    layout.norms(dims.hidden_size, "input_layernorm", "post_attention_layernorm")
    if config.get("model_type") == "glm4":
        layout.norms(dims.hidden_size, "post_self_attn_layernorm", "post_mlp_layernorm")
    return layout


def _moe(config: Mapping[str, Any], dims: Dims) -> Layout:
    """Mixtral and Qwen's mixtures: experts in stacked parameters, which are no linear layers; a shared one beside them is."""
    layout = Layout()
    _attention(layout, config, dims)
    layout.modules["mlp.gate"] = dims.num_experts * dims.hidden_size
    layout.modules["mlp.experts"] = dims.num_experts * 3 * dims.hidden_size * dims.intermediate_size
    if dims.shared_size:
        layout.linear("mlp.shared_expert.gate_proj", dims.hidden_size, dims.shared_size)
        layout.linear("mlp.shared_expert.up_proj", dims.hidden_size, dims.shared_size)
        layout.linear("mlp.shared_expert.down_proj", dims.shared_size, dims.hidden_size)
        layout.linear("mlp.shared_expert_gate", dims.hidden_size, 1)
    layout.norms(dims.hidden_size, "input_layernorm", "post_attention_layernorm")
    if config.get("model_type") == "qwen3_moe":
        layout.norms(dims.head_dim, "self_attn.q_norm", "self_attn.k_norm")
    return layout


def _phi(config: Mapping[str, Any], dims: Dims) -> Layout:
    """Phi-1 and Phi-2: biases everywhere, one LayerNorm for attention and MLP side by side."""
    layout = Layout(mlp_tensors=4 if config.get("hidden_act", "gelu_new") == "gelu_new" else 1, rms_norm=False)
    layout.linear("self_attn.q_proj", dims.hidden_size, dims.q_size, True)
    layout.linear("self_attn.k_proj", dims.hidden_size, dims.kv_size, True)
    layout.linear("self_attn.v_proj", dims.hidden_size, dims.kv_size, True)
    layout.linear("self_attn.dense", dims.q_size, dims.hidden_size, True)
    layout.linear("mlp.fc1", dims.hidden_size, dims.intermediate_size, True)
    layout.linear("mlp.fc2", dims.intermediate_size, dims.hidden_size, True)
    layout.norms(dims.hidden_size, "input_layernorm")
    if config.get("qk_layernorm"):
        layout.norms(dims.head_dim, "self_attn.q_layernorm", "self_attn.k_layernorm")
    return layout


def _four_linears(layout: Layout, attention: str, dims: Dims, qkv_size: int, bias: bool) -> None:
    """The names that BLOOM, Falcon and ChatGLM share: query_key_value, dense, dense_h_to_4h, dense_4h_to_h."""
    layout.linear(f"{attention}.query_key_value", dims.hidden_size, qkv_size, bias)
    layout.linear(f"{attention}.dense", dims.q_size, dims.hidden_size, bias)
    layout.linear("mlp.dense_h_to_4h", dims.hidden_size, dims.intermediate_size, bias)
    layout.linear("mlp.dense_4h_to_h", dims.intermediate_size, dims.hidden_size, bias)


def _bloom(config: Mapping[str, Any], dims: Dims) -> Layout:
    layout = Layout(mlp_tensors=1, rms_norm=False)
    _four_linears(layout, "self_attention", dims, 3 * dims.hidden_size, True)
    layout.norms(dims.hidden_size, "input_layernorm", "post_attention_layernorm")
    return layout


def _falcon(config: Mapping[str, Any], dims: Dims) -> Layout:
    """Falcon: the new decoder (40B, 180B) has groups of heads and two norms, the old one a single key head."""
    layout = Layout(mlp_tensors=1, rms_norm=False)
    _four_linears(layout, "self_attention", dims, dims.q_size + 2 * dims.kv_size, bool(config.get("bias", False)))
    if config.get("new_decoder_architecture") and config.get("num_ln_in_parallel_attn") in (None, 2):
        layout.norms(dims.hidden_size, "ln_attn", "ln_mlp")
    else:
        layout.norms(dims.hidden_size, "input_layernorm")
        if not config.get("parallel_attn", True):
            layout.norms(dims.hidden_size, "post_attention_layernorm")
    return layout


def _chatglm(config: Mapping[str, Any], dims: Dims) -> Layout:
    """ChatGLM-6B: LayerNorm and biases, no gate, its own gelu."""
    layout = Layout(mlp_tensors=4, rms_norm=False)
    _four_linears(layout, "attention", dims, 3 * dims.hidden_size, True)
    layout.norms(dims.hidden_size, "input_layernorm", "post_attention_layernorm")
    return layout


def _chatglm2(config: Mapping[str, Any], dims: Dims) -> Layout:
    """ChatGLM2 and 3: gate and up in dense_h_to_4h, few key heads in query_key_value."""
    layout = Layout(rms_norm=bool(config.get("rmsnorm", True)))
    bias = bool(config.get("add_bias_linear", False))
    qkv_bias = bias or bool(config.get("add_qkv_bias", False))
    layout.linear("self_attention.query_key_value", dims.hidden_size, dims.q_size + 2 * dims.kv_size, qkv_bias)
    layout.linear("self_attention.dense", dims.q_size, dims.hidden_size, bias)
    layout.linear("mlp.dense_h_to_4h", dims.hidden_size, 2 * dims.intermediate_size, bias)
    layout.linear("mlp.dense_4h_to_h", dims.intermediate_size, dims.hidden_size, bias)
    layout.norms(dims.hidden_size, "input_layernorm", "post_attention_layernorm")
    return layout


def _baichuan(config: Mapping[str, Any], dims: Dims) -> Layout:
    layout = Layout()
    layout.linear("self_attn.W_pack", dims.hidden_size, 3 * dims.hidden_size)
    layout.linear("self_attn.o_proj", dims.q_size, dims.hidden_size)
    layout.linear("mlp.gate_proj", dims.hidden_size, dims.intermediate_size)
    layout.linear("mlp.up_proj", dims.hidden_size, dims.intermediate_size)
    layout.linear("mlp.down_proj", dims.intermediate_size, dims.hidden_size)
    layout.norms(dims.hidden_size, "input_layernorm", "post_attention_layernorm")
    return layout


def _qwen(config: Mapping[str, Any], dims: Dims) -> Layout:
    """Qwen 1: `intermediate_size` counts gate and up together; only c_attn has a bias."""
    layout = Layout()
    bias = not config.get("no_bias", True)
    layout.linear("attn.c_attn", dims.hidden_size, 3 * dims.q_size, True)
    layout.linear("attn.c_proj", dims.q_size, dims.hidden_size, bias)
    layout.linear("mlp.w1", dims.hidden_size, dims.intermediate_size, bias)
    layout.linear("mlp.w2", dims.hidden_size, dims.intermediate_size, bias)
    layout.linear("mlp.c_proj", dims.intermediate_size, dims.hidden_size, bias)
    layout.norms(dims.hidden_size, "ln_1", "ln_2")
    return layout


_LAYOUTS: dict[str, Callable[[Mapping[str, Any], Dims], Layout]] = {
    "split": _split,
    "fused": _fused,
    "moe": _moe,
    "phi": _phi,
    "falcon": _falcon,
    "bloom": _bloom,
    "chatglm": _chatglm,
    "chatglm2": _chatglm2,
    "baichuan": _baichuan,
    "qwen": _qwen,
}
