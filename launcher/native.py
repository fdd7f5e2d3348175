"""In: the config.json of a model that brings its own code. Out: the config of the transformers class that computes the same.

Pure: `prepare` rewrites the weights by what stands here, so that no code of the model is ever executed. Whatever the class
would not compute to the last bit is a `Refusal` with its reasons: a key of the config that nobody here has looked at too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from launcher.families import family, family_of


class Native(BaseModel):
    """A conversion, as the plan keeps it.

    Args:
        source: family of the original; its prompt template stays in use.
        target: the transformers class.
        fixed_head: why the head may not be trained, None where it may.
        exact_length: tokens up to which both compute the same, None for any number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    target: str
    fixed_head: str | None = None
    exact_length: int | None = None


@dataclass(frozen=True)
class NativeConfig:
    """What a model becomes: the conversion, and the whole config.json of the converted folder."""

    native: Native
    config: dict[str, Any]


@dataclass(frozen=True)
class Refusal:
    """Why a model of a family is not converted."""

    source: str
    reasons: tuple[str, ...]


class _Source:
    """A config that is read key by key: what is asked for is known, what is not what it has to be is a reason."""

    def __init__(self, config: Mapping[str, Any], harmless: str) -> None:
        self.config = config
        self.known = {*_COMMON.split(), *harmless.split()}
        self.reasons: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or what the original's own config class takes where the file is silent."""
        self.known.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """A value that has no default."""
        value = self.get(key)
        if value is None:
            self.reasons.append(f"its config lacks {key}")
        return value

    def must(self, key: str, wanted: Any, default: Any, why: str) -> None:
        """Refuse another value than the wanted one."""
        value = self.get(key, default)
        if value != wanted:
            self.reasons.append(f"{key} is {value!r}: {why}")

    def unknown(self) -> list[str]:
        """Keys that nothing here has asked for."""
        return sorted(key for key in self.config if key not in self.known and not key.startswith("_"))


# Bookkeeping, and what only generation reads.
_COMMON = """
architectures auto_map model_type transformers_version torch_dtype dtype tokenizer_class use_cache bos_token_id
eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id name_or_path return_dict output_attentions
output_hidden_states torchscript is_encoder_decoder is_decoder id2label label2id num_labels problem_type
classifier_dropout gradient_checkpointing chunk_size_feed_forward task_specific_params max_length min_length do_sample
num_beams temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size early_stopping
num_return_sequences max_new_tokens
"""
_DROPOUT = "the native class has no such dropout"
_GROUPS = "the first InternLM has as many key heads as query heads"


def native_config(config: Mapping[str, Any]) -> NativeConfig | Refusal | None:
    """The native config of an original one; why there is none; None where the family is native already, or unknown."""
    name = family_of(config).name
    if name not in _FAMILIES:
        return None
    build, target, harmless = _FAMILIES[name]
    if build is None:
        return Refusal(name, (target,))
    source = _Source(config, harmless)
    native, values = build(source, Native(source=name, target=target))
    source.must("quantization_bit", 0, 0, "its weights are stored quantised")
    if source.get("quantization_config"):
        source.reasons.append("quantization_config: its weights are stored quantised")
    source.reasons += [f"its config has {key}, which this version does not know" for key in source.unknown()]
    if source.reasons:
        return Refusal(name, tuple(source.reasons))
    kept = {"dtype": config.get("dtype", config.get("torch_dtype"))}
    values = {"architectures": [target], **values, **{key: value for key, value in kept.items() if value is not None}}
    return NativeConfig(native, values)


def _chatglm2(source: _Source, native: Native) -> tuple[Native, dict[str, Any]]:
    """ChatGLM2 and 3. Their rotary embedding turns neighbours in the first half of a head, as GLM does."""
    source.must("multi_query_attention", True, False, "the native class keeps few key heads")
    source.must("add_bias_linear", False, False, "the native class has no such bias")
    source.must("rmsnorm", True, True, "the native class has RMSNorm")
    source.must("post_layer_norm", True, True, "the native class ends in a norm")
    source.must("apply_residual_connection_post_layernorm", False, False, "the native class adds before the norm")
    source.must("fp32_residual_connection", False, False, "the native class adds in the model's dtype")
    source.must("pre_seq_len", 0, 0, "it has a P-tuning prefix")
    source.must("original_rope", True, True, "its rotary embedding is another one")
    source.must("rope_ratio", 1, 1, "nobody has compared stretched positions")
    source.must("hidden_dropout", 0, 0, _DROPOUT)
    source.must("tie_word_embeddings", False, False, "its head has weights of its own")
    layers, heads, groups = (source.need(key) for key in ("num_layers", "num_attention_heads", "multi_query_group_num"))
    vocab_size = source.need("padded_vocab_size")
    source.must("vocab_size", vocab_size, vocab_size, f"padded_vocab_size is {vocab_size}")
    return native, {
        "model_type": "glm",
        "vocab_size": vocab_size,
        "hidden_size": source.need("hidden_size"),
        "intermediate_size": source.need("ffn_hidden_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": source.need("kv_channels"),
        "hidden_act": "silu",
        "attention_dropout": source.get("attention_dropout", 0.0),
        "attention_bias": source.get("add_qkv_bias", False),
        "rms_norm_eps": source.get("layernorm_epsilon", 1e-5),
        "max_position_embeddings": source.get("seq_length", 2048),
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "pad_token_id": 0,
        # GlmConfig's own default is GLM-4's.
        "eos_token_id": 2,
    }


def _llama(source: _Source, **more: Any) -> dict[str, Any]:
    """What descends from Llama, with Llama's keys."""
    source.must("tie_word_embeddings", False, False, "its head has weights of its own")
    source.must("hidden_act", "silu", "silu", "its activation was not compared")
    source.must("rope_scaling", {}, {}, "nobody has compared stretched positions")
    heads = source.need("num_attention_heads")
    return {
        "model_type": "llama",
        "vocab_size": source.need("vocab_size"),
        "hidden_size": source.need("hidden_size"),
        "intermediate_size": source.need("intermediate_size"),
        "num_hidden_layers": source.need("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "rms_norm_eps": source.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": source.get("max_position_embeddings", 2048),
        "initializer_range": source.get("initializer_range", 0.02),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": source.get("pad_token_id"),
        "bos_token_id": source.get("bos_token_id", 1),
        "eos_token_id": source.get("eos_token_id", 2),
        **more,
    }


def _baichuan(source: _Source, native: Native) -> tuple[Native, dict[str, Any]]:
    """The 7B of both. The second divides each row of its head by its length, which the converted head has done already."""
    if source.get("max_position_embeddings") is None or source.get("hidden_size") == 5120:
        source.reasons.append("the 13B counts positions by ALiBi, and transformers has no such class")
    values = _llama(source)
    # The class of the first is written with a capital C.
    second = "z_loss_weight" in source.config or source.get("vocab_size") == 125696
    if not second and not source.reasons and "BaiChuanForCausalLM" not in str(source.get("architectures", "")):
        source.reasons.append("nothing in its config (architectures, z_loss_weight) tells Baichuan from Baichuan2")
    if not second:
        return native, values
    because = "its own head divides each row by its length at every step, the native one has it done once"
    return native.model_copy(update={"fixed_head": because}), values


def normalises_head(native: Native) -> bool:
    """Whether the rows of the head have to be divided by their length."""
    return native.source == "baichuan" and native.fixed_head is not None


def _internlm(source: _Source, native: Native) -> tuple[Native, dict[str, Any]]:
    """The first InternLM: Llama with a bias in attention. Beyond the length of its training it stretches positions."""
    source.must("num_key_value_heads", source.get("num_attention_heads"), source.get("num_attention_heads"), _GROUPS)
    rotary = source.get("rotary", {})
    rope = {"rope_type": "default", "rope_theta": float(rotary.get("base", 10000))}
    values = _llama(source, attention_bias=source.get("bias", True), rope_parameters=rope)
    return native.model_copy(update={"exact_length": values["max_position_embeddings"]}), values


def _xverse(source: _Source, native: Native) -> tuple[Native, dict[str, Any]]:
    """Llama under another name."""
    heads = source.get("num_attention_heads")
    rope = {"rope_type": "default", "rope_theta": float(source.get("rope_theta", 10000))}
    return native, _llama(source, num_key_value_heads=source.get("num_key_value_heads", heads), rope_parameters=rope)


def _qwen(source: _Source, native: Native) -> tuple[Native, dict[str, Any]]:
    """The first Qwen. Its intermediate_size counts gate and up; beyond seq_length it stretches positions and scores."""
    heads, hidden_size, size = (source.need(k) for k in ("num_attention_heads", "hidden_size", "intermediate_size"))
    source.must("no_bias", True, True, "the native class has no such bias")
    source.must("rotary_pct", 1, 1, "the native class turns whole heads")
    source.must("scale_attn_weights", True, True, "the native class scales scores")
    source.must("emb_dropout_prob", 0, 0, _DROPOUT)
    source.must("tie_word_embeddings", False, False, "its head has weights of its own")
    if heads and hidden_size and source.get("kv_channels", 128) * heads != hidden_size:
        source.reasons.append(f"kv_channels is {source.get('kv_channels')}: the native class has hidden_size / heads")
    length = source.get("seq_length", 2048)
    return native.model_copy(update={"exact_length": length}), {
        "model_type": "qwen2",
        "vocab_size": source.need("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": (size or 0) // 2,
        "num_hidden_layers": source.need("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "attention_dropout": source.get("attn_dropout_prob", 0.0),
        "rms_norm_eps": source.get("layer_norm_epsilon", 1e-6),
        "max_position_embeddings": length,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(source.get("rotary_emb_base", 10000))},
        "pad_token_id": source.get("pad_token_id"),
        "bos_token_id": source.get("bos_token_id"),
        "eos_token_id": source.get("eos_token_id", 151643),
    }


_Build = Callable[[_Source, Native], tuple[Native, dict[str, Any]]]
_CHATGLM2 = "apply_query_key_layer_scaling attention_softmax_in_fp32 bias_dropout_fusion prefix_projection"
_QWEN = """max_position_embeddings use_dynamic_ntk use_logn_attn use_flash_attn use_cache_quantization use_cache_kernel
softmax_in_fp32 fp16 bf16 fp32 onnx_safe initializer_range"""
# Family -> (how its config is read, class, keys that change nothing), or (None, why no class computes the same, "").
_FAMILIES: dict[str, tuple[_Build | None, str, str]] = {
    "chatglm": (None, "transformers has no class with its two-dimensional positions and its open prompt", ""),
    "chatglm2": (_chatglm2, "GlmForCausalLM", _CHATGLM2),
    "chatglm3": (_chatglm2, "GlmForCausalLM", _CHATGLM2),
    "baichuan": (_baichuan, "LlamaForCausalLM", "model_max_length z_loss_weight pretraining_tp"),
    "internlm": (_internlm, "LlamaForCausalLM", "attn_implementation max_position_embeddings pretraining_tp"),
    "xverse": (_xverse, "LlamaForCausalLM", "max_tokenizer_truncation pretraining_tp"),
    "qwen": (_qwen, "Qwen2ForCausalLM", _QWEN),
}
assert all(family(name).needs_remote_code for name in _FAMILIES)
