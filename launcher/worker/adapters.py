"""A base model and the plan's adapter in, the model to train out; what PEFT leaves to its caller stands here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from launcher.errors import PreflightError, UsageError
from launcher.plan import Plan
from launcher.worker.byshard import ADAPTER_FILE

_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def with_adapter(model: Any, plan: Plan, total_steps: int) -> Any:
    """The model with the plan's adapter, ready to train; under `full` the model itself with every weight trained.

    Raises:
        UsageError: targets match nothing in this model; lists the names it has.
    """
    import peft

    # Not peft.prepare_model_for_kbit_training: it makes embedding and head fp32, 2 GiB of a 7B model that nobody trains.
    if plan.recipe.adapter.type == "full":
        model.requires_grad_(True)
        return model
    try:
        if plan.deepspeed is not None:
            # DeepSpeed wants all weights in one precision and keeps its own fp32 copy of what is trained.
            return peft.get_peft_model(model, peft_config(plan, total_steps), autocast_adapter_dtype=False)
        return _with_fp32_trained(peft.get_peft_model(model, peft_config(plan, total_steps)))
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        names = ", ".join(sorted(linear_names(model)))
        set_to = plan.targets if isinstance(plan.targets, str) else ", ".join(plan.targets)
        raise UsageError(
            f"adapter.targets: {set_to}", f"match nothing in {plan.shape.name}", f"it has: {names}"
        ) from None


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by PEFT's names; a file that is mapped is read when they are."""
    if (folder / ADAPTER_FILE).is_file():
        return load_file(folder / ADAPTER_FILE)
    state: dict[str, torch.Tensor] = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    return state


def require_adapter(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Compare the tensors of an adapter with those of a model: PEFT itself would pass over what is missing.

    Raises:
        PreflightError: it has other ones.
    """
    from peft import get_peft_model_state_dict

    shapes = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    missing = [name for name, shape in shapes.items() if name not in state or tuple(state[name].shape) != shape]
    wrong = missing or sorted(state.keys() - shapes)
    if wrong:
        found = (
            f"{'lacks' if missing else 'has, and this model has not,'} {wrong[0]}{' and others' if wrong[1:] else ''}"
        )
        raise PreflightError("the adapter to begin with", found, "check adapter.targets, adapter.r and the base model")


def put_adapter(model: Any, folder: Path) -> None:
    """Give an adapter the values of a file."""
    from peft import set_peft_model_state_dict

    state = adapter_of(folder)
    require_adapter(model, state)
    set_peft_model_state_dict(model, state)


def _with_fp32_trained(model: Any) -> Any:
    """Trained weights in fp32: PEFT does it for adapters but not for modules_to_save, and fp16 gradients cannot be unscaled."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def peft_config(plan: Plan, total_steps: int) -> Any:
    """The PEFT config of the plan's adapter."""
    import peft

    adapter = plan.recipe.adapter
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": plan.targets if isinstance(plan.targets, str) else list(plan.targets),
        "modules_to_save": list(adapter.modules_to_save) or None,
    }
    if adapter.type != "adalora":
        return peft.LoraConfig(
            r=adapter.r, use_rslora=adapter.type == "rslora", use_dora=adapter.type == "dora", **common
        )
    # The Trainer multiplies each micro batch's loss by the number of ranks and sums over accumulation, both undone by its
    # token count; the orthogonality term is added before the first and knows nothing of the second.
    repeated = plan.num_processes * plan.accumulation
    start, end = _adalora_schedule(total_steps)
    return peft.AdaLoraConfig(
        init_r=adapter.init_r or math.ceil(1.5 * adapter.r),
        target_r=adapter.r,
        tinit=start,
        tfinal=end,
        deltaT=max(1, total_steps // 100),
        total_step=total_steps,
        orth_reg_weight=adapter.orth_reg_weight / repeated,
        **common,
    )


def _adalora_schedule(total_steps: int) -> tuple[int, int]:
    """Steps of warmup before ranks fall, and steps at the end during which they stay: a tenth and three tenths.

    Raises:
        UsageError: too few steps for ranks to fall in between.
    """
    if total_steps < 3:
        raise UsageError(
            "adapter.type: adalora",
            f"needs at least 3 steps to take ranks away, there are {total_steps}",
            "raise train.epochs",
        )
    return max(1, total_steps // 10), max(1, total_steps * 3 // 10)


def linear_names(model: torch.nn.Module) -> set[str]:
    """Last parts of the names of all linear layers."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


class AdaLoraRanks(TrainerCallback):
    """Lets AdaLoRA take ranks away after every step; neither PEFT nor the Trainer does it by itself."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        allocator = model.base_model.rankallocator
        config = allocator.peft_config
        is_last_decision = state.global_step == config.total_step - config.tfinal
        if is_last_decision and not allocator.exp_avg_ipt and config.rank_pattern:
            # A run that is gone on with after its end: the ranks were decided then, and the scores that decided them are gone.
            allocator.mask_using_rank_pattern(model.base_model.model, config.rank_pattern)
            return
        model.base_model.update_and_allocate(state.global_step)


def adalora_state(model: Any) -> dict[str, torch.Tensor]:
    """What decides which ranks go next and which are gone, flat, for a checkpoint."""
    allocator = model.base_model.rankallocator
    state = {
        f"{kind}/{name}": tensor.detach().cpu().contiguous()
        for kind in _SCORES
        for name, tensor in getattr(allocator, kind).items()
    }
    pattern = allocator.peft_config.rank_pattern or {}
    kept = {f"rank_pattern/{name}": torch.tensor(ranks) for name, ranks in pattern.items()}
    # PEFT's own file leaves out the ranks that are gone for now, which may still come back.
    weights = {
        f"weights/{name}": p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad
    }
    return state | kept | weights


def load_adalora_state(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Put weights, scores and pattern of a checkpoint back; PEFT cannot read its own AdaLoRA file into a model that trains on."""
    allocator = model.base_model.rankallocator
    device = next(model.parameters()).device
    for key, tensor in state.items():
        kind, _, name = key.partition("/")
        if kind in _SCORES:
            getattr(allocator, kind)[name] = tensor.to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[f"weights/{name}"])
    pattern = {key.partition("/")[2]: kept.tolist() for key, kept in state.items() if key.startswith("rank_pattern/")}
    allocator.peft_config.rank_pattern = pattern or None


def active_ranks(model: Any) -> dict[str, int]:
    """AdaLoRA: how many singular values each module keeps, as a checkpoint would; all of them until the first are taken away.

    Not those that differ from zero: all are zero before the first step, and what was taken away grows again until the next decision.
    """
    pattern = model.base_model.rankallocator.peft_config.rank_pattern
    if pattern:
        return {name.partition(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}
    values = {name: p.numel() for name, p in model.named_parameters() if ".lora_E." in name}
    return {name.partition(".lora_E")[0]: num for name, num in values.items()}
