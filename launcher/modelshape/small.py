"""The config of a model in, the sizes of a small copy of it out: the same classes and module names, few layers, heads as wide as before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LAYERS = ("num_layers", "num_hidden_layers", "n_layer")
_HEADS = ("num_attention_heads", "n_head")
_KEY_HEADS = ("num_key_value_heads", "multi_query_group_num")
_WIDTHS = ("hidden_size", "n_embd")
_MLPS = ("intermediate_size", "inner_hidden_size", "ffn_hidden_size", "n_inner", "moe_intermediate_size")


def small_sizes(config: Mapping[str, Any], num_layers: int = 2) -> dict[str, Any]:
    """The keys of a config that make it small: two heads as wide as before; the vocabulary stays, ids are real.

    Raises:
        KeyError: the config has no name for one of them that is known here.
    """

    def named(names: tuple[str, ...]) -> list[str]:
        return [name for name in names if isinstance(config.get(name), int)]

    if not (named(_LAYERS) and named(_HEADS) and named(_WIDTHS)):
        raise KeyError("layers, heads or width")
    head_dim = config[named(_WIDTHS)[0]] // config[named(_HEADS)[0]]
    width = 2 * (config.get("head_dim") or config.get("kv_channels") or head_dim)
    sizes: dict[str, Any] = dict.fromkeys(named(_LAYERS), num_layers)
    sizes |= dict.fromkeys(named(_HEADS), 2) | dict.fromkeys(named(_WIDTHS), width)
    sizes |= {name: min(2, config[name]) for name in named(_KEY_HEADS)}
    sizes |= dict.fromkeys(named(_MLPS), 2 * width)
    # What is listed layer by layer (kinds of attention, for one) is listed for as many as there are.
    before = config[named(_LAYERS)[0]]
    listed = {key: value for key, value in config.items() if isinstance(value, list) and len(value) == before > 0}
    return sizes | {key: (value * num_layers)[:num_layers] for key, value in listed.items()}
