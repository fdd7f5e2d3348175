"""Where recipes are: a path works as it is; a bare name is looked up beside the user, then among the shipped ones."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_folder() -> Path:
    """The folder of the shipped recipes: inside an installed wheel, or beside the package in a checkout."""
    inside = _PACKAGE / "_recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes"


def looked_up(name: str, folders: Sequence[Path]) -> Path | None:
    """The file that a path, or a bare name in the first of these folders, means; None where there is none."""
    given = Path(os.path.expanduser(name))
    # os.path: a name that is too long is no file; Path.is_file raises.
    if os.path.isfile(given):
        return given
    if given.name == name:  # a bare name, with or without its ending
        file_name = name if given.suffix in (".yaml", ".yml") else f"{name}.yaml"
        for folder in folders:
            if os.path.isfile(folder / file_name):
                return folder / file_name
    return None


def find_recipe(name: str) -> Path:
    """The file that a path or bare name means.

    Raises:
        UsageError: there is none; names the nearest.
    """
    file = looked_up(name, (Path("recipes"), Path(), shipped_folder()))
    if file is not None:
        return file
    given = Path(os.path.expanduser(name))
    known = {path.stem: path for path in recipes()}
    close = difflib.get_close_matches(given.stem, known, n=1)
    found = "is a folder" if os.path.isdir(given) else "there is no such recipe"
    to_type = f"did you mean: launch {known[close[0]]}" if close else "list the recipes there are: launch recipes"
    shown = name if len(name) <= 200 else f"{name[:200]}…"
    raise UsageError(f"recipe {shown}", found, to_type)


def recipes() -> list[Path]:
    """All recipes beside the user and shipped, the user's own first, without schema and device maps."""
    found: dict[str, Path] = {}
    for folder in (Path("recipes"), shipped_folder()):
        for path in sorted(folder.glob("*.yaml")):
            if path.is_file():
                found.setdefault(path.stem, path)
    return list(found.values())


def purpose(path: Path) -> str:
    """The first sentence of a recipe's head comment."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("#"):
            break
        if "yaml-language-server" not in line:
            lines.append(line.lstrip("# "))
    return " ".join(lines).split(". ")[0].rstrip(".")
