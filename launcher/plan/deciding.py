"""Recipe, Cluster and ModelShape in; every `auto` decided, with the reason; or all the mistakes that only show together."""

from __future__ import annotations

from dataclasses import replace

from launcher import __version__
from launcher.cluster import GIB, Cluster
from launcher.compat import fixes_for
from launcher.errors import Problem, RecipeError
from launcher.families import family, template_names
from launcher.installed import version_of
from launcher.memory import Logits
from launcher.modelshape import (
    ModelShape,
    module_names,
    trainable_parameters,
    trains_head,
    unmatched_saved,
    unmatched_targets,
)
from launcher.plan.beside import beside
from launcher.plan.mapped import (
    enough_micro_batches,
    explanations,
    map_problems,
    not_pipelined,
    schedules,
    why_micro_batches,
)
from launcher.plan.model import Batching, Decision, Dtype, Plan, Targets, budget_bytes
from launcher.plan.packing import attention_for, cheaper
from launcher.plan.remarks import remarks
from launcher.plan.searching import FREE_SHARE, Choice, Option, Question, choose, why_shares, why_strategy
from launcher.recipe import Recipe
from launcher.recipe.device_maps import DeviceMap
from launcher.recipe.rules import uncompilable, unshardable

# Larger micro batches bring no speed on these devices and make the heaviest batch heavier.
_LARGEST_MICRO_BATCH = {"cuda": 64, "cpu": 8}

_LOGITS: dict[Logits, tuple[str, str]] = {
    "parts": ("where there are labels, in parts", "the head is not trained, so no logits have to be kept"),
    "labels": ("where there are labels", "others have no part in the loss"),
    "whole": (
        "of every token",
        "here a loss of fewer is not held against its plan: code of the model's own, or a device map",
    ),
}


class Deciding:
    """Goes through the open questions in an order in which each answer rests on those before it."""

    def __init__(
        self, recipe: Recipe, cluster: Cluster, shape: ModelShape, device_map: DeviceMap | None = None
    ) -> None:
        self.device_map = device_map
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
        self._check_compile()
        self._native()
        self.decisions += remarks(recipe, self.cluster, self.shape, self.device_map)
        fixes = self._fixes()
        self._template()
        strategies = self._strategies()
        self.problems += map_problems(recipe, self.device_map, self.cluster, self.shape, strategies)
        self.dtype = self._dtype()
        targets = self._targets()
        batching = self._batching()
        trained = 0 if self.problems else trainable_parameters(self.shape, recipe.adapter)
        question = Question(recipe, self.cluster, self.shape, self.dtype, batching, trained, self.device_map)
        question = replace(question, attention=attention_for(question)[0])
        options = self._options(question, strategies)
        if self.problems:
            raise RecipeError(self.problems)
        question, choice = self._chosen(question, options, alone_too=strategies == ["device_map"])
        chosen = choice.chosen.option
        self._explain(question, choice)
        return Plan(
            version=__version__,
            name=name,
            recipe=recipe,
            cluster=self.cluster,
            shape=self.shape,
            strategy=chosen.strategy,
            backend="python" if chosen.schedule == "naive" else recipe.launch.backend,  # one process needs no launcher
            num_processes=question.num_processes(choice.chosen),
            dtype=self.dtype,
            weights_dtype=question.weights_dtype(chosen.strategy),
            targets=targets,
            trainable_parameters=trained,
            micro_batch=chosen.micro_batch,
            accumulation=recipe.train.global_batch // (question.num_replicas(chosen.strategy) * chosen.micro_batch),
            global_batch=recipe.train.global_batch,
            gradient_checkpointing=choice.chosen.gradient_checkpointing,
            batching=question.batching,
            attention=question.attention if question.batching == "packed" else "sdpa",
            logits=question.logits(chosen.strategy),
            memory=choice.chosen.memory,
            time=choice.chosen.time,
            shares=choice.chosen.shares,
            rank_bytes=choice.chosen.rank_bytes,
            alternatives=choice.alternatives(),
            device_map=self.device_map,
            schedule=chosen.schedule,
            pipeline=question.order if chosen.schedule == "pipelined" else None,
            stages=choice.chosen.stages,
            decisions=tuple(self.decisions),
            fixes=fixes,
        )

    def _chosen(self, question: Question, options: list[Option], alone_too: bool) -> tuple[Question, Choice]:
        """The best of the options, and whether its rows are packed; `alone_too` shows a device map what it is beside."""
        choice = choose(question, options)
        if alone_too and self.cluster.num_devices > 1 and choice.chosen.fits:
            choice = beside(question, choice, options, self._sizes(1))
        if self.recipe.data.batching == "auto":
            question, choice, decision = cheaper(question, choice)
            self.decisions.append(decision)
        return question, choice

    def _decide(self, key: str, value: str, because: str) -> None:
        self.decisions.append(Decision(key=key, value=value, because=because))

    def _problem(self, key: str, message: str) -> None:
        self.problems.append(Problem(key, message))

    def _check_template(self) -> None:
        names = ("auto", "chat", *template_names())
        if self.recipe.data.template not in names:
            found = f"there is no template {self.recipe.data.template!r}. There are: {', '.join(names)}"
            self._problem("data.template", found)

    def _template(self) -> None:
        """What the tokenizer's own template gives way to, in families whose older chat models ship none."""
        known, data = family(self.shape.prompts), self.recipe.data
        word_for_word = data.format in ("context_target", "text")
        if data.template != "auto" or word_for_word or not known.chat or self.recipe.model.path is None:
            return
        chosen = self.shape.template
        if chosen == known.template:
            others = " or ".join(dict.fromkeys(known.chat.values()))
            because = f"where the tokenizer has none of its own; for a chat model: data.template={others}"
        else:
            because = f"where the tokenizer has none of its own; the name says chat; for a base model: data.template={known.template}"
        self._decide("data.template", chosen, because)

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
        fixes = fixes_for(self.shape.family, version_of("transformers"))
        for fix in fixes:
            self._decide("model.compat", f"{fix.name} ({fix.range})", fix.mends)
        return tuple(fix.name for fix in fixes)

    def _strategies(self) -> list[str]:
        """The strategies that are open: the one that was asked for, or those that these devices and this adapter allow."""
        asked, num = self.recipe.strategy.type, self.cluster.num_devices
        if self.recipe.launch.backend == "python" and num > 1 and asked != "device_map":
            found = f"python starts one process, the hardware has {num} devices. Set launch.backend=torchrun"
            self._problem("launch.backend", found)
        if asked == "single" and num > 1:
            found = f"single uses one device, the hardware has {num}. Set strategy.type=ddp, or add --nproc 1"
            self._problem("strategy.type", found)
        if asked != "auto":
            return [asked]
        if num == 1:
            return ["single"]
        # Quantised weights are not sharded, and on a CPU there is nothing to gain.
        if self.recipe.model.quantization != "none" or self.cluster.kind == "cpu":
            return ["ddp"]
        return [name for name in ("ddp", "fsdp", "zero2", "zero1", "zero3") if not self._forbidden(name)]

    def _forbidden(self, strategy: str) -> bool:
        """Whether what the recipe trains cannot be sharded so, or not compiled."""
        asked = self.recipe.strategy.model_copy(update={"type": strategy})
        asked_so = self.recipe.model_copy(update={"strategy": asked})
        return any(unshardable(asked_so)) or any(uncompilable(asked_so))

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

    def _check_compile(self) -> None:
        if self.recipe.train.compile and self.shape.remote_code:
            found = (
                f"the code that comes with {self.shape.name} was not written for a compiler. Set train.compile=false"
            )
            self._problem("train.compile", found)

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
            return self._all_linear()
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

    def _all_linear(self) -> Targets:
        """By name where there are experts: PEFT means attention alone, or experts too, by adapter and transformers version."""
        if self.family.layout != "moe":
            return "all-linear"
        chosen = tuple(dict.fromkeys(name.rpartition(".")[2] for name in self.shape.linears))
        because = "the linear layers; experts are stacked parameters, which keep their weights"
        self._decide("adapter.targets", ", ".join(chosen), because)
        return chosen

    def _batching(self) -> Batching:
        asked = self.recipe.data.batching
        if asked == "packed" and not self.family.packing:
            found = (
                f"rows packed together would see each other in {self.family.name}, which ignores position ids. "
                "Set data.batching=bucketed"
            )
            self._problem("data.batching", found)
        return asked if asked != "auto" else "bucketed"  # until the whole of it is priced

    def _options(self, question: Question, strategies: list[str]) -> list[Option]:
        """Every combination that the recipe leaves open."""
        asked = self.recipe.train.gradient_checkpointing
        if strategies == ["device_map"]:
            return self._mapped(None if asked == "auto" else asked)
        checkpointing = [False, True] if asked == "auto" else [asked]
        return [
            Option(strategy, checkpointed, size)
            for strategy in strategies
            for checkpointed in checkpointing
            for size in self._sizes(question.num_replicas(strategy))
        ]

    def _mapped(self, checkpointing: bool | None) -> list[Option]:
        """Every schedule and micro batch of a device map that the recipe leaves open."""
        open_ = schedules(self.recipe, self.shape, self.cluster, self.device_map)
        sizes, options = self._sizes(1), []
        # A model's own code computes all layers again or none, where transformers' classes leave it to each layer.
        modes = [False, True] if checkpointing is None and self.shape.remote_code else [checkpointing]
        for schedule in open_:
            of_it = sizes
            if schedule == "pipelined":
                of_it, problem = enough_micro_batches(self.recipe, self.cluster, self.device_map, sizes)
                refused = not_pipelined(self.recipe, self.shape, self.cluster)
                if refused:
                    problem = Problem("strategy.schedule", f"{refused}. Set strategy.schedule=naive")
                if problem and open_ == ["pipelined"]:
                    self.problems.append(problem)
            options += [Option("device_map", again, size, schedule) for again in modes for size in of_it]
        return options

    def _sizes(self, num_replicas: int) -> list[int]:
        """Micro batches that make up the global batch, largest first; what the recipe sets, where it sets one."""
        train = self.recipe.train
        rows, rest = divmod(train.global_batch, num_replicas)
        if rest:
            self._problem("train.global_batch", _no_multiple(train.global_batch, num_replicas, f"{num_replicas} ranks"))
            rows = max(1, rows)
        if train.micro_batch == "auto":
            largest = min(rows, _LARGEST_MICRO_BATCH[self.cluster.kind])
            return [size for size in range(largest, 0, -1) if rows % size == 0]
        if rows % train.micro_batch and not rest:
            ranks = f"{num_replicas} ranks × " if num_replicas > 1 else ""
            what = f"{ranks}micro batch {train.micro_batch}"
            message = _no_multiple(train.global_batch, num_replicas * train.micro_batch, what)
            self._problem("train.global_batch", message)
        return [train.micro_batch]

    def _explain(self, question: Question, choice: Choice) -> None:
        """The reasons of what was chosen; the figures of what was not are the plan's alternatives."""
        recipe, option = self.recipe, choice.chosen.option
        if recipe.strategy.type == "auto":
            self._decide("strategy.type", option.strategy, why_strategy(choice, self.cluster.num_devices))
        if question.weights_dtype(option.strategy) != self.dtype:
            self._decide("weights", "fp32", f"{self.dtype} alone loses small updates of trained weights")
        if option.strategy == "device_map":
            self.decisions += explanations(question, choice)
        if recipe.train.micro_batch == "auto":
            budget = budget_bytes(option.strategy, self.cluster)
            limit = _LARGEST_MICRO_BATCH[self.cluster.kind]
            because = f"the fastest that fits {budget * (1 - FREE_SHARE) / GIB:.1f} GiB, at most {limit}, and divides the global batch"
            if choice.chosen.memory.total_bytes > budget * (1 - FREE_SHARE):
                because = f"fits {budget / GIB:.1f} GiB with less than a tenth of it to spare; with more nothing would"
            if not choice.chosen.fits:
                because = "the smallest is still too much"
            if option.schedule == "naive":
                because = f"the fastest that fits, at most {limit}, and divides the global batch"
            if option.schedule == "pipelined":
                because = f"the fastest that fits: {why_micro_batches(question, choice.chosen, self._sizes(1))}"
            self._decide("train.micro_batch", str(option.micro_batch), because)
        if choice.chosen.shares:
            self.decisions.append(why_shares(question, choice.chosen))
        self._decide("logits", *_LOGITS[question.logits(option.strategy)])
        if recipe.train.gradient_checkpointing == "auto":
            value, because = "false", "everything fits without computing layers twice"
            if choice.chosen.stages and choice.chosen.gradient_checkpointing:
                again = [self.cluster.devices[stage.device].name for stage in choice.chosen.stages if stage.recompute]
                value, because = (
                    f"on {', '.join(again)}",
                    "activations are kept on a device where that fits and is faster",
                )
            elif choice.chosen.gradient_checkpointing:
                value, because = "true", "activations do not fit without, or only of batches too small to be fast"
            self._decide("train.gradient_checkpointing", value, because)


def _no_multiple(number: int, unit: int, what: str) -> str:
    below = number // unit * unit
    nearest = [str(candidate) for candidate in (below, below + unit) if candidate > 0]
    return f"{number} is no multiple of {what}. Nearest that are: {', '.join(nearest)}"
