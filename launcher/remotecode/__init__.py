"""The .py files that come with a model: found, looked at, pinned and staged, without executing any of them.

Read `finding` (auto_map -> files), `review` (what deserves a look), `pinning` (the lock), `staging` (the folder that ranks import from).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import PreflightError, Problem, RecipeError
from launcher.native import NativeConfig, native_config
from launcher.recipe.schema import Model
from launcher.remotecode.finding import CodeFile, RemoteCode, code_folder, find_code, read_code
from launcher.remotecode.pinning import check_pin, diff, read_lock, trusted_sources, write_lock
from launcher.remotecode.review import Remark, missing_packages, remarks
from launcher.remotecode.staging import Staged, stage

__all__ = [
    "CodeFile",
    "RemoteCode",
    "Staged",
    "Trusted",
    "checked_code",
    "code_folder",
    "find_code",
    "planned_code",
    "read_code",
    "stage",
    "trust_code",
]


def planned_code(
    model: Model, base_dir: Path, recipe: Path, needed: bool = False, because: Sequence[str] = ()
) -> tuple[Model, RemoteCode | None]:
    """The code that a run of this model will execute, and the model section with its digest, so that a resume is held to it too.

    None for a model that brings none or may not use it, and where its files have not been fetched.

    Args:
        recipe: whose lock file counts.
        needed: whether transformers cannot build the model without it.
        because: why a class of transformers cannot compute it instead.

    Raises:
        RecipeError: it is needed, it is here, and the recipe does not allow it.
        PreflightError: it cannot be loaded, or is not the code that was trusted.
    """
    folder = code_folder(model, base_dir)
    if not model.trust_remote_code:
        if needed and folder is not None:
            reasons = f"{'; '.join(because)}. " if because else ""
            message = (
                f"the code of {model.path} is not part of transformers and comes with the weights. {reasons}"
                f"Look at it: launch trust {recipe}. If you trust it: model.trust_remote_code=true"
            )
            raise RecipeError([Problem("model.trust_remote_code", message)])
        return model, None
    code = checked_code(model, folder, recipe) if folder is not None else None
    if code is not None:
        return model.model_copy(update={"code_sha256": code.sha256}), code
    lock = read_lock(recipe)
    if (
        folder is None and lock is not None and model.code_sha256 is None
    ):  # prepare fetches it and holds it against this
        model = model.model_copy(update={"code_sha256": lock.sha256})
    return model, None


@dataclass(frozen=True)
class Trusted:
    """What `launch trust` found and wrote.

    Args:
        changes: how the code differs from what was trusted before; empty where that is the same or nothing was.
        asked_for: whether the recipe allows the code to be executed.
        converted: the transformers class that is used instead, where there is one: then none of it is executed.
    """

    code: RemoteCode
    remarks: list[Remark]
    changes: list[str]
    lock: Path
    asked_for: bool
    converted: str | None = None


def trust_code(model: Model, base_dir: Path, recipe: Path) -> Trusted:
    """Look at the code of a recipe's model and pin it in the recipe's lock file.

    Raises:
        PreflightError: it is not here, there is none, or it is broken.
        UsageError: the lock cannot be written.
    """
    folder = code_folder(model, base_dir)
    if folder is None:
        found = "is made from the config in the recipe" if model.path is None else "has not been fetched yet"
        to_type = "there is nothing to trust" if model.path is None else f"launch prepare {recipe}"
        raise PreflightError(f"model.path: {model.path}", found, to_type)
    code = find_code(folder)
    if code is None:
        raise PreflightError(
            f"model.path: {model.path}", "no auto_map names code", "leave model.trust_remote_code=false"
        )
    sources = read_code(folder, code)
    before = read_lock(recipe)
    old = trusted_sources(recipe, before.sha256) if before is not None and before.sha256 != code.sha256 else None
    changes = diff(old, sources) if old is not None else []
    lock = write_lock(recipe, str(model.path), code, sources)
    pinned = code.model_copy(update={"pinned_by": lock.name})
    native = native_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    converted = native.native.target if isinstance(native, NativeConfig) else None
    return Trusted(pinned, remarks(sources), changes, lock, model.trust_remote_code, converted)


def checked_code(model: Model, folder: Path, recipe: Path | None = None) -> RemoteCode | None:
    """The code of a model folder, held against its pin; None where the folder names none.

    Raises:
        PreflightError: it cannot be loaded, or is not the code that was trusted.
    """
    code = find_code(folder)
    if code is None:
        return None
    sources = read_code(folder, code)
    code = check_pin(model, code, sources, recipe)
    missing = missing_packages(sources)
    if missing:
        file, line, package = missing[0]
        if (folder / f"{package}.py").is_file():  # never advise to install a stranger's package of that name
            found = f"{file}:{line} imports {package} as if it were installed; it lies beside it"
            raise PreflightError(f"model.path: {model.path}", found, f"write in {file}: from .{package} import …")
        found = f"{file}:{line} imports {package}, which is not installed"
        raise PreflightError(f"model.path: {model.path}", found, f"pip install {package}")
    return code
