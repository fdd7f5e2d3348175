"""A plan in, the JSON of DeepSpeed out; a person's own JSON is taken into it where it contradicts neither recipe nor plan.

What a recipe decides stands in the recipe alone. A file of one's own (`strategy.deepspeed: FILE`) is for what no recipe key has: sizes of
buckets, overlap, pinned memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.errors import Problem, RecipeError
from launcher.plan.model import Plan

Json = dict[str, Any]
KEY = "strategy.deepspeed"
# What makes optimizer and schedule, in DeepSpeed's file and in the recipe.
_TRAIN = {
    "optimizer": ("train.optimizer", "train.lr", "train.weight_decay"),
    "scheduler": ("train.schedule", "train.warmup"),
}
_FROM = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch ÷ (ranks × micro batch)",
    "gradient_clipping": "train.max_grad_norm",
    "bf16.enabled": "model.dtype",
    "fp16.enabled": "model.dtype",
    "zero_optimization.stage": "strategy.type",
    "zero_optimization.offload_optimizer.device": "strategy.offload",
    "zero_optimization.offload_param.device": "strategy.offload",
}


def generated(plan: Plan) -> Json:
    """The JSON of a plan under zero1, zero2 or zero3; every value in it follows from the recipe."""
    offload = plan.recipe.strategy.offload
    return {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": plan.recipe.train.max_grad_norm or 0.0,
        "bf16": {"enabled": plan.dtype == "bf16"},
        "fp16": {"enabled": plan.dtype == "fp16"},
        "zero_optimization": {
            "stage": int(plan.strategy[-1]),
            "offload_optimizer": {"device": "none" if offload == "none" else "cpu"},
            **(
                {"offload_param": {"device": "cpu" if offload == "parameters" else "none"}}
                if plan.strategy == "zero3"
                else {}
            ),
        },
        # The optimizer is made by the Trainer, as under every other strategy: no weight decay on biases and norms.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,  # what there is to say stands in TensorBoard
    }


def _buckets(plan: Plan) -> Json:
    """How much travels at once: what transformers sets for `auto`, by the width of the model, and what memory is planned with."""
    width = plan.shape.hidden_size
    sizes = {"reduce_bucket_size": width * width}
    if plan.strategy == "zero3":
        sizes |= {
            "stage3_prefetch_bucket_size": 9 * width * width // 10,
            "stage3_param_persistence_threshold": 10 * width,
        }
    return sizes


def deepspeed_json(plan: Plan, given: Json | None) -> Json:
    """The JSON that the ranks read.

    Args:
        given: the person's own, as `read_given` returns it; None for none.

    Raises:
        RecipeError: it contradicts recipe or plan; every contradiction with both values.
    """
    ours, sizes = generated(plan), {"zero_optimization": _buckets(plan)}
    if given is None:
        return _merged(sizes, ours)
    problems = [
        Problem(KEY, f"sets {name}, which a recipe sets by {', '.join(keys)}. Remove it from the file")
        for name, keys in _TRAIN.items()
        if name in given
    ]
    decided = _flat(ours)
    for name, theirs in _flat(given).items():
        if name in _FROM and theirs != "auto" and theirs != decided.get(name, theirs):
            found = f"has {name} = {_shown(theirs)}, the plan has {_shown(decided[name])} (from {_FROM[name]})"
            problems.append(Problem(KEY, f'{found}. Change one of them, or write "auto" in the file'))
    if problems:
        raise RecipeError(problems)
    return _merged(_merged(sizes, given), ours)


def read_given(path: str) -> Json:
    """The JSON file of a recipe's strategy.deepspeed.

    Raises:
        RecipeError: it cannot be read, or is no JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError([Problem(KEY, f"{path} cannot be read: {error.strerror}. Give a file, or null")]) from None
    except ValueError as error:
        raise RecipeError([Problem(KEY, f"{path} is no JSON: {error}. Mend it, or set null")]) from None
    if not isinstance(value, dict):
        raise RecipeError(
            [Problem(KEY, f"{path} holds no JSON object. Write what DeepSpeed calls its config, or set null")]
        )
    return value


def _flat(value: Json, prefix: str = "") -> Json:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: Json = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return flat


def _merged(given: Json, ours: Json) -> Json:
    """Both, ours where both have a value; they agree there, or theirs says `auto`, or it is no decision of the recipe's."""
    both = dict(given)
    for name, value in ours.items():
        theirs = given.get(name)
        if isinstance(value, dict):
            both[name] = _merged(theirs if isinstance(theirs, dict) else {}, value)
        elif name not in ("steps_per_print", "zero_allow_untested_optimizer") or theirs is None:
            both[name] = value
    return both


def _shown(value: Any) -> str:
    return json.dumps(value)
