"""A plan in, the JSON of DeepSpeed out; a person's own JSON is taken into it where it contradicts neither recipe nor plan.

What a recipe decides stands in the recipe alone. A file of one's own (`strategy.deepspeed: FILE`) is for what no recipe key has: sizes of
buckets, overlap, pinned memory.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from launcher.errors import Problem, RecipeError
from launcher.modelshape import ModelShape
from launcher.plan.model import DTYPE_BYTES, Plan

Json = dict[str, Any]
KEY = "strategy.deepspeed"
# On the way to a disk: values that the optimizer steps on at once, on a rank; and buffers, of a parameter's part each.
_SUB_GROUP = 10**8
_NUM_BUFFERS = 5
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
    "zero_optimization.offload_optimizer.nvme_path": "strategy.nvme_path",
    "zero_optimization.offload_param.nvme_path": "strategy.nvme_path",
}


def generated(plan: Plan) -> Json:
    """The JSON of a plan under zero1, zero2 or zero3; every value in it follows from the recipe."""
    strategy = plan.recipe.strategy
    offloaded = {"device": "cpu"}
    if strategy.nvme_path is not None:
        offloaded = {"device": "nvme", "nvme_path": strategy.nvme_path}
    return {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": plan.recipe.train.max_grad_norm or 0.0,
        "bf16": {"enabled": plan.dtype == "bf16"},
        "fp16": {"enabled": plan.dtype == "fp16"},
        "zero_optimization": {
            "stage": int(plan.strategy[-1]),
            "offload_optimizer": {"device": "none"} if strategy.offload == "none" else offloaded,
            **(
                {"offload_param": offloaded if strategy.offload == "parameters" else {"device": "none"}}
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
    if plan.recipe.strategy.nvme_path is not None:
        sizes |= _swapped(plan)
    return sizes


def _swapped(plan: Plan) -> Json:
    """What passes through host memory at once on its way to a disk and back.

    DeepSpeed's own figures are the same for every model: sub-groups of a billion values, of which it keeps four times four bytes, are
    more than most models have. Weights: a buffer takes one parameter's part, and as long as a rank may keep gathered ones for their
    next use there are never enough buffers; so none is kept.
    """
    sizes: Json = {"sub_group_size": _SUB_GROUP}
    if plan.recipe.strategy.offload == "parameters":
        part = math.ceil(_largest(plan.shape) / plan.num_processes)
        sizes |= {
            "offload_param": {"buffer_count": _NUM_BUFFERS, "buffer_size": part, "max_in_cpu": 0},
            "stage3_max_reuse_distance": 0,
        }
    return sizes


def swap_buffers_bytes(plan: Plan) -> int:
    """Host memory of all ranks for what is on its way to a disk or back, 0 where nothing is.

    The optimizer: a weight, its gradient and two moments of a sub-group in fp32, which closes with the parameter that fills it. Weights:
    the buffers, and once more those of a sub-group, which are written after a step.
    """
    strategy = plan.recipe.strategy
    if strategy.nvme_path is None:
        return 0
    part = math.ceil(_largest(plan.shape) / plan.num_processes)
    group = min(_SUB_GROUP + part, math.ceil(plan.trainable_parameters / plan.num_processes))
    values = _NUM_BUFFERS * part + group if strategy.offload == "parameters" else 0
    return plan.num_processes * (4 * 4 * group + values * DTYPE_BYTES[plan.weights_dtype])


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


def _largest(shape: ModelShape) -> int:
    """Values of the largest module, and so at least of the largest parameter."""
    return max(*shape.modules.values(), *shape.outer.values())


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
