"""A config whose kind of model no formula here describes, or whose weights are no plain numbers, is refused before it is counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.errors import UsageError
from launcher.families import family_of, former_of

# They read a whole text at once and write none: nothing of them is a causal language model.
_ENCODERS = (
    "albert", "bert", "camembert", "clip", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm", "longformer",
    "modernbert", "mpnet", "nomic_bert", "roberta", "roformer", "vit", "wav2vec2", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
_ENCODER_DECODERS = (
    "bart", "blenderbot", "led", "longt5", "marian", "mbart", "mt5", "nllb-moe", "pegasus", "prophetnet", "t5", "umt5", "whisper",
)  # fmt: skip
# How configs say that a layer has experts.
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "ffn_config")


def refuse_other_kinds(config: Mapping[str, Any], name: str, source: str) -> None:
    """Raise for a config whose kind of model is not planned, whatever its numbers.

    Raises:
        UsageError: see above.
    """
    found, to_type = _other_kind(config) or _other_weights(config) or _other_layers(config) or ("", "")
    if found:
        raise UsageError(f"model: {name}", f"the config ({source}) {found}", to_type)


def _other_kind(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """What else it is than a causal language model of texts, and what to type."""
    model_type = config.get("model_type")
    if "auto_map" not in config and not (isinstance(model_type, str) and model_type):
        return f"says no model_type ({model_type!r})", "write it there, e.g. model_type: llama"
    former = former_of(str(model_type))
    if former is not None:
        found = f"says model_type {model_type}, as it did before transformers had a class for {former}"
        return found, f"fetch today's revision, whose config says {former}: model.revision=null"
    if isinstance(config.get("text_config"), Mapping):
        found = "is that of a model of texts and images, which this version does not train"
        return found, "take a model of texts alone, e.g. model.path=google/gemma-3-1b-it"
    if config.get("is_encoder_decoder") is True or model_type in _ENCODER_DECODERS:
        found = f"is that of an encoder and a decoder ({model_type}), which this version does not train"
        return found, "take a causal language model, e.g. model.path=Qwen/Qwen2.5-0.5B"
    if model_type in _ENCODERS:
        found = f"is that of an encoder ({model_type}), which writes no text"
        return found, "take a causal language model, e.g. model.path=Qwen/Qwen2.5-0.5B"
    return None


def _other_weights(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """That its weights are stored quantised, which adapters of this version are not put over."""
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping) or not stored:
        return None
    method = stored.get("quant_method", "quantised")
    found = f"says that its weights are stored quantised ({method}), which this version does not train over"
    return found, "take the original weights; to hold them in 4 bits while training: model.quantization=nf4"


def _other_layers(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Layers that the formulas do not describe."""
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        found = "mixes layers with and without experts, which this version does not plan"
        return found, "take a model whose layers are alike, e.g. model.path=Qwen/Qwen3-30B-A3B"
    experts = [key for key in _EXPERTS if config.get(key)]
    if experts and family_of(config).name == "unknown":
        found = f"has experts ({experts[0]}), and the family {config.get('model_type')} is not in families.yaml"
        return found, "take a mixture of experts that is known, e.g. model.path=Qwen/Qwen3-30B-A3B"
    return None
