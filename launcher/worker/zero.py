"""What DeepSpeed needs beside its JSON: a partitioned model, its optimizer's state in our files, and proof that it does what was planned.

DeepSpeed's launcher is not part of this: its signal handler ends processes by pattern. Ranks come from torchrun.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from launcher.plan import Plan
from launcher.worker.byshard import Weights
from launcher.worker.model import DTYPES

State = dict[str, Any]


def connect() -> None:
    """Let DeepSpeed take over the process group that is there. Its shared-memory collectives, which a CPU would first have to
    compile for minutes and which leave files in /dev/shm, are not used: gloo does the same."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def partition(model: Any, weights: Weights, plan: Plan, device: torch.device) -> None:
    """Fill an empty model, a parameter at a time: rank 0 reads it, every rank keeps its part (ZeRO-3)."""
    import deepspeed

    # All pass through the same room: taken and given back for each, it would lie between what is kept and stay with the process.
    largest = max(parameter.numel() for parameter in model.parameters())
    room = torch.empty(largest, dtype=DTYPES[plan.weights_dtype], device=device)
    first: Any = None
    for name, parameter in model.named_parameters():
        found = weights.find(name)
        if found is None:  # the adapter's own, as PEFT made it: DeepSpeed takes care of it later
            continue
        whole = room[: parameter.numel()].view(parameter.shape)
        if dist.get_rank() == 0:
            found[0].read(found[1], whole)
        parameter.data = whole
        if first is None:
            first = parameter
            deepspeed.zero.Init(module=_only(first), config_dict_or_path=plan.deepspeed)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])


def _only(parameter: torch.nn.Parameter) -> torch.nn.Module:
    """A module with that parameter and no other."""
    module = torch.nn.Module()
    module.register_parameter("parameter", parameter)
    return module


def gathered(parameter: Any) -> torch.Tensor | None:
    """The whole of a ZeRO-3 parameter on rank 0's CPU, None on the others. Every rank has to ask."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True) if dist.get_rank() == 0 else None


def write_state(folder: Path, engine: Any, last_epoch: int) -> None:
    """This rank's part of masters and moments, as flat as DeepSpeed has them; on rank 0 also what is no tensor."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, State] = {}
    for place, master in enumerate(_masters(engine)):
        tensors[f"{place}|master"] = master.detach().cpu()
        state = engine.optimizer.optimizer.state[master]
        tensors |= {f"{place}|{key}": value.cpu().contiguous() for key, value in state.items() if _is_tensor(value)}
        scalars[str(place)] = {key: value for key, value in state.items() if not _is_tensor(value)}
    save_file(tensors, folder / _file_name())
    if dist.get_rank() == 0:
        scaler = {
            key: value for key, value in vars(engine.optimizer.loss_scaler).items() if isinstance(value, int | float)
        }
        left = {"scalars": scalars, "loss_scaler": scaler, "last_epoch": last_epoch}
        (folder / "optimizer.json").write_text(json.dumps(left))


def read_state(folder: Path, engine: Any) -> int:
    """Put this rank's part back; the scheduler's step. The model's own weights are there already."""
    left = json.loads((folder / "optimizer.json").read_text())
    with safe_open(folder / _file_name(), framework="pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a safe_open is no mapping
    for place, master in enumerate(_masters(engine)):
        master.data.copy_(saved.pop(f"{place}|master"))
        state = engine.optimizer.optimizer.state[master]
        state.update(left["scalars"][str(place)])
        for key in [key for key in saved if key.startswith(f"{place}|")]:
            value, kind = saved.pop(key), key.partition("|")[2]
            # A count of steps stays where the optimizer keeps it, moments go to their master.
            place_of = state[kind].device if _is_tensor(state.get(kind)) else master.device
            state[kind] = value.to(place_of)
    assert not saved, f"no parameter has {list(saved)[:4]}"
    for key, value in left["loss_scaler"].items():
        setattr(engine.optimizer.loss_scaler, key, value)
    return int(left["last_epoch"])


def _masters(engine: Any) -> list[torch.Tensor]:
    """The flat fp32 tensors of this rank that the optimizer steps on."""
    optimizer = engine.optimizer
    flat = optimizer.fp32_partitioned_groups_flat if _stage(engine) == 3 else optimizer.single_partition_of_fp32_groups
    return list(flat)


def _stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _file_name() -> str:
    return f"optimizer-rank{dist.get_rank()}.safetensors"


def what_is_wrong(engine: Any, model: torch.nn.Module, plan: Plan) -> str | None:
    """What differs between the engine and the plan; None where it does what was planned."""
    import deepspeed

    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        return f"the model is trained by {type(engine).__name__}, not by DeepSpeed"
    if _stage(engine) != int(plan.strategy[-1]):
        return f"DeepSpeed runs stage {_stage(engine)}"
    if engine.dp_world_size != plan.num_processes:
        return f"DeepSpeed sees {engine.dp_world_size} of {plan.num_processes} ranks"
    masters = _masters(engine)
    held, trained = sum(master.numel() for master in masters), sum(map(numel, _trained(model)))
    # Cut into equal parts: rounded up for each group, by stage 3 for each parameter.
    spare = 2 * plan.num_processes * (1 + len(_trained(model)))
    if held * plan.num_processes > trained + spare or held * plan.num_processes < trained:
        return f"this rank holds {held:,} of {trained:,} trained values"
    if plan.recipe.strategy.offload != "none" and any(master.device.type != "cpu" for master in masters):
        return f"the optimizer's state is on {masters[0].device}, not in host memory"
    if _stage(engine) == 3:
        whole = [name for name, parameter in model.named_parameters() if not hasattr(parameter, "ds_tensor")]
        if whole:
            return f"{len(whole)} parameters are whole on every rank, such as {whole[0]}"
    return None


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def numel(parameter: Any) -> int:
    """Values of a whole parameter; under ZeRO-3 the tensor itself is empty."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
