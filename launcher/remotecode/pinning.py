"""A recipe's pin and the code that is there in; agreement, or a refusal with a diff, out. Also the lock file that pins.

`my.yaml` has its lock beside it: `my.lock.json` (digest and checksums) and `my.trusted/` (the text that was looked at, for the diff).
`model.code_sha256` in the recipe counts before the lock.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from launcher.errors import PreflightError, UsageError
from launcher.recipe.schema import Model
from launcher.remotecode.finding import RemoteCode, describe, digest
from launcher.rundir import cache_folder, write_atomic, write_json

_LONGEST_DIFF = 60


def lock_file(recipe: Path) -> Path:
    """Where the lock of a recipe is."""
    return recipe.with_suffix(".lock.json")


def trusted_folder(recipe: Path) -> Path:
    """Where the text that was trusted is kept."""
    return recipe.with_suffix(".trusted")


def read_lock(recipe: Path) -> RemoteCode | None:
    """What was trusted; None where there is no lock.

    Raises:
        PreflightError: the lock cannot be read.
    """
    file = lock_file(recipe)
    if not os.path.lexists(file):
        return None
    try:
        return RemoteCode.model_validate(json.loads(file.read_text(encoding="utf-8"))["code"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        raise PreflightError(
            f"lock file {file}",
            "cannot be read",
            f"remove it, look again and pin again: rm -r {file}; launch trust {recipe}",
        ) from None


def write_lock(recipe: Path, model: str, code: RemoteCode, sources: Mapping[str, bytes]) -> Path:
    """Pin this code for a recipe; the lock file.

    Raises:
        UsageError: the folder of the recipe cannot be written to.
    """
    folder, file = trusted_folder(recipe), lock_file(recipe)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        for name, source in sources.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source)
        # The digest is over bytes: git must not change line ends.
        write_atomic(folder / ".gitattributes", "* -text\n")
        write_json(file, {"model": model, "code": code.model_dump(mode="json")})
    except OSError as error:
        raise UsageError(
            f"lock file {file}",
            f"cannot be written: {error.strerror}",
            f"pin it in the recipe: model.code_sha256={code.sha256}",
        ) from None
    return file


def check_pin(model: Model, code: RemoteCode, sources: Mapping[str, bytes], recipe: Path | None) -> RemoteCode:
    """The code, with what pins it.

    Raises:
        PreflightError: it is not the code that was trusted.
    """
    lock = read_lock(recipe) if recipe is not None else None
    pin = model.code_sha256 or (lock.sha256 if lock is not None else None)
    by = "model.code_sha256" if model.code_sha256 else lock_file(recipe).name if recipe is not None else ""
    if model.code_sha256 == code.sha256:
        _remember(code.sha256, sources)
    if lock is not None and lock.sha256 == code.sha256 and lock.classes != code.classes:
        found = f"auto_map names other classes than when it was trusted: {_named(code)}, was {_named(lock)}"
        raise PreflightError(f"{lock_file(recipe).name if recipe else by}", found, f"look again: launch trust {recipe}")
    if pin is None or pin == code.sha256:
        return code.model_copy(update={"pinned_by": by if pin else ""})
    changes = _changes(lock, pin, sources, recipe)
    more = [f"… {len(changes) - _LONGEST_DIFF} lines more"] if len(changes) > _LONGEST_DIFF else []
    shown = "".join(f"\n    {line}" for line in [*changes[:_LONGEST_DIFF], *more])
    again = f"model.code_sha256={code.sha256}" if model.code_sha256 else f"launch trust {recipe}"
    raise PreflightError(
        f"{by}: {pin[:12]}…",
        f"the code in {model.path} is not the one that was trusted, its sha256 is {code.sha256[:12]}…{shown}",
        f"read what changed; if you trust it: {again}",
    )


def _remember(pin: str, sources: Mapping[str, bytes]) -> None:
    """Keep a text that a digest in a recipe pins, for the diff once it has changed: no file beside the recipe holds it."""
    folder = cache_folder() / "trusted" / pin
    if folder.is_dir():
        return
    with contextlib.suppress(OSError):  # a convenience: without it the refusal is the same, only shorter
        for name, source in sources.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source)


def _named(code: RemoteCode) -> str:
    return ", ".join(sorted(code.classes.values()))


def trusted_sources(recipe: Path | None, pin: str) -> dict[str, bytes] | None:
    """The text that has this digest: from beside the recipe, the run that the recipe lies in, or the cache; None where it is gone."""
    beside = [] if recipe is None else [trusted_folder(recipe), recipe.parent / "code" / pin[:16]]
    for folder in (*beside, cache_folder() / "trusted" / pin):
        sources = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.py"))}
        if digest(describe(sources)) == pin:
            return sources
    return None


def diff(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> list[str]:
    """A unified diff over all files."""
    lines: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        sides = [side.get(name, b"").decode("utf-8", "replace").splitlines() for side in (old, new)]
        lines += difflib.unified_diff(sides[0], sides[1], f"trusted/{name}", f"now/{name}", lineterm="")
    return lines


def _changes(lock: RemoteCode | None, pin: str, sources: Mapping[str, bytes], recipe: Path | None) -> list[str]:
    """What is other than when it was trusted: a diff where the old text is known, else the names of files."""
    old = trusted_sources(recipe, pin)
    if old is not None:
        return diff(old, sources)
    if lock is None or recipe is None or lock.sha256 != pin:
        return ["(no copy of the trusted text is here to compare with)"]
    before = {file.name: file.sha256 for file in lock.files}
    now = {file.name: file.sha256 for file in describe(sources)}
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    return [f"{name} (its old text is no longer in {trusted_folder(recipe).name})" for name in names]
