"""A folder of safetensors in, a model without weights and a reader of single tensors out: no rank ever holds a whole model.

Every parameter of the empty model is one value that is seen everywhere (strides of zero), so that it has its shape, dtype and device
and no memory; PEFT would put its adapters on the meta device beside a base that is there, and lose how they start. A file is opened
for one tensor and closed again: a mapping that stays open would count all of the file as this rank's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open

from launcher.worker.checkpoint.files import TensorFile

ADAPTER_FILE = "adapter_model.safetensors"
# What PEFT puts into the name of a tensor of the base.
_PEFT_PREFIX = "base_model.model."
_PEFT_PARTS = (".base_layer.", ".original_module.", ".modules_to_save.default.")


class Tensors:
    """The tensors of safetensors files, by name."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._file: dict[str, Path] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safe_open is no mapping
                    self._file[name] = path
                    self._shape[name] = tuple(file.get_slice(name).get_shape())

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, None where there is none of that name."""
        return self._shape.get(name)

    def read(self, name: str, into: torch.Tensor, rows: slice = slice(None)) -> None:
        """Copy a tensor, or some of its rows, into one that is there, whatever its dtype and device."""
        with safe_open(self._file[name], framework="pt") as file:
            into.copy_(file.get_slice(name)[rows] if self._shape[name] else file.get_tensor(name))

    def values(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The values [start, stop) of a tensor as if it were flat."""
        return TensorFile(self._file[name]).read(name, start, stop)


class Weights:
    """Where each weight of a model, adapter and all, is read from.

    Args:
        base: the model's own tensors.
        prefix: of the model's names, which older files leave out (`transformer.`).
        adapter: what a checkpoint of an adapter holds; None before the first.
    """

    def __init__(self, base: Tensors, prefix: str, adapter: Tensors | None) -> None:
        self.base = base
        self.prefix = prefix
        self.adapter = adapter

    def find(self, name: str) -> tuple[Tensors, str] | None:
        """The tensors and the name in them for a parameter or buffer of the model."""
        if self.adapter is not None:
            own = name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
            if ".original_module." not in name and self.adapter.shape(own) is not None:
                return self.adapter, own
        own = name.removeprefix(_PEFT_PREFIX)
        for part in _PEFT_PARTS:
            own = own.replace(part, ".")
        for candidate in (own, own.removeprefix(self.prefix)):
            if self.base.shape(candidate) is not None:
                return self.base, candidate
        return None


def empty_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a folder's config, its parameters without memory and its buffers as the config has them."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)))
    model.tie_weights()
    model.config.use_cache = False
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def is_empty(parameter: torch.Tensor) -> bool:
    """Whether it has no memory of its own (`empty_model`)."""
    return parameter.numel() > 1 and not any(parameter.stride())


def weights_of(model: Any, folder: Path, checkpoint: Path | None) -> Weights | None:
    """Where the weights of an empty model are read from; None where the files have other tensors than the model.

    transformers loads older and foreign layouts too, by renaming, merging and turning tensors while it reads all of them: not here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    if not any(folder.glob("model*.safetensors")) or any(
        isinstance(c, WeightConverter) for c in get_model_conversion_mapping(model, add_legacy=False)
    ):
        return None
    weights = weights_in(model, folder, checkpoint)
    for name, parameter in model.named_parameters():
        found = weights.find(name)
        if found is None or found[0].shape(found[1]) != tuple(parameter.shape):
            return None
    return weights


def weights_in(model: Any, folder: Path, checkpoint: Path | None) -> Weights:
    """The safetensors files of a folder, and of a checkpoint's adapter where there is one, as the places of a model's weights."""
    adapter = checkpoint and checkpoint / ADAPTER_FILE
    return Weights(
        Tensors(sorted(folder.glob("model*.safetensors"))),
        f"{model.base_model_prefix}.",
        Tensors([adapter]) if adapter is not None and adapter.is_file() else None,
    )


def read_buffers(model: torch.nn.Module, weights: Weights) -> None:
    """Buffers that are kept in the files, which few models have."""
    kept = model.state_dict()
    for name, buffer in model.named_buffers():
        found = weights.find(name) if name in kept else None
        if found is not None:
            found[0].read(found[1], buffer)
