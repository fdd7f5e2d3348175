"""Whether rows that are packed into one sequence see each other in this model: tried, in a second, on a small copy of it.

A family can ignore position ids, a library can hand a mask on, a config can switch a cache on; every one of them leaks silently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from launcher.errors import PreflightError
from launcher.plan import Plan
from launcher.remotecode import Staged
from launcher.worker.data.batches import collator
from launcher.worker.staged import from_config, load_config

_VOCAB = 64
_TOLERANCE, _TOLERANCE_BF16 = 1e-4, 0.05


def refuse_leaks(plan: Plan, model_dir: Path, code: Staged | None = None, device: torch.device | None = None) -> None:
    """Compare the logits of a row by itself and behind another one in a pack, on two layers with random weights.

    Args:
        device: a card, to try what the plan computes attention with there; a CPU otherwise.

    Raises:
        PreflightError: they differ, so a packed row depends on its neighbour.
    """
    config = load_config(model_dir, code)
    config.num_hidden_layers, config.vocab_size = 2, _VOCAB
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)  # the real ones may lie beyond the small vocabulary
    torch.manual_seed(0)
    model = from_config(config, code).eval()
    flash = device is not None and plan.attention == "flash_attention_2"
    if flash:
        model = model.to(device, torch.bfloat16)
        model.set_attn_implementation(plan.attention)
    model.config.use_cache = False  # as in training
    rows = [{"input_ids": torch.randint(0, _VOCAB, (length,)).tolist()} for length in (7, 9)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    pack = collator("packed", 0, flash=flash)
    with torch.no_grad():
        together = model(**_inputs(pack(rows), model.device)).logits[0, 7:]
        alone = model(**_inputs(pack(rows[1:]), model.device)).logits[0]
    difference = float((together - alone).abs().max())
    if difference > (_TOLERANCE_BF16 if flash else _TOLERANCE):
        found = f"rows of one pack see each other in {plan.shape.name}: logits differ by {difference:.2g}"
        raise PreflightError("data.batching: packed", found, "set data.batching=bucketed")


def _inputs(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items() if name != "labels"
    }
