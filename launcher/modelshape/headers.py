"""In: a folder. Out: what the headers of its safetensors files say, each entry checked; no weight is read."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any

from launcher.errors import PreflightError

# The rest has a byte a value, but for those that are packed more tightly, whose bytes only their offsets tell.
_DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
# Saved by some, but no parameters: they follow from the config.
_BUFFERS = re.compile(r"(inv_freq|rotary_emb\.(cos|sin)_cached|attn\.(masked_)?bias)$")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_LONGEST_HEADER = 100_000_000  # the format's own limit, in bytes


def read_tensors(folder: Path, complete: bool = True) -> dict[str, tuple[tuple[int, ...], int]]:
    """Every parameter of a folder's safetensors files: name -> (shape, stored bytes). Empty where there are none.

    Only headers are read: 8 bytes of length, then JSON (https://huggingface.co/docs/safetensors, "Format").

    Args:
        complete: a shard that the index names and the folder lacks is an error; else there is nothing to read.

    Raises:
        PreflightError: a shard is missing, cut short or no such file, or the index cannot be read.
    """
    tensors: dict[str, tuple[tuple[int, ...], int]] = {}
    for file in _shards(folder, complete):
        for name, entry in _read_header(file).items():
            if not _BUFFERS.search(name):
                start, end = entry["data_offsets"]
                tensors[name] = tuple(entry["shape"]), end - start
    return tensors


def stored_dtypes(folder: Path) -> set[str]:
    """Precisions of the floating-point tensors in a folder's safetensors files (`BF16`, `F32`, …); empty where a file lacks.

    Raises:
        PreflightError: a shard is cut short or no such file, or the index cannot be read.
    """
    entries = [entry for file in _shards(folder, complete=False) for entry in _read_header(file).values()]
    return {entry["dtype"] for entry in entries if "F" in entry["dtype"]}


def _shards(folder: Path, complete: bool) -> list[Path]:
    """The safetensors files that make up the model of a folder."""
    index, single = folder / _INDEX, folder / _SINGLE
    for file in (index, single):
        if complete and not file.is_file() and (file.exists() or file.is_symlink()):
            what = "is a link to nothing" if not file.exists() else "is a folder" if file.is_dir() else "is no file"
            raise PreflightError(f"model.path: {folder}", f"{file.name} {what}", f"copy or download {file.name} again")
    if not index.is_file():
        return [single] if single.is_file() else []
    try:
        files = [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
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


def _read_header(file: Path) -> dict[str, dict[str, Any]]:
    """The entries of a safetensors file's header: name -> {dtype, shape, data_offsets}, all of which belong together.

    Raises:
        PreflightError: the file is shorter than its header says, has no header, or one that contradicts itself.
    """
    you_set, to_type = f"model.path: {file.parent}", f"copy or download {file.name} again"
    try:
        size_bytes = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if header_bytes + 8 > size_bytes:
                raise PreflightError(you_set, f"{file.name} is cut short in its header ({size_bytes} bytes)", to_type)
            header = json.loads(stream.read(header_bytes)) if header_bytes <= _LONGEST_HEADER else None
    except OSError as error:
        raise PreflightError(
            you_set, f"{file.name} cannot be read: {error.strerror}", "make it yours to read"
        ) from None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise PreflightError(you_set, f"{file.name} is not a safetensors file", to_type)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in entries.items():
        wrong = _wrong_entry(entry)
        if wrong is not None:
            raise PreflightError(you_set, f"{file.name} is not a safetensors file: {name[:80]} {wrong}", to_type)
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["data_offsets"][0] != end:
            wrong = "does not begin where the tensor before it ends"
            raise PreflightError(you_set, f"{file.name} is not a safetensors file: {name[:80]} {wrong}", to_type)
        end = entry["data_offsets"][1]
    if 8 + header_bytes + end > size_bytes:
        found = f"{file.name} is cut short: its header says {8 + header_bytes + end} bytes, the file has {size_bytes}"
        raise PreflightError(you_set, found, to_type)
    return entries


def _wrong_entry(entry: Any) -> str | None:
    """What is wrong with the entry of one tensor; None where it is sound."""
    if not isinstance(entry, dict):
        return "is no mapping"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        return f"has no dtype ({dtype!r})"
    if not (isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)):
        return f"has no shape ({str(shape)[:80]})"
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(place) is int for place in offsets)):
        return f"has no data_offsets ({str(offsets)[:80]})"
    num_bytes = offsets[1] - offsets[0]
    if num_bytes < 0 or (dtype in _DTYPE_BYTES and num_bytes != prod(shape) * _DTYPE_BYTES[dtype]):
        return f"is {dtype} of {str(shape)[:80]} in {num_bytes:,} bytes"
    return None
