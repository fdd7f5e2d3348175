"""A checkpoint from the stages of a pipeline, laid out as that of one process: each rank writes what it has, the first one joins the parts.

No weight travels between ranks: they share the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launcher.plan import Plan
from launcher.worker.byshard import ADAPTER_FILE
from launcher.worker.sharding import in_files, write_index


def write_part(folder: Path, model: Any, plan: Plan, rank: int) -> None:
    """This rank's weights: of an adapter, or in files of at most checkpoint.max_shard_size."""
    if plan.recipe.adapter.type == "full":
        held = dict(model.named_parameters())
        for place, names in enumerate(in_files(model, plan.recipe.checkpoint.max_shard_size)):
            tensors = {name: held[name].detach().cpu().contiguous() for name in names}
            if tensors:
                save_file(tensors, folder / f"part-{rank:04d}-{place:05d}.safetensors", metadata={"format": "pt"})
    elif rank == 0:
        model.save_pretrained(folder)  # its config too
    else:
        from peft import get_peft_model_state_dict

        trained = {name: tensor.detach().cpu() for name, tensor in get_peft_model_state_dict(model).items()}
        save_file(
            {name: tensor.contiguous() for name, tensor in trained.items()}, folder / f"part-{rank:04d}.safetensors"
        )


def join_parts(folder: Path, model: Any, plan: Plan) -> None:
    """Make of all parts what PEFT and transformers read, on the first rank.

    Raises:
        OSError, SafetensorError: a file could not be written.
    """
    parts = sorted(folder.glob("part-*.safetensors"))
    if plan.recipe.adapter.type != "full":
        weights: dict[str, torch.Tensor] = load_file(folder / ADAPTER_FILE)
        for part in parts:
            weights |= load_file(part)
        save_file(weights, folder / ADAPTER_FILE, metadata={"format": "pt"})
        for part in parts:
            part.unlink()
        return
    kept = {}
    for place, part in enumerate(parts, 1):
        name = f"model-{place:05d}-of-{len(parts):05d}.safetensors"
        part.rename(folder / name)
        with safe_open(folder / name, framework="pt") as file:
            kept |= dict.fromkeys(file.keys(), name)
    write_index(folder, kept)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def write_rng_state(folder: Path, rank: int, device: torch.device) -> None:
    """The random states of this rank; dropout draws from them."""
    save_file(rng_state(device), folder / f"rng-rank{rank}.safetensors")


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
