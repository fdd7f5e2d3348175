"""Attention on cards without torch's flash kernel: those before compute capability 8.0, and all of them in fp32.

There torch has a kernel that needs little memory too, but not one in which a group of heads shares its keys. transformers asks for
just that where there is no mask, and torch then writes all scores out, in fp32. So keys are repeated first, as transformers itself
does it behind a mask.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

REPEATED = "sdpa_repeated_keys"


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's flash attention computes in `dtype` there."""
    return device.type != "cuda" or (dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0))


def repeat_keys(model: Any) -> None:
    """Have a model of transformers' own repeat the keys of a group before its attention."""
    AttentionInterface.register(REPEATED, _repeated)
    AttentionMaskInterface.register(REPEATED, sdpa_mask)
    if model.config._attn_implementation == "sdpa":  # not where the model has no other than its own
        model.set_attn_implementation(REPEATED)


def _repeated(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa_attention_forward` of heads that all have keys of their own; shapes (rows, heads, tokens, head size)."""
    groups = getattr(module, "num_key_value_groups", 1)
    alone = SimpleNamespace(is_causal=getattr(module, "is_causal", True), layer_idx=getattr(module, "layer_idx", None))
    answer: tuple[torch.Tensor, None] = sdpa_attention_forward(
        alone, query, repeat_kv(key, groups), repeat_kv(value, groups), attention_mask, **more
    )
    return answer
