"""A loaded recipe, its plan and a key in; out where the value comes from: a line of the file, an override, a default, or derived."""

from __future__ import annotations

import difflib
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
    """(label, text) lines about one key.

    Raises:
        UsageError: neither the recipe nor the plan has such a key.
    """
    if key in _DERIVED:
        return [(key, str(getattr(plan, key))), ("from", f"derived: {_DERIVED[key]}")]
    if key not in all_keys():
        known = [*all_keys(), *_DERIVED]
        near = difflib.get_close_matches(key, known, n=1)
        near = near or [name for name in known if name.rpartition(".")[2] == key][:1]
        to_type = f"did you mean --explain {near[0]}?" if near else "type `launch schema -` to see every key"
        raise UsageError(f"--explain {key}", "a recipe has no such key", to_type)
    written = _value_of(loaded.document.values, key)
    decided = [decision for decision in plan.decisions if decision.key == key]
    lines = [(key, decided[0].value if decided else _shown(_value_of(plan.recipe.model_dump(by_alias=True), key)))]
    if written is not None:
        lines.append(("from", f"{loaded.document.places.get(key, loaded.document.place(key))}: {_shown(written)}"))
    else:
        lines.append(("from", f"the default: {_shown(_value_of(plan.recipe.model_dump(by_alias=True), key))}"))
    lines += [("because", decision.because) for decision in decided]
    lines.append(("means", description(key)))
    return lines


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
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
