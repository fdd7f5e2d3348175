"""Stages and micro batches in; seconds of a step, and how long each stage waits, out. Pure.

Every stage computes all micro batches, each forward and backward, in an order of its own, and waits where what it needs next is
not there. `gpipe` goes forward with all of them and then backward, `1f1b` goes backward as soon as it can. A stage waits as
long either way where all are alike; what differs is how many micro batches a stage holds at once.

The orders are those of torch.distributed.pipelining; GPipe: arxiv.org/abs/1811.06965, 1F1B: arxiv.org/abs/2006.09503.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Order = Literal["1f1b", "gpipe"]


@dataclass(frozen=True)
class Flow:
    """One step: its seconds, and for each stage the share of them in which it has nothing to compute."""

    seconds: float
    waits: tuple[float, ...]


def in_flight(order: Order, after_it: int, micro_batches: int) -> int:
    """The most micro batches of which a stage, with so many stages after it, keeps what the backward pass needs."""
    return micro_batches if order == "gpipe" else min(after_it + 1, micro_batches)


def passes(order: Order, after_it: int, micro_batches: int) -> list[tuple[bool, int]]:
    """(forward or not, micro batch) in the order in which a stage computes them."""
    ahead = in_flight(order, after_it, micro_batches)
    found = [(True, n) for n in range(ahead)]
    for n in range(micro_batches):
        found.append((False, n))
        if ahead + n < micro_batches:
            found.append((True, ahead + n))
    return found


def flow(stages: Sequence[tuple[float, float]], micro_batches: int, order: Order) -> Flow:
    """Play a step through.

    Args:
        stages: seconds of one micro batch, (forward, backward), handing over included; in the order of the layers.
    """
    last = len(stages) - 1
    left = [passes(order, last - at, micro_batches)[::-1] for at in range(len(stages))]
    free = [0.0] * len(stages)  # when each stage has done what it did last
    done: dict[tuple[bool, int, int], float] = {}
    while any(left):
        for at, (forward_s, backward_s) in enumerate(stages):
            while left[at]:
                forward, n = left[at][-1]
                # What it waits for: the stage before it going forward; going backward the stage behind it, or its own forward pass.
                before = (True, at - 1, n) if forward else (False, at + 1, n) if at < last else (True, at, n)
                ready = 0.0 if forward and at == 0 else done.get(before)
                if ready is None:
                    break
                left[at].pop()
                free[at] = done[forward, at, n] = max(free[at], ready) + (forward_s if forward else backward_s)
    seconds = max(free)
    return Flow(seconds, tuple(1 - micro_batches * sum(stage) / seconds if seconds else 0.0 for stage in stages))
