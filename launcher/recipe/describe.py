"""The schema's fields in, two descriptions out: JSON Schema for editors, and the reference page for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from launcher.recipe.schema import Recipe, Section, section_of

_NAMES = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "dict": "mapping",
    "NoneType": "null",
}


def schema_text() -> str:
    """What stands in recipes/schema.json."""
    value: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(by_alias=True),
    }
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def reference_text() -> str:
    """What stands in docs/recipe.md: every key with its values, default and sentence."""
    lines = [
        "# Every key of a recipe",
        "",
        "Made by `launch schema docs/recipe.md` from the sentences in `launcher/recipe/schema.py`.",
        "",
    ]
    for name, field in Recipe.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            lines += [f"## {name}", "", *_table([(name, field)])]
        else:
            lines += [f"## {name}", "", str(field.description), "", *_table(_rows(section, name))]
        lines.append("")
    return "\n".join(lines)


def _rows(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of a section and of the sections inside it."""
    for name, field in section.model_fields.items():
        key = f"{prefix}.{field.alias or name}"
        yield key, field
        inner = section_of(field.annotation)
        if inner is not None:
            yield from _rows(inner, key)


def _table(rows: Any) -> list[str]:
    lines = ["| key | values | default | |", "|---|---|---|---|"]
    for key, field in rows:
        lines.append(f"| `{key}` | {_values(field.annotation)} | {_default(field)} | {field.description} |")
    return lines


def _values(annotation: Any) -> str:
    """What may be written, in words: `auto`, whole number."""
    if section_of(annotation) is not None:
        return "section" if type(None) not in get_args(annotation) else "section, null"
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list of names"
    arguments = [
        argument for argument in get_args(annotation) if not isinstance(argument, FieldInfo) and _is_type(argument)
    ]
    if get_origin(annotation) is dict or not arguments:
        return _NAMES.get(getattr(annotation, "__name__", ""), "mapping")
    return ", ".join(dict.fromkeys(_values(argument) for argument in arguments))


def _is_type(argument: Any) -> bool:
    return isinstance(argument, type) or get_origin(argument) is not None


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, Section):
        return ""
    return f"`{json.dumps(field.default)}`" if not isinstance(field.default, str) else f"`{field.default}`"
