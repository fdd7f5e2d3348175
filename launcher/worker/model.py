"""The transformers model of this rank, offline, from the folder that prepare left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from launcher.compat import BUILT_FIRST
from launcher.errors import PreflightError
from launcher.plan import Plan
from launcher.remotecode import Staged
from launcher.worker.attention import has_flash, repeat_keys
from launcher.worker.spread import disconnect
from launcher.worker.staged import check, load_weights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_model(
    plan: Plan,
    model_dir: str | Path,
    where: torch.device | Mapping[str, torch.device],
    quantized: bool = True,
    code: Staged | None = None,
) -> Any:
    """The base model in the plan's precision, on a device, or on those of a device map (each tensor is read straight to its own).

    Args:
        quantized: False loads the full-precision weights of a recipe that trains on quantised ones (merging needs them).
        code: the model's own code, where it has some.

    Raises:
        PreflightError: the weights cannot be loaded, or some of them are missing; the code is not the plan's.
    """
    check(plan, code)
    quantization = plan.recipe.model.quantization if quantized else "none"
    dtype = DTYPES[plan.weights_dtype]
    options: dict[str, Any] = {"dtype": dtype}
    placed = where if isinstance(where, Mapping) else {"": where}
    is_built = code is not None and BUILT_FIRST in code.fixes
    if quantization != "none":
        options["quantization_config"] = bitsandbytes_config(quantization, DTYPES[plan.dtype])
    if is_built:
        options["device"] = placed[""] if len(placed) == 1 else "cpu"  # `connect` takes the modules from there
    elif quantization != "none" or len(placed) > 1:
        options["device_map"] = {name: str(device) for name, device in placed.items()}
    try:
        model, left = load_weights(model_dir, code, output_loading_info=True, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        found = "some tensors have other shapes than its config says; the rank's log lists them"
        to_type = f"check that config.json and the weights in {model_dir} belong together"
        raise PreflightError(f"model {plan.shape.name}", found, to_type) from error
    except (OSError, ValueError, ImportError, KeyError, SafetensorError, UnpicklingError) as error:
        raise PreflightError(
            f"model {plan.shape.name}",
            f"cannot be loaded: {str(error).splitlines()[0]}",
            f"check the files in {model_dir}",
        ) from error
    missing = sorted(left["missing_keys"])
    if missing:
        found = f"has no weights for {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}: they would be random"
        raise PreflightError(f"model {plan.shape.name}", found, f"check that the files in {model_dir} are complete")
    # The cache of keys and values is for generation; in training it costs memory and lets packed rows leak.
    model.config.use_cache = False
    if code is None and not all(has_flash(device, DTYPES[plan.dtype]) for device in placed.values()):
        repeat_keys(model)
    if len(placed) > 1:
        return disconnect(model)
    return model if quantization != "none" else model.to(placed[""])


def bitsandbytes_config(quantization: str, compute_dtype: torch.dtype) -> Any:
    """How transformers quantises the base: `int8`, or `nf4` with its scales quantised too."""
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
