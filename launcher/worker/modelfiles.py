"""The recipe's model in, folders of this machine out: weights, tokenizer and staged code, fetched, converted or made where they have to be.

All by content: see `cache`. A rehearsal's model is small, from random weights; tokenizer and code are the real ones where they are here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import PreflightError
from launcher.plan import Plan
from launcher.remotecode import Staged, checked_code, read_code, stage
from launcher.rundir import RunDir, cache_folder, read_json, write_json
from launcher.worker.cache import hash_files, key_of, made, say

_FORMAT_NATIVE = 2  # raised when the same original no longer gives the same converted model
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "*.model",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "added_tokens.json",
    "generation_config.json",
)
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
_OTHER_PATTERNS = ("*.json", "*.model", "*.txt", "*.py", "*.jinja", "*.tiktoken", "tokenizer*")


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a model are.

    Args:
        tokenizer_key: changes with what the tokenizer makes of a text.
        source_dir: the folder in its original layout, of a model that was converted; None for random weights.
    """

    model_dir: Path
    tokenizer_dir: Path
    tokenizer_key: str
    source_dir: Path | None = None
    code: Staged | None = None


def find_model(plan: Plan, run: RunDir, data_hash: str, cached: list[str]) -> ModelFiles:
    """Make or find the model of a plan.

    Args:
        data_hash: of the rows, from which a tokenizer is made where there is none.
        cached: what was there already is added to it.

    Raises:
        PreflightError: a model that is not there, or code that is not the plan's.
    """
    if plan.recipe.model.config is not None:
        return _from_config(plan, data_hash, cached)
    model_dir = source_dir = _existing_model(plan)
    if plan.shape.native is not None:
        key = key_of("native", _FORMAT_NATIVE, plan.shape.native.model_dump(), hash_model(source_dir))
        model_dir = made("native", key, cached, lambda into: _convert(plan, source_dir, into))
    tokenizer_key = hash_files(tokenizer_files(model_dir))
    tokenizer_dir, code = model_dir, _staged_code(plan, run, model_dir, cached)
    if code is not None:
        staged, tokenizer_key = code, key_of(tokenizer_key, code.code.sha256)
        if plan.rehearsal is not None:
            key = key_of("small", code.code.sha256, hash_files([source_dir / "config.json"]), plan.shape.num_layers)
            model_dir = made("model", key, cached, lambda into: _make_small(plan, source_dir, staged, into))
    return ModelFiles(model_dir, tokenizer_dir, tokenizer_key, source_dir, code)


def _from_config(plan: Plan, data_hash: str, cached: list[str]) -> ModelFiles:
    """Random weights, with a tokenizer from the rows, or that of the model that is rehearsed."""
    recipe = plan.recipe
    assert recipe.model.config is not None
    if plan.rehearsal is not None and plan.rehearsal.folder is not None:
        tokenizer_key = key_of("tokenizer", hash_files(tokenizer_files(Path(plan.rehearsal.folder))), plan.shape.name)
    else:
        read = recipe.data.model_dump(mode="json", include={"format", "fields", "max_rows", "bad_rows", "system"})
        named = recipe.data.template if plan.rehearsal is not None else None
        tokenizer_key = key_of("tokenizer", data_hash, read, recipe.model.config.get("vocab_size"), named)
    tokenizer_dir = made("tokenizer", tokenizer_key, cached, lambda into: _make_tokenizer(plan, into))
    model_key = key_of("model", recipe.model.config, recipe.train.seed, tokenizer_key)
    model_dir = made("model", model_key, cached, lambda into: _make_model(plan, tokenizer_dir, into))
    return ModelFiles(model_dir, tokenizer_dir, tokenizer_key)


def _existing_model(plan: Plan) -> Path:
    """The folder of the recipe's model, fetched from the hub where it is none.

    Raises:
        PreflightError: it is neither here nor to be had.
    """
    name = plan.recipe.model.path
    assert name is not None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    say(event="prepare", what="download", state=f"fetching {name}")
    revision = plan.recipe.model.revision
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*WEIGHT_PATTERNS, *_OTHER_PATTERNS]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=["*.bin", "*.bin.index.json", *_OTHER_PATTERNS]
                )
            )
    except RepositoryNotFoundError:
        raise PreflightError(
            f"model.path: {name}",
            "is no folder here and no model on the hub that you may read",
            "check the name, or log in: hf auth login",
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0][:160]
        raise PreflightError(
            f"model.path: {name}",
            f"is no folder here, and the hub cannot be reached: {reason}",
            "give the folder of a copy: model.path=/path/to/model",
        ) from None
    return folder


def _convert(plan: Plan, source_dir: Path, into: Path) -> None:
    from launcher.worker.convert import convert_model
    from launcher.worker.native_tokenizer import convert_tokenizer

    def progress(done: int, total: int) -> None:
        say(event="prepare", what="native", state="converting", done=done, total=total)

    assert plan.shape.native is not None
    # The tokenizer first: it takes seconds, the weights minutes.
    convert_tokenizer(source_dir, into, plan.shape.native, plan.shape.name)
    convert_model(source_dir, into, plan.shape.name, progress)


def _make_tokenizer(plan: Plan, into: Path) -> None:
    original = plan.rehearsal and plan.rehearsal.folder
    if original and plan.rehearsal and plan.rehearsal.native is not None:
        from launcher.worker.native_tokenizer import convert_tokenizer

        convert_tokenizer(Path(original), into, plan.rehearsal.native, plan.shape.name)
    elif original:
        for file in tokenizer_files(Path(original)):
            shutil.copyfile(file, into / file.name)
    else:
        from launcher.worker.fresh import train_tokenizer

        train_tokenizer(plan, into)


def _make_model(plan: Plan, tokenizer_dir: Path, into: Path) -> None:
    from launcher.worker.fresh import random_model

    say(event="prepare", what="model", state="building from config")
    random_model(plan, tokenizer_dir, into)


def _make_small(plan: Plan, source_dir: Path, code: Staged, into: Path) -> None:
    """A small copy of a model with code of its own, for a rehearsal."""
    from launcher.worker.code_trial import small_copy
    from launcher.worker.quiet import quiet_libraries

    quiet_libraries()
    for file in [*tokenizer_files(source_dir), *source_dir.glob("*.py")]:
        shutil.copyfile(file, into / file.name)
    small_copy(source_dir, into, code, plan.shape.num_layers)


def _staged_code(plan: Plan, run: RunDir, model_dir: Path, cached: list[str]) -> Staged | None:
    """The model's own code in the run directory, tried once for this code, config and libraries; None where it has none.

    Raises:
        PreflightError: it is not the plan's, cannot be loaded, or writes into the module cache.
    """
    if plan.shape.native is not None:
        return None
    model = plan.recipe.model
    code = plan.code or (checked_code(model, model_dir) if model.trust_remote_code else None)
    if code is None:
        return None
    staged = stage(code, read_code(model_dir, code), run.code, plan.fixes)
    run.module_cache.mkdir(mode=0o555, exist_ok=True)
    tried_on = importlib.metadata.version("transformers"), importlib.metadata.version("torch")
    key = key_of("code", code.sha256, code.classes, hash_files(sorted(model_dir.glob("*.json"))), plan.fixes, tried_on)
    made("code", key, cached, lambda into: _try_code(staged, model_dir, run))
    return staged


def _try_code(staged: Staged, model_dir: Path, run: RunDir) -> None:
    """Leaves an empty folder in the cache where the code can be loaded, nothing where it cannot."""
    from launcher.worker.quiet import quiet_libraries
    from launcher.worker.staged import try_out

    say(event="prepare", what="code", state="trying to load it")
    quiet_libraries()
    try_out(staged, model_dir, run.code)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model folder that its tokenizer may read, and those that say how an answer ends."""
    found = sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)})
    return [path for path in found if path.is_file()]


def hash_model(folder: Path) -> str:
    """Checksum over all that a conversion reads.

    A file of the hub's cache is called by its own checksum. Others are read once: 12 GiB are half a minute of every start,
    so what was found is kept for as long as size, time and inode stay.
    """
    kept_in = cache_folder() / "checksums.json"
    kept: dict[str, Any] = read_json(kept_in) or {}
    num_kept = len(kept)
    patterns = (*WEIGHT_PATTERNS, "*.bin", "*.bin.index.json", "*config.json", *_TOKENIZER_FILES, "*.tiktoken")
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        file, stat = path.resolve(), path.stat()
        checksum = file.name
        if not (path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", checksum)):
            stamp = f"{file} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
            checksum = kept[stamp] = kept.get(stamp) or hash_files([file])
        digest.update(f"{path.name}\0{checksum}\0".encode())
    if len(kept) > num_kept:
        kept_in.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept_in, kept)
    return digest.hexdigest()
