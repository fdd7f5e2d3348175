"""Where a trained model lies to talk to it: within every budget, as little in host memory as can be; what is said where it does not fit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from launcher.cluster import GIB, resolve_cluster
from launcher.errors import DoesNotFitError, PreflightError, RecipeError, UsageError
from launcher.plan import ChatPlan, Plan, chat_plan
from launcher.recipe.device_maps import DeviceMap, load_device_map
from launcher.rundir import RunDir
from launcher.start import Where, asked, chat_placement, plan_recipe

MIXED = ("RTX 3060 Ti 8GiB reserved=921MiB", "RTX 3060 12GiB")


@pytest.fixture(scope="module")
def trained() -> Plan:
    """The plan of a run on the two cards."""
    return plan_recipe(asked(None, (), Where(device_map="2gpu-mixed")))[1]


def placed(plan: Plan, names: tuple[str, ...], context: int = 4096, **more: object) -> ChatPlan:
    device_map = DeviceMap.model_validate({"devices": names, **more})
    return chat_plan(plan, resolve_cluster(device_map.devices), device_map, context)


def check(chat: ChatPlan, num_layers: int) -> None:
    """Every layer once, in host memory or in order on the devices, and no device too full."""
    borders = [(stage.first, stage.stop) for stage in chat.stages]
    assert borders[0][0] == chat.in_host
    assert borders[-1][1] == num_layers
    assert all(before[1] == after[0] for before, after in itertools.pairwise(borders))
    for stage in chat.stages:
        device = chat.cluster.devices[stage.device]
        assert stage.memory_bytes <= device.memory_bytes - device.reserved_bytes


def test_ranges_of_another_model_are_a_mistake_of_the_map(trained: Plan) -> None:
    with pytest.raises(RecipeError, match=r"places layers 0 to 9, .* has 28 layers"):
        placed(trained, MIXED, placement=["0-4", "5-9"])


@pytest.mark.parametrize("context", [64, 4096, 20_000])
def test_two_cards_hold_what_neither_does(trained: Plan, context: int) -> None:
    chat = placed(trained, MIXED, context)
    check(chat, 28)
    assert (len(chat.stages), chat.in_host, chat.host_bytes) == (2, 0, 0)
    # ChatGLM2 has two heads of keys: 28 layers × 2 × 2 × 128 values of two bytes.
    assert chat.cache_bytes == context * 28 * 2 * 2 * 128 * 2
    assert chat.longest >= context
    check(placed(trained, MIXED, chat.longest), 28)


def test_as_few_layers_as_can_be_lie_in_host_memory(trained: Plan) -> None:
    few, many = (placed(trained, ("RTX 3060 12GiB",), context, spill="host") for context in (4096, 32_768))
    for chat in (few, many):
        check(chat, 28)
        assert chat.host_bytes / chat.in_host == pytest.approx(0.38 * GIB, rel=0.02)
    assert 0 < few.in_host < many.in_host
    assert few.tokens_per_second > many.tokens_per_second
    assert placed(trained, MIXED, spill="host").in_host == 0, "two cards have room for all of it"


def advice(plan: Plan, names: tuple[str, ...], context: int, **more: object) -> str:
    with pytest.raises(DoesNotFitError, match=r"11\.6 GiB of weights and .* of cache for [\d,]+ tokens on") as caught:
        placed(plan, names, context, **more)
    return caught.value.to_type


def test_what_does_not_fit_says_what_does(trained: Plan) -> None:
    assert advice(trained, ("RTX 3060 Ti",), 4096) == "spill: host in the device map"
    tight = ("RTX 3060 Ti 8GiB reserved=1500MiB", "RTX 3060 12GiB reserved=4500MiB")
    offered, _, rest = advice(trained, tight, 32_768).partition(", or ")
    assert rest == "spill: host in the device map"
    most = int(offered.removeprefix("--context "))
    check(placed(trained, tight, most), 28)
    assert f"--context {most}" in advice(trained, tight, most + 256), "no more than that"
    by_hand = advice(trained, MIXED, 4096, placement=["0-20", "21-27"])
    assert by_hand == "placement: auto in the device map, or spill: host and placement: auto in the device map"


def test_no_more_tokens_than_the_model_was_made_for(trained: Plan) -> None:
    cards = ("RTX 3090", "RTX 4090")
    assert placed(trained, cards).longest == trained.shape.positions == 32_768
    with pytest.raises(UsageError, match="was made for 32,768 tokens at most") as caught:
        placed(trained, cards, 32_769)
    assert caught.value.to_type == "--context 32768"
    short = trained.model_copy(update={"shape": trained.shape.model_copy(update={"positions": 2048})})
    chat = chat_plan(short, resolve_cluster(cards), None)
    assert (chat.context, chat.longest) == (2048, 2048)


def test_quantised_layers_stay_on_cards(trained: Plan) -> None:
    model = trained.recipe.model.model_copy(update={"quantization": "int8"})
    plan = trained.model_copy(update={"recipe": trained.recipe.model_copy(update={"model": model})})
    assert placed(plan, ("RTX 3060 12GiB",), spill="host").in_host == 0
    with pytest.raises(DoesNotFitError, match="quantised layers are not kept in host memory"):
        placed(plan, ("RTX 3050 reserved=3GiB",), spill="host")


def test_a_placement_by_hand_is_kept(trained: Plan) -> None:
    chat = placed(trained, MIXED, placement=["0-10", "11-27"])
    assert [(stage.device, stage.first, stage.stop) for stage in chat.stages] == [(0, 0, 11), (1, 11, 28)]


def run_of(plan: Plan, folder: Path) -> RunDir:
    run = RunDir(folder)
    run.create()
    run.plan.write_text(plan.model_dump_json(by_alias=True))
    return run


def test_the_cards_of_a_named_map_have_to_be_here(
    trained: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(trained, tmp_path / "run")
    with pytest.raises(PreflightError, match="no GPU that nvidia-smi shows") as caught:
        chat_placement(run, "2gpu-mixed", None)
    assert f"talk to it on what is here: launch chat {run.path}\n" in caught.value.to_type
    assert "cannot be rehearsed" in caught.value.to_type
    told = capsys.readouterr().err
    assert "layers 15–27, norm, head" in told
    assert "GiB for 4,096 tokens of question and answer" in told


def test_what_cannot_be_asked_of_a_talk_is_said_before_a_model_is_loaded(trained: Plan, tmp_path: Path) -> None:
    run, cpus = run_of(trained, tmp_path / "run"), tmp_path / "cpus.yaml"
    cpus.write_text("devices: [2xcpu]\n", encoding="utf-8")
    with pytest.raises(UsageError, match="a model is spread over cards"):
        chat_placement(run, str(cpus), None)
    with pytest.raises(
        UsageError, match="there is room for 4,096 tokens of question and answer, on these cards for 32,768"
    ):
        chat_placement(run, "2gpu-mixed", None, 5000)


def test_the_cards_that_a_run_was_trained_on_need_not_be_here(
    trained: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat_placement(run_of(trained, tmp_path / "run"), None, None) is None
    assert "answers come from what is here" in capsys.readouterr().err


def test_the_same_cards_in_another_order(trained: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = resolve_cluster(tuple(reversed(MIXED)))
    known = tuple(device.model_copy(update={"uuid": f"GPU-{device.name}"}) for device in here.devices)
    here = here.model_copy(update={"nodes": (here.nodes[0].model_copy(update={"devices": known}),)})
    for module in ("launcher.cluster.found_on_this_machine", "launcher.cluster.hardware.found_on_this_machine"):
        monkeypatch.setattr(module, lambda: here)
    chat = chat_placement(run_of(trained, tmp_path / "run"), None, 8192)
    assert chat is not None
    assert {device.uuid for device in chat.cluster.devices} == {device.uuid for device in known}
    assert chat.context == 8192


def test_a_context_without_a_device_map(trained: Plan, tmp_path: Path) -> None:
    run = run_of(trained.model_copy(update={"device_map": None, "stages": ()}), tmp_path / "run")
    assert chat_placement(run, None, None) is None
    with pytest.raises(UsageError, match="--context 512: is room that a device map is planned with"):
        chat_placement(run, None, 512)


def test_training_through_a_layer_in_host_memory_is_refused_with_the_reason() -> None:
    recipe = str(load_device_map("2gpu-mixed").path.parent.parent / "chatglm2_lora_2gpu_mixed.yaml")
    with pytest.raises(DoesNotFitError, match="keeps in host memory gets no gradient") as caught:
        plan_recipe(asked(recipe, (), Where(device_map="1gpu-host-spill")))
    assert "model.quantization=nf4" in caught.value.to_type
