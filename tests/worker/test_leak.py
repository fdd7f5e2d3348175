"""The packing check finds the families that leak, whatever the table of families says."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cluster import resolve_cluster
from launcher.errors import PreflightError
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan
from launcher.recipe import load_recipe
from launcher.worker.data.leak import refuse_leaks


def plan_of(tiny_recipe: Path) -> Plan:
    loaded = load_recipe(tiny_recipe)
    cluster = resolve_cluster(loaded.recipe.hardware)
    return make_plan("tiny", loaded.recipe, cluster, shape_of(loaded.recipe.model, tiny_recipe.parent))


@pytest.mark.parametrize(("model_type", "leaks"), [("llama", False), ("qwen2", False), ("bloom", True), ("opt", True)])
def test_a_family_that_ignores_position_ids_is_found(
    tiny_recipe: Path, tmp_path: Path, model_type: str, leaks: bool
) -> None:
    from transformers import AutoConfig

    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "vocab_size": 500,
    }
    AutoConfig.for_model(model_type, **sizes).save_pretrained(tmp_path)
    if leaks:
        with pytest.raises(PreflightError, match="see each other"):
            refuse_leaks(plan_of(tiny_recipe), tmp_path)
    else:
        refuse_leaks(plan_of(tiny_recipe), tmp_path)
