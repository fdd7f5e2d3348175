"""`launch plan RECIPE --explain KEY`: where a value comes from."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from launcher.cli import main
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


def test_what_only_a_plan_decides() -> None:
    assert said("logits") == {
        "logits": "of every token",
        "because": "here a loss of fewer is not held against its plan: code of the model's own, or a device map",
    }
    assert said("model.native")["model.native"] == "no"


def test_a_section_is_its_settings() -> None:
    settings = said("train", "train.early_stopping.patience=3", "data.eval.fraction=0.02")
    assert settings["train.lr"].startswith("0.0001  (")
    assert settings["train.early_stopping.patience"] == "3  (override train.early_stopping.patience=3)"
    assert settings["train.micro_batch"].endswith("  (the default: auto)")
    assert settings["means"] == "How long, how fast and in which steps the model learns."
    assert "train" not in settings
    assert said("train.early_stopping", "train.early_stopping=null")["train.early_stopping"] == "null"


def test_as_json_and_on_a_terminal_with_few_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    def printed(*argv: str) -> str:
        written = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(RECIPE), *argv])
        assert ended.value.code == 0
        return written.getvalue().decode()

    lines = json.loads(printed("--explain", "train.seed", "--json"))
    assert lines[0] == {"label": "train.seed", "text": "42"}
    assert json.loads(printed("--json"))["micro_batch"] == 20
    assert "micro batch 20 x 8 ranks" in printed()
    assert "####" in printed()
