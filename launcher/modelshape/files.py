"""In: a folder or a hub id. Out: its config.json, read from the disk and nothing else.

Nothing is downloaded: a hub id is looked up in the cache that huggingface_hub left, then in catalogue.yaml.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from launcher.errors import PreflightError, UsageError

_LONGEST_ID = 96  # letters that the hub allows


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


def near_names(hub_id: str) -> list[str]:
    """The one name of the catalogue that was meant: another letter case, or no owner; else one that is nearly the same; or none."""
    wanted = hub_id.lower()
    same = [known for known in catalogue_names() if wanted in (known.lower(), known.partition("/")[2].lower())]
    return (same or difflib.get_close_matches(hub_id, catalogue_names(), n=1, cutoff=0.85))[:1]


def local_folder(path_or_id: str, base_dir: Path) -> Path | None:
    """The folder that a model path means, counted from `base_dir`; None where it can only be a hub id.

    Raises:
        UsageError: it looks like a folder and none is there.
    """
    try:
        folder = base_dir / Path(path_or_id).expanduser()
        if folder.is_dir():
            return folder
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # longer than names may be, of a user that there is not, or with a NUL in it
        shown = path_or_id if len(path_or_id) < 60 else f"{path_or_id[:50]}… ({len(path_or_id):,} letters)"
        found = f"can be no folder: {getattr(error, 'strerror', None) or error}"
        raise UsageError(
            f"model.path: {shown}", found, "give a folder with config.json, or a hub id such as org/name"
        ) from None
    hub_id = len(path_or_id) <= _LONGEST_ID and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path_or_id)
    if re.match(r"[./~\\]", path_or_id) or not hub_id:
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
    """The folder of that model in huggingface_hub's cache, None where it is not there, or where it is not said which commit is meant."""
    model_dir = hub_cache() / f"models--{hub_id.replace('/', '--')}"
    ref = model_dir / "refs" / (revision or "main")
    commit = ref.read_text(encoding="utf-8", errors="replace").strip() if ref.is_file() else revision
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
    except (OSError, ValueError, RecursionError) as error:
        raise PreflightError(
            f"model.path: {folder}", f"{file} cannot be read: {error}", "write config.json again"
        ) from None
    if not isinstance(config, dict):
        raise PreflightError(f"model.path: {folder}", f"{file} holds no JSON object", "write config.json again")
    return config if name is None else {"_name_or_path": Path(name).name, **config}
