"""A model folder in; its remote code out: the classes that auto_map names, every .py file they reach, sha256 of each. Nothing is executed.

The files are the named ones and what they import relatively, wherever in a file the import stands: an import in a function is
staged too, because it may be reached while training.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from launcher.errors import PreflightError
from launcher.modelshape.files import cached_snapshot, local_folder
from launcher.recipe.schema import Model

# The first one that names a class counts: a tokenizer's code is often reached through config.json only.
_CONFIGS = ("tokenizer_config.json", "config.json", "generation_config.json")


class CodeFile(BaseModel):
    """One .py file: its path below the model folder, with slashes, and what it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
    num_bytes: int


class RemoteCode(BaseModel):
    """The code that comes with a model.

    Args:
        classes: AutoConfig, AutoTokenizer, … -> `module.Class`, the module as a dotted path below the folder.
        files: every file that is reached, by name.
        sha256: one digest over names and contents; what a recipe or a lock file pins.
        pinned_by: what it was held against; empty where nothing pins it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: dict[str, str]
    files: tuple[CodeFile, ...]
    sha256: str
    pinned_by: str = ""


@dataclass(frozen=True)
class Import:
    """A relative import: the line it stands on, the file it needs, and whether the module fails without it."""

    line: int
    file: str
    needed: bool


def code_folder(model: Model, base_dir: Path) -> Path | None:
    """Where the model's files are on this machine; None where it is made from a config or has not been fetched."""
    if model.path is None:
        return None
    return local_folder(model.path, base_dir) or cached_snapshot(model.path, model.revision)


def find_code(folder: Path) -> RemoteCode | None:
    """The remote code of a model folder; None where no auto_map names any.

    Raises:
        PreflightError: a file or a class that is named is not there, lies outside of the folder, or is no Python.
    """
    classes = _classes(folder)
    named = sorted({reference for references in classes.values() for reference in references})
    if not named:
        return None
    sources: dict[str, bytes] = {}
    for reference in named:
        _follow(folder, _module_file(folder, reference), f"auto_map names {reference}", sources)
    for reference in named:
        _require_class(folder, reference, sources)
    files = describe(sources)
    # A tokenizer has two: the fast one is taken where there is one, as transformers 5 does.
    return RemoteCode(
        classes={auto: references[-1] for auto, references in sorted(classes.items())},
        files=files,
        sha256=digest(files),
    )


def describe(sources: Mapping[str, bytes]) -> tuple[CodeFile, ...]:
    """Name, checksum and size of every file, by name."""
    return tuple(
        CodeFile(name=name, sha256=hashlib.sha256(source).hexdigest(), num_bytes=len(source))
        for name, source in sorted(sources.items())
    )


def digest(files: tuple[CodeFile, ...]) -> str:
    """One sha256 over the names and checksums of all files."""
    return hashlib.sha256("".join(f"{file.sha256}  {file.name}\n" for file in files).encode()).hexdigest()


def read_code(folder: Path, code: RemoteCode) -> dict[str, bytes]:
    """The bytes of every file, which must be those that `code` names.

    Raises:
        PreflightError: a file has changed since, or is gone.
    """
    sources = {}
    for file in code.files:
        try:
            sources[file.name] = (folder / file.name).read_bytes()
        except OSError as error:
            raise _refused(folder, f"{file.name} cannot be read: {error.strerror}", "copy it there again") from None
        if hashlib.sha256(sources[file.name]).hexdigest() != file.sha256:
            raise _refused(
                folder, f"{file.name} has changed since this run was planned", "start it again: launch RECIPE"
            )
    return sources


def cycle_in(sources: Mapping[str, bytes]) -> list[str]:
    """The names of files that import one another in a circle while they are loaded, first one twice; empty where none do."""
    edges = {
        name: [each.file for each in relative_imports(name, tree(name, source), sources) if each.needed]
        for name, source in sources.items()
    }

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        return next((found for after in edges.get(name, ()) if (found := walk(after, [*path, name]))), [])

    return next((found for name in sorted(edges) if (found := walk(name, []))), [])


def tree(name: str, source: bytes) -> ast.Module:
    """The syntax tree of a file.

    Raises:
        SyntaxError, ValueError: it is no Python, or more deeply nested than can be looked at.
    """
    try:
        return ast.parse(source, filename=name)
    except (RecursionError, MemoryError):
        raise ValueError("it is nested too deeply to be looked at") from None


def relative_imports(name: str, module: ast.Module, files: Any) -> Iterator[Import]:
    """Every relative import of a file.

    Args:
        files: what can be asked `file in files` for the names of files that are there.
    """
    for node, needed in _statements(module, True):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from _targets(name, node, needed, files)


def absolute_imports(module: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import without which the module cannot be loaded: not in try, if or a function."""
    for node, needed in _statements(module, True):
        if not needed:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.lineno, node.module.split(".")[0]


def _statements(node: ast.AST, needed: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below one, and whether it is executed whenever the module is."""
    for child in ast.iter_child_nodes(node):
        yield child, needed
        always = not isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try | ast.If | ast.While
        )
        yield from _statements(child, needed and always)


def _targets(name: str, node: ast.ImportFrom, needed: bool, files: Any) -> Iterator[Import]:
    """The files that one `from .x import y` reaches."""
    parents = name.split("/")[:-1]
    if node.level - 1 > len(parents):
        yield Import(node.lineno, "../" * (node.level - 1 - len(parents)) + (node.module or ""), True)
        return
    base = parents[: len(parents) - (node.level - 1)] + (node.module.split(".") if node.module else [])
    packages = ["/".join([*base[:depth], "__init__.py"]) for depth in range(1, len(base) + 1)]
    reached = [package for package in packages if package in files]
    module = "/".join(base) + ".py"
    if base and module in files:
        reached.append(module)
    for alias in node.names:
        inner = "/".join([*base, alias.name])
        reached += [each for each in (f"{inner}.py", f"{inner}/__init__.py") if each in files]
    own = "/".join([*base, "__init__.py"])
    there = module in reached or own in files or len(reached) > sum(package in files for package in packages)
    if not there:
        # Packages above it do not make up for the module: the likeliest place is what the message names.
        reached.append(module if base else f"{node.names[0].name}.py")
    yield from (Import(node.lineno, each, needed) for each in reached if each != name or own == name)


class _Folder:
    """`name in folder` for the files of a model folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).is_file() or (self.folder / name).is_symlink()


def _classes(folder: Path) -> dict[str, list[str]]:
    """auto_map of all configs: auto class -> references, the preferred one last."""
    classes: dict[str, list[str]] = {}
    for name in _CONFIGS:
        file = folder / name
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            mapped = config.get("auto_map") or {}
            entries = mapped.items() if isinstance(mapped, dict) else [("AutoTokenizer", mapped)]
            found = {
                auto: [each for each in ([value] if isinstance(value, str) else value) if each]
                for auto, value in entries
            }
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise _refused(folder, f"the auto_map of {name} cannot be read: {error}", f"write {name} again") from None
        for auto, references in found.items():
            if references:
                classes.setdefault(auto, [_reference(folder, name, each) for each in references])
    return classes


def _reference(folder: Path, config: str, reference: Any) -> str:
    """`module.Class`. What stood before `--`, a repository, is dropped where the folder has the file itself."""
    repository, dashes, rest = str(reference).rpartition("--")
    module, dot, name = rest.rpartition(".")
    if not dot or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise _refused(folder, f"auto_map in {config} names {reference!r}, which is no file.Class", f"mend {config}")
    if dashes and _module_name(module) not in _Folder(folder):
        raise _refused(
            folder,
            f"auto_map in {config} names code of another repository, {repository}, and the folder has no {_module_name(module)}",
            f"copy the .py files of {repository} into the folder",
        )
    return rest


def _module_name(module: str) -> str:
    return module.replace(".", "/") + ".py"


def _module_file(folder: Path, reference: str) -> str:
    name = _module_name(reference.rpartition(".")[0])
    if name in _Folder(folder):
        return name
    has = sorted(path.name for path in folder.glob("*.py"))
    there = f"the folder has only {', '.join(has)}" if has else "the folder has weights but no .py file at all"
    raise _refused(
        folder,
        f"auto_map names {reference}, but there is no {name}: {there}",
        "copy the .py files of the original model there",
    )


def _follow(folder: Path, name: str, why: str, sources: dict[str, bytes]) -> None:
    """Add a file and everything that it imports relatively."""
    if name in sources:
        return
    source = _read(folder, name, why)
    try:
        module = tree(name, source)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        place = f"{name}:{line}" if line else name
        raise _refused(
            folder, f"{place} is no Python: {getattr(error, 'msg', error)}", f"mend {name}, or copy it again"
        ) from None
    sources[name] = source
    for each in relative_imports(name, module, _Folder(folder)):
        if each.file.startswith("../"):
            raise _refused(
                folder, f"{name}:{each.line} imports from outside of the folder", "put all of the code into one folder"
            )
        if each.file in _Folder(folder) or each.needed:
            _follow(folder, each.file, f"{name}:{each.line} imports it", sources)


def _read(folder: Path, name: str, why: str) -> bytes:
    path = folder / name
    if path.is_symlink() or path.exists():
        try:
            real = path.resolve()
        except (OSError, RuntimeError):  # before 3.13 a loop of links is a RuntimeError
            raise _refused(folder, f"{name} is a link to itself", "copy the file again") from None
        # A snapshot of the hub's cache is made of links into the blobs beside it.
        allowed = [folder.resolve()] + (
            [folder.resolve().parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
        )
        if not any(real.is_relative_to(root) for root in allowed):
            raise _refused(
                folder,
                f"{name} is a link to {real}, outside of the folder",
                f"put the file itself there: cp --remove-destination {real} {path}",
            )
    if path.exists() and not path.is_file():  # a pipe would be waited for, a folder cannot be read
        raise _refused(folder, f"{name} is no file", "put the file itself there")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _refused(
            folder, f"there is no {name}, and {why}", "copy the .py files of the original model there"
        ) from None
    except OSError as error:
        raise _refused(folder, f"{name} cannot be read: {error.strerror}", f"chmod +r {path}") from None


def _require_class(folder: Path, reference: str, sources: Mapping[str, bytes]) -> None:
    """The class must be defined, assigned or imported at the top of its file, or come from `import *`."""
    module, _, name = reference.rpartition(".")
    file = _module_name(module)
    bound: set[str] = set()
    for node, _ in _statements(tree(file, sources[file]), True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    if name not in bound and "*" not in bound:
        raise _refused(
            folder,
            f"auto_map names {reference}, but {file} has no {name}",
            "copy the config and the .py files from the same revision",
        )


def _refused(folder: Path, found: str, to_type: str) -> PreflightError:
    return PreflightError(f"model.path: {folder}", found, to_type)
