"""A loaded recipe, its plan and a key in; out where the value comes from: a line of the file, an override, a default, or derived."""

from __future__ import annotations

import difflib
import json
from typing import Any

from launcher.errors import UsageError
from launcher.plan import Plan
from launcher.recipe import LoadedRecipe
from launcher.recipe.reading import all_keys, description

# What the plan has that no recipe key sets, with how it comes about.
_DERIVED = {
    "accumulation": "global batch ÷ (ranks with rows of their own × micro batch)",
    "num_processes": "one for each device; a naive device map is one process over all of them",
    "weights_dtype": "that of the computation; fp32 where all weights are trained without DeepSpeed, which keeps such a copy itself",
    "trainable_parameters": "the adapter's, as PEFT makes them, and modules_to_save",
}


def explain(loaded: LoadedRecipe, plan: Plan, key: str) -> list[tuple[str, str]]:
    """(label, text) lines about one key: of the recipe, a section of it, or what stands under `why` in a plan.

    Raises:
        UsageError: neither the recipe nor the plan has such a key.
    """
    decided = [decision for decision in plan.decisions if decision.key == key]
    if key in _DERIVED:
        return [(key, str(getattr(plan, key))), ("from", f"derived: {_DERIVED[key]}")]
    keys = all_keys()
    if key not in keys and decided:
        return [line for decision in decided for line in ((key, decision.value), ("because", decision.because))]
    if key not in keys:
        known = list(dict.fromkeys([*keys, *_DERIVED, *(decision.key for decision in plan.decisions)]))
        near = difflib.get_close_matches(key, known, n=1)
        near = near or [name for name in known if name.rpartition(".")[2] == key][:1]
        to_type = f"did you mean --explain {near[0]}?" if near else "type `launch schema -` to see every key"
        raise UsageError(f"--explain {key}", "neither recipe nor plan has such a key", to_type)
    within = [name for name in keys if name.startswith(f"{key}.")]
    values = plan.recipe.model_dump(by_alias=True)
    if within and _value_of(values, key) is not None:
        settings = [name for name in within if not isinstance(_value_of(values, name), dict)]
        lines = [
            (name, _setting(loaded, plan, name)) for name in settings if _value_of(values, name.rpartition(".")[0])
        ]
        return [*lines, ("means", description(key))]
    value, source = _value_and_source(loaded, plan, key)
    because = [("because", decision.because) for decision in decided]
    return [(key, value), ("from", source), *because, ("means", description(key))]


def _setting(loaded: LoadedRecipe, plan: Plan, key: str) -> str:
    """One setting of a section in a line: its value, and where that is from."""
    value, source = _value_and_source(loaded, plan, key)
    where, _, written = source.rpartition(": ")
    return f"{value}  ({where if written == value else source})"


def _value_and_source(loaded: LoadedRecipe, plan: Plan, key: str) -> tuple[str, str]:
    """The value that the plan has, and the place where it stands with what stands there: `recipe.yaml:3:5: auto`."""
    decided = next((decision.value for decision in plan.decisions if decision.key == key), None)
    written, default = _value_of(loaded.document.values, key), _value_of(plan.recipe.model_dump(by_alias=True), key)
    source = f"the default: {_shown(default)}"
    if written is not None:
        source = f"{loaded.document.places.get(key, loaded.document.place(key))}: {_shown(written)}"
    return decided or _shown(default), source


def _value_of(values: Any, key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return None
        values = values[part]
    return values


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value.is_integer():
        return f"{value:g}"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
