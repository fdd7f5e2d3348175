"""The prepared dataset in, micro batches out, in an order that depends on (seed, epoch, global batch) alone.

So a resumed run, and one on another number of ranks, sees the rows of every step as the uninterrupted run does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from launcher.worker.data.tokens import IGNORED

Batch = dict[str, torch.Tensor]


class WholeSteps(Dataset[dict[str, Any]]):
    """Training rows, and behind them as many that teach nothing as the last step of an epoch lacks.

    Without them accelerate would repeat rows to give each rank as many batches as the others: other rows on other numbers of ranks.
    """

    def __init__(self, rows: Any, global_batch: int) -> None:
        self.rows = rows
        self.num_rows = len(rows)
        self.length = -(-self.num_rows // global_batch) * global_batch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, Any]:
        return dict(self.rows[place]) if place < self.num_rows else self._nothing

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        """What the data loader asks for instead of one after the other."""
        real = [place for place in places if place < self.num_rows]
        return self._read(real) + [self._nothing] * (len(places) - len(real))

    def _read(self, places: list[int]) -> list[dict[str, Any]]:
        table = self.rows[places] if places else {}
        return [{name: column[at] for name, column in table.items()} for at in range(len(places))]

    @cached_property
    def _nothing(self) -> dict[str, Any]:
        """The shortest row with nothing to learn in it."""
        lengths = self.rows["length"][:]
        row = dict(self.rows[lengths.index(min(lengths))])
        return {**row, "labels": [IGNORED] * len(row["labels"])}


class StepOrder(Sampler[int]):
    """Row numbers of an epoch, in whole steps: numbers past the last row stand for rows that teach nothing (`WholeSteps`).

    Args:
        lengths: tokens of every row.
        global_batch: rows of one optimizer step.
        seed: with the epoch it decides the order.
        bucketed: put rows of like length into the same step, so that little is padded and ranks wait little for each other.
    """

    def __init__(self, lengths: Sequence[int], global_batch: int, seed: int, bucketed: bool) -> None:
        self.lengths = lengths
        self.global_batch = global_batch
        self.seed = seed
        self.bucketed = bucketed
        self.epoch = 0

    def go_to(self, epoch: int) -> None:
        """Called before every epoch, also by a resumed run. On purpose not `set_epoch`: accelerate calls that with its own count, and
        where batches are skipped on several ranks it does not call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.global_batch) * self.global_batch

    def __iter__(self) -> Iterator[int]:
        return iter([*self._rows(), *range(len(self.lengths), len(self))])

    def _rows(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.bucketed:
            return order
        num_steps = -(-len(order) // self.global_batch)
        # Windows of at most 50 steps and at least four an epoch: the rows that share a step change from epoch to epoch.
        window = self.global_batch * max(1, min(50, num_steps // 4))
        steps: list[list[int]] = []
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=lambda row: -self.lengths[row])
            steps += [rows[place : place + self.global_batch] for place in range(0, len(rows), self.global_batch)]
        whole = [step for step in steps if len(step) == self.global_batch]
        rest = [row for step in steps if len(step) < self.global_batch for row in step]
        shuffled = torch.randperm(len(whole), generator=generator).tolist()
        return [row for place in shuffled for row in whole[place]] + rest


def collator(batching: str, pad_token_id: int, own_mask: bool = False) -> Callable[[list[dict[str, Any]]], Batch]:
    """What makes a micro batch out of rows.

    `packed` puts the rows into one sequence of shape (1, tokens) with position ids that start again at every row and, on purpose,
    no attention mask: with a mask transformers would let the rows see each other. A model that makes its `own_mask` gets ids
    and labels alone: what stands right of a row is seen by none of its tokens.
    """
    if batching == "packed":
        from transformers import DataCollatorWithFlattening

        flatten: Callable[[list[dict[str, Any]]], Batch] = DataCollatorWithFlattening(return_position_ids=True)
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
