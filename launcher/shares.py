"""In: seconds that unlike cards take for the same rows. Out: each rank's share of a step's tokens, such that all are done at once.

Copies of a model wait, in every step, for the slowest card. So the faster one gets more: its micro batches hold more rows, and its memory
is planned with them. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Cards whose times are so close are alike: the estimate is no better.
_ALIKE = 1.03


def shares_by_speed(seconds: Sequence[float]) -> tuple[float, ...]:
    """Of every rank its share of a step's tokens, in all 1; nothing where all are as fast.

    Args:
        seconds: what each takes for the same rows.
    """
    if max(seconds) <= min(seconds) * _ALIKE:
        return ()
    speeds = [1 / each for each in seconds]
    return tuple(speed / sum(speeds) for speed in speeds)


def most_rows(shares: Sequence[float], micro_batch: int) -> tuple[int, ...]:
    """Of every rank the rows of the longest length that one of its micro batches holds at most; `micro_batch` is the mean of all ranks."""
    return tuple(math.ceil(round(share * len(shares) * micro_batch, 6)) for share in shares)


def rows_of_a_step(shares: Sequence[float], micro_batch: int, accumulation: int) -> tuple[int, ...]:
    """Rows of the longest length that each rank has in a step. What is left after rounding down goes to the largest remainders."""
    wanted = [share * len(shares) * micro_batch * accumulation for share in shares]
    rows = [math.floor(each) for each in wanted]
    by_need = sorted(range(len(shares)), key=lambda rank: rows[rank] - wanted[rank])
    for rank in by_need[: len(shares) * micro_batch * accumulation - sum(rows)]:
        rows[rank] += 1
    return tuple(rows)
