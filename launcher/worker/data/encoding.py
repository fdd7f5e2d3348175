"""Conversations in, tokens out, by as many processes as there are cores where there are many rows; what was cut or dropped is counted."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence

from launcher.errors import DataError
from launcher.recipe.schema import Data
from launcher.worker.data.rows import Message
from launcher.worker.data.tokens import IGNORED, Prompter, Tokens
from launcher.worker.pulse import die_with_parent

Progress = Callable[[int, int], None]
_ROWS_AT_ONCE = 500
_ROWS_PER_PROGRESS = 2000
# With fewer rows a process costs more than it saves; more processes than this wait for the one that collects.
_MANY, _MOST_PROCESSES = 4000, 16

# What the processes that are forked look at: rows need not be sent to them.
_shared: tuple[Prompter, Sequence[list[Message]], int] | None = None


class Encoder:
    """Conversations to tokens. A row whose whole answer is cut off teaches nothing, and goes.

    Args:
        total: rows that will be given in all.
        progress: called with (rows done, rows in all) now and then.
        processes: so many at most.
    """

    def __init__(
        self, prompter: Prompter, data: Data, total: int, progress: Progress, processes: int | None = None
    ) -> None:
        self.prompter = prompter
        self.data = data
        self.total = total
        self.progress = progress
        self.processes = processes or min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
        self.done = self.dropped = self.truncated = 0

    def encode(self, rows: Sequence[list[Message]], places: list[str] | None = None) -> list[Tokens]:
        """The tokens of the rows that are left, in their order.

        Args:
            places: where each row stands; those of rows that go are taken out.

        Raises:
            DataError: the template does not go with these rows.
        """
        kept, stays = [], []
        for tokens in self._tokens(rows):
            self.done += 1
            if self.done % _ROWS_PER_PROGRESS == 0:
                self.progress(self.done, self.total)
            stays.append(not is_left_out(tokens, self.data))
            if not stays[-1]:
                self.dropped += 1
            else:
                self.truncated += tokens.cut
                kept.append(tokens)
        if places is not None:
            places[:] = [place for place, stay in zip(places, stays, strict=True) if stay]
        return kept

    def _tokens(self, rows: Sequence[list[Message]]) -> Iterator[Tokens]:
        global _shared
        length = self.data.max_length
        if self.processes == 1 or len(rows) < _MANY:
            yield from (self.prompter.tokens(row, length) for row in rows)
            return
        _shared = self.prompter, rows, length
        try:
            # Forked, because a tokenizer from a model's own code cannot be sent. Nothing here has started a thread yet.
            with multiprocessing.get_context("fork").Pool(self.processes, initializer=die_with_parent) as pool:
                for part in pool.imap(_tokens_from, range(0, len(rows), _ROWS_AT_ONCE)):
                    if isinstance(part, tuple):
                        raise DataError(*part)
                    yield from part
        finally:
            _shared = None


def is_left_out(tokens: Tokens, data: Data) -> bool:
    """Whether a row is not learned from: too long where such rows are dropped, or cut so that nothing of its answer is left."""
    return tokens.cut and (data.overlong == "drop" or all(label == IGNORED for label in tokens.labels))


def _tokens_from(start: int) -> list[Tokens] | tuple[str, str, str]:
    """Of the rows from one on, in a process of the pool; or the three parts of an error, of which pickle would keep one."""
    assert _shared is not None
    prompter, rows, length = _shared
    try:
        return [prompter.tokens(row, length) for row in rows[start : start + _ROWS_AT_ONCE]]
    except DataError as error:
        return error.you_set, error.found, error.to_type
