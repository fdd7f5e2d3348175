"""Between an optimizer of torch or bitsandbytes and the slices of a checkpoint. ZeRO's are read and written by `launcher.worker.zero`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from launcher.errors import PreflightError
from launcher.worker.checkpoint.files import Staging
from launcher.worker.checkpoint.slices import MASTER, Slice, Slices, State, write_slices
from launcher.worker.dtensors import local, placed_like, rows_of_this_rank

OPTIMIZER_FILE = "optimizer.json"


def write_optimizer(
    folder: Staging, optimizer: Any, scheduler: Any, model: torch.nn.Module, own_parameters: bool = False
) -> None:
    """This rank's share of the optimizer's state, and on rank 0 what is no parameter's.

    Args:
        own_parameters: whether each rank trains others (a pipeline) and writes all of its state. Else they hold the same state and share
            the writing, or where it is sharded (FSDP2) each writes its rows of everything.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    names, parameters = _parameter_names(optimizer, model), dict(model.named_parameters())
    share = (0, 1) if own_parameters else folder.share
    state: dict[int, State] = optimizer.state_dict()["state"]
    slices = [
        _slice(names[index], parameters[names[index]], _flat(state[index]), share, rank) for index in sorted(state)
    ]
    write_slices(folder, rank, slices)
    if rank == 0:
        folder.text(OPTIMIZER_FILE, json.dumps({"last_epoch": scheduler.last_epoch}))


def _slice(name: str, parameter: torch.Tensor, state: State, share: tuple[int, int] | None, rank: int) -> Slice:
    """What this rank writes of a parameter: its rows where it is sharded, else its share of the values."""
    shape = tuple(parameter.shape)
    sized = {
        kind: local(value).detach().reshape(-1)
        for kind, value in state.items()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.is_floating_point()
    }
    rest = {kind: value for kind, value in state.items() if kind not in sized}
    if isinstance(parameter, DTensor):
        return Slice(name, shape, first_value(parameter), sized, rest)
    place, num = share or (0, 1)
    start, stop = parameter.numel() * place // num, parameter.numel() * (place + 1) // num if share else 0
    mine = {kind: value[start:stop] for kind, value in sized.items()}
    return Slice(name, shape, start, mine if stop > start else {}, rest if place == 0 and share else {})


def read_optimizer(folder: Path, optimizer: Any, model: torch.nn.Module) -> int:
    """Put the state back, all of it or this rank's rows, whoever wrote it; the scheduler's step.

    Learning rate, weight decay and the like come from the recipe, not from the checkpoint. Where ZeRO has kept fp32 copies of weights
    that the files have in half precision, the model gets those.

    Raises:
        PreflightError: some of it is not there.
    """
    put_back(Slices(folder), optimizer, model)
    return read_last_epoch(folder)


def put_back(slices: Slices, optimizer: Any, model: torch.nn.Module) -> None:
    """Give an optimizer its state, all of it or this rank's rows.

    Raises:
        PreflightError: some of it is not there.
    """
    parameters, names = dict(model.named_parameters()), _parameter_names(optimizer, model)
    state = {
        index: _nested(_state_of(slices, name, parameters[name], type(optimizer))) for index, name in names.items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _state_of(slices: Slices, name: str, parameter: torch.Tensor, kind_of_optimizer: type) -> State:
    require(slices, name, parameter.shape)
    shape, start = local(parameter).shape, first_value(parameter)
    state = slices.rest(name)
    for kind in slices.kinds(name):
        values = slices.read(name, kind, start, start + shape.numel()).view(shape)
        if kind == MASTER:
            local(parameter).detach().copy_(values)
        else:
            state[kind] = placed_like(parameter, values)
    if kind_of_optimizer is torch.optim.AdamW and "step" in state:  # DeepSpeed's for the host counts without a tensor
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32)
    return state


def read_last_epoch(folder: Path) -> int:
    """The scheduler's step."""
    return int(json.loads((folder / OPTIMIZER_FILE).read_text())["last_epoch"])


def require(slices: Slices, name: str, shape: torch.Size) -> None:
    """Refuse a parameter whose state is not there, or that of another one.

    Raises:
        PreflightError: it is not there, or of another shape.
    """
    before = slices.shapes.get(name)
    if before != tuple(shape):
        found = f"its optimizer has no state of {name}"
        if before is not None:
            found = f"{name} was {'×'.join(map(str, before))}, now it is {'×'.join(map(str, shape))}"
        raise PreflightError(f"resume from {slices.folder.name}", found, "start a new run: launch RECIPE")


def first_value(parameter: torch.Tensor) -> int:
    """The place in the flat parameter of the first value that this rank holds."""
    if not isinstance(parameter, DTensor):
        return 0
    return rows_of_this_rank(parameter).start * (parameter.numel() // parameter.shape[0])


def set_schedule(scheduler: Any, optimizer: Any, last_epoch: int) -> None:
    """Go to a step of the schedule."""
    scheduler.last_epoch = last_epoch
    scheduler._step_count = last_epoch + 1
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _parameter_names(optimizer: Any, model: torch.nn.Module) -> dict[int, str]:
    """Index in the optimizer's state -> parameter name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index: names[id(parameter)] for index, parameter in enumerate(ordered)}


def _flat(state: State) -> State:
    """A parameter's state without the inner dict in which bitsandbytes keeps what is quantised: `inner/name` for its values."""
    flat: State = {}
    for key, value in state.items():
        flat |= {f"{key}/{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _nested(flat: State) -> State:
    """The way back from `_flat`."""
    state: State = {}
    for key, value in flat.items():
        outer, slash, inner = key.partition("/")
        if slash:
            state.setdefault(outer, {})[inner] = value
        else:
            state[key] = value
    return state
