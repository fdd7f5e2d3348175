"""The descriptions that are made from the schema stand in the repository as they are made."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.recipe import all_keys
from launcher.recipe.describe import reference_text, schema_text

ROOT = Path(__file__).parents[2]


def test_the_reference_page_is_up_to_date_and_names_every_key() -> None:
    text = reference_text()
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == text, "make schema"
    sections = {key for key in all_keys() if any(other.startswith(f"{key}.") for other in all_keys())}
    missing = [key for key in all_keys() if key not in sections and f"`{key}`" not in text]
    assert not missing


def test_the_schema_knows_defaults_choices_and_unknown_keys() -> None:
    schema = json.loads(schema_text())
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["model", "data"]
    assert schema["$defs"]["Adapter"]["properties"]["type"]["enum"] == ["lora", "rslora", "dora", "adalora", "full"]
    assert "async" in schema["$defs"]["Checkpoint"]["properties"]
