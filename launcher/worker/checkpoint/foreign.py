"""The optimizer's state of a checkpoint that a run begins with: ours, or the optimizer.pt of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from launcher.worker.checkpoint.optimizer import OPTIMIZER_FILE
from launcher.worker.checkpoint.slices import MASTER, Slices, State

_MOMENTS = {"exp_avg", "exp_avg_sq"}


class NotReadableError(Exception):
    """There are no moments to begin with; the message says why."""


class Whole(Slices):
    """State that lies in memory, whole tensors by parameter, with what `Slices` has."""

    def __init__(self, folder: Path, states: Mapping[str, State]) -> None:
        self.folder = folder
        self.states = states
        self.shapes = {name: tuple(state["exp_avg"].shape) for name, state in states.items()}

    def kinds(self, name: str) -> list[str]:
        return [kind for kind in self.states[name] if kind in _MOMENTS]

    def rest(self, name: str) -> State:
        return {kind: value for kind, value in self.states[name].items() if kind not in _MOMENTS}

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        values: torch.Tensor = self.states[name][kind].reshape(-1)[start:stop]
        return values


def moments_to_begin_with(folder: Path, shapes: Mapping[str, tuple[int, ...]], order: Sequence[str]) -> Slices:
    """AdamW's moments of these parameters.

    Args:
        shapes: of what is trained, by name.
        order: the names as transformers' Trainer numbers them: those with weight decay first.

    Raises:
        NotReadableError: there are none, or those of something else.
    """
    if (folder / OPTIMIZER_FILE).is_file():
        found = Slices(folder)
        if not found.shapes:
            raise NotReadableError("its moments lie in blocks that belong to its ranks")
    elif (folder / "optimizer.pt").is_file():
        found = Whole(folder, _of_trainer(folder / "optimizer.pt", order))
    elif next(folder.glob("global_step*"), None) is not None:
        raise NotReadableError("its optimizer's state lies in DeepSpeed's own files")
    else:
        raise NotReadableError("it has no optimizer's state")
    other = [name for name, shape in shapes.items() if found.shapes.get(name) != shape]
    if other:
        raise NotReadableError(f"its optimizer's state is not that of {other[0]}")
    if any(set(found.kinds(name)) - {MASTER} != _MOMENTS for name in shapes):
        raise NotReadableError("its optimizer's state is not AdamW's in full precision")
    return found


def _of_trainer(path: Path, order: Sequence[str]) -> dict[str, State]:
    """State by name, from the numbers under which torch has it."""
    try:
        states: dict[int, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"]
    except (OSError, RuntimeError, UnpicklingError, KeyError, TypeError) as error:
        raise NotReadableError(f"{path.name} cannot be read: {str(error).splitlines()[0]}") from None
    if len(states) != len(order):
        raise NotReadableError(f"{path.name} is of {len(states)} parameters, trained are {len(order)}")
    if not all(isinstance(state, dict) and state.keys() >= _MOMENTS for state in states.values()):
        raise NotReadableError(f"{path.name} is not AdamW's in full precision")
    return {name: states[index] for index, name in enumerate(order)}
