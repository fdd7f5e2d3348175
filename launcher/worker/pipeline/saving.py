"""A checkpoint from the stages of a pipeline, laid out as that of one process: each rank writes what it has, under the names of the whole.

An adapter's tensors travel to the first rank, which writes them as one file; weights of full training do not travel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from launcher.plan import Plan
from launcher.worker.checkpoint import Staging, gathered
from launcher.worker.weights import files_of, write_adapter_files, write_model_files


def write_part(folder: Staging, model: Any, plan: Plan, group: Any) -> None:
    """This rank's weights: of an adapter, or in files of at most checkpoint.max_shard_size. Every rank has to call it.

    Args:
        group: of all ranks, through host memory: weights that are saved in full may be larger than what is free on a card.
    """
    rank = dist.get_rank()
    if plan.recipe.adapter.type != "full":
        from peft import get_peft_model_state_dict

        trained = {name: tensor.detach().cpu() for name, tensor in get_peft_model_state_dict(model).items()}
        parts: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(trained, parts, group=group)
        if parts is not None:
            write_adapter_files(folder, model, {name: tensor for part in parts for name, tensor in part.items()})
        return
    held = dict(model.named_parameters())
    sizes = {name: parameter.numel() * parameter.element_size() for name, parameter in held.items()}
    groups = [names for names in files_of(sizes, plan.recipe.checkpoint.max_shard_size).values() if names]
    numbers = gathered(len(groups), group)
    before, total = sum(numbers[:rank]), sum(numbers)
    kept = {}
    for place, names in enumerate(groups, before + 1):
        file = f"model-{place:05d}-of-{total:05d}.safetensors"
        folder.tensors(file, {name: held[name].detach() for name in names})
        kept |= dict.fromkeys(names, file)
    found = gathered((kept, sum(sizes.values())), group)
    if rank == 0:
        weight_map = {name: file for files, _ in found for name, file in files.items()}
        write_model_files(folder, model, weight_map, sum(num_bytes for _, num_bytes in found))


def write_rng_state(folder: Staging, rank: int, device: torch.device) -> None:
    """The random states of this rank; dropout draws from them."""
    folder.tensors(f"rng-rank{rank}.safetensors", rng_state(device))


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Device type -> state of its random generator."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def read_rng_state(folder: Path, rank: int, num_ranks: int, device: torch.device) -> bool:
    """Put them back; False where the checkpoint has none of as many ranks."""
    written = sorted(folder.glob("rng-rank*.safetensors"))
    if len(written) != num_ranks:
        return False
    state = load_file(folder / f"rng-rank{rank}.safetensors")
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    return True
