"""In: `model:` and `adapter:` of a recipe. Out: `ModelShape`, parameters by module, exact to the tensor, without torch.

Read `files` (config.json, hub cache, catalogue.yaml), `headers` (safetensors), `kinds` (what is refused), then `layouts` (the
formulas by family).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from launcher.errors import PreflightError, UsageError
from launcher.families import Family, family, family_of
from launcher.modelshape.files import (
    cached_snapshot,
    catalogue_config,
    catalogue_names,
    config_of_folder,
    local_folder,
    near_names,
    read_config,
)
from launcher.modelshape.headers import read_tensors
from launcher.modelshape.kinds import refuse_other_kinds
from launcher.modelshape.layouts import MissingKeyError, dims_of, layout_of, positions_of
from launcher.native import Native, Refusal, native_config
from launcher.recipe.schema import Adapter, Model

__all__ = [
    "ModelShape",
    "adapted_in_a_layer",
    "adapted_modules",
    "catalogue_names",
    "module_names",
    "read_config",
    "shape_of",
    "shape_of_config",
    "trainable_parameters",
    "trains_head",
    "unmatched_saved",
    "unmatched_targets",
]

# Ten times more than any model has; beyond it a mistyped number would keep the planner busy for ever.
_MOST_LAYERS = 2000


class ModelShape(BaseModel):
    """What a plan needs to know of a model. Sizes count elements, `stored_bytes` a file's bytes (0: none was read).

    `linears`: linear layers of one layer, named from the layer on -> (in_features, out_features). `modules`: every
    module of one layer that has parameters of its own -> their number. `outer`: the same beside the layers, by full
    name. `head_parameters` is 0 when the head is the embedding. `mlp_width`: that of all MLPs of a layer that one token
    goes through, which is more than `intermediate_size` in a mixture of experts. `mlp_tensors`: values as wide as it that
    its activation keeps for the backward pass (see `layouts.Layout`). `rms_norm`: RMSNorm, else LayerNorm. `positions`: how
    many its config says it knows, None where it does not. `source` says where all this was read. `native`: the model is
    converted, and all this is that of the native class; `not_native`: why a model with code of its own is not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model_type: str
    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    num_parameters: int
    embedding_parameters: int
    layer_parameters: int
    head_parameters: int
    stored_bytes: int
    linears: dict[str, tuple[int, int]]
    modules: dict[str, int]
    outer: dict[str, int]
    mlp_width: int
    mlp_tensors: int
    rms_norm: bool
    remote_code: bool
    source: str
    positions: int | None = None
    native: Native | None = None
    not_native: tuple[str, ...] = ()

    @property
    def prompts(self) -> str:
        """The family whose prompts the model knows: the original one of a converted model."""
        return self.native.source if self.native else self.family

    @property
    def template(self) -> str:
        """The prompt template where the tokenizer has none of its own."""
        return family(self.prompts).template_for(self.name)


def shape_of(model: Model, base_dir: Path) -> ModelShape:
    """The shape of the recipe's model; a relative path counts from `base_dir`.

    Raises:
        UsageError: an unknown hub id, a folder that is not there, a config without a dimension.
        PreflightError: a folder without config.json or with a broken one, a shard that is missing or cut short.
    """
    if model.config is not None:
        return shape_of_config(model.config, str(model.config.get("model_type", "model")), "model.config of the recipe")
    if model.path is None:
        raise UsageError("model: {}", "neither path nor config is set", "write `model: {path: org/name}`")
    folder = local_folder(model.path, base_dir)
    if folder is not None:
        return _with_tensors(
            _native_shape(config_of_folder(folder, model.path), model.path, f"{folder}"), folder, complete=True
        )
    snapshot = cached_snapshot(model.path, model.revision)
    if snapshot is not None:
        config = config_of_folder(snapshot, model.path)
        return _with_tensors(_native_shape(config, model.path, f"{snapshot}"), snapshot, complete=False)
    shipped = catalogue_config(model.path)
    if shipped is not None:
        return _native_shape(shipped, model.path, "the shipped catalogue")
    near = "".join(f"did you mean model.path={name}? Else " for name in near_names(model.path))
    raise UsageError(
        f"model.path: {model.path}",
        "it is no folder, not in the hub cache of this machine and not in the shipped catalogue",
        f"{near}type `launch prepare RECIPE` to fetch it, or give a folder that holds its config.json",
    )


def _native_shape(config: Mapping[str, Any], name: str, source: str) -> ModelShape:
    """The shape of the native class where the model is converted to one, else that of its own code."""
    found = native_config(config)
    if found is None:
        return shape_of_config(config, name, source)
    if isinstance(found, Refusal):
        return shape_of_config(config, name, source).model_copy(update={"not_native": found.reasons})
    return shape_of_config(found.config, name, source).model_copy(update={"native": found.native})


def shape_of_config(config: Mapping[str, Any], name: str, source: str) -> ModelShape:
    """The shape that a transformers config describes, by the formulas of its family.

    Raises:
        UsageError: the config lacks a dimension, or describes another kind of model.
    """
    refuse_other_kinds(config, name, source)
    known = family_of(config)
    try:
        dims = dims_of(config, known)
        layout = layout_of(config, known, dims)
    except MissingKeyError as error:
        raise UsageError(
            f"model: {name}", f"the config ({source}) lacks {error}", f"add {str(error).split()[0]} to the config"
        ) from None
    if not 0 < dims.num_layers <= _MOST_LAYERS:
        raise UsageError(
            f"model: {name}", f"the config ({source}) has {dims.num_layers} layers", f"give 1 to {_MOST_LAYERS}"
        )
    if dims.num_heads % dims.num_kv_heads:
        found = f"the config ({source}) has {dims.num_heads} heads in {dims.num_kv_heads} groups of keys"
        raise UsageError(f"model: {name}", found, "write a number of key heads that divides the heads")
    layer_parameters = sum(layout.modules.values())
    guess = " (as if it were a Llama: its family is not in families.yaml)" if known.name == "unknown" else ""
    return ModelShape(
        name=name,
        model_type=str(config.get("model_type", "")),
        family=known.name,
        num_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        intermediate_size=dims.intermediate_size,
        num_heads=dims.num_heads,
        num_kv_heads=dims.num_kv_heads,
        head_dim=dims.head_dim,
        vocab_size=dims.vocab_size,
        tie_word_embeddings=dims.tied,
        num_parameters=dims.num_layers * layer_parameters + sum(layout.outer.values()),
        embedding_parameters=layout.outer[known.embedding],
        layer_parameters=layer_parameters,
        head_parameters=layout.outer.get(known.head, 0),
        stored_bytes=0,
        linears=layout.linears,
        modules=layout.modules,
        outer=layout.outer,
        mlp_width=dims.mlp_width,
        mlp_tensors=layout.mlp_tensors,
        rms_norm=layout.rms_norm,
        positions=positions_of(config),
        remote_code=known.needs_remote_code or (known.name == "unknown" and "auto_map" in config),
        source=source + guess,
    )


def _with_tensors(shape: ModelShape, folder: Path, complete: bool) -> ModelShape:
    """The shape with what the safetensors headers of a folder say.

    A known family has the parameters of its formulas, which are exact to the tensor; of another one the headers know better.

    Raises:
        PreflightError: a file cannot be read, or these are the weights of another model than config.json's.
    """
    tensors = read_tensors(folder, complete)
    if not tensors:
        return shape
    head = family(shape.family).head + ".weight"
    counted = {name: size for name, size in tensors.items() if not (shape.tie_word_embeddings and name == head)}
    stored, wanted = sum(math.prod(dims) for dims, _ in counted.values()), shape.num_parameters
    remark = ""
    if shape.family == "unknown":
        wanted = stored
    elif (
        stored + shape.head_parameters < wanted
    ):  # a head that is missing may be the embedding, which loading finds out
        found = f"its safetensors files hold {stored:,} parameters, its config.json describes {wanted:,}"
        raise PreflightError(f"model.path: {folder}", found, "copy config.json and weights of one model there")
    elif stored != wanted:
        remark = f", which hold {stored:,} parameters where the config describes {wanted:,}"
    return shape.model_copy(
        update={
            "num_parameters": wanted,
            "stored_bytes": sum(num_bytes for _, num_bytes in tensors.values()),
            "source": f"{shape.source} (config.json and safetensors headers{remark})",
        }
    )


def trainable_parameters(shape: ModelShape, adapter: Adapter) -> int:
    """Number of parameters that an adapter trains, as PEFT 0.21 makes them.

    A LoRA pair has r × (in + out); DoRA adds a magnitude for each output; AdaLoRA starts with init_r (null: 1.5 × r,
    rounded up) and has a singular value for each rank. modules_to_save are copies, trained in full.
    """
    if adapter.type == "full":
        return shape.num_parameters
    saved = _saved_modules(shape, adapter.modules_to_save)
    rank = adapter.init_r or math.ceil(1.5 * adapter.r) if adapter.type == "adalora" else adapter.r
    total = sum(size for name, size in _all_modules(shape) if name in saved)
    for name, (in_features, out_features) in adapted_modules(shape, adapter.targets).items():
        if name in saved:
            continue
        total += rank * (in_features + out_features)
        total += {"dora": out_features, "adalora": rank}.get(adapter.type, 0)
    return total


def trains_head(shape: ModelShape, adapter: Adapter) -> bool:
    """Whether an adapter changes the head: in full, as a module to save, or as one of its targets."""
    head = family(shape.family).head
    if adapter.type == "full" or head in _saved_modules(shape, adapter.modules_to_save):
        return True
    return head in adapted_modules(shape, adapter.targets)


def adapted_modules(shape: ModelShape, targets: str | Sequence[str]) -> dict[str, tuple[int, int]]:
    """Full names of the modules that get an adapter -> (in_features, out_features), by PEFT's rule."""
    known = family(shape.family)
    if targets == "auto":
        targets = known.lora_targets or "all-linear"
    if targets == "all-linear":
        return dict(_linears(shape, known))
    named = [*_linears(shape, known), *_ends(shape, known)]
    return {name: size for name, size in named if _matches(name, targets)}


def adapted_in_a_layer(shape: ModelShape, targets: str | Sequence[str]) -> set[str]:
    """Names, from the layer on, of the linear layers of one layer that get an adapter."""
    prefix = f"{family(shape.family).layers}.0."
    one = shape.model_copy(update={"num_layers": 1})
    return {name.removeprefix(prefix) for name in adapted_modules(one, targets) if name.startswith(prefix)}


def unmatched_targets(shape: ModelShape, targets: str | Sequence[str]) -> list[str]:
    """The targets that name no module of the model; `linears`, embedding and head are what can be named."""
    if isinstance(targets, str):
        return []
    known = family(shape.family)
    names = [name for name, _ in (*_linears(shape, known), *_ends(shape, known))]
    return [target for target in targets if not any(_matches(name, [target]) for name in names)]


def unmatched_saved(shape: ModelShape, wanted: Sequence[str]) -> list[str]:
    """The names in modules_to_save that are no module of the model: PEFT passes them over without a word."""
    return [name for name in wanted if not _saved_modules(shape, [name])]


def module_names(shape: ModelShape) -> list[str]:
    """Short names that a target may have, for the error that lists them: those of a layer, the embedding, the head."""
    known = family(shape.family)
    names = [*shape.linears, known.embedding, known.head]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _matches(name: str, targets: Iterable[str]) -> bool:
    """PEFT's rule for a list of targets."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _linears(shape: ModelShape, known: Family) -> Iterator[tuple[str, tuple[int, int]]]:
    """Full names and sizes of the linear layers of all layers."""
    for index in range(shape.num_layers):
        for name, size in shape.linears.items():
            yield f"{known.layers}.{index}.{name}", size


def _ends(shape: ModelShape, known: Family) -> list[tuple[str, tuple[int, int]]]:
    """Embedding and head, which can be named as a target too."""
    return [
        (known.embedding, (shape.vocab_size, shape.hidden_size)),
        (known.head, (shape.hidden_size, shape.vocab_size)),
    ]


def _all_modules(shape: ModelShape) -> Iterator[tuple[str, int]]:
    """Full names of all modules with parameters of their own; a tied head has the embedding's."""
    known = family(shape.family)
    yield from shape.outer.items()
    if shape.tie_word_embeddings:
        yield known.head, shape.embedding_parameters
    for index in range(shape.num_layers):
        for name, size in shape.modules.items():
            yield f"{known.layers}.{index}.{name}", size


def _saved_modules(shape: ModelShape, wanted: Sequence[str]) -> set[str]:
    """Modules that are, or lie inside, one whose name ends with one of `wanted`: PEFT's rule for modules_to_save."""
    saved = set()
    for name, _ in _all_modules(shape):
        parts = name.split(".")
        parents = [".".join(parts[:num]) for num in range(1, len(parts) + 1)]
        if any(parent.endswith(target) for parent in parents for target in wanted):
            saved.add(name)
    return saved
