"""A LoRA that was trained on a converted model in, the same adapter for the original layout out: exact, and without the base.

Query, key and value are one matrix there. Their three products are one product of three times the rank: A is stacked, B lies
in blocks, and with the scale kept the fused layer computes what the three did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from launcher.native import NativeConfig
from launcher.rundir import read_json, write_json
from launcher.worker.convert import KEYS, filled, qkv_rows

_BASE = "base_model.model."
_FILE, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_fused(checkpoint: Path, found: NativeConfig, folder: Path) -> bool:
    """Write the adapter of a checkpoint for the original layout; False where its kind has no exact counterpart there.

    DoRA's magnitudes are those of the parts, AdaLoRA's file holds masked ranks, and modules saved in full are no adapter.
    """
    config = read_json(checkpoint / _CONFIG) or {}
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        return False
    state = load_file(checkpoint / _FILE)
    made, ranks = _fused(state, found)
    if len(made) == 0 or sum(2 for _ in _modules(state)) != len(state):
        return False
    folder.mkdir()
    save_file(made, folder / _FILE, metadata={"format": "pt"})
    write_json(folder / _CONFIG, {**config, **_ranks(config, ranks), "base_model_name_or_path": None})
    return True


def _modules(state: dict[str, torch.Tensor]) -> list[str]:
    """Names of the adapted modules, without PEFT's own words around them."""
    return [
        name.removeprefix(_BASE).removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")
    ]


def _fused(state: dict[str, torch.Tensor], found: NativeConfig) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Tensors under the original's names, and the rank of each adapted module there."""
    adapted = set(_modules(state))
    made: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for row in KEYS[found.native.source]:
        if not row.source.endswith(".weight") or not row.targets:
            continue
        targets = [target.removesuffix(".weight") for target in row.targets]
        for place in sorted({parts for name in adapted for target in targets if (parts := _match(target, name))}):
            source = filled(row.source, place).removesuffix(".weight")
            pairs = [_pair(state, filled(target, place)) for target in targets]
            down, up = _stacked(pairs, qkv_rows(found.config)) if len(pairs) > 1 else _whole(pairs[0])
            made[f"{_BASE}{source}.lora_A.weight"], made[f"{_BASE}{source}.lora_B.weight"] = down, up
            ranks[source.rpartition(".")[2]] = down.shape[0]
    return made, ranks


def _match(pattern: str, name: str) -> tuple[str, ...] | None:
    """What the stars of a pattern stand for in a name; None where it is another one, `()` matches nothing with stars."""
    parts, wanted = name.split("."), pattern.split(".")
    if len(parts) != len(wanted) or any(w not in ("*", p) for p, w in zip(parts, wanted, strict=True)):
        return None
    return tuple(p for p, w in zip(parts, wanted, strict=True) if w == "*")


def _pair(state: dict[str, torch.Tensor], module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A (r, in) and B (out, r) of a module, None where it has no adapter."""
    down = state.get(f"{_BASE}{module}.lora_A.weight")
    return None if down is None else (down, state[f"{_BASE}{module}.lora_B.weight"])


def _whole(pair: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor]:
    assert pair is not None
    return pair[0].clone(), pair[1].clone()


def _stacked(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None], rows: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A of all parts above one another; B of each part in the rows of that part and the columns of its own rank."""
    there = [pair for pair in pairs if pair is not None]
    down = torch.cat([pair[0] for pair in there])
    up = torch.zeros(sum(rows), down.shape[0], dtype=down.dtype)
    row = column = 0
    for pair, num in zip(pairs, rows, strict=True):
        if pair is not None:
            up[row : row + num, column : column + pair[0].shape[0]] = pair[1]
            column += pair[0].shape[0]
        row += num
    return down, up


def _ranks(config: dict[str, Any], ranks: dict[str, int]) -> dict[str, Any]:
    """What adapter_config.json says of them: the scale, alpha / r (rsLoRA: alpha / √r), stays as it was trained."""
    rank, alpha = config["r"], config["lora_alpha"]
    scaled = {name: math.sqrt(num / rank) if config.get("use_rslora") else num / rank for name, num in ranks.items()}
    return {
        "target_modules": sorted(ranks),
        "rank_pattern": {name: num for name, num in ranks.items() if num != rank},
        "alpha_pattern": {name: alpha * factor for name, factor in scaled.items() if factor != 1},
    }
