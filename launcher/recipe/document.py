"""YAML text in, plain values and the place of every key out.

Works on the node graph instead of loaded objects, because that has a line and a column for everything and lets a
duplicate key be reported beside all other mistakes. YAML 1.2: `3e-4` is a number, `no` is text.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from launcher.errors import Problem, RecipeError, UsageError

_SCALARS: dict[str, Any] = {
    "tag:yaml.org,2002:null": lambda _: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": lambda text: int(text.replace("_", ""), 0),
    "tag:yaml.org,2002:float": lambda text: float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan")),
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
            UsageError: the text has no `=`, or its value is no YAML.
        """
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UsageError(
                override, "is neither a flag nor an override", "write it as section.key=value, e.g. train.lr=2e-4"
            )
        scratch = _compose(text, f"override {override}")
        target = self.values
        for part in parts[:-1]:
            inner = target.get(part)
            target[part] = inner = dict(inner) if isinstance(inner, dict) else {}
            target = inner
        target[parts[-1]] = scratch.values.get("") if scratch.values else None
        self.places[key] = f"override {override}"
        self.from_command_line.add(key)


def read_document(path: Path) -> Document:
    """Read a recipe file.

    Raises:
        UsageError: it cannot be read as text.
        RecipeError: it is no YAML, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(str(path), f"cannot be read: {error}", "give a recipe as a UTF-8 YAML file") from None
    name = str(path)
    document = _compose(text, name)
    document.folder = path.resolve().parent
    value = document.values.pop("", None)
    if not isinstance(value, dict):
        found = "is empty" if value is None else f"holds a {type(value).__name__}"
        raise RecipeError(
            [Problem("", f"{found}; a recipe is a mapping with the sections model, data, …", f"{name}:1:1")]
        )
    document.values = value
    return document


def _compose(text: str, name: str) -> Document:
    """The document of a YAML text; its one value stands under the empty key."""
    document = Document(name=name, folder=Path.cwd(), values={})
    try:
        node = YAML().compose(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise RecipeError([Problem("", f"is no valid YAML: {error.problem or error.context}", where)]) from None
    if node is not None:
        document.values[""] = _value(node, "", document)
    return document


def _value(node: Node, key: str, document: Document) -> Any:
    """The plain value of a node; notes its place and its mistakes in `document` on the way."""
    document.places.setdefault(key, _where(node, document))
    if isinstance(node, MappingNode):
        return _mapping(node, key, document)
    if isinstance(node, SequenceNode):
        return [_value(item, f"{key}.{index}", document) for index, item in enumerate(node.value)]
    assert isinstance(node, ScalarNode)
    convert = _SCALARS.get(str(node.tag), str)
    try:
        return convert(node.value)
    except ValueError:
        document.problems.append(Problem(key, f"{node.value!r} is no number", _where(node, document)))
        return None


def _mapping(node: MappingNode, key: str, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
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
