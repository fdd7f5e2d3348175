"""The model of a plan spread over its ranks, by FSDP2 or ZeRO-3, or its devices: built, filled from files, proved.

The same calls on a CPU and on GPUs. accelerate would ignore `fsdp` on a CPU without a word, so it is not asked: the model is sharded
before the Trainer sees it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from launcher.errors import PreflightError
from launcher.families import family
from launcher.plan import Plan, total_steps
from launcher.rundir import RunDir
from launcher.worker import spread, zero
from launcher.worker.adapters import adapter_of, put_adapter, require_adapter, with_adapter
from launcher.worker.attention import repeat_keys
from launcher.worker.byshard import Weights, empty_model, is_empty, read_buffers, weights_of
from launcher.worker.devices import stage_devices
from launcher.worker.dtensors import rows_of_this_rank
from launcher.worker.model import DTYPES, load_model
from launcher.worker.prepared import Prepared
from launcher.worker.weights import PARAMETERS_SHARDED


def build_model(plan: Plan, run: RunDir, prepared: Prepared, device: torch.device, num_rows: int) -> Any:
    """The model that this rank trains, adapter and all; where parameters are sharded its share of it, and at once that of the checkpoint
    to go on from. All weights come from that checkpoint, an adapter that is whole on every rank is put in by the Trainer."""
    if plan.strategy in PARAMETERS_SHARDED:
        model, weights = unplaced_model(plan, run, prepared, num_rows)
        if plan.strategy == "fsdp":
            shard(model, plan, device)
            if weights is not None:
                _fill(model, weights)
        elif weights is not None:
            zero.partition(model, weights, plan, device)
        return model
    checkpoint, full = origin(plan, run), plan.recipe.adapter.type == "full"
    folder = checkpoint if checkpoint is not None and full else Path(prepared.model_dir)
    placed: Any = device
    if plan.strategy == "device_map":
        placed = spread.places(family(plan.shape.family), plan.stages, stage_devices(plan), folder, prepared.code)
    model = _adapted(load_model(plan, folder, placed, code=prepared.code), plan, num_rows)
    if checkpoint is not None and not full and plan.resume_from is None:
        put_adapter(model, checkpoint)
    return spread.to_train(model, plan, placed) if plan.strategy == "device_map" else model


def unplaced_model(plan: Plan, run: RunDir, prepared: Prepared, num_rows: int) -> tuple[Any, Weights | None]:
    """The model, adapter and all, before anything of it lies on a device.

    Without memory, beside what its weights are read from, at once those of the checkpoint to go on from; or all of it in host memory and
    None, where its files cannot be read by tensor.
    """
    checkpoint, full = origin(plan, run), plan.recipe.adapter.type == "full"
    folder = checkpoint if checkpoint is not None and full else Path(prepared.model_dir)
    model, weights = None, None
    # DoRA starts from the norms of the weights; a model's own code may do anything while it is built.
    if prepared.code is None and plan.recipe.adapter.type != "dora":
        model = empty_model(folder, DTYPES[plan.weights_dtype])
        weights = weights_of(model, folder, checkpoint)
    if weights is None:
        print(f"{folder} cannot be read by shard: each rank loads all of it before it keeps its share", flush=True)
        model = load_model(plan, folder, torch.device("cpu"), code=prepared.code)
    else:
        read_buffers(model, weights)
    if prepared.code is None and not plan.cluster.has_flash(plan.dtype):
        repeat_keys(model)
    model = _adapted(model, plan, num_rows)
    if checkpoint is not None and not full:
        require_adapter(model, adapter_of(checkpoint))
        if weights is None:
            put_adapter(model, checkpoint)
    return model, weights


def origin(plan: Plan, run: RunDir) -> Path | None:
    """The checkpoint whose weights the ranks take: that of a run that goes on, else what the recipe begins with."""
    if plan.resume_from is not None:
        return run.path / plan.resume_from
    named = plan.recipe.checkpoint.init_from
    return Path(named) if named is not None else None


def _adapted(model: Any, plan: Plan, num_rows: int) -> Any:
    """The model with the plan's adapter: one seed for all ranks, so that it starts the same everywhere, and the same as on one rank."""
    torch.manual_seed(plan.recipe.train.seed)
    return with_adapter(model, plan, total_steps(plan, num_rows))


def shard(model: Any, plan: Plan, device: torch.device) -> None:
    """Hand every layer, and the rest, to FSDP2: each rank keeps a share of the rows of every parameter."""
    mesh = init_device_mesh(device.type, (plan.num_processes,))
    # Trained weights lie in fp32 and compute in half precision. Under an adapter the base lies in half precision as it is,
    # and the adapter has to stay in fp32 (`_with_fp32_trained`): there autocast does what it does under DDP.
    halved = plan.recipe.adapter.type == "full" and plan.dtype != "fp32"
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[plan.dtype] if halved else None, reduce_dtype=torch.float32)
    for module in (*layers_of(model), model):
        for parameter in module.parameters():
            if is_empty(parameter):
                # FSDP2 wants them in one piece, of which it copies this rank's rows. On a CPU pages that nobody has written to are no
                # memory; on a GPU it is that of one layer at a time.
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        fully_shard(module, mesh=mesh, mp_policy=policy)


def layers_of(model: Any) -> list[torch.nn.Module]:
    """The blocks that are gathered one at a time: what transformers never splits, else the children of the longest list."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if layers:
        return layers
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def compile_layers(model: Any) -> None:
    """Have torch compile each layer when it is first called.

    In place, so that parameters keep their names and checkpointing, FSDP2's hooks and DDP stay around the layers. Sizes are symbols: micro
    batches of another shape need no other kernels. All layers are one code, which is compiled once.
    """
    for layer in layers_of(model):
        layer.compile(dynamic=True)


def _fill(model: Any, weights: Weights) -> None:
    """Read this rank's rows of every parameter that files have; the adapter's own are as PEFT made them, or as its checkpoint has them."""
    for name, parameter in model.named_parameters():
        found = weights.find(name)
        if found is not None:
            tensors, own = found
            tensors.read(own, parameter.to_local().detach(), rows_of_this_rank(parameter))


def prove(plan: Plan, model: torch.nn.Module, wrapped: Any) -> None:
    """Look at what trains, on this rank, before the first step: several libraries fall back to something else without a word.

    Args:
        wrapped: what the Trainer calls: the model, DDP around it, or DeepSpeed's engine.

    Raises:
        PreflightError: it is not what was planned.
    """
    found: str | None = None
    if plan.strategy == "ddp" and not isinstance(wrapped, DistributedDataParallel):
        found = "the ranks train copies that do not know of each other"
    elif plan.strategy == "single" and isinstance(wrapped, DistributedDataParallel):
        found = "the one rank is wrapped into DDP, which keeps all gradients twice"
    elif plan.strategy == "fsdp":
        found = next(filter(None, (_whats_wrong(*named, plan) for named in model.named_parameters())), None)
    elif plan.strategy == "device_map":
        found = spread.what_is_wrong(model, plan, wrapped)
    elif plan.strategy.startswith("zero"):
        found = zero.what_is_wrong(wrapped, model, plan)
    if found is not None:
        raise PreflightError(f"strategy.type: {plan.strategy}", found, "report this, please")


def _whats_wrong(name: str, parameter: torch.Tensor, plan: Plan) -> str | None:
    """What keeps a parameter from being spread over all ranks, this one having its rows and no more."""
    if not isinstance(parameter, DTensor):
        return f"{name} is whole on every rank"
    if parameter.device_mesh.size() != plan.num_processes:
        return f"{name} is spread over {parameter.device_mesh.size()} of {plan.num_processes} ranks"
    rows = rows_of_this_rank(parameter)
    held, planned = parameter.to_local().numel(), (rows.stop - rows.start) * math.prod(parameter.shape[1:])
    return f"this rank holds {held:,} values of {name}, planned are {planned:,}" if held != planned else None


def on_any_rank(value: bool, device: torch.device) -> bool:
    """Whether it is so on any rank. Every rank has to ask."""
    flag = torch.tensor([float(value)], device=device)
    if dist.is_initialized():
        dist.all_reduce(flag)
    return bool(flag)
