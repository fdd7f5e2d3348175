"""The weights of a checkpoint, as PEFT and transformers read them, under every strategy. Ranks share the writing, a file each at a time."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from launcher.plan import Plan
from launcher.worker import shares, zero
from launcher.worker.byshard import ADAPTER_FILE
from launcher.worker.checkpoint import Staging

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PARAMETERS_SHARDED = ("fsdp", "zero3")
_UNITS = {"MB": 10**6, "GB": 10**9}


def write_weights(folder: Staging, model: Any, plan: Plan) -> None:
    """Write an adapter, or all weights in files of at most checkpoint.max_shard_size. Every rank has to call it.

    A rank holds one file's tensors at a time, unless `folder` keeps copies.
    """
    if plan.recipe.adapter.type != "full":
        _write_adapter(folder, model, plan)
        return
    is_sharded = plan.strategy in PARAMETERS_SHARDED
    state = dict(model.named_parameters()) if is_sharded else _as_published(model)
    sizes = {name: zero.numel(tensor) * tensor.element_size() for name, tensor in state.items()}
    files = files_of(sizes, plan.recipe.checkpoint.max_shard_size)
    if is_sharded and folder.copies is not None and shares.can_be_copied(model):
        shares.put_off(folder, files, model)
    else:
        mine = {name for file in _my_files(files, folder) for name in files[file]}
        _write_full(folder, files, gathered(model, mine.__contains__) if is_sharded else iter(state.items()))
    if _rank() == 0:
        write_model_files(folder, model, weight_map_of(files), sum(sizes.values()))


def gathered(
    model: Any, wanted: Callable[[str], bool], trained_only: bool = False
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(name, whole tensor on the CPU) of every weight of a sharded model, one at a time. Every rank has to take all of them.

    Args:
        wanted: whether this rank is given the tensor of a name; else it gets None.
        trained_only: leave out what is frozen.
    """
    for name, parameter in model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        if isinstance(parameter, DTensor):
            whole = parameter.detach().full_tensor()
            yield name, whole.cpu() if wanted(name) else None
        else:
            yield name, zero.gathered(parameter, wanted(name))


def _write_adapter(folder: Staging, model: Any, plan: Plan) -> None:
    """Rank 0's alone: adapters are small."""
    from peft import get_peft_model_state_dict

    is_first = _rank() == 0
    trained = None
    if plan.strategy in PARAMETERS_SHARDED:
        trained = dict(gathered(model, lambda name: is_first, trained_only=True))
    if is_first:
        write_adapter_files(folder, model, get_peft_model_state_dict(model, state_dict=trained))


def write_adapter_files(folder: Staging, model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """The two files that PEFT reads."""
    folder.tensors(ADAPTER_FILE, tensors)
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True  # what PEFT itself saves
    folder.by_library(config.save_pretrained)


def _write_full(
    folder: Staging, files: dict[str, list[str]], weights: Iterator[tuple[str, torch.Tensor | None]]
) -> None:
    """Deal the files out to the ranks: in every round each takes the tensors of one, then all write at the same time."""
    mine, round_of = set(_my_files(files, folder)), folder.share[1] if folder.share else 1
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for place, (file, names) in enumerate(files.items(), 1):
        for name, tensor in islice(weights, len(names)):
            if file in mine and tensor is not None:
                kept.setdefault(file, {})[name] = tensor
        if place % round_of == 0 or place == len(files):
            for each, tensors in kept.items():
                folder.tensors(each, tensors)
            kept = {}


def _my_files(files: dict[str, list[str]], folder: Staging) -> list[str]:
    return list(files)[folder.share[0] :: folder.share[1]] if folder.share else []


def _as_published(model: Any) -> dict[str, torch.Tensor]:
    """The weights under the names of the files that the model came in, tied ones once: what `save_pretrained` writes."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    published: dict[str, torch.Tensor] = revert_weight_conversion(
        model, remove_tied_weights_from_state_dict(state, model)
    )
    return published


def write_model_files(folder: Staging, model: Any, weight_map: dict[str, str], num_bytes: int) -> None:
    """What transformers reads beside the weights: in which file each is, and the config."""
    if set(weight_map.values()) != {SINGLE_FILE}:
        folder.text(INDEX_FILE, index_of(weight_map, num_bytes))
    # Not by their save_pretrained, which refuses generation settings that published models have.
    config = copy.copy(model.config)
    config.dtype = next(model.parameters()).dtype
    folder.text("config.json", config.to_json_string())
    if getattr(model, "generation_config", None) is not None:
        folder.text("generation_config.json", model.generation_config.to_json_string())


def files_of(sizes: dict[str, int], max_shard_size: str) -> dict[str, list[str]]:
    """File name -> names of the weights in it, in the order of `sizes` (bytes by name)."""
    number, unit = re.fullmatch(r"(\d+)(MB|GB)", max_shard_size).groups()  # type: ignore[union-attr]
    limit = int(number) * _UNITS[unit]
    groups: list[list[str]] = [[]]
    size = 0
    for name, num_bytes in sizes.items():
        if groups[-1] and size + num_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{place:05d}-of-{len(groups):05d}.safetensors": names for place, names in enumerate(groups, 1)}


def weight_map_of(files: dict[str, list[str]]) -> dict[str, str]:
    """Name of a weight -> its file."""
    return {name: file for file, names in files.items() for name in names}


def index_of(weight_map: dict[str, str], num_bytes: int) -> str:
    """What tells transformers which weight is in which of several files."""
    return json.dumps({"metadata": {"total_size": num_bytes}, "weight_map": weight_map}, indent=1)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
