"""The recipe's JSON Schema, for editors: completion, the sentence of every key, red lines under mistakes."""

from __future__ import annotations

import json
from typing import Any

from launcher.recipe.schema import Recipe


def schema_text() -> str:
    """The schema as it stands in recipes/schema.json."""
    value: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(by_alias=True),
    }
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
