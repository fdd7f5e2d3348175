"""A recipe file and overrides in, a checked frozen `Recipe` out; or one RecipeError that names every mistake.

Paths inside the file count from the file's folder, paths of an override from where you are. Both are absolute in the Recipe.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.errors import Problem, RecipeError
from launcher.recipe.document import Document, read_document
from launcher.recipe.rules import broken_rules
from launcher.recipe.schema import Recipe, Section, section_of

# What other tools call it -> what it is called here.
_ELSEWHERE = {
    "learning_rate": "train.lr",
    "batch_size": "train.global_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "micro_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch (accumulation is derived from it)",
    "accumulation": "train.global_batch (accumulation is derived from it)",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "lr_scheduler_type": "train.schedule",
    "logging_steps": "train.log_every_steps",
    "eval_steps": "train.eval_every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "output_dir": "launch.run_dir",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "dataset": "data.path",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "val_size": "data.eval.fraction",
    "packing": "data.batching",
    "prompts": "data.questions",
    "sample_prompts": "data.questions",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targets",
    "target_modules": "adapter.targets",
    "finetuning_type": "adapter.type",
    "nproc_per_node": "hardware, or the flag --nproc",
    "master_port": "launch.port",
}

_A = {True: "A recipe", False: "Such a file"}
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "finite_number": "a finite number",
}


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe, with the document it came from for messages that name a place."""

    name: str
    recipe: Recipe
    document: Document

    @contextlib.contextmanager
    def locating(self) -> Iterator[None]:
        """Give every RecipeError raised inside the file, line and column of its keys."""
        try:
            yield
        except RecipeError as error:
            raise located(error.problems, self.document) from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override and check a recipe.

    Raises:
        RecipeError: the file or an override has mistakes; all of them are in it.
        UsageError: the file cannot be read, or an override is none.
    """
    document = read_document(path)
    for override in overrides:
        document.set(override)
    problems = list(document.problems)
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        problems += problems_of(error)
        raise located([*problems, *_rules_of_sound_sections(document, problems)], document) from None
    if recipe.strategy.device_map is not None and recipe.strategy.type == "auto":  # whoever names one wants one
        recipe = recipe.model_copy(update={"strategy": recipe.strategy.model_copy(update={"type": "device_map"})})
    problems += broken_rules(recipe)
    if problems:
        raise located(problems, document)
    return LoadedRecipe(name=path.stem, recipe=with_absolute_paths(recipe, document), document=document)


def _rules_of_sound_sections(document: Document, problems: Sequence[Problem]) -> list[Problem]:
    """Broken rules of the sections that are right by themselves, so that they are reported in the same go."""
    unsound = {problem.key.partition(".")[0] for problem in problems}
    stand_ins = {"model": {"path": "a/model"}, "data": {"path": "data"}}
    values = {name: value for name, value in document.values.items() if name not in unsound}
    try:
        recipe = Recipe.model_validate(stand_ins | values)
    except ValidationError:
        return []
    return broken_rules(recipe, unsound)


def with_absolute_paths(recipe: Recipe, document: Document) -> Recipe:
    """The same recipe with every path absolute; a hub id stays as it is."""

    def base(key: str) -> Path:
        parts = key.split(".")
        prefixes = {".".join(parts[: n + 1]) for n in range(len(parts))}
        return Path.cwd() if prefixes & document.from_command_line else document.folder

    def absolute(value: str, key: str) -> str:
        if "://" in value:
            return value
        return os.path.normpath(base(key) / os.path.expanduser(value))

    def each(value: str | tuple[str, ...], key: str) -> str | tuple[str, ...]:
        return absolute(value, key) if isinstance(value, str) else tuple(absolute(item, key) for item in value)

    model, data, launch, strategy = recipe.model, recipe.data, recipe.launch, recipe.strategy
    checkpoint = recipe.checkpoint
    if checkpoint.init_from is not None:
        checkpoint = checkpoint.model_copy(update={"init_from": absolute(checkpoint.init_from, "checkpoint.init_from")})
    if model.path is not None:
        folder = absolute(model.path, "model.path")
        if model.path.startswith(("/", ".", "~")) or os.path.isdir(folder):
            model = model.model_copy(update={"path": folder})
    evaluation = data.eval
    if evaluation is not None and evaluation.path is not None:
        evaluation = evaluation.model_copy(update={"path": each(evaluation.path, "data.eval.path")})
    data = data.model_copy(update={"path": each(data.path, "data.path"), "eval": evaluation})
    if launch.run_dir is not None:
        launch = launch.model_copy(update={"run_dir": absolute(launch.run_dir, "launch.run_dir")})
    if strategy.device_map is not None:  # a bare name is looked up among the shipped ones later
        file = absolute(strategy.device_map, "strategy.device_map")
        if strategy.device_map.startswith((".", "~")) or os.path.isfile(file):
            strategy = strategy.model_copy(update={"device_map": file})
    for name in ("deepspeed", "nvme_path"):
        if (value := getattr(strategy, name)) is not None:
            strategy = strategy.model_copy(update={name: absolute(value, f"strategy.{name}")})
    sections = {"model": model, "data": data, "launch": launch, "strategy": strategy, "checkpoint": checkpoint}
    return recipe.model_copy(update=sections)


def located(problems: Sequence[Problem], document: Document) -> RecipeError:
    """The error of these problems, each with its place in the document, in the order of the file."""
    placed = [problem if problem.where else replace(problem, where=document.place(problem.key)) for problem in problems]
    return RecipeError(sorted(placed, key=lambda problem: _line_and_column(problem.where)))


def _line_and_column(where: str) -> tuple[int, int]:
    """Sort key: file order first, overrides last."""
    parts = where.rsplit(":", 2)
    if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
        return int(parts[1]), int(parts[2])
    return 10**9, 0


def problems_of(error: ValidationError, root: type[Section] = Recipe) -> list[Problem]:
    """One problem a key of `root`, from pydantic's one error per alternative of a union."""
    grouped: dict[str, list[Any]] = {}
    for detail in error.errors(include_url=False):
        key = _key_of(detail["loc"], root)
        if detail["type"] in ("extra_forbidden", "missing"):
            key = ".".join(str(part) for part in detail["loc"])
        grouped.setdefault(key, []).append(detail)
    # Where an item of a list is wrong, that the list is no text either says nothing new.
    lists = {key.rpartition(".")[0] for key in grouped if key.rpartition(".")[2].isdigit()}
    grouped = {key: details for key, details in grouped.items() if key not in lists}
    return [Problem(key, _message(key, details, root)) for key, details in grouped.items()]


def _key_of(loc: tuple[int | str, ...], root: type[Section]) -> str:
    """The dotted key of an error: without the names pydantic adds for the alternatives of a union."""
    parts: list[str] = []
    section: Any = root
    for part in loc:
        fields = _fields_of(section)
        if part in fields:
            section = fields[str(part)].annotation
            parts.append(str(part))
        elif isinstance(part, int):
            parts.append(str(part))
    return ".".join(parts)


def _fields_of(annotation: Any) -> dict[str, Any]:
    """Alias or name -> field, of the section that an annotation such as `Eval | None` holds; empty for plain values."""
    section = section_of(annotation)
    return {field.alias or name: field for name, field in section.model_fields.items()} if section else {}


def _message(key: str, details: list[Any], root: type[Section]) -> str:
    first = details[0]
    if first["type"] == "extra_forbidden":
        return f"unknown key. {_did_you_mean_key(key, root)}"
    if first["type"] == "missing":
        return f"is missing. {description(key, root)}"
    expected = list(dict.fromkeys(_expectation(detail) for detail in details))
    message = f"expected {' or '.join(expected)}, found {_shown(first['input'])}."
    choices = [
        c.strip(" '")
        for d in details
        if d["type"] == "literal_error"
        for c in d["ctx"]["expected"].replace(" or ", ",").split(",")
    ]
    close = difflib.get_close_matches(str(first["input"]).lower(), choices, n=1)
    return f"{message} Did you mean {close[0]}?" if close else f"{message} {description(key, root)}"


def _expectation(detail: Any) -> str:
    """What one alternative of a field wants, in words."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        sign = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}[bounds[kind]]
        bound = context[bounds[kind]]
        return f"{sign} {bound:,}" if isinstance(bound, int) else f"{sign} {bound:g}"
    if kind == "string_pattern_mismatch":
        return f"text like {context['pattern']}"
    return _EXPECTED.get(kind, str(detail["msg"]))


def _shown(value: Any) -> str:
    """A value in YAML's words."""
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    )


def description(key: str, root: type[Section] = Recipe) -> str:
    """The sentence of the field, to help where there is nothing to guess."""
    field: Any = None
    annotation: Any = root
    for part in key.split("."):
        field = _fields_of(annotation).get(part, field)
        annotation = getattr(field, "annotation", None)
    return str(field.description) if field is not None else ""


def _did_you_mean_key(key: str, root: type[Section]) -> str:
    parent, _, name = key.rpartition(".")
    if root is Recipe and name in _ELSEWHERE:
        return f"Did you mean {_ELSEWHERE[name]}?"
    if key in all_keys(root):  # written with a dot, which is for the command line
        return f"In a file write {name} inside of {parent}"
    annotation: Any = root
    for part in parent.split(".") if parent else []:
        section = _fields_of(annotation).get(part)
        if section is None:
            return f"A recipe has: {', '.join(_fields_of(root))}"
        annotation = section.annotation
    siblings = _fields_of(annotation)
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {f'{parent}.' if parent else ''}{close[0]}?"
    elsewhere = [full for full in all_keys(root) if full.rpartition(".")[2] == name]
    if elsewhere:
        return f"Did you mean {elsewhere[0]}?"
    return f"{parent or _A[root is Recipe]} has: {', '.join(siblings)}"


def all_keys(section: Any = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key that a recipe can have, sections included."""
    keys: list[str] = []
    for name, field in _fields_of(section).items():
        keys += [prefix + name, *all_keys(field.annotation, f"{prefix}{name}.")]
    return keys
