"""Folders that prepare makes once for a content: found by their key, written under a temporary name and renamed, checked when found.

Also the line of JSON by which prepare tells the control side how far it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.rundir import cache_folder, read_json, rename_or_yield, write_json

# Part of every key: raise it when the same input no longer gives the same folder.
_FORMAT = 2
# The list of files in a cache folder, with their sizes.
_CONTENTS = "contents.json"


def say(**event: Any) -> None:
    """Print an event: progress, or the error that ended it."""
    print(json.dumps(event, ensure_ascii=False), flush=True)


def made(what: str, key: str, cached: list[str], make: Callable[[Path], None]) -> Path:
    """The cache folder of a key; made under a temporary name and renamed where it is not there yet."""
    target = cache_folder() / f"{what}-{key[:24]}"
    if target.is_dir():
        if _is_whole(target):
            cached.append(what)
            say(event="prepare", what=what, state="cached")
            return target
        _remove(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        make(temporary)
        write_json(temporary / _CONTENTS, _sizes(temporary))
        rename_or_yield(temporary, target)  # somebody else's has the same content
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(event="prepare", what=what, state="made")
    return target


def key_of(*parts: Any) -> str:
    """The key of what is made from these values."""
    return hashlib.sha256(json.dumps([_FORMAT, *parts], sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def hash_files(files: Sequence[Path]) -> str:
    """One checksum over names and bytes, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    """Relative name -> bytes of every file of a cache folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != _CONTENTS)
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)}


def _is_whole(folder: Path) -> bool:
    """Whether every file is there in the size it was made; a look at the bytes would cost more than making most of them again."""
    contents = read_json(folder / _CONTENTS)
    return isinstance(contents, dict) and contents == _sizes(folder)


def _remove(folder: Path) -> None:
    """Take a damaged folder out of the cache: its name at once, then its files."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.damaged")
    with contextlib.suppress(FileNotFoundError):  # another launcher was quicker
        folder.rename(doomed)
        shutil.rmtree(doomed)
