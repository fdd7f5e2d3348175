"""YAML text in, plain values and the place of every key out.

Works on the node graph instead of loaded objects, because that has a line and a column for everything and lets a
duplicate key be reported beside all other mistakes. YAML 1.2: `3e-4` is a number, `no` is text.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from launcher.errors import Problem, RecipeError, UsageError

_MOST_PLACES = 20_000
_BOOLEANS = {"true": True, "false": False}
_SCALARS: dict[str, Any] = {
    "tag:yaml.org,2002:null": lambda _: None,
    "tag:yaml.org,2002:bool": lambda text: _BOOLEANS[text.lower()],
    # 017 is seventeen: YAML 1.2 writes octal numbers 0o17.
    "tag:yaml.org,2002:int": lambda text: int(text.replace("_", ""), 0 if text.lstrip("+-")[1:2] in ("x", "o") else 10),
    "tag:yaml.org,2002:float": lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.replace("_", "").lower())),
}


@dataclass
class Document:
    """A recipe as written: nested plain values, and `places` from dotted key to `file:line:column` or the override."""

    name: str
    folder: Path
    values: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)
    from_command_line: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def place(self, key: str) -> str:
        """Where a key, or the nearest section above it that is written down, stands."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key, self.name)

    def set(self, override: str) -> None:
        """Apply `section.key=value`, the value read as YAML.

        Raises:
            UsageError: the text has no `=`.
        """
        key, equals, text = override.partition("=")
        key = key.strip()
        parts = key.split(".")
        if not equals or not all(parts):
            raise UsageError(
                override, "is neither a flag nor an override", "write it as section.key=value, e.g. train.lr=2e-4"
            )
        where = f"override {override}"
        try:
            scratch = _compose(text, where)
        except RecipeError as error:
            self.problems += [replace(problem, key=key, where=where) for problem in error.problems]
            return
        target = self.values
        for num, part in enumerate(parts[:-1], 1):
            if not isinstance(target.get(part), dict):
                target[part] = {}
                self._replaced(".".join(parts[:num]), where)
            target = target[part]
        target[parts[-1]] = scratch.values.get("")
        self._replaced(key, where)
        for problem in scratch.problems:
            self.problems.append(replace(problem, key=f"{key}.{problem.key}".rstrip("."), where=where))
        self.from_command_line.add(key)

    def _replaced(self, key: str, where: str) -> None:
        """Note that a key and all that stood below it come from somewhere else now."""
        self.places = {known: place for known, place in self.places.items() if not known.startswith(f"{key}.")}
        self.places[key] = where


def read_document(path: Path, what: str = "recipe", holds: str = "the sections model, data, …") -> Document:
    """Read a recipe file, or one that is written like it.

    Args:
        what: it is, and `holds`: which keys, for a message to somebody whose file is something else.

    Raises:
        UsageError: it cannot be read as text.
        RecipeError: it is no YAML, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(str(path), f"cannot be read: {error}", f"give a {what} as a UTF-8 YAML file") from None
    name = str(path)
    document = _compose(text, name)
    document.folder = path.resolve().parent
    value = document.values.pop("", None)
    if not isinstance(value, dict):
        found = "is empty" if value is None else f"holds {'a list' if isinstance(value, list) else repr(value)}"
        raise RecipeError([Problem("", f"{found}; a {what} is a mapping with {holds}", f"{name}:1:1")])
    document.values = value
    return document


def _compose(text: str, name: str) -> Document:
    """The document of a YAML text; its one value stands under the empty key."""
    document = Document(name=name, folder=Path.cwd(), values={})
    try:
        node = YAML().compose(io.StringIO(text))
        if node is not None:
            document.values[""] = _value(node, "", document)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise RecipeError([Problem("", f"is no valid YAML: {error.problem or error.context}", where)]) from None
    except ReaderError as error:  # a character that no YAML may hold
        line, column = text.count("\n", 0, error.position) + 1, error.position - text.rfind("\n", 0, error.position)
        raise RecipeError([Problem("", f"is no valid YAML: {error.reason}", f"{name}:{line}:{column}")]) from None
    except RecursionError:
        raise RecipeError([Problem("", "holds itself, or nests too deeply", f"{name}:1:1")]) from None
    return document


def _value(node: Node, key: str, document: Document) -> Any:
    """The plain value of a node; notes its place and its mistakes in `document` on the way."""
    document.places.setdefault(key, _where(node, document))
    if len(document.places) > _MOST_PLACES:
        raise RecipeError([Problem("", "has more than 20,000 values: aliases of aliases?", f"{document.name}:1:1")])
    if isinstance(node, MappingNode):
        return _mapping(node, key, document)
    if isinstance(node, SequenceNode):
        return [_value(item, f"{key}.{index}", document) for index, item in enumerate(node.value)]
    assert isinstance(node, ScalarNode)
    convert = _SCALARS.get(str(node.tag), str)
    try:
        return convert(node.value)
    except (ValueError, KeyError):
        kind = "number" if str(node.tag).endswith(("int", "float")) else "boolean"
        document.problems.append(Problem(key, f"{node.value!r} is no {kind}", _where(node, document)))
        return None


def _mapping(node: MappingNode, key: str, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, ScalarNode):
            document.problems.append(
                Problem(key, "has a list or a mapping as a key. Write a word", _where(key_node, document))
            )
            continue
        name = str(key_node.value)
        path = f"{key}.{name}" if key else name
        if name in values:
            message = f"is set twice (first at {document.places[path]}). Keep one of the two"
            document.problems.append(Problem(path, message, _where(key_node, document)))
            continue
        document.places[path] = _where(key_node, document)
        values[name] = _value(value_node, path, document)
    return values


def _where(node: Node, document: Document) -> str:
    return f"{document.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
