"""A stream of rows in, windows of them out, each of which is what an epoch is of data that lie on the disk: shuffled, sorted, dealt out.

All ranks read the same rows, which costs little. Each tokenises every n-th row of a window to learn its length, and they tell each other
those; so all know the length of every row, deal them out as they would rows of a prepared dataset, and tokenise what is their own when a
micro batch wants it. The rows of a step depend on seed and position alone, on any number of ranks. Nothing is written to the disk; a
checkpoint says where the window of its next step begins.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from launcher.errors import DataError
from launcher.plan import Plan
from launcher.plan.model import window_steps
from launcher.worker.data.batches import StepOrder
from launcher.worker.data.encoding import is_left_out
from launcher.worker.data.rows import BadRowError, Message, to_conversation
from launcher.worker.data.source import Place, Source
from launcher.worker.data.tokens import Prompter


class Windows(Dataset[dict[str, Any]]):
    """The training rows of a stream, one window at a time. All ranks make the same calls of `go_to`.

    Args:
        start: what `as_json` gave for a checkpoint; None for the beginning.
    """

    def __init__(self, plan: Plan, prompter: Prompter, start: dict[str, Any] | None = None) -> None:
        self.data = plan.recipe.data
        self.prompter = prompter
        self.source = Source(self.data, plan.recipe.train.seed)
        self.num_rows = window_steps(plan) * plan.global_batch
        self.taken: deque[list[str]] = deque()  # a stream's rows are not named (`WholeSteps`)
        self.steps = window_steps(plan)
        # window -> where it begins.
        self.begins = {0: Place()} if start is None else {int(start["window"]): Place(**start["place"])}
        self.window = -1
        self.rows: list[list[Message]] = []
        self.lengths = [1] * self.num_rows
        self._own: dict[int, dict[str, Any]] = {}  # tokenised to learn the length
        self.rank, self.num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if dist.is_initialized() else None

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self._own[place] if place in self._own else self._encoded(self.rows[place])

    def go_to(self, window: int) -> None:
        """Read a window: the next one, or one that `begins` has a place for; those between are passed through."""
        if window == self.window:
            return
        begin = max((number for number in self.begins if number <= window), default=0)
        for number in range(begin, window + 1):
            self._fill(number, self.begins.get(number, Place()))
        self.begins = {number: place for number, place in self.begins.items() if number >= window}

    def as_json(self, step: int) -> dict[str, Any]:
        """Where to go on after so many steps of the run."""
        window = step // self.steps
        return {"window": window, "place": self.begins[window].as_json()}

    def _fill(self, window: int, begin: Place) -> None:
        """Rows until the window is full, and their lengths."""
        self.window, self.rows, self.lengths, self._own = window, [], [], {}
        arriving = self._conversations(begin)
        place = begin
        while len(self.rows) < self.num_rows:
            wanted = list(itertools.islice(arriving, self.num_rows - len(self.rows)))
            place = wanted[-1][1]
            self._take([row for row, _ in wanted])
            if not self.rows and place.round >= begin.round + 2:
                raise self._nothing("no answer is left of any row", "allow longer rows: data.max_length=1024")
        self.begins[window + 1] = place

    def _take(self, rows: list[list[Message]]) -> None:
        """Keep the rows that teach something."""
        mine = {at: self._encoded(rows[at]) for at in range(self.rank, len(rows), self.num_ranks)}
        for at, length in enumerate(self._of_all_ranks([row["length"] for row in mine.values()], len(rows))):
            if length == 0:
                continue
            if at in mine:
                self._own[len(self.rows)] = mine[at]
            self.rows.append(rows[at])
            self.lengths.append(length)

    def _of_all_ranks(self, mine: list[int], num: int) -> list[int]:
        """The lengths of `num` rows, of which each rank knows every n-th."""
        if self.group is None:
            return mine
        own = torch.zeros(-(-num // self.num_ranks), dtype=torch.long)
        own[: len(mine)] = torch.tensor(mine, dtype=torch.long)
        parts = [torch.empty_like(own) for _ in range(self.num_ranks)]
        dist.all_gather(parts, own, group=self.group)
        lengths: list[int] = torch.stack(parts, dim=1).flatten()[:num].tolist()
        return lengths

    def _encoded(self, row: list[Message]) -> dict[str, Any]:
        """input_ids, labels and length of a row; length 0 of one that teaches nothing."""
        tokens = self.prompter.tokens(row, self.data.max_length)
        length = 0 if is_left_out(tokens, self.data) else len(tokens.input_ids)
        return {"input_ids": tokens.input_ids, "labels": tokens.labels, "length": length}

    def _conversations(self, begin: Place) -> Iterator[tuple[list[Message], Place]]:
        """Rows that are conversations, each with the place behind it."""
        good = begin.round  # the last round in which there was one
        for row, place in self.source.rows(begin):
            try:
                if row.problem is not None:
                    raise BadRowError(row.problem)
                conversation = to_conversation(row.value, self.data)
            except BadRowError as error:
                if self.data.bad_rows == "error":
                    raise self._nothing(
                        f"a bad row\n    {row.where}  {error}",
                        "mend it, or leave such rows out with: data.bad_rows=skip",
                    ) from None
                if place.round > good + 1:
                    found = f"none of its rows can be used; one of them: {row.where}  {error}"
                    raise self._nothing(found, "check data.path and data.format") from None
                continue
            good = place.round
            yield conversation, place

    def _nothing(self, found: str, to_type: str) -> DataError:
        paths = self.data.path if isinstance(self.data.path, str) else ", ".join(self.data.path)
        return DataError(f"data.path: {paths}", found, to_type)


class WindowOrder(StepOrder):
    """The steps of the window that a stream is at."""

    def __init__(self, windows: Windows, plan: Plan) -> None:
        super().__init__(windows.lengths, plan.global_batch, plan.recipe.train.seed, plan.batching)
        self.windows = windows

    def go_to(self, epoch: int) -> None:
        self.windows.go_to(epoch)
        self.lengths = self.windows.lengths
        super().go_to(epoch)
