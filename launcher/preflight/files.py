"""The model's files: every shard that an index names, the tokenizer; there, and no torn copy or pointer in their place.

Shards in safetensors format were held against their headers, and the model's own .py files found, when the plan was made.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from launcher.modelshape.files import cached_snapshot
from launcher.plan import Plan
from launcher.preflight.finding import Finding
from launcher.recipe.schema import Model

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZERS = ("tokenizer*", "*.model", "vocab*", "*.tiktoken")
_POINTER = b"version https://git-lfs.github.com/spec/"
_SHOWN = 4


def offline() -> bool:
    """Whether huggingface_hub may fetch nothing, by its own variables and its own reading of them."""
    said = (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "").upper()
    return said in ("1", "ON", "YES", "TRUE")


def model_files(plan: Plan) -> Iterator[Finding]:
    """Whether the model is here as a whole, or will be."""
    model = plan.recipe.model
    if model.path is None:
        yield Finding("ok", f"model {plan.shape.name}", plan.shape.source)
        return
    what = f"model.path: {model.path}"
    if os.path.isdir(model.path):
        yield from _of_folder(Path(model.path), plan, what)
        return
    snapshot = cached_snapshot(model.path, model.revision)
    missing = to_fetch(model)
    if snapshot is not None and not missing:
        broken = list(_broken(snapshot, what, "remove it there, then fetch it again: launch prepare RECIPE"))
        yield from broken or [Finding("ok", what, "is in the hub cache, every file of it")]
    elif not offline():
        names = f": {_listed(missing)}" if snapshot is not None else ""
        yield Finding("ok", what, f"will be fetched from the hub by prepare{names}")
    else:
        found = "is not here" if snapshot is None else f"lacks {_listed(missing)}"
        to_type = "give a folder: model.path=DIR, or fetch it once: HF_HUB_OFFLINE=0 launch prepare RECIPE"
        yield Finding("error", what, f"{found}, and HF_HUB_OFFLINE=1 forbids fetching it", to_type)


def to_fetch(model: Model) -> list[str]:
    """What of a hub model is not on this machine: names, or what they would be; empty for a folder and a model from a config."""
    if model.path is None or os.path.isdir(model.path):
        return []
    snapshot = cached_snapshot(model.path, model.revision)
    return ["all of it"] if snapshot is None else _missing(snapshot)


def _of_folder(folder: Path, plan: Plan, what: str) -> Iterator[Finding]:
    missing = _missing(folder)
    broken = list(_broken(folder, what, f"copy or download it again; for a clone: git -C {folder} lfs pull"))
    if missing:
        named = any("(" not in name for name in missing)
        to_type = (
            f"copy {missing[0]} there" if named else "give the whole folder that save_pretrained wrote: model.path=DIR"
        )
        yield Finding("error", what, f"the folder has no {_listed(missing)}", to_type)
    yield from broken
    if not missing and not broken:
        yield Finding("ok", f"model {plan.shape.name}", plan.shape.source)


def _missing(folder: Path) -> list[str]:
    """Names of shards that an index lists and the folder lacks; else `weights (…)`, `tokenizer (…)` where there are none."""
    shards = _shards(folder)
    missing = [name for name in shards if not (folder / name).is_file()]
    for what, patterns in (("weights", _WEIGHTS), ("tokenizer", _TOKENIZERS)):
        if not any(path.is_file() for pattern in patterns for path in folder.glob(pattern)) and not missing:
            missing.append(f"{what} ({', '.join(patterns)})")
    return missing


def _shards(folder: Path) -> list[str]:
    """The files that the first index of a folder names; empty without an index, or for one that planning or loading refuses."""
    for index in _INDEXES:
        try:
            return sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue
    return []


def _broken(folder: Path, what: str, to_type: str) -> Iterator[Finding]:
    """Pointers that git left in place of large files, and .bin files that lost their end."""
    for path in sorted({path for pattern in (*_WEIGHTS, *_TOKENIZERS) for path in folder.glob(pattern)}):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.read(len(_POINTER))
        if head == _POINTER:
            yield Finding("error", what, f"{path.name} is a pointer of git lfs, not the file itself", to_type)
        elif path.suffix == ".bin" and head.startswith(b"PK") and not zipfile.is_zipfile(path):
            # torch writes zip files, whose table of contents is the last thing in them.
            yield Finding("error", what, f"{path.name} is cut short ({path.stat().st_size} bytes)", to_type)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
