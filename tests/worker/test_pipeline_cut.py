"""Cutting a model into stages: which families can be, that each stage has what is planned, and what fp16 does about overflows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from launcher.cluster import resolve_cluster
from launcher.errors import PreflightError
from launcher.families import family
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan
from launcher.recipe import Recipe
from launcher.recipe.device_maps import DeviceMap
from launcher.worker.byshard import empty_model
from launcher.worker.pipeline.cutting import Elsewhere, Stage, belongs, cut, prove
from launcher.worker.pipeline.loop import LossScale
from launcher.worker.pipeline.trial import try_cut
from tests.test_modelshape import CONFIGS, TINY
from tests.worker.test_sharding import one_rank  # noqa: F401 - a fixture

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
NATIVE = ["llama", "mistral", "mixtral", "qwen3", "qwen2_moe", "qwen3_moe", "phi", "phi3", "glm", "glm4"]
SLIDING = {
    "model_type": "qwen2", **TINY, "num_hidden_layers": 4, "tie_word_embeddings": False, "use_sliding_window": True,
    "sliding_window": 3, "max_window_layers": 1,
}  # fmt: skip


def planned(folder: Path, config: dict[str, Any], placement: tuple[str, ...] = ("0-0", "1-1")) -> Plan:
    """A pipeline of a model folder with this config."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    values = {
        "model": {"path": str(folder)}, "data": {"path": "rows.json", "max_length": 16}, "hardware": "2xcpu",
        "strategy": {"type": "device_map"}, "train": {"global_batch": 4, "micro_batch": 1},
    }  # fmt: skip
    recipe = Recipe.model_validate(values)
    device_map = DeviceMap(devices=("2xcpu",), schedule="pipelined", placement=placement)
    shape = shape_of(recipe.model, folder)
    return make_plan("tiny", recipe, resolve_cluster("2xcpu"), shape, device_map=device_map)


@pytest.mark.parametrize("name", NATIVE)
def test_a_family_computes_the_same_in_two_stages(tmp_path: Path, name: str) -> None:
    try_cut(planned(tmp_path / name.replace("_", "-"), CONFIGS[name]), tmp_path / name.replace("_", "-"))


def test_kinds_of_layers_go_by_their_number_in_the_whole_model(tmp_path: Path) -> None:
    try_cut(planned(tmp_path / "sliding", SLIDING, ("0-1", "2-3")), tmp_path / "sliding")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "granite", **TINY, "embedding_multiplier": 12.0}, "has a loss of .* instead of"),
        (CONFIGS["bloom"], r"cannot be computed \(ValueError"),
        ({**CONFIGS["mixtral"], "num_local_experts": 1}, r"cannot be tried \(RuntimeError"),
    ],
    ids=["granite", "bloom", "nonsense"],
)
def test_what_would_compute_something_else_is_refused_before_any_rank_starts(
    tmp_path: Path, config: dict[str, Any], found: str
) -> None:
    folder = tmp_path / "model"
    plan = planned(folder, CONFIGS["llama"])
    plan = plan.model_copy(update={"shape": plan.shape.model_copy(update={"family": config["model_type"]})})
    if config["model_type"] == "granite":
        plan = plan.model_copy(update={"shape": plan.shape.model_copy(update={"family": "unknown"})})
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(PreflightError, match=found) as caught:
        try_cut(plan, folder)
    assert caught.value.to_type == "set strategy.schedule=naive"


def stage_of(plan: Plan, folder: Path, rank: int) -> tuple[Stage, frozenset[str]]:
    model = peft.get_peft_model(
        empty_model(folder, torch.float32), peft.LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"])
    )
    names = frozenset(name for name, _ in model.named_parameters())
    stage = Stage(model, plan.stages[rank])
    cut(stage.whole, stage.planned, family("llama"))
    return stage, names


def test_a_stage_has_its_layers_under_their_names_and_nothing_else(tmp_path: Path) -> None:
    plan = planned(tmp_path / "llama", CONFIGS["llama"])
    (first, names), (last, _) = (stage_of(plan, tmp_path / "llama", rank) for rank in range(2))
    held = [set(dict(stage.model.named_parameters())) for stage in (first, last)]
    assert held[0] | held[1] == names
    assert not held[0] & held[1]
    assert all(belongs(name, first.planned, family("llama")) for name in held[0])
    assert any(".layers.1." in name for name in held[1])
    assert not any(".layers.0." in name for name in held[1])
    assert isinstance(last.whole.model.layers[0], Elsewhere)


@pytest.mark.usefixtures("one_rank")
def test_a_rank_that_has_other_than_planned_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path / "llama", CONFIGS["llama"])
    monkeypatch.setattr(
        "torch.distributed.all_gather_object", lambda found, own: found.__setitem__(slice(None), others(own))
    )
    stages = [stage_of(plan, tmp_path / "llama", rank) for rank in range(2)]
    names = stages[0][1]
    held = [set(dict(stage.model.named_parameters())) for stage, _ in stages]
    whole = copy.deepcopy(stages[1][0])
    whole.planned = stages[0][0].planned

    def others(own: set[str]) -> list[set[str]]:
        return [own, held[1]]

    with pytest.raises(PreflightError, match="some of its weights were never read"):
        prove(plan, stages[0][0], names)
    for parameter in stages[0][0].model.parameters():
        parameter.data = parameter.data.contiguous()
    prove(plan, stages[0][0], names)
    with pytest.raises(PreflightError, match=r"rank 0 holds .*layers\.1\..* and lacks .*layers\.0\."):
        prove(plan, whole, names)
    held[1].add("base_model.model.model.embed_tokens.weight")
    with pytest.raises(PreflightError, match=r"no stage has nothing, more than one has .*embed_tokens"):
        prove(plan, stages[0][0], names)
    held[1].clear()
    with pytest.raises(PreflightError, match=r"no stage has .*layers\.1\."):
        prove(plan, stages[0][0], names)


def test_a_model_without_the_modules_of_its_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="cannot be cut into stages"):
        cut(torch.nn.Sequential(), planned(tmp_path, CONFIGS["llama"]).stages[0], family("llama"))


def test_the_scale_of_a_loss_falls_at_once_and_rises_slowly_as_that_of_torch() -> None:
    ours, torchs = LossScale(), torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight])
    for step in range(4100):
        finite = step not in (3, 4, 50)
        torchs.scale(weight.sum()).backward()
        if not finite:
            weight.grad.fill_(float("inf"))
        torchs.step(optimizer)
        torchs.update()
        optimizer.zero_grad()
        ours.update(finite)
        assert ours.value == torchs.get_scale(), step
