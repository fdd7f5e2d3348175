"""launcher/placement.py: never over budget, equal to trying everything, quick enough."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

import pytest

from launcher.pipeline import Order
from launcher.placement import Layers, Moment, Place, Placement, Schedule, place

MICRO_BATCHES = 3


def drawn(seed: int, num_layers: int | None = None) -> tuple[Layers, list[Place]]:
    """A small model and two to four unlike devices, tight enough that not everything fits everywhere."""
    draw = random.Random(seed)
    layer, ends = draw.randint(5, 20), (draw.randint(0, 20), draw.randint(0, 20))

    def moments(flying: int, working: int) -> tuple[Moment, ...]:
        """When the loss is there, and when a layer goes backward."""
        loss = Moment(layer, flying, 0, ends[0], ends[1] + draw.randint(0, 30))
        return loss, Moment(layer, flying, working, *ends)

    layers = Layers(
        num=draw.randint(1, 7) if num_layers is None else num_layers,
        keeping=moments(draw.randint(5, 30), draw.randint(0, 10)),
        recomputing=moments(draw.randint(1, 4), draw.randint(5, 40)),
        ends_together=draw.random() < 0.3,
    )
    places = []
    for _ in range(draw.randint(2, 4)):
        keep = draw.randint(1, 9) / 4
        places.append(
            Place(
                budget_bytes=draw.randint(30, 260),
                keep_s=keep,
                recompute_s=1.5 * keep,
                embedding_s=draw.randint(0, 3) / 8,
                head_s=draw.randint(0, 8) / 8,
                hand_over_s=draw.choice([0.0, 0.125, 0.5]),
            )
        )
    return layers, places


def everything(layers: Layers, places: Sequence[Place], schedule: Schedule, passes: Order = "1f1b") -> Iterator[float]:
    """Seconds of every placement that fits, written down a second time and tried one by one."""
    stages = range(1, len(places) + 1) if schedule == "naive" else range(2, min(MICRO_BATCHES, len(places)) + 1)
    for num_stages in stages:
        for order in itertools.permutations(places, num_stages):
            for cuts in itertools.combinations_with_replacement(range(layers.num + 1), num_stages - 1):
                sizes = [b - a for a, b in itertools.pairwise((0, *cuts, layers.num))]
                for modes in itertools.product((False, True), repeat=num_stages):
                    seconds = tried(layers, order, sizes, modes, (schedule, passes))
                    if seconds is not None:
                        yield seconds


def tried(
    layers: Layers, order: Sequence[Place], sizes: Sequence[int], modes: Sequence[bool], how: tuple[Schedule, Order]
) -> float | None:
    """Seconds of one placement, None where a device has too little memory."""
    (schedule, passes), last, times = how, len(order) - 1, []
    for at, (here, num, again) in enumerate(zip(order, sizes, modes, strict=True)):
        if num == 0 and at not in (0, last):
            return None
        head_here = at == (0 if layers.ends_together else last)
        flying = 1 if schedule == "naive" else MICRO_BATCHES if passes == "gpipe" else min(last - at + 1, MICRO_BATCHES)
        passing = 0
        if schedule == "pipelined":
            passing = layers.input_bytes * ((flying + 1 if at < last else 0) + (1 if at > 0 else 0))
            passing += (flying - 1) * layers.logits_bytes if head_here else 0
        for moment in layers.recomputing if again else layers.keeping:
            needed = num * (moment.layer + flying * moment.flying) + passing
            needed += moment.working if num > 0 else 0
            needed += (moment.embedding if at == 0 else 0) + (moment.head if head_here else 0)
            if needed > here.budget_bytes:
                return None
        borders = (at > 0) + (at < last) + (last > 0 and layers.ends_together and at in (0, last))
        times.append(
            num * (here.recompute_s if again else here.keep_s)
            + (here.embedding_s if at == 0 else 0)
            + (here.head_s if head_here else 0)
            + borders * here.hand_over_s
        )
    return sum(times) + (0 if schedule == "naive" else (MICRO_BATCHES - 1) * max(times))


def check(found: Placement, layers: Layers, places: Sequence[Place], how: tuple[Schedule, Order]) -> None:
    """A placement covers every layer once, in order, within every budget, and its seconds are what it costs."""
    assert [stage.start for stage in found.stages[1:]] == [stage.stop for stage in found.stages[:-1]]
    assert (found.stages[0].start, found.stages[-1].stop) == (0, layers.num)
    assert len({stage.device for stage in found.stages}) == len(found.stages)
    assert all(stage.memory_bytes <= places[stage.device].budget_bytes for stage in found.stages)
    order = [places[stage.device] for stage in found.stages]
    sizes = [stage.stop - stage.start for stage in found.stages]
    seconds = tried(layers, order, sizes, [stage.recompute for stage in found.stages], how)
    assert seconds == pytest.approx(found.seconds)


@pytest.mark.parametrize("how", [("naive", "1f1b"), ("pipelined", "1f1b"), ("pipelined", "gpipe")], ids="-".join)
@pytest.mark.parametrize("block", range(4))
def test_equal_to_trying_everything(how: tuple[Schedule, Order], block: int) -> None:
    fitted = 0
    # Trying everything takes a second with ten layers on four devices: once a block.
    for seed, num in [(seed, None) for seed in range(40 * block, 40 * block + 40)] + [(1000 + block, 10)]:
        layers, places = drawn(seed, num)
        best = min(everything(layers, places, *how), default=math.inf)
        found = place(layers, places, how[0], MICRO_BATCHES, order=how[1])
        assert (found is None) == (best == math.inf), seed
        if found is not None:
            fitted += 1
            check(found, layers, places, how)
            assert found.seconds == pytest.approx(best), seed
    assert fitted > 10, "the drawn cases are not all hopeless"


@pytest.mark.parametrize("schedule", ["naive", "pipelined"])
def test_eighty_layers_on_eight_unlike_devices(schedule: Schedule) -> None:
    layers = Layers(80, (Moment(900, 700, 0, 500, 800),), (Moment(900, 16, 800, 500, 500),))
    places = [Place(9_000 + 4_000 * n, 0.01 + 0.003 * n, 0.015 + 0.004 * n, 0.001, 0.01, 0.002) for n in range(8)]
    found = place(layers, places, schedule, micro_batches=16)
    assert found is not None
    check_budgets = [stage.memory_bytes <= places[stage.device].budget_bytes for stage in found.stages]
    assert all(check_budgets)


def test_a_forced_mode_is_kept() -> None:
    layers = Layers(4, (Moment(10, 30),), (Moment(10, 1, working=30),))
    places = [Place(500, 1.0, 1.5, 0, 0, 0)] * 2
    for mode in (False, True):
        found = place(layers, places, "naive", recompute=mode)
        assert found is not None
        assert {stage.recompute for stage in found.stages} == {mode}


def test_one_device_is_best_for_naive_where_all_fits_on_the_fastest() -> None:
    layers = Layers(6, (Moment(10, 10, 0, 5, 10),), (Moment(10, 1, 10, 5, 10),))
    slow, fast = Place(1000, 2.0, 3.0, 0, 0, 0.1), Place(1000, 1.0, 1.5, 0, 0, 0.1)
    naive = place(layers, [slow, fast], "naive")
    assert naive is not None
    assert [(stage.device, stage.stop) for stage in naive.stages] == [(1, 6)]
    pipelined = place(layers, [slow, fast], "pipelined", 8)
    assert pipelined is not None
    assert sorted((stage.device, stage.stop - stage.start) for stage in pipelined.stages) == [(0, 2), (1, 4)]
