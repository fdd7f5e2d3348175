"""The rows of a step in, micro batches of unlike ranks out: each rank gets its share of the tokens, no micro batch more than has room.

Rows are given by their lengths, the longest first; what comes out are places among them: of every rank its micro batches.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.shares import most_rows

Dealt = list[list[list[int]]]
_HALVINGS = 24  # of the search for the least time: to a millionth of a step


def dealt_by_share(
    lengths: Sequence[int], shares: Sequence[float], micro_batch: int, accumulation: int, packed: bool
) -> Dealt:
    """`accumulation` micro batches for each rank, none empty.

    Args:
        shares: of each rank, in all 1.
        packed: whether the rows of a micro batch lie one after the other; else they are padded to its longest.
    """
    rooms = [rows * lengths[0] for rows in most_rows(shares, micro_batch)]
    dealt = _packs(lengths, shares, rooms, accumulation) if packed else _padded(lengths, shares, rooms, accumulation)
    batches = [batch for of_rank in dealt for batch in of_rank]
    for empty in (batch for batch in batches if not batch):
        empty.append(max(batches, key=len).pop())
    return dealt


def _packs(lengths: Sequence[int], shares: Sequence[float], rooms: Sequence[int], accumulation: int) -> Dealt:
    """Each row goes to the rank that is then done first, into its emptiest pack.

    There is always room: packs have room for as many rows of the longest length as a step has, so one of them holds fewer.
    """
    dealt: Dealt = [[[] for _ in range(accumulation)] for _ in shares]
    tokens = [[0] * accumulation for _ in shares]
    for at, length in enumerate(lengths):
        open_ = [rank for rank, room in enumerate(rooms) if min(tokens[rank]) + length <= room]
        rank = min(open_, key=lambda rank: (sum(tokens[rank]) + length) / shares[rank])
        place = tokens[rank].index(min(tokens[rank]))
        dealt[rank][place].append(at)
        tokens[rank][place] += length
    return dealt


def _padded(lengths: Sequence[int], shares: Sequence[float], rooms: Sequence[int], accumulation: int) -> Dealt:
    """Rows of like length lie together; cut such that the rank that is done last is done as early as can be."""
    found = _cut(lengths, shares, rooms, accumulation, float("inf"))
    assert found is not None, "with its room alone to keep to, every step can be cut"
    low, high = 0.0, 2.0 * lengths[0] * len(lengths)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        other = _cut(lengths, shares, rooms, accumulation, middle)
        if other is None:
            low = middle
        else:
            found, high = other, middle
    return found


def _cut(
    lengths: Sequence[int], shares: Sequence[float], rooms: Sequence[int], accumulation: int, slots: float
) -> Dealt | None:
    """Cut so that no rank gets more than its share of so many slots, padding and all; None where rows are left.

    Ranks take turns. What one has not used in a turn, because another row was too much, it may use in the next.
    """
    dealt: Dealt = [[] for _ in shares]
    used = [0] * len(shares)
    at = 0
    for turn in range(1, accumulation + 1):
        for rank, share in enumerate(shares):
            first, start = at, lengths[at] if at < len(lengths) else 0
            most = min(rooms[rank], slots * share * turn / accumulation - used[rank])
            while at < len(lengths) and (at == first or start * (at - first + 1) <= most):
                at += 1
            used[rank] += start * (at - first)
            dealt[rank].append(list(range(first, at)))
    return dealt if at == len(lengths) else None
