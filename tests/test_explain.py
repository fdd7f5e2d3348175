"""`launch plan RECIPE --explain KEY`: where a value comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.explain import explain
from launcher.start import Asked, plan_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "alpaca_lora_8xa800.yaml"


def said(key: str, *overrides: str) -> dict[str, str]:
    """label -> text of what is said about a key of the 8×A800 recipe."""
    return dict(explain(*plan_recipe(Asked(str(RECIPE), overrides)), key))


def test_a_line_of_the_file() -> None:
    assert said("hardware")["from"].startswith(f"{RECIPE}:")
    assert said("adapter.alpha")["from"].endswith(": 32")


def test_an_override_a_default_and_a_decision() -> None:
    assert said("train.lr", "train.lr=2e-4")["from"] == "override train.lr=2e-4: 0.0002"
    assert said("train.seed")["from"] == "the default: 42"
    decided = said("train.micro_batch")
    assert decided["from"] == "the default: auto"
    assert decided["train.micro_batch"].isdigit()
    assert "fits" in decided["because"]
    assert decided["means"] == "Rows that one device works on at once."


def test_what_is_derived() -> None:
    assert said("accumulation")["from"].startswith("derived: global batch ÷")


def test_no_such_key() -> None:
    with pytest.raises(UsageError, match=r"did you mean --explain train\.lr\?"):
        said("train.lrr")
