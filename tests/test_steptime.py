"""The time of a step: what it grows with, and what it must never do. Figures against real runs: benchmarks/step_time.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launcher.cluster import card, card_names, resolve_cluster
from launcher.memory import MemoryRequest
from launcher.modelshape import shape_of
from launcher.recipe.schema import Adapter, Model
from launcher.steptime import Speed, speed_of, step_time

SHAPE = shape_of(Model(path="Qwen/Qwen2.5-7B-Instruct"), Path("/"))


def request(**changed: Any) -> MemoryRequest:
    values = {"shape": SHAPE, "trainable_parameters": 2_500_000, "full": False, "adapter": Adapter()}
    return MemoryRequest(**{**values, "micro_batch": 4, "sequence_length": 512, **changed})


def speed(hardware: str = "8xA800-80GB", dtype: str = "bf16") -> Speed:
    cluster = resolve_cluster(hardware)
    return speed_of(cluster.devices[0], cluster, dtype)


def seconds(hardware: str = "8xA800-80GB", accumulation: int = 1, **changed: Any) -> float:
    return step_time(request(**changed), speed(hardware), accumulation, 1).total_s


def test_large_products_take_their_arithmetic_at_the_stated_fraction() -> None:
    """A frozen base costs 4 operations a parameter and token, a trained one 6; the rest is small at this size."""
    known, tokens = speed(), 16 * 2048
    weights = SHAPE.num_parameters - SHAPE.embedding_parameters
    frozen = seconds(micro_batch=16, sequence_length=2048)
    assert 4 * weights * tokens / known.flops < frozen < 1.5 * 4 * weights * tokens / known.flops
    trained = seconds(micro_batch=16, sequence_length=2048, full=True, trainable_parameters=SHAPE.num_parameters)
    assert 6 * weights * tokens / known.flops < trained < 1.5 * 6 * weights * tokens / known.flops


def test_what_costs_time() -> None:
    base = seconds()
    assert seconds(gradient_checkpointing=True) == pytest.approx(1.45 * base, rel=0.1)
    assert seconds(accumulation=3) == pytest.approx(3 * base, rel=0.01)
    assert seconds(quantization="nf4") > seconds(quantization="none")
    assert seconds(adapter=Adapter(targets="all-linear")) > base
    assert seconds(sequence_length=4096, micro_batch=1) > 2 * seconds(sequence_length=2048, micro_batch=1)
    full = {"full": True, "trainable_parameters": SHAPE.num_parameters, "num_processes": 8}
    assert seconds(strategy="zero3", offload="optimizer", **full) > seconds(strategy="zero3", **full)


def test_a_faster_card_is_never_slower() -> None:
    ordered = ["RTX 3060 12GB", "RTX 3060 Ti", "RTX 3090", "A800-80GB", "H100-80GB"]
    times = [seconds(name) for name in ordered]
    assert times == sorted(times, reverse=True)


def test_tiny_batches_wait_for_python_and_not_for_the_card() -> None:
    one, four = seconds("H100-80GB", micro_batch=1, sequence_length=8), seconds("H100-80GB", sequence_length=8)
    assert one == pytest.approx(four, rel=0.02)


def test_slow_links_show_where_weights_travel() -> None:
    full = {"full": True, "trainable_parameters": SHAPE.num_parameters, "num_processes": 8, "strategy": "fsdp"}
    pcie = Speed(**{**vars(speed()), "link": 5e9})
    with_nvlink, with_pcie = (step_time(request(**full), link, 1, 8).communication_s for link in (speed(), pcie))
    assert with_pcie > 3 * with_nvlink > 0
    assert seconds(num_processes=8, strategy="ddp") < 1.1 * seconds(), "an adapter's gradients are small"


def test_parts_sum_up_and_tokens_count_all_ranks() -> None:
    time = step_time(request(num_processes=8, strategy="ddp"), speed(), 2, 8)
    assert time.total_s == sum(time.parts().values())
    assert time.tokens == 4 * 512 * 2 * 8
    assert time.tokens_per_second == pytest.approx(time.tokens / time.total_s)


def test_every_card_has_a_speed_and_it_is_said_whence() -> None:
    for name in card_names():
        found = speed(name, "fp16")
        assert 0.3 * card(name).fp16 * 1e12 < found.flops < 0.75 * card(name).fp16 * 1e12
        known = card(name).capability in ("8.0", "9.0")
        assert ("by published steps" if known else "assumed") in found.basis


def test_planned_steps_agree_with_published_ones(benchmark_named: Callable[[str], ModuleType]) -> None:
    published_steps = benchmark_named("published_steps")
    ratios: dict[str, list[float]] = {}
    for card_name, *step, published in published_steps.PUBLISHED:
        planned, _ = published_steps.tokens_per_second(card_name, *step)
        ratios.setdefault(card_name, []).append(planned / published)
    for each in ratios.values():
        assert statistics.median(each) == pytest.approx(1, abs=published_steps.GOAL)
        assert 0.75 < min(each) <= max(each) < 1.3
