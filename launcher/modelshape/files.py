"""In: a folder or a hub id. Out: config.json and the safetensors headers, read from the disk and nothing else.

Nothing is downloaded: a hub id is looked up in the cache that huggingface_hub left, then in catalogue.yaml.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from launcher.errors import PreflightError, UsageError

_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # the rest has one byte
# Saved by some, but no parameters: they follow from the config.
_BUFFERS = re.compile(r"(inv_freq|rotary_emb\.(cos|sin)_cached|attn\.(masked_)?bias)$")
_INDEX = "model.safetensors.index.json"


@cache
def _catalogue_lines() -> dict[str, str]:
    """The lines of catalogue.yaml by hub id. YAML is slow here: all of it takes 15 ms, a line one."""
    lines = (Path(__file__).parent.parent / "catalogue.yaml").read_text(encoding="utf-8").splitlines()
    return {line.split(":", 1)[0]: line for line in lines if line and not line.startswith("#")}


def catalogue_names() -> tuple[str, ...]:
    """Hub ids whose configs are shipped."""
    return tuple(_catalogue_lines())


@cache
def catalogue_config(hub_id: str) -> dict[str, Any] | None:
    """The shipped config of a public model, None where it is not in the catalogue."""
    line = _catalogue_lines().get(hub_id)
    if line is None:
        return None
    value = YAML(typ="safe", pure=False).load(line)[hub_id]
    return catalogue_config(value) if isinstance(value, str) else dict(value)


def local_folder(path_or_id: str, base_dir: Path) -> Path | None:
    """The folder that a model path means, counted from `base_dir`; None where it can only be a hub id.

    Raises:
        UsageError: it looks like a folder and none is there.
    """
    folder = base_dir / Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if re.match(r"[./~\\]", path_or_id) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path_or_id):
        raise UsageError(
            f"model.path: {path_or_id}",
            f"there is no folder {folder}",
            "give a folder with config.json, or a hub id such as org/name",
        )
    return None


def hub_cache() -> Path:
    """huggingface_hub's cache of models, by its own variables."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub").expanduser()


def cached_snapshot(hub_id: str, revision: str | None = None) -> Path | None:
    """The folder of that model in huggingface_hub's cache, None where it is not there."""
    model_dir = hub_cache() / f"models--{hub_id.replace('/', '--')}"
    ref = model_dir / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = model_dir / "snapshots" / commit if commit else None
    return snapshot if snapshot is not None and (snapshot / "config.json").is_file() else None


def read_config(path_or_id: str, revision: str | None = None, base_dir: Path = Path()) -> dict[str, Any] | None:
    """The config of a folder, of a cached hub model, or of the catalogue, in this order; None where all lack it.

    Raises:
        UsageError: it looks like a folder and none is there.
        PreflightError: the folder has no config.json, or one that is not JSON.
    """
    folder = local_folder(path_or_id, base_dir) or cached_snapshot(path_or_id, revision)
    return catalogue_config(path_or_id) if folder is None else config_of_folder(folder)


def config_of_folder(folder: Path, name: str | None = None) -> dict[str, Any]:
    """config.json of a folder.

    Args:
        name: what the recipe calls the model, for a file that does not say itself what it is a copy of.

    Raises:
        PreflightError: it is not there, or not a JSON object.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PreflightError(
            f"model.path: {folder}",
            "the folder has no config.json",
            "give the folder that save_pretrained wrote, or a hub id",
        ) from None
    except (OSError, ValueError) as error:
        raise PreflightError(
            f"model.path: {folder}", f"{file} cannot be read: {error}", "write config.json again"
        ) from None
    if not isinstance(config, dict):
        raise PreflightError(f"model.path: {folder}", f"{file} holds no JSON object", "write config.json again")
    return config if name is None else {"_name_or_path": Path(name).name, **config}


def read_tensors(folder: Path, complete: bool = True) -> dict[str, tuple[tuple[int, ...], int]]:
    """Every parameter of a folder's safetensors files: name -> (shape, stored bytes). Empty where there are none.

    Only headers are read: 8 bytes of length, then JSON (https://huggingface.co/docs/safetensors, "Format").

    Args:
        complete: a shard that the index names and the folder lacks is an error; else there is nothing to read.

    Raises:
        PreflightError: a shard is missing or cut short, or the index cannot be read.
    """
    tensors: dict[str, tuple[tuple[int, ...], int]] = {}
    for file in _shards(folder, complete):
        for name, entry in read_header(file).items():
            if name != "__metadata__" and not _BUFFERS.search(name):
                shape = tuple(entry["shape"])
                tensors[name] = shape, prod(shape) * _DTYPE_BYTES.get(entry["dtype"], 1)
    return tensors


def stored_dtypes(folder: Path) -> set[str]:
    """Precisions of the floating-point tensors in a folder's safetensors files (`BF16`, `F32`, …); empty where a file lacks.

    Raises:
        PreflightError: a shard is cut short, or the index cannot be read.
    """
    entries = [
        entry
        for file in _shards(folder, complete=False)
        for name, entry in read_header(file).items()
        if name != "__metadata__"
    ]
    return {entry["dtype"] for entry in entries if "F" in entry["dtype"]}


def _shards(folder: Path, complete: bool) -> list[Path]:
    """The safetensors files that make up the model of a folder."""
    index = folder / _INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else []
    try:
        files = [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise PreflightError(
            f"model.path: {folder}", f"{index.name} cannot be read: {type(error).__name__}", f"copy {index.name} again"
        ) from None
    missing = [file.name for file in files if not file.is_file()]
    if missing and complete:
        raise PreflightError(
            f"model.path: {folder}",
            f"{index.name} names {', '.join(missing)}, which the folder lacks",
            f"copy {missing[0]} there",
        )
    return [] if missing else files


def read_header(file: Path) -> Mapping[str, Any]:
    """The header of a safetensors file.

    Raises:
        PreflightError: the file is shorter than its header says, or has no header.
    """
    you_set, to_type = f"model.path: {file.parent}", f"copy or download {file.name} again"
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes + 8 > size_bytes:
            raise PreflightError(you_set, f"{file.name} is cut short in its header ({size_bytes} bytes)", to_type)
        try:
            header: dict[str, Any] = json.loads(stream.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise PreflightError(you_set, f"{file.name} is not a safetensors file", to_type) from None
    wanted_bytes = 8 + header_bytes + max(ends, default=0)
    if wanted_bytes > size_bytes:
        raise PreflightError(
            you_set,
            f"{file.name} is cut short: its header says {wanted_bytes} bytes, the file has {size_bytes}",
            to_type,
        )
    return header
