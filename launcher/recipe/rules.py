"""Rules between the fields of a recipe: a Recipe in, the broken rules out.

Here stands what the libraries cannot combine and what contradicts itself whatever the machine; what depends on the model or
the devices (fp16 on a CPU, packing with a family that cannot) is found by `launcher.plan`. Each rule was tried against the
libraries: tests/recipe/test_rules.py holds the attempts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from launcher.errors import Problem
from launcher.recipe.schema import Recipe

SHARDED = ("zero1", "zero2", "zero3", "fsdp")


def broken_rules(recipe: Recipe, unsound: Collection[str] = ()) -> list[Problem]:
    """All broken rules; none for a recipe that is right.

    Args:
        unsound: sections that have mistakes of their own; rules that read one of them are left for the next time.
    """
    sound = [rule for rule, reads in _RULES.items() if not set(reads) & set(unsound)]
    return [problem for rule in sound for problem in rule(recipe)]


def _model(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    if (model.path is None) == (model.config is None):
        found = "neither path nor config is set" if model.path is None else "path and config are both set"
        yield Problem("model", f"{found}. Give one: path for a model that exists, config for one from random weights")
    if model.path == "":
        yield Problem("model.path", "is empty. Give a hub id or a folder")
    if model.config is not None and "model_type" not in model.config:
        yield Problem("model.config", "has no model_type. Add it, e.g. model_type: llama")
    if model.code_sha256 is not None and not model.trust_remote_code:
        yield Problem(
            "model.code_sha256", "pins code that is not executed. Set model.trust_remote_code=true, or remove it"
        )
    if model.quantization != "none" and recipe.adapter.type == "full":
        yield Problem(
            "adapter.type",
            f"full cannot train a base stored in {model.quantization}: quantised weights have no gradient. "
            "Set adapter.type=lora, or model.quantization=none",
        )


def _data(recipe: Recipe) -> Iterator[Problem]:
    evaluation = recipe.data.eval
    for key, paths in (("data.path", recipe.data.path), ("data.eval.path", evaluation and evaluation.path)):
        if paths is not None and not (paths and all(paths)):
            yield Problem(key, "is empty. Give a file, a folder or a list of them")
    if evaluation is not None:
        given = [name for name in ("fraction", "rows", "path") if getattr(evaluation, name) is not None]
        if len(given) != 1:
            found = "nothing is set" if not given else f"{' and '.join(given)} are set"
            yield Problem("data.eval", f"{found}. Give one of fraction, rows, path")
    yield from _streaming(recipe)
    if recipe.train.early_stopping is not None and evaluation is None:
        yield Problem("train.early_stopping", "needs an evaluation loss. Add data.eval, e.g. data.eval.fraction=0.02")
    if recipe.data.format in ("text", "context_target") and recipe.data.system is not None:
        message = f"{recipe.data.format} is used word for word and has no system prompt. Remove it, or use another data.format"
        yield Problem("data.system", message)


def _streaming(recipe: Recipe) -> Iterator[Problem]:
    data, paths = recipe.data, recipe.data.path
    if not data.streaming:
        remote = next((path for path in ([paths] if isinstance(paths, str) else paths) if "://" in path), None)
        if remote is not None:
            yield Problem(
                "data.path", f"{remote} is an address, and only a stream is read from one. Set data.streaming=true"
            )
        return
    if recipe.train.max_steps is None:
        yield Problem(
            "data.streaming", "nobody knows how many rows a stream has. Set train.max_steps, e.g. train.max_steps=1000"
        )
    if data.eval is not None and data.eval.path is None:
        kept = "fraction" if data.eval.fraction is not None else "rows"
        yield Problem(f"data.eval.{kept}", "rows of a stream cannot be set aside. Give a file: data.eval.path=FILE")
    if data.shuffle_rows < recipe.train.global_batch:
        found = f"{data.shuffle_rows} rows do not make a step of {recipe.train.global_batch}"
        yield Problem("data.shuffle_rows", f"{found}. Set data.shuffle_rows={16 * recipe.train.global_batch}")


def _adapter(recipe: Recipe) -> Iterator[Problem]:
    adapter = recipe.adapter
    if adapter.type == "full" and adapter.modules_to_save:
        yield Problem("adapter.modules_to_save", "full trains every module already. Remove it")
    if adapter.init_r is not None and adapter.type != "adalora":
        yield Problem(
            "adapter.init_r", f"only adalora has it; {adapter.type} keeps its rank. Remove it, or set adapter.r"
        )
    if adapter.init_r is not None and adapter.type == "adalora" and adapter.init_r < adapter.r:
        yield Problem(
            "adapter.init_r",
            f"{adapter.init_r} is below adapter.r={adapter.r}: ranks only fall. Set adapter.init_r={adapter.r * 3 // 2}",
        )
    if adapter.orth_reg_weight != 0.5 and adapter.type != "adalora":
        yield Problem("adapter.orth_reg_weight", f"only adalora has it, not {adapter.type}. Remove it")
    if adapter.targets == ():
        yield Problem("adapter.targets", "is an empty list. Write auto, all-linear or names of modules")


def _strategy(recipe: Recipe) -> Iterator[Problem]:
    strategy, launch = recipe.strategy, recipe.launch
    if strategy.offload != "none" and not strategy.type.startswith("zero"):
        yield Problem(
            "strategy.offload", f"{strategy.type} has no offload. Set strategy.type=zero2 or zero3, or offload=none"
        )
    if strategy.offload == "parameters" and strategy.type in ("zero1", "zero2"):
        yield Problem(
            "strategy.offload",
            f"{strategy.type} does not shard parameters. Set strategy.type=zero3, or offload=optimizer",
        )
    if strategy.nvme_path is not None and strategy.offload == "none":
        yield Problem(
            "strategy.nvme_path",
            "offload=none keeps nothing there. Set strategy.offload=optimizer or parameters, or remove it",
        )
    elif strategy.nvme_path is not None and strategy.type in ("zero1", "zero2"):
        yield Problem(
            "strategy.nvme_path",
            f"under {strategy.type} DeepSpeed keeps what is offloaded in host memory. Set strategy.type=zero3, or remove it",
        )
    if strategy.deepspeed is not None and not strategy.type.startswith("zero"):
        yield Problem(
            "strategy.deepspeed",
            f"{strategy.type} does not read it. Set strategy.type=zero1, zero2 or zero3, or deepspeed=null",
        )
    if strategy.schedule == "pipelined" and strategy.type != "device_map":
        yield Problem(
            "strategy.schedule",
            f"{strategy.type} has no schedule. Set strategy.type=device_map, or strategy.schedule=naive",
        )
    if strategy.pipeline != "auto" and (strategy.type != "device_map" or strategy.schedule == "naive"):
        yield Problem(
            "strategy.pipeline",
            f"{strategy.pipeline} is an order of pipelined stages. "
            "Set strategy.type=device_map and strategy.schedule=pipelined, or remove it",
        )
    if strategy.type not in ("device_map", "auto") and strategy.device_map is not None:
        yield Problem(
            "strategy.type",
            f"{strategy.type} does not spread one model over the devices, a device map does. Set strategy.type=device_map",
        )
    if launch.backend == "python" and strategy.type in ("ddp", *SHARDED):
        yield Problem(
            "launch.backend",
            f"python starts one process, {strategy.type} needs one per device. Set launch.backend=torchrun",
        )


def unshardable(recipe: Recipe) -> Iterator[Problem]:
    """What cannot be cut into shares; each was tried."""
    strategy, quantization = recipe.strategy.type, recipe.model.quantization
    if quantization != "none" and strategy in ("fsdp", "zero3"):
        yield Problem(
            "strategy.type",
            f"{strategy} would cut up weights stored in {quantization}, whose blocks have scales of their own. "
            "Set strategy.type=zero2, or model.quantization=none",
        )
    if recipe.adapter.type == "adalora" and strategy in SHARDED:
        yield Problem(
            "adapter.type",
            f"adalora looks at whole weights and their gradients, of which a rank under {strategy} has a share. "
            "Set strategy.type=ddp, or adapter.type=lora",
        )
    if recipe.adapter.type == "adalora" and strategy == "device_map":
        yield Problem(
            "adapter.type",
            "adalora adds up a term of all layers, which lie on several devices under device_map. "
            "Set adapter.type=lora, or strategy.type=single",
        )
    if recipe.train.optimizer != "adamw" and strategy == "fsdp":
        yield Problem(
            "train.optimizer",
            f"{recipe.train.optimizer} knows no sharded tensors. Set train.optimizer=adamw, or strategy.type=zero2",
        )
    if recipe.train.optimizer != "adamw" and recipe.strategy.offload != "none":
        yield Problem(
            "train.optimizer",
            f"{recipe.train.optimizer} does not run on the host, where strategy.offload={recipe.strategy.offload} puts it. "
            "Set train.optimizer=adamw, or strategy.offload=none",
        )


def uncompilable(recipe: Recipe) -> Iterator[Problem]:
    """What torch.compile is not given."""
    if not recipe.train.compile:
        return
    strategy = recipe.strategy.type
    if recipe.model.quantization == "nf4":
        yield Problem(
            "train.compile",
            "compiled layers over a base stored in nf4 fail, or give no gradient, once they have evaluated. "
            "Set train.compile=false, or model.quantization=int8",
        )
    if strategy == "device_map" or strategy.startswith("zero"):
        who = "hooks between the devices" if strategy == "device_map" else "DeepSpeed's hooks"
        yield Problem(
            "train.compile",
            f"under {strategy} layers are called with {who}, and nobody has held a compiled one against its plan. "
            "Set train.compile=false, or strategy.type=ddp or fsdp",
        )


def _run(recipe: Recipe) -> Iterator[Problem]:
    if recipe.checkpoint.resume == "auto" and recipe.launch.run_dir is None:
        yield Problem(
            "checkpoint.resume",
            "auto needs a run directory that stays the same. Set launch.run_dir, or use: launch resume RUN",
        )
    if recipe.checkpoint.init_from is not None and recipe.adapter.type == "adalora":
        yield Problem(
            "checkpoint.init_from",
            "a file of AdaLoRA lacks the ranks that are gone for now, so nothing can begin with it. Remove it, or set adapter.type=lora",
        )
    if recipe.launch.run_dir == "":
        yield Problem("launch.run_dir", "is empty. Give a folder, or null for runs/<recipe>-<time>")


def _questions(recipe: Recipe) -> Iterator[Problem]:
    questions, strategy = recipe.data.questions, recipe.strategy
    if not all(question.strip() for question in questions):
        yield Problem("data.questions", "holds an empty one. Write a question, or remove it")
    if any(_is_broken(question) for question in questions):
        yield Problem(
            "data.questions", "holds half a character (a surrogate), which is no text. Write the character itself"
        )
    pipelined = strategy.type == "device_map" and strategy.schedule == "pipelined"
    if questions and (strategy.type in ("zero3", "fsdp") or pipelined):
        yield Problem(
            "data.questions",
            f"under {strategy.type} no rank holds the whole model, so none can answer while it trains. Remove them, and ask "
            "afterwards: launch chat RUN",
        )


def _is_broken(text: str) -> bool:
    """Whether a text cannot be written as UTF-8."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


# Each rule, and the sections that it reads.
_RULES: dict[Callable[[Recipe], Iterator[Problem]], tuple[str, ...]] = {
    _model: ("model", "adapter"),
    _data: ("data", "train"),
    _adapter: ("adapter",),
    _strategy: ("strategy", "launch"),
    _questions: ("data", "strategy"),
    unshardable: ("model", "adapter", "strategy", "train"),
    uncompilable: ("model", "strategy", "train"),
    _run: ("checkpoint", "launch", "adapter"),
}
