"""Between ZeRO's optimizer and the slices of a checkpoint.

It steps on flat fp32 tensors that are cut over the ranks without regard to parameters. DeepSpeed knows where each parameter lies in them;
by that its state gets names, any other strategy or number of ranks can read it, and it can read theirs. The one exception are 8-bit
optimizers, whose blocks do not end where parameters do: their partitions are kept as they are. What lies on a disk (`nvme`) passes
through host memory a flat tensor at a time, into a file of its own.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.errors import PreflightError
from launcher.worker import nvme
from launcher.worker.byshard import Weights
from launcher.worker.checkpoint.files import Staging, TensorFile
from launcher.worker.checkpoint.optimizer import OPTIMIZER_FILE, require
from launcher.worker.checkpoint.slices import MASTER, Slice, Slices, State, write_slices
from launcher.worker.zero import masters, stage_of, trained


@dataclass(frozen=True)
class Part:
    """Where this rank has a run of a parameter's values.

    Args:
        start: place of the first value in the flat parameter.
        group: which of the rank's flat tensors they lie in, from `offset` on; length: how many there are.
        halved: whether the parameter itself is in half precision.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    group: int
    offset: int
    length: int
    halved: bool

    def within(self, flat: torch.Tensor) -> torch.Tensor:
        """Its values in a flat tensor of the group."""
        return flat[self.offset : self.offset + self.length]


def _groups(engine: Any, model: torch.nn.Module) -> Iterator[tuple[int, list[Part]]]:
    """The rank's flat tensors, and what parts of parameters lie in each."""
    groups: dict[int, list[Part]] = defaultdict(list)
    for part in _parts(engine, model):
        groups[part.group].append(part)
    return iter(groups.items())


def _parts(engine: Any, model: torch.nn.Module) -> Iterator[Part]:
    """All that this rank holds of trained parameters."""
    optimizer, rank = engine.optimizer, dist.get_rank()
    for name, parameter in trained(model):
        halved = parameter.dtype != torch.float32
        if stage_of(engine) == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            length = min(size, int(parameter.ds_numel) - rank * size)  # the last ranks' parts are filled up
            if length > 0:
                yield Part(name, tuple(parameter.ds_shape), rank * size, group, offset, length, halved)
        elif (found := parameter._hp_mapping) is not None:
            here, there = found.lp_fragment_address, found.hp_fragment_address
            group = found.param_group_index
            yield Part(name, tuple(parameter.shape), here.start, group, there.start, there.numel, halved)


def write_state(folder: Staging, engine: Any, model: torch.nn.Module, last_epoch: int) -> None:
    """This rank's part of masters and moments; on rank 0 also what is no parameter's."""
    rank = dist.get_rank()
    if is_blockwise(engine):
        folder.tensors(_file_name(), _flat_state(engine))
    else:
        kept: list[Slice] = []
        for group, parts in _groups(engine, model):
            if nvme.is_swapped(engine, group):
                with nvme.in_memory(engine, group):
                    write_slices(folder, f"{rank}-{group}", [_slice(engine, part) for part in parts])
            else:
                kept += [_slice(engine, part) for part in parts]
        write_slices(folder, rank, kept)
    if rank == 0:
        scaler = {
            key: value for key, value in vars(engine.optimizer.loss_scaler).items() if isinstance(value, int | float)
        }
        folder.text(OPTIMIZER_FILE, json.dumps({"loss_scaler": scaler, "last_epoch": last_epoch}))


def _slice(engine: Any, part: Part) -> Slice:
    master = masters(engine)[part.group]
    state = engine.optimizer.optimizer.state[master]
    sized = {kind: part.within(flat) for kind, flat in state.items() if _is_like(flat, master)}
    if part.halved:  # else the weights themselves are as good
        sized[MASTER] = part.within(master.detach())
    rest = {kind: value for kind, value in state.items() if kind not in sized}
    return Slice(part.name, part.shape, part.start, sized, rest)


def read_state(folder: Path, engine: Any, model: torch.nn.Module, weights: Weights) -> int:
    """Put this rank's part back, whoever wrote it; the scheduler's step. The model has its weights already.

    Args:
        weights: those of the checkpoint, which may be more precise than the model's.

    Raises:
        PreflightError: some of it is not there.
    """
    if is_blockwise(engine):
        _read_flat_state(folder, engine)
    else:
        put_back(Slices(folder), engine, model, weights)
    left = json.loads((folder / OPTIMIZER_FILE).read_text())
    for key, value in left.get("loss_scaler", {}).items():
        setattr(engine.optimizer.loss_scaler, key, value)
    return int(left["last_epoch"])


def put_back(slices: Slices | None, engine: Any, model: torch.nn.Module, weights: Weights) -> None:
    """Give this rank's part of masters and moments their values; without slices the masters alone.

    Raises:
        PreflightError: some of them are not there.
    """
    for group, parts in _groups(engine, model):
        with nvme.in_memory(engine, group, changed=True):
            master, state = masters(engine)[group], {}
            for part in parts:
                if part.halved:
                    stop = part.start + part.length
                    part.within(master.data).copy_(_precise(slices, weights, part.name, part.start, stop))
                if slices is not None:
                    _put_back_state(slices, part, master, state, engine.optimizer.optimizer)
            if slices is not None:
                engine.optimizer.optimizer.state[master] = state


def _put_back_state(slices: Slices, part: Part, master: torch.Tensor, state: State, optimizer: Any) -> None:
    """Fill in what a flat tensor's state has of a part.

    Raises:
        PreflightError: some of it is not there.
    """
    require(slices, part.name, torch.Size(part.shape))
    for kind in slices.kinds(part.name):
        if kind != MASTER:
            flat = state.setdefault(kind, torch.zeros_like(master.data))
            part.within(flat).copy_(slices.read(part.name, kind, part.start, part.start + part.length))
    state |= {kind: _counted(value, optimizer) for kind, value in slices.rest(part.name).items()}


def _precise(slices: Slices | None, weights: Weights, name: str, start: int, stop: int) -> torch.Tensor:
    """Values of a weight in the best precision that the checkpoint has.

    Raises:
        PreflightError: it has none.
    """
    if slices is not None and MASTER in slices.kinds(name):
        return slices.read(name, MASTER, start, stop)
    found = weights.find(name)
    if found is None:
        raise PreflightError("checkpoint", f"has no weights for {name}", "start a new run: launch RECIPE")
    return found[0].values(found[1], start, stop)


def _counted(steps: Any, optimizer: Any) -> Any:
    """A count of steps as the optimizer keeps it: DeepSpeed's for the host as a number, torch's as a tensor."""
    if type(optimizer).__module__.startswith("deepspeed"):
        return int(steps)
    return torch.as_tensor(steps, dtype=torch.float32)


def is_blockwise(engine: Any) -> bool:
    """Whether the optimizer is one of bitsandbytes."""
    return type(engine.optimizer.optimizer).__module__.startswith("bitsandbytes")


def _flat_state(engine: Any) -> dict[str, torch.Tensor]:
    """Everything as flat as it is; numbers as tensors of one value."""
    tensors: dict[str, torch.Tensor] = {}
    for place, master in enumerate(masters(engine)):
        state = {MASTER: master.detach(), **engine.optimizer.optimizer.state[master]}
        tensors |= {f"{place}|{kind}": torch.as_tensor(value) for kind, value in state.items()}
    return tensors


def _read_flat_state(folder: Path, engine: Any) -> None:
    file = TensorFile(folder / _file_name())
    for place, master in enumerate(masters(engine)):
        kinds = [key.partition("|")[2] for key in file.layout if key.startswith(f"{place}|")]
        state = {kind: file.whole(f"{place}|{kind}") for kind in kinds}
        master.data.copy_(state.pop(MASTER))
        engine.optimizer.optimizer.state[master] = {
            kind: value.item() if kind == "step" else value.to(master.device) for kind, value in state.items()
        }


def _is_like(value: Any, master: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == master.shape


def _file_name() -> str:
    return f"optimizer-rank{dist.get_rank()}.safetensors"
