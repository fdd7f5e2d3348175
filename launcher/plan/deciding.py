"""Recipe, Cluster and ModelShape in; every `auto` decided, with the reason; or all the mistakes that only show together."""

from __future__ import annotations

from launcher import __version__
from launcher.cluster import Cluster
from launcher.compat import fixes_for, transformers_version
from launcher.errors import Problem, RecipeError
from launcher.families import family, template_names
from launcher.memory import Memory, MemoryRequest, estimate
from launcher.modelshape import (
    ModelShape,
    module_names,
    trainable_parameters,
    trains_head,
    unmatched_saved,
    unmatched_targets,
)
from launcher.plan.model import Batching, Decision, Dtype, Plan, Targets, budget_bytes
from launcher.recipe import Recipe

GIB = 2**30
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Larger micro batches bring no speed on these devices and make the heaviest batch heavier.
_LARGEST_MICRO_BATCH = {"cuda": 64, "cpu": 8}
_SMALLEST_WORTHWHILE = 4
# What an automatic choice leaves free: the allocator's gaps, and the error of the estimate.
_FREE_SHARE = 0.1


class Deciding:
    """Goes through the open questions in an order in which each answer rests on those before it."""

    def __init__(self, recipe: Recipe, cluster: Cluster, shape: ModelShape) -> None:
        self.recipe = recipe
        self.cluster = cluster
        self.shape = shape
        self.family = family(shape.family)
        self.decisions: list[Decision] = []
        self.problems: list[Problem] = []

    def plan(self, name: str) -> Plan:
        """The plan, whether it fits or not.

        Raises:
            RecipeError: the recipe asks for what this model or these devices cannot do.
        """
        recipe = self.recipe
        self._check_template()
        self._check_quantization()
        self._native()
        fixes = self._fixes()
        self.strategy, self.num_processes = self._strategy()
        # A device map is one model however many processes it takes; every other strategy feeds each process its own rows.
        self.num_replicas = 1 if self.strategy == "device_map" else self.num_processes
        self.dtype = self._dtype()
        self.weights_dtype = self._weights_dtype()
        targets = self._targets()
        batching = self._batching()
        self.trained = 0 if self.problems else trainable_parameters(self.shape, recipe.adapter)
        checkpointing, micro_batch, memory = self._micro_batch()
        if self.problems:
            raise RecipeError(self.problems)
        return Plan(
            version=__version__,
            name=name,
            recipe=recipe,
            cluster=self.cluster,
            shape=self.shape,
            strategy=self.strategy,
            backend=recipe.launch.backend,
            num_processes=self.num_processes,
            dtype=self.dtype,
            weights_dtype=self.weights_dtype,
            targets=targets,
            trainable_parameters=self.trained,
            micro_batch=micro_batch,
            accumulation=recipe.train.global_batch // (self.num_replicas * micro_batch),
            global_batch=recipe.train.global_batch,
            gradient_checkpointing=checkpointing,
            batching=batching,
            memory=memory,
            decisions=tuple(self.decisions),
            fixes=fixes,
        )

    def _decide(self, key: str, value: str, because: str) -> None:
        self.decisions.append(Decision(key=key, value=value, because=because))

    def _problem(self, key: str, message: str) -> None:
        self.problems.append(Problem(key, message))

    def _check_template(self) -> None:
        names = ("auto", "chat", *template_names())
        if self.recipe.data.template not in names:
            found = f"there is no template {self.recipe.data.template!r}. There are: {', '.join(names)}"
            self._problem("data.template", found)

    def _native(self) -> None:
        """Which class computes the model, where it is not its own; what that class would compute differently."""
        native, recipe = self.shape.native, self.recipe
        if self.shape.not_native:
            self._decide("model.native", "no", "; ".join(self.shape.not_native))
        if native is None:
            return
        because = "it computes the same, and no code of the model is executed"
        self._decide("model.native", f"{native.source} → {native.target}", because)
        if native.fixed_head and trains_head(self.shape, recipe.adapter):
            key = "adapter.type" if recipe.adapter.type == "full" else "adapter.modules_to_save"
            if recipe.adapter.type != "full" and not recipe.adapter.modules_to_save:
                key = "adapter.targets"
            found = f"the head of {self.shape.name} cannot be trained in {native.target}: {native.fixed_head}"
            self._problem(key, f"{found}. Set adapter.type=lora, and leave the head out")
        if native.exact_length is not None and recipe.data.max_length > native.exact_length:
            found = f"{self.shape.name} computes more than {native.exact_length} tokens unlike {native.target}"
            self._problem("data.max_length", f"{found}. Set data.max_length={native.exact_length}")

    def _fixes(self) -> tuple[str, ...]:
        """What is mended about the model's own code, where that is what runs."""
        if self.shape.native is not None or not self.shape.remote_code:
            return ()
        fixes = fixes_for(self.shape.family, transformers_version())
        for fix in fixes:
            self._decide("model.compat", f"{fix.name} ({fix.range})", fix.mends)
        return tuple(fix.name for fix in fixes)

    def _strategy(self) -> tuple[str, int]:
        """The strategy and how many processes it starts."""
        asked, num = self.recipe.strategy.type, self.cluster.num_devices
        if self.recipe.launch.backend == "python" and num > 1 and asked != "device_map":
            found = f"python starts one process, the hardware has {num} devices. Set launch.backend=torchrun"
            self._problem("launch.backend", found)
        if asked == "auto":
            if num == 1:
                chosen, because = "single", "there is one device"
            else:
                chosen, because = "ddp", f"a copy of the model on each of {num} devices is fastest where it fits"
            self._decide("strategy.type", chosen, because)
            return chosen, num
        if asked == "single" and num > 1:
            found = f"single uses one device, the hardware has {num}. Set strategy.type=ddp, or add --nproc 1"
            self._problem("strategy.type", found)
        return asked, 1 if asked == "device_map" and self.recipe.strategy.schedule == "naive" else num

    def _dtype(self) -> Dtype:
        asked, on_cpu = self.recipe.model.dtype, self.cluster.kind == "cpu"
        without_bf16 = [device.name for device in self.cluster.devices if not device.bf16 and not on_cpu]
        loses_positions = self.shape.remote_code and not self.family.bf16
        if asked == "auto":
            chosen: Dtype
            if on_cpu:
                chosen, because = "fp32", "a CPU computes it fastest"
            elif without_bf16:
                chosen, because = "fp16", f"{without_bf16[0]} has no bf16"
            elif loses_positions:
                chosen, because = "fp16", f"not bf16: {self.family.no_bf16}"
            else:
                chosen, because = "bf16", "every card has it and it needs no loss scaling"
            self._decide("model.dtype", chosen, because)
            return chosen
        if asked == "fp16" and on_cpu:
            found = "on a CPU the Trainer would quietly compute in fp32. Set model.dtype=fp32"
            self._problem("model.dtype", found)
        if asked == "bf16" and without_bf16:
            self._problem("model.dtype", f"{without_bf16[0]} has no bf16. Set model.dtype=fp16")
        if asked == "bf16" and loses_positions:
            self._problem("model.dtype", f"not with {self.family.name}: {self.family.no_bf16}. Set model.dtype=fp16")
        return asked

    def _check_quantization(self) -> None:
        recipe = self.recipe
        if recipe.adapter.type == "dora" and recipe.model.quantization == "int8" and self.cluster.kind == "cpu":
            found = "dora over an int8 base fails at its second step on a CPU. Set adapter.type=lora, or model.quantization=nf4"
            self._problem("adapter.type", found)

    def _weights_dtype(self) -> Dtype:
        """Precision in which the base lies in memory."""
        if self.recipe.adapter.type != "full" or self.strategy not in ("single", "ddp", "device_map"):
            return self.dtype
        if self.dtype != "fp32":
            self._decide("weights", "fp32", f"{self.dtype} alone loses small updates of trained weights")
        return "fp32"

    def _targets(self) -> Targets:
        adapter = self.recipe.adapter
        if adapter.type == "full":
            return ()
        unknown = unmatched_saved(self.shape, adapter.modules_to_save)
        if unknown:
            has = ", ".join(module_names(self.shape))
            found = f"{', '.join(unknown)} match nothing in {self.shape.name}. It has: {has}"
            self._problem("adapter.modules_to_save", found)
        if adapter.targets == "all-linear":
            return "all-linear"
        if adapter.targets == "auto":
            if not self.family.lora_targets:
                self._decide("adapter.targets", "all-linear", f"{self.shape.model_type} is no family known here")
                return "all-linear"
            chosen = tuple(self.family.lora_targets)
            self._decide("adapter.targets", ", ".join(chosen), f"the attention projections of {self.family.name}")
            return chosen
        missing = unmatched_targets(self.shape, adapter.targets)
        if missing:
            has = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in self.shape.linears))
            name = f"{self.shape.name}{f' as {self.shape.native.target}' if self.shape.native else ''}"
            self._problem("adapter.targets", f"{', '.join(missing)} match nothing in {name}. It has: {has}")
        return tuple(adapter.targets)

    def _batching(self) -> Batching:
        asked = self.recipe.data.batching
        if asked == "packed" and not self.family.packing:
            found = (
                f"rows packed together would see each other in {self.family.name}, which ignores position ids. "
                "Set data.batching=bucketed"
            )
            self._problem("data.batching", found)
        if asked != "auto":
            return asked
        self._decide("data.batching", "bucketed", "rows of like length leave little padding in every family")
        return "bucketed"

    def _micro_batch(self) -> tuple[bool, int, Memory]:
        """Gradient checkpointing, rows of a micro batch, and the memory they lead to."""
        train, sizes = self.recipe.train, self._sizes()
        asked = train.gradient_checkpointing
        # Keeping activations costs no time, so it comes first, unless only micro batches fit that leave the device idle.
        worthwhile = [size for size in sizes if size >= _SMALLEST_WORTHWHILE] or sizes[:1]
        options = [(False, size) for size in worthwhile] + [(True, size) for size in sizes]
        if asked != "auto":
            options = [(asked, size) for size in sizes]
        budget = budget_bytes(self.strategy, self.cluster)
        if train.micro_batch == "auto":
            budget = round(budget * (1 - _FREE_SHARE))
        fitting = (option for option in options if self._memory(*option).total_bytes <= budget)
        checkpointing, size = next(fitting, options[-1])
        if train.micro_batch == "auto":
            kept = (
                " without gradient checkpointing" if asked == "auto" and not checkpointing and size < sizes[0] else ""
            )
            limit = _LARGEST_MICRO_BATCH[self.cluster.kind]
            because = (
                f"the largest that fits {budget / GIB:.1f} GiB{kept}, at most {limit}, and divides the global batch"
            )
            self._decide("train.micro_batch", str(size), because)
        if asked == "auto":
            without = "everything fits without computing layers twice"
            because = "activations do not fit without" if checkpointing else without
            self._decide("train.gradient_checkpointing", str(checkpointing).lower(), because)
        return checkpointing, size, self._memory(checkpointing, size)

    def _sizes(self) -> list[int]:
        """Micro batches that make up the global batch, largest first; what the recipe sets, where it sets one."""
        train, num = self.recipe.train, self.num_replicas
        rows, rest = divmod(train.global_batch, num)
        if rest:
            self._problem("train.global_batch", _no_multiple(train.global_batch, num, f"{num} ranks"))
            rows = max(1, rows)
        if train.micro_batch == "auto":
            largest = min(rows, _LARGEST_MICRO_BATCH[self.cluster.kind])
            return [size for size in range(largest, 0, -1) if rows % size == 0]
        if rows % train.micro_batch and not rest:
            what = f"{num} ranks × micro batch {train.micro_batch}"
            self._problem("train.global_batch", _no_multiple(train.global_batch, num * train.micro_batch, what))
        return [train.micro_batch]

    def _memory(self, gradient_checkpointing: bool, micro_batch: int) -> Memory:
        recipe = self.recipe
        return estimate(
            MemoryRequest(
                shape=self.shape,
                trainable_parameters=self.trained,
                full=recipe.adapter.type == "full",
                adapter=recipe.adapter,
                quantization=recipe.model.quantization,
                weights_dtype_bytes=BYTES[self.weights_dtype],
                compute_dtype_bytes=BYTES[self.dtype],
                optimizer=recipe.train.optimizer,
                micro_batch=micro_batch,
                sequence_length=recipe.data.max_length,
                gradient_checkpointing=gradient_checkpointing,
                strategy=self.strategy,
                offload=recipe.strategy.offload,
                num_processes=self.cluster.num_devices,
                kind=self.cluster.kind,
            )
        )


def _no_multiple(number: int, unit: int, what: str) -> str:
    below = number // unit * unit
    nearest = [str(candidate) for candidate in (below, below + unit) if candidate > 0]
    return f"{number} is no multiple of {what}. Nearest that are: {', '.join(nearest)}"
