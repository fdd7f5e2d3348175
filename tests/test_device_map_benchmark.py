"""benchmarks/device_maps.py judges what accelerate has placed, and not something near it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from launcher.plan.searching import Option
from launcher.recipe.device_maps import DeviceMap

HOST = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers": "cpu", "lm_head": "cpu"}


@pytest.fixture(scope="module")
def benchmark(benchmark_named: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_named("device_maps")


@pytest.mark.parametrize(
    ("device_map", "devices", "ranges"),
    [
        ({"": 1}, (1,), ((0, 3),)),
        ({"model": 0, "lm_head": 0}, (0,), ((0, 3),)),
        (
            {"model.embed_tokens": 0, **{f"model.layers.{n}": 0 if n < 3 else 2 for n in range(4)}, "model.norm": 2, "lm_head": 2},
            (0, 2),
            ((0, 2), (3, 3)),
        ),
        ({"model.embed_tokens": 0, "model.layers": 1, "lm_head": 2}, (0, 1, 2), ((0, -1), (0, 3), (4, 3))),
    ],
    ids=["whole", "parts", "two cards", "ends alone"],
)  # fmt: skip
def test_modules_become_stages(
    benchmark: ModuleType, device_map: dict[str, int], devices: tuple[int, ...], ranges: tuple[tuple[int, int], ...]
) -> None:
    assert benchmark.as_stages(device_map, 4) == benchmark.Given(devices, ranges)


def test_what_lies_in_host_memory_is_no_placement_to_train(benchmark: ModuleType) -> None:
    assert benchmark.as_stages(HOST, 4) is None
    assert benchmark.spilled(HOST, 4) == 3


def test_a_placement_costs_what_the_planner_says_of_the_same_device_map(benchmark: ModuleType) -> None:
    cards = benchmark.BOXES["3060 Ti (display) + 3060"]
    question = benchmark.asked("THUDM/chatglm2-6b", "none", cards)
    given = benchmark.Given((0, 1), ((0, 12), (13, 27)))
    judged = benchmark.fastest(question, "naive", given)
    by_hand = DeviceMap(devices=cards, placement=("0-12", "13-27"))
    option = Option("device_map", True, judged.option.micro_batch, "naive")
    asked = benchmark.with_placement(question, given, judged.option.micro_batch)
    same = benchmark.replace(asked, device_map=by_hand).price(option)
    assert (judged.time, judged.stages) == (same.time, same.stages)
    assert benchmark.fastest(question, "naive").time.total_s < judged.time.total_s
    # Halves of 14 layers do not fit beside each other at any number of rows without computing again.
    assert "RTX 3060 Ti needs" in benchmark.lacking(question, benchmark.Given((0, 1), ((0, 20), (21, 27))))
