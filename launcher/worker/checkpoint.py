"""Writes and reads checkpoints/step-N: a staging folder, every rank's part, checksums, the manifest last, one rename.

    adapter_model.safetensors  or  model-0000k-of-0000n.safetensors    weights, readable by PEFT and transformers
    optimizer-rank<k>.safetensors                                      the share of optimizer state that rank k wrote, by parameter name
    optimizer.json                                                     scalars of the optimizer and the scheduler's step
    rng_state*.pth, rng-rank<k>.safetensors                            random states, of the Trainer's ranks and of a pipeline's
    trainer_state.json, adalora.safetensors                            the Trainer's counters, AdaLoRA's scores
    manifest.json                                                      the commit marker

Optimizer state goes by parameter name, so that another number of ranks can read it, and as safetensors, so that nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from launcher.manifest import FILE_NAME, Manifest, best_first, describe_file, folders, set_aside, sync_folder
from launcher.plan import Plan, identity
from launcher.rundir import RunDir, write_atomic
from launcher.worker.dtensors import local, placed_like

State = dict[str, Any]
_OPTIMIZER = "optimizer.json"


@dataclass(frozen=True)
class Position:
    """Where in training a checkpoint is taken; `eval_loss` is the newest one, None before the first."""

    step: int
    epoch: float
    rows_key: str
    eval_loss: float | None


def save_checkpoint(
    run: RunDir, plan: Plan, at: Position, write: Callable[[Path], None], join: Callable[[Path], None] | None = None
) -> Path:
    """Commit checkpoints/step-N. Called by every rank; `write` puts this rank's files into the folder it is given, then `join` on rank 0
    makes of them what it has to be.

    Raises:
        OSError: a file could not be written; the staging folder is removed and nothing older is touched.
    """
    rank, num_ranks = _rank(), _num_ranks()
    target = run.checkpoints / f"step-{at.step}"
    staging = run.checkpoints / f".staging-step-{at.step}"
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    _barrier()
    error: str | None = None
    try:
        write(staging)
    except (OSError, RuntimeError, SafetensorError) as failure:
        # torch and safetensors have errors of their own for a full disk.
        error = f"rank {rank}: {failure}"
    errors = [message for message in gathered(error) if message]
    if errors:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise OSError(f"checkpoint step-{at.step} was not saved: {errors[0]}")
    if rank == 0:
        manifest = Manifest(
            step=at.step,
            epoch=at.epoch,
            rows_key=at.rows_key,
            identity=identity(plan),
            eval_loss=at.eval_loss,
            world={
                "num_processes": num_ranks,
                "strategy": plan.strategy,
                "micro_batch": plan.micro_batch,
                "accumulation": plan.accumulation,
            },
            files={},
        )
        try:
            if join is not None:
                join(staging)
            _commit(staging, target, manifest)
        except (OSError, SafetensorError) as failure:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(failure, OSError):
                raise
            raise OSError(f"checkpoint step-{at.step} was not saved: rank 0: {failure}") from failure
        _rotate(run, plan, target)
    _barrier()
    return target


def _commit(staging: Path, target: Path, manifest: Manifest) -> None:
    """Checksums, flush to disk, manifest, rename."""
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors writes 0600, which locks colleagues out of a shared folder
            with path.open("rb") as file:
                os.fsync(file.fileno())
    files = {
        str(path.relative_to(staging)): describe_file(path) for path in sorted(staging.rglob("*")) if path.is_file()
    }
    whole = manifest.model_copy(update={"files": files}).sealed()
    write_atomic(staging / FILE_NAME, whole.model_dump_json(indent=1) + "\n")
    sync_folder(staging)
    if target.exists():
        set_aside(target)  # only a damaged folder can be in the way: a valid one would have been resumed from
    staging.rename(target)
    sync_folder(target.parent)


def _rotate(run: RunDir, plan: Plan, newest: Path) -> None:
    """Delete what is older than `keep` complete checkpoints; the best one stays, and folders without a manifest are not counted."""
    for folder in folders(run):
        if folder == newest:
            break
        set_aside(
            folder
        )  # of a later step than the one just committed: it was passed over on resume, and counts for nothing
    complete = [folder for folder in folders(run) if (folder / FILE_NAME).is_file()]
    surplus = complete[plan.recipe.checkpoint.keep :]
    if not surplus:
        return
    best = [folder for _, folder in best_first(run)[:1]]
    for folder in surplus:
        if folder not in best:
            # The name goes first: a half-deleted folder must not look like a checkpoint.
            doomed = folder.with_name(f".deleting-{folder.name}")
            folder.rename(doomed)
            shutil.rmtree(doomed)


def write_optimizer(
    folder: Path, optimizer: Any, scheduler: Any, model: torch.nn.Module, own_parameters: bool = False
) -> None:
    """This rank's share of the optimizer's state, and on rank 0 what is no tensor.

    Ranks that hold the same state share the writing; where it is sharded (FSDP2) each writes its rows of everything.

    Args:
        own_parameters: each rank trains others (a pipeline) and writes all of its state; `join_optimizer` has to follow.
    """
    names = _parameter_names(optimizer, model)
    state: dict[int, State] = optimizer.state_dict()["state"]
    rank, num_ranks = _rank(), _num_ranks()
    everything = own_parameters or any(isinstance(parameter, DTensor) for parameter in model.parameters())
    mine = {
        f"{names[index]}|{key}": local(value).detach().cpu().contiguous()
        for place, index in enumerate(sorted(state))
        if everything or place % num_ranks == rank
        for key, value in _flat(state[index]).items()
        if isinstance(value, torch.Tensor)
    }
    rest = {names[i]: {k: v for k, v in _flat(values).items() if _is_plain(v)} for i, values in state.items()}
    save_file(mine, folder / f"optimizer-rank{rank}.safetensors")
    if rank == 0 or own_parameters:
        left = {"scalars": rest, "parameters": list(rest), "last_epoch": scheduler.last_epoch}
        name = f"optimizer-rank{rank}.json" if own_parameters else _OPTIMIZER
        (folder / name).write_text(json.dumps(left))


def join_optimizer(folder: Path) -> None:
    """One file of what is no tensor, from those of all ranks."""
    parts = sorted(folder.glob("optimizer-rank*.json"))
    read = [json.loads(part.read_text()) for part in parts]
    scalars = {name: values for left in read for name, values in left["scalars"].items()}
    (folder / _OPTIMIZER).write_text(json.dumps({**read[0], "scalars": scalars, "parameters": list(scalars)}))
    for part in parts:
        part.unlink()


def read_optimizer(folder: Path, optimizer: Any, model: torch.nn.Module) -> int:
    """Put the state back, of all shards or of this rank's rows, of the parameters that this rank has; the scheduler's step.

    Learning rate, weight decay and the like come from the recipe, not from the checkpoint.
    """
    left = json.loads((folder / _OPTIMIZER).read_text())
    by_name: dict[str, State] = {name: dict(left["scalars"].get(name, {})) for name in left["parameters"]}
    parameters = dict(model.named_parameters())
    is_sharded = any(isinstance(parameter, DTensor) for parameter in parameters.values())
    for shard in sorted(folder.glob(f"optimizer-rank{_rank() if is_sharded else '*'}.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safe_open is no mapping
                name, _, kind = key.rpartition("|")
                if name in parameters:
                    by_name[name][kind] = placed_like(parameters[name], file.get_tensor(key))
    names = _parameter_names(optimizer, model)
    current = optimizer.state_dict()
    state = {index: _nested(by_name[name]) for index, name in names.items() if name in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
    return int(left["last_epoch"])


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
    """A parameter's state without the inner dict in which bitsandbytes keeps what is quantised: `inner/name` for its values.

    Raises:
        TypeError: there is something in it that would not be saved; dropped, a resume would start with other moments.
    """
    flat: State = {}
    for key, value in state.items():
        flat |= {f"{key}/{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    lost = [key for key, value in flat.items() if not (isinstance(value, torch.Tensor) or _is_plain(value))]
    if lost:
        raise TypeError(
            f"the optimizer's state holds {lost[0]}, a {type(flat[lost[0]]).__name__}, which has no place in a checkpoint"
        )
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


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | bool | str) or value is None


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gathered(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
