"""(Recipe, Cluster, ModelShape) in, one frozen Plan out: everything that was `auto` decided, each decision with its reason.

Pure: no file is read and no device is touched. The plan goes to RUN/plan.json as it is, and the workers read nothing else.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from launcher import __version__
from launcher.cluster import Cluster
from launcher.errors import DoesNotFitError, Problem, RecipeError
from launcher.families import Family, template_names
from launcher.families import family as family_named
from launcher.memory import Memory, MemoryRequest, estimate
from launcher.modelshape import ModelShape, trainable_parameters, unmatched_targets
from launcher.recipe import Recipe
from launcher.recipe.rules import broken_rules

Dtype = Literal["bf16", "fp16", "fp32"]
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
GIB = 2**30
# Larger micro batches bring no speed on these devices and make the heaviest batch heavier.
_LARGEST_MICRO_BATCH = {"cuda": 64, "cpu": 8}
_SHORTEST_ROW = 64  # nobody halves data.max_length below this to save memory


class Decision(BaseModel):
    """A value that was derived, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    value: str
    because: str


class Plan(BaseModel):
    """All that a run is, before it starts.

    Args:
        weights_dtype: precision in which the base weights lie in memory (dtype is that of the computation).
        targets: module names that get an adapter; `all-linear`; or empty for full training.
        micro_batch, accumulation, global_batch: rows; global = num_processes × micro × accumulation.
        memory: bytes of one device, the fullest.
        resume_from: checkpoint folder below the run directory, None for a fresh start.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    name: str
    recipe: Recipe
    cluster: Cluster
    shape: ModelShape
    strategy: str
    backend: str
    num_processes: int
    dtype: Dtype
    weights_dtype: Dtype
    targets: tuple[str, ...] | Literal["all-linear"]
    trainable_parameters: int
    micro_batch: int
    accumulation: int
    global_batch: int
    gradient_checkpointing: bool
    batching: Literal["padded", "bucketed", "packed"]
    memory: Memory
    decisions: tuple[Decision, ...]
    resume_from: str | None = None

    @property
    def kind(self) -> str:
        """cuda or cpu."""
        return self.cluster.kind


def make_plan(name: str, recipe: Recipe, cluster: Cluster, shape: ModelShape) -> Plan:
    """Decide everything.

    Raises:
        RecipeError: the recipe asks for what this model or these devices cannot do.
        DoesNotFitError: it needs more memory than a device has; its last part lists changes that were planned and do fit.
    """
    plan = _decide(name, recipe, cluster, shape)
    lack = _lacking_bytes(plan)
    if lack > 0:
        raise _does_not_fit(plan)
    return plan


def identity(plan: Plan) -> dict[str, Any]:
    """What has to be the same for a checkpoint to be continued: weights, optimizer state and order of rows depend on it."""
    recipe = plan.recipe
    return {
        "model.path": recipe.model.path,
        "model.config": recipe.model.config,
        "model.revision": recipe.model.revision,
        "model.quantization": recipe.model.quantization,
        "adapter.type": recipe.adapter.type,
        "adapter.r": recipe.adapter.r,
        "adapter.init_r": recipe.adapter.init_r,
        "adapter.alpha": recipe.adapter.alpha,
        "adapter.targets": plan.targets if isinstance(plan.targets, str) else list(plan.targets),
        "adapter.modules_to_save": list(recipe.adapter.modules_to_save),
        "data.batching": plan.batching,
        "train.optimizer": recipe.train.optimizer,
        "train.seed": recipe.train.seed,
        "train.global_batch": recipe.train.global_batch,
    }


def steps_per_epoch(plan: Plan, num_rows: int) -> int:
    """Optimizer steps in which every training row is seen once."""
    return -(-num_rows // plan.global_batch)


def total_steps(plan: Plan, num_rows: int) -> int:
    """Optimizer steps of the whole run."""
    train = plan.recipe.train
    return train.max_steps or max(1, round(steps_per_epoch(plan, num_rows) * train.epochs))


def _decide(name: str, recipe: Recipe, cluster: Cluster, shape: ModelShape) -> Plan:
    family = family_named(shape.family)
    decisions: list[Decision] = []
    problems: list[Problem] = []
    if recipe.data.template not in ("auto", "chat", *template_names()):
        names = ", ".join(["auto", "chat", *template_names()])
        problems.append(Problem("data.template", f"there is no template {recipe.data.template!r}. There are: {names}"))
    strategy, num_processes = _strategy(recipe, cluster, decisions, problems)
    dtype = _dtype(recipe, cluster, family, shape, decisions, problems)
    weights_dtype: Dtype = dtype
    if recipe.adapter.type == "full" and strategy in ("single", "ddp", "device_map"):
        weights_dtype = "fp32"
        if dtype != "fp32":
            decisions.append(
                Decision(key="weights", value="fp32", because=f"{dtype} alone loses small updates of trained weights")
            )
    targets = _targets(recipe, family, shape, decisions, problems)
    batching = _batching(recipe, family, decisions, problems)
    trainable = 0 if problems else trainable_parameters(shape, recipe.adapter)
    draft = {
        "version": __version__,
        "name": name,
        "recipe": recipe,
        "cluster": cluster,
        "shape": shape,
        "strategy": strategy,
        "backend": recipe.launch.backend,
        "num_processes": num_processes,
        "dtype": dtype,
        "weights_dtype": weights_dtype,
        "targets": targets,
        "trainable_parameters": trainable,
        "batching": batching,
    }
    batch = _batch(draft, decisions, problems)
    if problems:
        raise RecipeError(problems)
    return Plan(**draft, **batch, decisions=tuple(decisions))


def _strategy(recipe: Recipe, cluster: Cluster, decisions: list[Decision], problems: list[Problem]) -> tuple[str, int]:
    """The strategy and how many processes it starts."""
    asked, num = recipe.strategy.type, cluster.num_devices
    if recipe.launch.backend == "python" and num > 1 and asked != "device_map":
        problems.append(
            Problem(
                "launch.backend",
                f"python starts one process, the hardware has {num} devices. Set launch.backend=torchrun",
            )
        )
    if asked == "auto":
        chosen = "single" if num == 1 else "ddp"
        because = (
            "there is one device"
            if num == 1
            else f"a copy of the model on each of {num} devices is fastest where it fits"
        )
        decisions.append(Decision(key="strategy.type", value=chosen, because=because))
        return chosen, num
    if asked == "single" and num > 1:
        problems.append(
            Problem(
                "strategy.type",
                f"single uses one device, the hardware has {num}. Set strategy.type=ddp, or add --nproc 1",
            )
        )
    return asked, 1 if asked == "device_map" and recipe.strategy.schedule == "naive" else num


def _dtype(
    recipe: Recipe,
    cluster: Cluster,
    family: Family,
    shape: ModelShape,
    decisions: list[Decision],
    problems: list[Problem],
) -> Dtype:
    asked = recipe.model.dtype
    without_bf16 = [device.name for device in cluster.devices if not device.bf16]
    own_code_needs_fp16 = shape.remote_code and not family.bf16
    if asked == "auto":
        if cluster.kind == "cpu":
            chosen, because = "fp32", "a CPU computes it fastest"
        elif without_bf16:
            chosen, because = "fp16", f"{without_bf16[0]} has no bf16"
        elif own_code_needs_fp16:
            chosen, because = "fp16", f"the model's own code loses positions in bf16 ({family.name})"
        else:
            chosen, because = "bf16", "every card has it and it needs no loss scaling"
        decisions.append(Decision(key="model.dtype", value=chosen, because=because))
        return chosen  # type: ignore[return-value]
    if asked == "fp16" and cluster.kind == "cpu":
        problems.append(
            Problem(
                "model.dtype",
                "fp16 does not train on a CPU: gradients are scaled by a GPU kernel. Set model.dtype=fp32",
            )
        )
    if asked == "bf16" and without_bf16 and cluster.kind != "cpu":
        problems.append(Problem("model.dtype", f"{without_bf16[0]} has no bf16. Set model.dtype=fp16"))
    if asked == "bf16" and own_code_needs_fp16:
        problems.append(
            Problem(
                "model.dtype",
                f"the own code of {family.name} computes positions in bf16 and loses some. Set model.dtype=fp16",
            )
        )
    return asked


def _targets(
    recipe: Recipe, family: Family, shape: ModelShape, decisions: list[Decision], problems: list[Problem]
) -> tuple[str, ...] | Literal["all-linear"]:
    adapter = recipe.adapter
    if adapter.type == "full":
        return ()
    if adapter.targets == "all-linear":
        return "all-linear"
    if adapter.targets == "auto":
        chosen: tuple[str, ...] | Literal["all-linear"] = tuple(family.lora_targets) or "all-linear"
        because = (
            f"the attention projections of {family.name}"
            if family.lora_targets
            else f"{shape.model_type} is no family known here"
        )
        decisions.append(
            Decision(
                key="adapter.targets", value=chosen if isinstance(chosen, str) else ", ".join(chosen), because=because
            )
        )
        return chosen
    missing = unmatched_targets(shape, adapter.targets)
    if missing:
        has = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in shape.linears))
        problems.append(
            Problem("adapter.targets", f"{', '.join(missing)} match nothing in {shape.name}. It has: {has}")
        )
    return tuple(adapter.targets)


def _batching(
    recipe: Recipe, family: Family, decisions: list[Decision], problems: list[Problem]
) -> Literal["padded", "bucketed", "packed"]:
    asked = recipe.data.batching
    if asked == "packed" and not family.packing:
        message = f"rows packed together would see each other in {family.name}, which ignores position ids. Set data.batching=bucketed"
        problems.append(Problem("data.batching", message))
    if asked != "auto":
        return asked
    decisions.append(
        Decision(
            key="data.batching", value="bucketed", because="rows of like length leave little padding in every family"
        )
    )
    return "bucketed"


def _batch(draft: dict[str, Any], decisions: list[Decision], problems: list[Problem]) -> dict[str, Any]:
    """micro_batch, accumulation, gradient_checkpointing and the memory they lead to."""
    recipe, cluster, num = draft["recipe"], draft["cluster"], draft["num_processes"]
    train = recipe.train
    rows_per_process, rest = divmod(train.global_batch, num)
    if rest:
        problems.append(Problem("train.global_batch", _no_multiple(train.global_batch, num, f"{num} ranks")))
        rows_per_process = max(1, rows_per_process)
    if train.micro_batch != "auto":
        sizes = [train.micro_batch]
        if rows_per_process % train.micro_batch and not rest:
            unit = num * train.micro_batch
            message = _no_multiple(train.global_batch, unit, f"{num} ranks × micro batch {train.micro_batch}")
            problems.append(Problem("train.global_batch", message))
    else:
        largest = min(rows_per_process, _LARGEST_MICRO_BATCH[cluster.kind])
        sizes = [size for size in range(largest, 0, -1) if rows_per_process % size == 0]
    asked = train.gradient_checkpointing
    # Keeping activations costs no time, so it comes first wherever a micro batch fits with it.
    modes = [asked] if asked != "auto" else [False, True]
    options = [(mode, size) for mode in modes for size in sizes]
    memories = {option: _memory(draft, *option) for option in options}
    budget = budget_bytes(draft["strategy"], cluster)
    checkpointing, size = next((option for option in options if memories[option].total_bytes <= budget), options[-1])
    if train.micro_batch == "auto":
        kept = " without gradient checkpointing" if asked == "auto" and not checkpointing and size < sizes[0] else ""
        because = (
            f"the largest that fits {budget / GIB:.1f} GiB{kept}, at most {_LARGEST_MICRO_BATCH[cluster.kind]}, "
            "and divides the global batch"
        )
        decisions.append(Decision(key="train.micro_batch", value=str(size), because=because))
    if asked == "auto":
        because = (
            "activations do not fit without" if checkpointing else "everything fits without computing layers twice"
        )
        decisions.append(
            Decision(key="train.gradient_checkpointing", value=str(checkpointing).lower(), because=because)
        )
    return {
        "micro_batch": size,
        "accumulation": max(1, rows_per_process // size),
        "global_batch": train.global_batch,
        "gradient_checkpointing": checkpointing,
        "memory": memories[checkpointing, size],
    }


def _no_multiple(number: int, unit: int, what: str) -> str:
    below = number // unit * unit
    nearest = [str(candidate) for candidate in (below, below + unit) if candidate > 0]
    return f"{number} is no multiple of {what}. Nearest that are: {', '.join(nearest)}"


def _memory(draft: dict[str, Any], gradient_checkpointing: bool, micro_batch: int) -> Memory:
    recipe: Recipe = draft["recipe"]
    return estimate(
        MemoryRequest(
            shape=draft["shape"],
            trainable_parameters=draft["trainable_parameters"],
            full=recipe.adapter.type == "full",
            adapter=recipe.adapter,
            quantization=recipe.model.quantization,
            weights_dtype_bytes=BYTES[draft["weights_dtype"]],
            compute_dtype_bytes=BYTES[draft["dtype"]],
            optimizer=recipe.train.optimizer,
            micro_batch=micro_batch,
            sequence_length=recipe.data.max_length,
            gradient_checkpointing=gradient_checkpointing,
            strategy=draft["strategy"],
            offload=recipe.strategy.offload,
            num_processes=len(draft["cluster"].devices),
            kind=draft["cluster"].kind,
        )
    )


def budget_bytes(strategy: str, cluster: Cluster) -> int:
    """What a plan's memory may come to: the free bytes of the smallest device.

    A device map splits the weights; until it is placed layer by layer the sum over all devices is what has to suffice.
    """
    free = [device.memory_bytes - device.reserved_bytes for device in cluster.devices]
    return sum(free) if strategy == "device_map" else min(free)


def _lacking_bytes(plan: Plan) -> int:
    """How many bytes the plan is short of; negative where it fits."""
    return plan.memory.total_bytes - budget_bytes(plan.strategy, plan.cluster)


def _does_not_fit(plan: Plan) -> DoesNotFitError:
    """The error with its remedies, each of which was planned and fits."""
    devices, free = plan.cluster.devices, budget_bytes(plan.strategy, plan.cluster) / GIB
    smallest = min(devices, key=lambda device: device.memory_bytes - device.reserved_bytes)
    where = f"a device with {free:.1f} GiB free ({smallest.name})"
    if plan.strategy == "device_map":
        where = f"{len(devices)} devices with {free:.1f} GiB free together ({' + '.join(d.name for d in devices)})"
    parts = plan.memory.parts()
    largest = max(parts, key=lambda part: parts[part])
    found = (
        f"{plan.memory.total_bytes / GIB:.1f} GiB needed on {where}; "
        f"largest part: {largest} {parts[largest] / GIB:.1f} GiB"
    )
    fits = [f"    {override:<44}{gib:6.1f} GiB" for override, gib in _remedies(plan)]
    to_type = (
        "\n".join(["fits, least change first:", *fits])
        if fits
        else "no single change makes it fit: use a smaller model or more memory"
    )
    return DoesNotFitError(f"{plan.name} on {plan.cluster.source}", found, to_type)


def _remedies(plan: Plan) -> list[tuple[str, float]]:
    """Overrides that make the plan fit, with the GiB they lead to."""
    recipe = plan.recipe
    candidates: list[tuple[str, str, dict[str, Any]]] = []
    if not plan.gradient_checkpointing:
        candidates.append(("train.gradient_checkpointing=true", "train", {"gradient_checkpointing": True}))
    if plan.micro_batch > 1:
        candidates.append(("train.micro_batch=1", "train", {"micro_batch": 1}))
    half = recipe.data.max_length // 2
    if half >= _SHORTEST_ROW:
        candidates.append((f"data.max_length={half}", "data", {"max_length": half}))
    if recipe.adapter.type == "full":
        candidates.append(("adapter.type=lora", "adapter", {"type": "lora"}))
        candidates += [
            (f"strategy.type={name}", "strategy", {"type": name}) for name in ("zero3",) if plan.num_processes > 1
        ]
    elif recipe.model.quantization == "none":
        candidates += [(f"model.quantization={q}", "model", {"quantization": q}) for q in ("int8", "nf4")]
    found = []
    for override, section, update in candidates:
        changed = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=update)})
        if broken_rules(changed):
            continue
        try:
            other = _decide(plan.name, changed, plan.cluster, plan.shape)
        except RecipeError:
            continue
        if _lacking_bytes(other) <= 0:
            found.append((override, other.memory.total_bytes / GIB))
    return found
