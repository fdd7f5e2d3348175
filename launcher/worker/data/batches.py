"""The prepared dataset in, micro batches out: which rows a step has (`StepOrder`), and which rank gets which of them (`RankBatches`).

The rows of a step depend on (seed, epoch, global batch) alone. So a resumed run, and one on another number of ranks, sees the rows of
every step as the uninterrupted run does.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from typing import Any, overload

import torch
from torch.utils.data import Dataset, Sampler

from launcher.plan.model import Batching
from launcher.worker.data.tokens import IGNORED
from launcher.worker.data.unlike import dealt_by_share

Batch = dict[str, torch.Tensor]
# Ranks get less even tokens where the slowest then has at most this share of the work.
_WORTH_UNEVEN = 0.96
# Packs of few rows are evened out until ranks differ by so little, or this often.
_EVEN, _SWAPS = 0.005, 20


class WholeSteps(Dataset[dict[str, Any]]):
    """Training rows, and behind them as many that teach nothing as the last step of an epoch lacks.

    Without them accelerate would repeat rows to give each rank as many batches as the others: other rows on other numbers of ranks.

    Args:
        ahead: micro batches that are read before the first of them is worked on.

    `taken`: of each of the micro batches that were read last, where its rows stand in the recipe's data, as `alpaca.json 8812`.
    """

    def __init__(self, rows: Any, global_batch: int, ahead: int = 1) -> None:
        self.taken: deque[list[str]] = deque(maxlen=ahead)
        self.rows = rows
        self.num_rows = len(rows)
        self.length = -(-self.num_rows // global_batch) * global_batch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, Any]:
        return dict(self.rows[place]) if place < self.num_rows else self._nothing

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """What the data loader asks for instead of one after the other."""
        real = [place for place in places if place < self.num_rows]
        found = self._read(real)
        self.taken.append(places_of(found))
        return found + [self._nothing] * (len(places) - len(real))

    def _read(self, places: list[int]) -> list[dict[str, Any]]:
        table = self.rows[places] if places else {}
        return [{name: column[at] for name, column in table.items()} for at in range(len(places))]

    @cached_property
    def _nothing(self) -> dict[str, Any]:
        """The shortest row with nothing to learn in it."""
        lengths = self.rows["length"][:]
        row = dict(self.rows[lengths.index(min(lengths))])
        row.pop("where", None)
        return {**row, "labels": [IGNORED] * len(row["labels"])}


def places_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where rows stand in the recipe's data, the longest first."""
    return [row["where"] for row in sorted(rows, key=lambda row: -row["length"]) if "where" in row]


class StepOrder:
    """Row numbers of the steps of an epoch. Numbers past the last row stand for rows that teach nothing (`WholeSteps`).

    The first step of a run is its heaviest, so that what will not fit in memory fails at once.

    Args:
        lengths: tokens of every row.
        global_batch: rows of one optimizer step.
        seed: with the epoch it decides the order.
        batching: `bucketed` puts rows of like length into the same step, so that little is padded and ranks wait little for each other.
    """

    def __init__(self, lengths: Sequence[int], global_batch: int, seed: int, batching: Batching) -> None:
        self.lengths = lengths
        self.shortest = min(lengths, default=0)
        self.global_batch = global_batch
        self.seed = seed
        self.batching = batching
        self.epoch = 0

    def go_to(self, epoch: int) -> None:
        """Called before every epoch, also by a resumed run. On purpose not `set_epoch`: accelerate calls that with its own count, and
        where batches are skipped on several ranks it does not call it."""
        self.epoch = epoch

    def length(self, row: int) -> int:
        """Tokens of a row; one that teaches nothing is as long as the shortest."""
        return self.lengths[row] if row < len(self.lengths) else self.shortest

    def __len__(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.lengths) / self.global_batch)

    def steps(self) -> list[list[int]]:
        """The rows of every step of the epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        steps = self._bucketed(order, generator) if self.batching == "bucketed" else self._cut(order)
        if self.epoch == 0 and len(steps) > 1:
            whole = len(steps) - (len(steps[-1]) < self.global_batch)
            heaviest = max(range(whole), key=lambda place: self._weight(steps[place]))
            steps[0], steps[heaviest] = steps[heaviest], steps[0]
        steps[-1] += range(len(self.lengths), len(self) * self.global_batch)
        return steps

    def _cut(self, rows: Sequence[int]) -> list[list[int]]:
        return [list(rows[place : place + self.global_batch]) for place in range(0, len(rows), self.global_batch)]

    def _bucketed(self, order: Sequence[int], generator: torch.Generator) -> list[list[int]]:
        # Windows of at most 50 steps and at least two an epoch: the rows that share a step change from epoch to epoch.
        window = self.global_batch * max(1, min(50, len(self) // 2))
        steps: list[list[int]] = []
        for start in range(0, len(order), window):
            steps += self._cut(sorted(order[start : start + window], key=lambda row: -self.lengths[row]))
        whole = [step for step in steps if len(step) == self.global_batch]
        rest = [row for step in steps if len(step) < self.global_batch for row in step]
        shuffled = torch.randperm(len(whole), generator=generator).tolist()
        return [whole[place] for place in shuffled] + ([rest] if rest else [])

    def _weight(self, step: Sequence[int]) -> int:
        """What a step's memory grows with: the tokens of a pack, the longest row of padded ones."""
        lengths = [self.lengths[row] for row in step]
        return sum(lengths) if self.batching == "packed" else max(lengths)


class MicroBatch(Sequence[int]):
    """The rows of a micro batch, found when somebody asks for them: a resumed run passes over thousands."""

    def __init__(self, of_step: Callable[[], list[list[int]]], place: int) -> None:
        self.of_step = of_step
        self.place = place

    def __len__(self) -> int:
        return len(self.of_step()[self.place])

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> list[int]: ...

    def __getitem__(self, at: int | slice) -> int | list[int]:
        return self.of_step()[self.place][at]


class RankBatches(Sampler[Sequence[int]]):
    """The micro batches of one rank, `accumulation` a step, such that all ranks of a step have about the same number of tokens.

    Neither packs nor padded micro batches have a number of rows that is fixed: none has more tokens, padding and all, than `micro_batch`
    of the step's longest row. Packed rows go, the longest first, where least tokens are. Rows that are padded lie beside rows of
    like length: few long ones or many short ones, or as many in each where that leaves less for the slowest rank to do.

    Args:
        shares: of each rank's tokens in a step, where its card is faster or slower than others (`unlike`).
    """

    def __init__(
        self,
        order: StepOrder,
        micro_batch: int,
        accumulation: int,
        rank: int,
        num_ranks: int,
        shares: Sequence[float] = (),
    ) -> None:
        self.order = order
        self.shares = shares
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.rank, self.num_ranks = rank, num_ranks

    def __len__(self) -> int:
        return len(self.order) * self.accumulation

    def __iter__(self) -> Iterator[Sequence[int]]:
        for step in self.order.steps():
            mine = cache(partial(self._mine, step))
            yield from (MicroBatch(mine, place) for place in range(self.accumulation))

    def _mine(self, step: Sequence[int]) -> list[list[int]]:
        return self.divided(step)[self.rank]

    def divided(self, step: Sequence[int]) -> list[list[list[int]]]:
        """Of every rank the micro batches of a step."""
        if self.order.batching == "padded":  # as they come
            size = self.micro_batch * self.num_ranks
            rounds = [step[place : place + size] for place in range(0, len(step), size)]
            return [
                [list(each[rank * self.micro_batch :][: self.micro_batch]) for each in rounds]
                for rank in range(self.num_ranks)
            ]
        rows = sorted(step, key=lambda row: (-self.order.length(row), row))
        lengths = [self.order.length(row) for row in rows]
        num, packed = self.num_ranks * self.accumulation, self.order.batching == "packed"
        if self.shares:
            dealt = dealt_by_share(lengths, self.shares, self.micro_batch, self.accumulation, packed)
        elif packed:
            dealt = evened(self._dealt(shared(lengths, num), lengths), lengths, self.micro_batch * lengths[0])
        else:
            dealt, cut = self._rounds(lengths), self._dealt(even_slots(lengths, num), lengths)
            # As many rows in each gives the ranks tokens that are more even.
            if _slowest(cut, lengths) < _WORTH_UNEVEN * _slowest(dealt, lengths):
                dealt = cut
        return [[[rows[at] for at in batch] for batch in batches] for batches in dealt]

    def _dealt(self, parts: list[list[int]], lengths: Sequence[int]) -> list[list[list[int]]]:
        """As many parts for each rank, such that tokens are even."""
        weights = [sum(lengths[at] for at in part) for part in parts]
        order = sorted(range(len(parts)), key=lambda place: -weights[place])
        falling = [weights[place] for place in order]
        mine = evened(
            [[of_rank] for of_rank in shared(falling, self.num_ranks, self.accumulation)], falling, sum(weights)
        )
        return [[parts[order[at]] for at in of_rank] for (of_rank,) in mine]

    def _rounds(self, lengths: Sequence[int]) -> list[list[list[int]]]:
        """Micro batches of as many rows each, those of all ranks at a time of like length and even tokens."""
        size = self.micro_batch * self.num_ranks
        rounds = []
        for start in range(0, len(lengths), size):
            parts = shared(lengths[start : start + size], self.num_ranks, self.micro_batch)
            parts = [[start + at for at in part] for part in parts]
            # The rank that has most of one round gets least of the next.
            parts.sort(key=lambda part: sum(lengths[at] for at in part), reverse=bool(len(rounds) % 2))
            rounds.append(parts)
        return [[parts[rank] for parts in rounds] for rank in range(self.num_ranks)]


def _slots(part: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens of a padded micro batch of rows, the longest first, padding and all."""
    return lengths[part[0]] * len(part)


def _slowest(dealt: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int]) -> int:
    """Slots of the rank that has most."""
    return max(sum(_slots(part, lengths) for part in of_rank) for of_rank in dealt)


def even_slots(lengths: Sequence[int], num: int) -> list[list[int]]:
    """Rows, the longest first, cut into `num` micro batches, none empty, of which the one with most slots has as few as can be."""

    def cut(most: int) -> list[list[int]]:
        parts: list[list[int]] = []
        for at in range(len(lengths)):
            if parts and lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= most:
                parts[-1].append(at)
            else:
                parts.append([at])
        return parts

    low, high = max(lengths), max(lengths) * math.ceil(len(lengths) / num)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= num else (middle + 1, high)
    parts = cut(low)
    while len(parts) < num:
        largest = max((part for part in parts if len(part) > 1), key=lambda part: _slots(part, lengths))
        place, half = parts.index(largest), len(largest) // 2
        parts[place : place + 1] = [largest[:half], largest[half:]]
    return parts


def shared(weights: Sequence[int], num: int, most: int | None = None) -> list[list[int]]:
    """Places of weights, given from heavy to light, in `num` parts of at most `most`, each put where the sum is least."""
    parts: list[list[int]] = [[] for _ in range(num)]
    open_ = [(0, place) for place in range(num)]
    for at, weight in enumerate(weights):
        total, place = heapq.heappop(open_)
        parts[place].append(at)
        if len(parts[place]) != most:
            heapq.heappush(open_, (total + weight, place))
    return parts


def evened(dealt: list[list[list[int]]], lengths: Sequence[int], room: int) -> list[list[list[int]]]:
    """The packs of all ranks, with rows of the rank that has most tokens exchanged for shorter ones of others, while that makes it less.

    Args:
        room: tokens that no pack may be more than.
    """
    for _ in range(_SWAPS):
        totals = [sum(lengths[at] for pack in packs for at in pack) for packs in dealt]
        most = totals.index(max(totals))
        if totals[most] <= (1 + _EVEN) * min(totals):
            break
        best: tuple[int, list[int], int, list[int], int] | None = None
        for other, packs in enumerate(dealt):
            gap = totals[most] - totals[other]
            for mine, theirs in itertools.product(dealt[most], packs):
                free = min(gap - 1, room - sum(lengths[at] for at in theirs))
                for one, two in itertools.product(range(len(mine)), range(len(theirs))):
                    moved = lengths[mine[one]] - lengths[theirs[two]]
                    higher = max(totals[most] - moved, totals[other] + moved)
                    if 0 < moved <= free and higher < (best[0] if best else totals[most]):
                        best = higher, mine, one, theirs, two
        if best is None:
            break
        _, mine, one, theirs, two = best
        mine[one], theirs[two] = theirs[two], mine[one]
    return dealt


def collator(
    batching: str, pad_token_id: int, own_mask: bool = False, flash: bool = False
) -> Callable[[list[dict[str, Any]]], Batch]:
    """What makes a micro batch out of rows.

    `packed` puts the rows into one sequence of shape (1, tokens) with position ids that start again at every row and, on purpose,
    no attention mask: with a mask transformers would let the rows see each other. A model that makes its `own_mask` gets ids
    and labels alone: what stands right of a row is seen by none of its tokens. `flash` adds where rows begin and how long the
    longest is, as flash attention wants to be told; to see it from the position ids it would wait for the card.
    """
    if batching == "packed":
        from transformers import DataCollatorWithFlattening

        flatten: Callable[[list[dict[str, Any]]], Batch] = DataCollatorWithFlattening(
            return_position_ids=True, return_flash_attn_kwargs=flash
        )
        return lambda rows: flatten([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
    if own_mask:
        return lambda rows: {
            name: part for name, part in _padded(rows, pad_token_id).items() if name != "attention_mask"
        }
    return lambda rows: _padded(rows, pad_token_id)


def _padded(rows: list[dict[str, Any]], pad_token_id: int) -> Batch:
    """Right-padded micro batch: input_ids, attention_mask and labels of shape (rows, longest)."""
    longest = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[place, :length] = torch.tensor(row["input_ids"])
        labels[place, :length] = torch.tensor(row["labels"])
        mask[place, :length] = 1
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
