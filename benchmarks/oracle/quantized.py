"""bitsandbytes' linear layers in a model without data: its modules and its autograd functions are the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from transformers.integrations import replace_with_bnb_linear

from launcher.plan import Plan
from launcher.worker.model import DTYPES, bitsandbytes_config

_BLOCK, _BLOCK_OF_SCALES = 64, 256


def quantize(model: Any, plan: Plan) -> None:
    """Replace the linear layers of a model on meta, as from_pretrained does: all but the head."""
    kind = plan.recipe.model.quantization
    config = bitsandbytes_config(kind, DTYPES[plan.dtype])
    # Outliers are a few columns of each input, which ones depends on data.
    config.llm_int8_threshold = 0.0
    replace_with_bnb_linear(model, ["lm_head", "output_layer"], config)
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)


def fake_weights(model: Any, dtype: torch.dtype) -> dict[int, torch.nn.Parameter]:
    """id of a quantised weight on meta -> the same without data.

    They are plain parameters with the attributes of bitsandbytes' own class: no fake tensor can be of that class.
    """
    made = {}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            fake = torch.nn.Parameter(torch.empty(module.weight.shape, dtype=torch.int8), requires_grad=False)
            fake.CB = fake.SCB = None
            module.state.CB, module.state.SCB = fake.data, torch.empty(module.weight.shape[0])
            made[id(module.weight)] = fake
        elif isinstance(module, bnb.nn.Linear4bit):
            packed = torch.empty((module.weight.numel() + 1) // 2, 1, dtype=torch.uint8)
            fake = torch.nn.Parameter(packed, requires_grad=False)
            fake.quant_state = module.quant_state = _state(module.weight.shape, dtype)
            made[id(module.weight)] = fake
    return made


def _state(shape: torch.Size, dtype: torch.dtype) -> QuantState:
    """Scales of blocks in a byte each, themselves scaled in blocks (double quantisation)."""
    num = shape.numel()
    of_scales = QuantState(
        torch.empty(-(-num // (_BLOCK * _BLOCK_OF_SCALES))), code=torch.empty(256), blocksize=_BLOCK_OF_SCALES,
        dtype=torch.float32,
    )  # fmt: skip
    return QuantState(
        torch.empty(-(-num // _BLOCK), dtype=torch.uint8), shape=shape, code=torch.empty(16), blocksize=_BLOCK,
        quant_type="nf4", dtype=dtype, offset=torch.empty(()), state2=of_scales,
    )  # fmt: skip


def scales(model: Any) -> Iterator[torch.Tensor]:
    """What belongs to quantised weights and is no parameter: scales of rows, or of blocks and of blocks of those."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt) and module.state.SCB is not None:
            yield module.state.SCB
        state = getattr(module, "quant_state", None)
        if isinstance(state, QuantState):
            yield from (state.absmax, state.state2.absmax)
