"""launcher/pipeline.py: steps played through, against what the literature says of even stages and against what is plain of others."""

from __future__ import annotations

import pytest

from launcher.pipeline import Order, flow, in_flight, passes

ORDERS: tuple[Order, ...] = ("1f1b", "gpipe")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("num", "micro_batches"), [(1, 3), (2, 2), (2, 8), (4, 4), (4, 32)])
def test_even_stages_wait_as_long_as_the_literature_says(order: Order, num: int, micro_batches: int) -> None:
    found = flow([(1.0, 2.0)] * num, micro_batches, order)
    assert found.seconds == pytest.approx((micro_batches + num - 1) * 3.0)
    # (p - 1) / (m + p - 1), Narayanan et al. 2021 and Huang et al. 2019
    assert found.waits == pytest.approx([(num - 1) / (micro_batches + num - 1)] * num)


@pytest.mark.parametrize("order", ORDERS)
def test_the_slowest_stage_sets_the_pace(order: Order) -> None:
    stages, micro_batches = [(0.5, 1.0), (1.0, 2.0), (0.2, 0.3)], 64
    found = flow(stages, micro_batches, order)
    assert 64 * 3.0 < found.seconds < 64 * 3.0 + sum(map(sum, stages))
    assert min(found.waits) == found.waits[1] < 0.05


def test_more_micro_batches_wait_less() -> None:
    waits = [max(flow([(1.0, 2.0), (1.5, 2.5)], num, "1f1b").waits) for num in (2, 4, 8, 16)]
    assert waits == sorted(waits, reverse=True)


@pytest.mark.parametrize("order", ORDERS)
def test_every_micro_batch_goes_forward_and_backward_once_and_no_more_are_in_flight_than_told(order: Order) -> None:
    for after_it in range(4):
        found = passes(order, after_it, 6)
        assert sorted(found) == sorted((forward, n) for forward in (True, False) for n in range(6))
        flying = [sum(1 if forward else -1 for forward, _ in found[: at + 1]) for at in range(len(found))]
        assert max(flying) == in_flight(order, after_it, 6)
        assert min(flying) >= 0
