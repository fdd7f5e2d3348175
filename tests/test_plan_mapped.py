"""What a plan decides of a device map: whether it can be pipelined, how many micro batches flow through it, and what they wait."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.cluster import resolve_cluster
from launcher.command import worker_environment
from launcher.errors import RecipeError
from launcher.memory import MemoryRequest
from launcher.modelshape import shape_of, shape_of_config
from launcher.pipeline import flow
from launcher.placement import Search
from launcher.plan import Plan, make_plan, time_of_rows
from launcher.plan.mapped import not_pipelined
from launcher.plan.pacing import Pacing, Part, Way
from launcher.plan.spreading import search_of, spread
from launcher.preflight.plan import check
from launcher.recipe import Recipe
from launcher.recipe.device_maps import DeviceMap
from launcher.recipe.schema import Adapter
from launcher.show import show_plan
from tests.test_plan import SEVEN, SMALL, planned, values

TWO = ["RTX 3060 Ti 8GiB reserved=921MiB", "RTX 3060 12GiB"]
CHATGLM2: dict[str, Any] = {"model": {"path": "THUDM/chatglm2-6b"}, "data": {"max_length": 512}}
UNTIED = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def pipelined(hardware: Any = TWO, **sections: Any) -> Plan:
    strategy = {"type": "device_map", "schedule": "pipelined", **sections.pop("strategy", {})}
    return planned(hardware, **{**CHATGLM2, **sections, "strategy": strategy})


def refused(hardware: Any = TWO, **sections: Any) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        pipelined(hardware, **sections)
    assert caught.value.exit_code == 2
    return {problem.key: problem.message for problem in caught.value.problems}


def test_a_pipeline_is_a_rank_a_stage_and_one_copy_of_the_model() -> None:
    plan = pipelined(train={"global_batch": 16, "micro_batch": 1})
    assert (plan.pipeline, plan.num_processes, len(plan.stages)) == ("1f1b", 2, 2)
    assert plan.micro_batch * plan.accumulation == plan.global_batch == 16
    assert plan.fullest_bytes == max(stage.memory_bytes for stage in plan.stages)
    assert [plan.device_of(rank) for rank in range(2)] == [stage.device for stage in plan.stages]
    assert Plan.model_validate_json(plan.model_dump_json(by_alias=True)) == plan


def test_a_step_takes_as_long_as_it_plays_through() -> None:
    plan = pipelined(train={"global_batch": 16, "micro_batch": 1})
    times = [(stage.forward_s, stage.seconds - stage.forward_s) for stage in plan.stages]
    played = flow(times, 16, "1f1b")
    assert plan.time.total_s == pytest.approx(played.seconds + plan.time.optimizer_s)
    assert [stage.waits for stage in plan.stages] == pytest.approx(played.waits)
    assert time_of_rows(plan, 512).total_s == pytest.approx(plan.time.total_s)
    assert time_of_rows(plan, 100).total_s < 0.5 * plan.time.total_s, "the same stages with shorter rows"


def test_micro_batches_are_chosen_between_waiting_and_memory_and_the_plan_says_how() -> None:
    plan = pipelined(train={"global_batch": 64})
    because = {decision.key: decision.because for decision in plan.decisions}
    assert (
        f"{plan.accumulation} micro batches, in which stages wait {plan.waiting:.0%} of a step"
        in because["train.micro_batch"]
    )
    assert "× the time" in because["train.micro_batch"]
    assert because["strategy.pipeline"] == "a device holds at most 2 micro batches at once; gpipe would hold all 64"
    screen = Console(record=True, width=240, file=io.StringIO())
    show_plan(screen, plan)
    shown = screen.export_text()
    assert f"{plan.waiting:.0%} of a step on average" in shown
    assert all(f"waits {stage.waits:.0%}" in shown for stage in plan.stages)
    assert f"micro batch {plan.micro_batch} × {plan.accumulation} through 2 stages = 64 rows a step" in shown


def test_gpipe_keeps_all_micro_batches_and_is_planned_with_their_memory() -> None:
    train = {"global_batch": 8, "micro_batch": 1, "gradient_checkpointing": True}
    one, all_of_them = (
        pipelined(train=train),
        pipelined(train=train, strategy={"pipeline": "gpipe"}, data={"max_length": 256}),
    )
    short = pipelined(train=train, data={"max_length": 256})
    assert (one.pipeline, all_of_them.pipeline) == ("1f1b", "gpipe")
    assert all_of_them.memory.total_bytes > short.memory.total_bytes
    assert "strategy.pipeline" not in {decision.key for decision in all_of_them.decisions}


@pytest.mark.parametrize(
    ("train", "found"),
    [
        (
            {"global_batch": 8, "micro_batch": 8},
            {
                "train.micro_batch": "a global batch of 8 holds 1 of micro batch 8, a pipeline over 2 devices needs 2. "
                "Set train.micro_batch=4, train.global_batch=16 or strategy.schedule=naive"
            },
        ),
        (
            {"global_batch": 1},
            {
                "train.global_batch": "a global batch of 1 holds 1 of micro batch 1, a pipeline over 2 devices needs 2. "
                "Set train.global_batch=2 or strategy.schedule=naive"
            },
        ),
        (
            {"global_batch": 10, "micro_batch": 4},
            {"train.global_batch": "10 is no multiple of micro batch 4. Nearest that are: 8, 12"},
        ),
    ],
)
def test_micro_batches_have_to_be_as_many_as_stages_and_all_of_one_size(
    train: dict[str, int], found: dict[str, str]
) -> None:
    assert refused(train=train) == found


@pytest.mark.parametrize(
    ("hardware", "sections", "found"),
    [
        (TWO, {"model": {"path": SMALL}}, "are one matrix, which cannot lie on the first stage and on the last"),
        (TWO, {"model": {"path": SEVEN, "quantization": "nf4"}}, "weights stored in nf4 are not cut into stages"),
        (TWO, {"adapter": {"type": "adalora"}}, "adalora shares its ranks out over all layers"),
        ("RTX 3090", {}, "a pipeline has two stages or more, and there is one device"),
        (TWO, {"model": {"path": "THUDM/chatglm-6b"}}, "cannot be cut into stages"),
    ],
)
def test_what_cannot_be_pipelined_is_refused_or_where_that_is_open_run_naively(
    hardware: Any, sections: dict[str, Any], found: str
) -> None:
    assert found in refused(hardware, **sections)["strategy.schedule"]
    recipe = Recipe.model_validate(values(hardware, **{**CHATGLM2, **sections}))
    assert not_pipelined(recipe, shape_of(recipe.model, Path("/")), resolve_cluster(recipe.hardware))
    open_ = pipelined(hardware, **{**sections, "strategy": {"schedule": "auto"}, "train": {"global_batch": 2}})
    assert open_.schedule == "naive"
    assert any(found in decision.because for decision in open_.decisions if decision.key == "strategy.schedule")


def test_a_family_whose_layers_nobody_knows_is_pipelined_only_where_that_is_asked_for() -> None:
    granite = {
        "model": {"config": {"model_type": "granite", "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8,
                             "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 4096, "tie_word_embeddings": False}},
        "train": {"global_batch": 64},
    }  # fmt: skip
    open_ = pipelined(**granite, strategy={"schedule": "auto"})
    assert open_.schedule == "naive"
    because = {decision.key: decision.because for decision in open_.decisions}["strategy.schedule"]
    assert "shows when that is tried: strategy.schedule=pipelined" in because
    assert pipelined(**granite, strategy={"schedule": "pipelined"}).schedule == "pipelined"


def test_cards_are_numbered_in_the_order_of_the_stages() -> None:
    swapped = pipelined(train={"global_batch": 64})
    assert [stage.device for stage in swapped.stages] == [1, 0], "the slower card comes first here"
    assert worker_environment(swapped)["CUDA_VISIBLE_DEVICES"] == "1,0"


def test_a_device_map_may_say_which_layers_lie_where() -> None:
    recipe = Recipe.model_validate(
        values("3xcpu", model={"config": UNTIED}, strategy={"type": "device_map"}, train={"micro_batch": 1})
    )
    device_map = DeviceMap(devices=("3xcpu",), schedule="pipelined", placement=("0-0", "1-2", "3-3"))
    plan = make_plan("test", recipe, resolve_cluster("3xcpu"), shape_of(recipe.model, Path("/")), device_map=device_map)
    assert [(stage.first, stage.stop) for stage in plan.stages] == [(0, 1), (1, 3), (3, 4)]
    assert plan.num_processes == 3


def test_preflight_lets_both_schedules_start(tmp_path: Any) -> None:
    settings = {"model": {"config": UNTIED}, "train": {"global_batch": 4, "micro_batch": 1}}
    for schedule in ("pipelined", "naive"):
        plan = pipelined("2xcpu", **settings, strategy={"schedule": schedule})
        assert not [each.what for each in check(plan, tmp_path) if each.what.startswith("strategy")]


def played_through(pacing: Pacing, search: Search, num_layers: int) -> Iterator[float]:
    """Seconds of a step of every placement, orders and cuts tried one by one."""
    for num in range(search.least_stages, search.most_stages + 1):
        for devices in itertools.permutations(range(len(search.places)), num):
            for cuts in itertools.combinations(range(num_layers + 1), num - 1):
                sizes = [b - a for a, b in itertools.pairwise((0, *cuts, num_layers))]
                found = search.given(list(zip(devices, sizes, strict=True)))
                if found is not None:
                    yield pacing.total([Part(s.device, s.stop - s.start, s.recompute) for s in found.stages])


@pytest.mark.parametrize("micro_batches", [3, 4, 8, 16])
@pytest.mark.parametrize("cards", [("RTX 4090", "RTX 3090", "RTX 3060 12GiB"), tuple(TWO)], ids=["three", "two"])
def test_a_pipeline_is_placed_where_a_step_is_shortest(cards: tuple[str, ...], micro_batches: int) -> None:
    """It need not be exact, and has been in every box that was tried."""
    cluster, model = (
        resolve_cluster(cards),
        {**UNTIED, "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000},
    )
    shape = shape_of_config(
        {**model, "num_hidden_layers": 9, "num_attention_heads": 32, "num_key_value_heads": 32}, "m", ""
    )
    request = MemoryRequest(
        shape=shape, full=False, micro_batch=1, trainable_parameters=10**6, adapter=Adapter(), weights_dtype_bytes=2,
        compute_dtype_bytes=2, sequence_length=512, accumulation=micro_batches, strategy="device_map",
    )  # fmt: skip
    way = Way("pipelined", micro_batches, None, 0.1, "1f1b")
    found = spread(request, cluster, "bf16", way, None)
    assert found is not None
    pacing, search = Pacing(request, cluster, "bf16", way), search_of(request, cluster, "bf16", way)
    assert found.time.total_s <= 1.001 * min(played_through(pacing, search, shape.num_layers))


def test_a_step_has_its_optimizer_and_hands_nothing_over_on_one_card() -> None:
    """A device map with one card takes as long as that card alone."""
    settings: dict[str, Any] = {
        "model": {"path": SMALL},
        "adapter": {"type": "full"},
        "train": {"global_batch": 4, "micro_batch": 1},
    }
    by_map = pipelined("A800-80GB", **settings, strategy={"schedule": "naive"})
    alone = planned("A800-80GB", **settings, data={"max_length": 512}, strategy={"type": "single"})
    assert by_map.time.parts()["optimizer"] == pytest.approx(alone.time.parts()["optimizer"], rel=0.05) != 0
    assert by_map.time.total_s == pytest.approx(alone.time.total_s, rel=0.05)
    assert by_map.time.communication_s == 0


def test_more_devices_than_micro_batches_are_left_out() -> None:
    """And twenty that are alike are searched as quickly as two; of unlike ones there may be ten."""
    plan = pipelined("20xA800-80GB", train={"global_batch": 8, "micro_batch": 1}, strategy={"schedule": "auto"})
    assert (plan.schedule, len(plan.stages)) == ("pipelined", 8)
    unlike = [f"A800-80GB reserved={gib}GiB" for gib in range(1, 12)]
    assert "11 kinds of devices are more" in refused(unlike)["devices"]


def test_both_schedules_and_each_card_alone_stand_side_by_side() -> None:
    plan = pipelined(strategy={"schedule": "auto"}, train={"global_batch": 8, "micro_batch": 1})
    others = {other.schedule or other.device: other for other in plan.alternatives[1:]}
    assert others.keys() == {"naive", "RTX 3060 Ti reserved=921MiB", "RTX 3060 12GB"}
    single = pipelined(strategy={"schedule": "auto"}, train={"global_batch": 1})
    (reason,) = (other.because for other in single.alternatives if other.schedule == "pipelined")
    assert reason == "a global batch of 1 holds 1 of micro batch 1, a pipeline over 2 devices needs 2"
    asked = pipelined(strategy={"schedule": "naive"}, train={"global_batch": 8, "micro_batch": 1})
    assert [other.fits for other in asked.alternatives if other.schedule == "pipelined"] == [True]


@pytest.mark.parametrize(
    ("sections", "key", "found"),
    [
        ({"launch": {"backend": "python"}}, "strategy.schedule", "launch.backend=python starts one process"),
        ({"hardware": TWO, "hosts": 2}, "strategy.type", "over the devices of one machine, there are 2. Leave --hostfile out"),
    ],
)  # fmt: skip
def test_what_no_device_map_does(sections: dict[str, Any], key: str, found: str) -> None:
    if sections.pop("hosts", 1) == 1:
        assert found in refused(**sections)[key]
        return
    recipe, one = (
        Recipe.model_validate(values(TWO, **CHATGLM2, strategy={"type": "device_map"})),
        resolve_cluster(tuple(TWO)),
    )
    two = one.model_copy(update={"nodes": one.nodes * 2})
    with pytest.raises(RecipeError, match=found):
        make_plan("test", recipe, two, shape_of(recipe.model, Path("/")))
