"""DeepSpeed's JSON: made from a plan as golden text, and a person's own checked against recipe and plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cluster import resolve_cluster
from launcher.errors import RecipeError
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan, read_given
from launcher.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "full_zero3_8xa800.yaml"


def planned(*overrides: str, given: str | None = None) -> Plan:
    loaded = load_recipe(RECIPE, overrides)
    shape = shape_of(loaded.recipe.model, loaded.document.folder)
    own = json.loads(given) if given is not None else None
    return make_plan("own", loaded.recipe, resolve_cluster(loaded.recipe.hardware), shape, deepspeed=own)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("zero3", ()),
        ("zero3_parameters", ("strategy.offload=parameters", "train.max_grad_norm=null")),
        ("zero3_nvme", ("strategy.offload=parameters", "strategy.nvme_path=/fast")),
        ("zero2_optimizer", ("strategy.type=zero2", "strategy.offload=optimizer", "model.dtype=fp16")),
        ("zero1_fp32", ("strategy.type=zero1", "model.dtype=fp32", "adapter.type=lora")),
    ],
)
def test_the_json_is_the_golden_text(name: str, overrides: tuple[str, ...], golden: Callable[[str, str], None]) -> None:
    golden(f"deepspeed_{name}", json.dumps(planned(*overrides).deepspeed, indent=1) + "\n")


def test_other_strategies_have_none() -> None:
    assert planned("strategy.type=fsdp").deepspeed is None


def test_a_plan_with_it_is_the_same_after_json() -> None:
    plan = planned()
    assert Plan.model_validate_json(plan.model_dump_json(by_alias=True)) == plan


def test_what_no_recipe_key_sets_is_taken_over() -> None:
    given = """{"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 7}, "train_batch_size": "auto",
                "bf16": {"enabled": true}, "steps_per_print": 10, "comms_logger": {"enabled": true}}"""
    config = planned(given=given).deepspeed
    assert config is not None
    assert config["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert config["zero_optimization"]["offload_param"] == {"device": "none"}
    assert (config["train_batch_size"], config["steps_per_print"]) == (128, 10)
    assert config["comms_logger"] == {"enabled": True}


def test_contradictions_are_named_with_both_values() -> None:
    given = """{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}, "train_batch_size": 64,
                "gradient_clipping": 1.0, "fp16": {"enabled": true}, "optimizer": {"type": "Adam"}}"""
    with pytest.raises(RecipeError) as caught:
        planned(given=given)
    assert [problem.key for problem in caught.value.problems] == ["strategy.deepspeed"] * 5
    assert [problem.message for problem in caught.value.problems] == [
        "sets optimizer, which a recipe sets by train.optimizer, train.lr, train.weight_decay. Remove it from the file",
        "has zero_optimization.stage = 2, the plan has 3 (from strategy.type). "
        'Change one of them, or write "auto" in the file',
        'has zero_optimization.offload_optimizer.device = "nvme", the plan has "none" (from strategy.offload). '
        'Change one of them, or write "auto" in the file',
        "has train_batch_size = 64, the plan has 128 (from train.global_batch). "
        'Change one of them, or write "auto" in the file',
        'has fp16.enabled = true, the plan has false (from model.dtype). Change one of them, or write "auto" in the file',
    ]


def test_a_file_counts_from_the_recipe_and_its_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(RECIPE.read_text().replace("{type: zero3}", "{type: zero3, deepspeed: ds.json}"))
    path = load_recipe(tmp_path / "own.yaml").recipe.strategy.deepspeed
    assert path == str(tmp_path / "ds.json")
    for text, word in ((None, "No such file"), ("{", "is no JSON"), ("[]", "holds no JSON object")):
        if text is not None:
            (tmp_path / "ds.json").write_text(text)
        with pytest.raises(RecipeError, match=word):
            read_given(path)
    (tmp_path / "ds.json").write_text('{"aio": {}}')
    assert read_given(path) == {"aio": {}}
