"""What DeepSpeed needs beside its JSON: a partitioned model, and proof that it does what was planned."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from launcher.plan import Plan
from launcher.worker import nvme
from launcher.worker.byshard import Weights
from launcher.worker.model import DTYPES


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


def gathered(parameter: Any, wanted: bool) -> torch.Tensor | None:
    """The whole of a ZeRO-3 parameter on the CPU of a rank that wants it, None on the others. Every rank has to ask."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True) if wanted else None


def masters(engine: Any) -> list[torch.Tensor]:
    """The flat fp32 tensors of this rank that the optimizer steps on."""
    optimizer = engine.optimizer
    flat = (
        optimizer.fp32_partitioned_groups_flat if stage_of(engine) == 3 else optimizer.single_partition_of_fp32_groups
    )
    return list(flat)


def _sizes_of_masters(engine: Any) -> list[int]:
    """How many values they have; those that lie on a disk are empty here."""
    if stage_of(engine) == 3:
        return list(engine.optimizer.fp16_partitioned_groups_flat_numel)
    return [master.numel() for master in masters(engine)]


def stage_of(engine: Any) -> int:
    """1, 2 or 3."""
    return int(engine.zero_optimization_stage())


def what_is_wrong(engine: Any, model: torch.nn.Module, plan: Plan) -> str | None:
    """What differs between the engine and the plan; None where it does what was planned."""
    import deepspeed

    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        return f"the model is trained by {type(engine).__name__}, not by DeepSpeed"
    if stage_of(engine) != int(plan.strategy[-1]):
        return f"DeepSpeed runs stage {stage_of(engine)}"
    if engine.dp_world_size != plan.num_processes:
        return f"DeepSpeed sees {engine.dp_world_size} of {plan.num_processes} ranks"
    flat, parameters = masters(engine), [parameter for _, parameter in trained(model)]
    held, wanted = sum(_sizes_of_masters(engine)), sum(map(numel, parameters))
    # Cut into equal parts: rounded up for each group, by stage 3 for each parameter.
    spare = 2 * plan.num_processes * (1 + len(parameters))
    if held * plan.num_processes > wanted + spare or held * plan.num_processes < wanted:
        return f"this rank holds {held:,} of {wanted:,} trained values"
    if plan.recipe.strategy.offload != "none" and any(master.device.type != "cpu" for master in flat):
        return f"the optimizer's state is on {flat[0].device}, not in host memory"
    if plan.recipe.strategy.nvme_path is not None:
        if not engine.optimizer.swap_optimizer:
            return "the optimizer's state is in memory, not on a disk"
        if (gone := nvme.missing(engine)) is not None:
            return f"{gone} lacks what the optimizer has put there"
    if stage_of(engine) == 3:
        whole = [name for name, parameter in model.named_parameters() if not hasattr(parameter, "ds_tensor")]
        if whole:
            return f"{len(whole)} parameters are whole on every rank, such as {whole[0]}"
    return None


def trained(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """(name, parameter) of what is trained."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def numel(parameter: Any) -> int:
    """Values of a whole parameter; under ZeRO-3 the tensor itself is empty."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
