"""The text of remote code in; what in it deserves a look before it is trusted out, with file and line. By syntax only: nothing is executed.

This finds what is written plainly. Whoever wants to hide a call can; it says where to begin reading, not that the rest is harmless.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.remotecode.finding import absolute_imports, tree

# Name or dotted prefix of what is called or imported -> why it deserves a look.
_CALLS = {
    "exec": "runs text as code",
    "eval": "runs text as code",
    "compile": "turns text into code",
    "__import__": "imports by a name made at run time",
    "importlib.import_module": "imports by a name made at run time",
    "os.system": "starts a program",
    "os.popen": "starts a program",
    "os.exec": "starts a program",
    "os.spawn": "starts a program",
    "os.fork": "starts a process",
    "os.environ": "reads or changes the environment",
    "os.getenv": "reads the environment",
    "os.remove": "deletes files",
    "os.unlink": "deletes files",
    "os.rename": "moves files",
    "shutil": "copies, moves or deletes files",
    "subprocess": "starts a program",
    "pty": "starts a program",
    "multiprocessing": "starts processes",
    "socket": "network",
    "requests": "network",
    "urllib": "network",
    "http": "network",
    "httpx": "network",
    "aiohttp": "network",
    "ftplib": "network",
    "smtplib": "network",
    "huggingface_hub": "network",
    "torch.hub": "network, and code from there",
    "ctypes": "calls machine code",
    "cffi": "calls machine code",
    "torch.utils.cpp_extension": "compiles and loads machine code",
    "pickle": "runs code while it reads",
    "cloudpickle": "runs code while it reads",
    "dill": "runs code while it reads",
    "joblib": "runs code while it reads",
    "marshal": "reads compiled code",
}
_LOADERS = ("torch.load", "numpy.load")
_WRITING_METHODS = ("write_text", "write_bytes", "unlink", "rmdir", "mkdir", "rename", "touch")


@dataclass(frozen=True)
class Remark:
    """Something to look at: `file:line`, the expression, and why."""

    file: str
    line: int
    what: str
    why: str


def remarks(sources: Mapping[str, bytes]) -> list[Remark]:
    """Everything that deserves a look, in the order of files and lines, one a line and kind."""
    found = {remark: None for name, source in sorted(sources.items()) for remark in _of_file(name, tree(name, source))}
    return sorted(found, key=lambda remark: (remark.file, remark.line))


def missing_packages(sources: Mapping[str, bytes]) -> list[tuple[str, int, str]]:
    """(file, line, package) of what the code imports whenever it is loaded and this Python lacks."""
    needed = [
        (name, line, package)
        for name, source in sorted(sources.items())
        for line, package in absolute_imports(tree(name, source))
    ]
    return [each for each in needed if importlib.util.find_spec(each[2]) is None]


def _of_file(name: str, module: ast.Module) -> Iterator[Remark]:
    names = _imported_names(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _of_import(name, node)
        elif isinstance(node, ast.Call):
            yield from _of_call(name, node, names)
        elif isinstance(node, ast.Attribute) and _dotted(node, names) == "os.environ":
            yield Remark(name, node.lineno, "os.environ", _CALLS["os.environ"])
        elif (
            isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in ("__builtins__", "__loader__")
        ):
            yield Remark(name, node.lineno, node.id, "reaches every function of Python")


def _of_import(name: str, node: ast.Import | ast.ImportFrom) -> Iterator[Remark]:
    if isinstance(node, ast.Import):
        imported = [alias.name for alias in node.names]
    else:
        imported = [f"{node.module}.{alias.name}" for alias in node.names] if node.module and not node.level else []
    for each in imported:
        reason = _reason(each)
        if reason is not None:
            yield Remark(name, node.lineno, f"import {each}", reason)


def _of_call(name: str, node: ast.Call, names: Mapping[str, str]) -> Iterator[Remark]:
    called = _dotted(node.func, names)
    reason = _reason(called)
    if reason is not None:
        yield Remark(name, node.lineno, f"{called}()", reason)
    elif called in _LOADERS and not _is_safe_load(called, node):
        yield Remark(name, node.lineno, f"{called}()", "runs code while it reads, unless it is told not to")
    elif called.rpartition(".")[2] == "open" and _mode(node) is not None:
        yield Remark(name, node.lineno, f"{called}(…, {_mode(node)})", "writes a file")
    elif isinstance(node.func, ast.Attribute) and node.func.attr in _WRITING_METHODS:
        yield Remark(name, node.lineno, f".{node.func.attr}()", "writes or deletes a file")
    elif _looks_up_by_name(called, node, names):
        yield Remark(name, node.lineno, "getattr()", "looks a function up by a name made at run time")


def _reason(dotted: str) -> str | None:
    """Why a dotted name deserves a look: it, or something that it lies in, is in the table."""
    dotted = dotted.removeprefix("builtins.")
    parts = dotted.split(".")
    prefixes = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    listed = next((_CALLS[each] for each in prefixes if each in _CALLS), None)
    if listed is None and len(parts) == 2 and parts[0] == "os":  # os.execv, os.spawnl …
        listed = next((_CALLS[f"os.{start}"] for start in ("exec", "spawn") if parts[1].startswith(start)), None)
    return listed


def _imported_names(module: ast.Module) -> dict[str, str]:
    """What a name in this file stands for: `sp` -> `subprocess`, `run` -> `subprocess.run`."""
    names: dict[str, str] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _dotted(node: ast.expr, names: Mapping[str, str]) -> str:
    """`os.path.join` for that expression, its first name replaced by what it was imported as; empty for anything else."""
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value, names)
        return f"{inner}.{node.attr}" if inner else ""
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _looks_up_by_name(called: str, node: ast.Call, names: Mapping[str, str]) -> bool:
    """`getattr(os, name)`: the name of what is called is not in the text."""
    if called != "getattr" or len(node.args) < 2 or isinstance(node.args[1], ast.Constant):
        return False
    return _dotted(node.args[0], names) in ("os", "builtins", "sys", "importlib")


def _is_safe_load(called: str, node: ast.Call) -> bool:
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if called == "numpy.load":  # does not unpickle unless it is asked to
        return "allow_pickle" not in keywords
    value = keywords.get("weights_only")
    return isinstance(value, ast.Constant) and value.value is True


def _mode(node: ast.Call) -> str | None:
    """The mode of an open() that can write, as text; None where it only reads."""
    is_method = isinstance(node.func, ast.Attribute) and not (
        isinstance(node.func.value, ast.Name) and node.func.value.id in ("io", "codecs", "gzip")
    )
    place = 0 if is_method else 1
    mode = next((keyword.value for keyword in node.keywords if keyword.arg == "mode"), None)
    if mode is None and len(node.args) > place:
        mode = node.args[place]
    if mode is None:
        return None
    if isinstance(mode, ast.Constant) and isinstance(mode.value, str):
        return repr(mode.value) if set(mode.value) & set("wax+") else None
    return "a mode made at run time" if not is_method else None
