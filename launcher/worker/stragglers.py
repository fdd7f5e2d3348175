"""Which rank is slower than the others: the seconds of its own work in a step, without its waiting for them.

Ranks of a step are as slow as the slowest, so their times say nothing. Own work is what lies between two meetings: from the end of the
last step to the next micro batch (rows are read), and from the model's forward pass to the gradient that the backward pass reaches last.
On a card both ends are events in its queue, which are read at the next log, long after they happened; nobody waits for them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from launcher.plan import Plan

# Elsewhere ranks meet within every layer (fsdp, zero3), or do unlike work (the stages of a pipeline).
_MEASURED = ("ddp", "zero1", "zero2")
_BEHIND = 0.15
_LEAST_SECONDS = 0.005  # a step; less is noise
_WINDOWS, _STEPS = 3, 10  # so long a rank has to stay behind


class OwnTime:
    """Measures this rank's own work. Without `model` nothing is measured, and `read` gives 0.

    Args:
        model: the model itself, inside of whatever wraps it.
    """

    def __init__(self, plan: Plan, model: torch.nn.Module | None, device: torch.device) -> None:
        self.on_card = device.type != "cpu"
        self._spans: list[tuple[Any, Any]] = []
        self._start: Any = None
        self._steps, self._seconds = 0, 0.0
        self.mark()
        first = next((p for p in model.parameters() if p.requires_grad), None) if model is not None else None
        self.measures = plan.num_processes > 1 and plan.strategy in _MEASURED and first is not None
        if self.measures:
            assert model is not None
            assert first is not None
            model.register_forward_pre_hook(self._forward)
            first.register_post_accumulate_grad_hook(self._backward)

    def mark(self) -> None:
        """All ranks may have waited for each other up to now."""
        self._marked = time.perf_counter()

    def begin(self) -> None:
        """A micro batch is here, and the forward pass is next."""
        self._seconds += time.perf_counter() - self._marked

    def end_step(self) -> None:
        """A step is done, on all ranks."""
        self._steps += 1
        self.mark()

    def read(self) -> float:
        """Seconds of a step since the last reading, on average."""
        spans = sum(self._elapsed(start, stop) for start, stop in self._spans)
        seconds = (self._seconds + spans) / max(1, self._steps)
        self._spans.clear()
        self._steps, self._seconds = 0, 0.0
        return seconds if self.measures else 0.0

    def _forward(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._start = self._now()

    def _backward(self, _: torch.Tensor) -> None:
        if self._start is not None:
            self._spans.append((self._start, self._now()))
            self._start = None

    def _now(self) -> Any:
        if not self.on_card:
            return time.perf_counter()
        event = torch.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed(self, start: Any, stop: Any) -> float:
        if not self.on_card:
            return float(stop - start)
        stop.synchronize()  # of a step that is over: at a log its loss was read before
        return float(start.elapsed_time(stop)) / 1000


@dataclass(frozen=True)
class Straggler:
    """A rank that stays behind.

    Args:
        behind: its own time over the median of all, less one; the mean of the windows.
        since: the step before the first of them.
    """

    rank: int
    behind: float
    since: int


@dataclass
class Stragglers:
    """Sees the own times of all ranks at every log, and tells of a rank once, when it has stayed behind."""

    _late: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    _told: set[int] = field(default_factory=set)
    _before: int | None = None

    def look(self, step: int, seconds: Sequence[float]) -> list[Straggler]:
        """Who has now been behind for long enough.

        Args:
            seconds: of a step, of every rank, since the last look.
        """
        before, self._before = self._before, step
        if before is None or not any(seconds):  # the first step is like no other
            return []
        # Of the two in the middle the faster: of two ranks the slower one is no median.
        median = statistics.median_low(seconds)
        found = []
        for rank, own in enumerate(seconds):
            if own < median * (1 + _BEHIND) or own - median < _LEAST_SECONDS:
                self._late.pop(rank, None)
                self._told.discard(rank)
                continue
            windows = self._late.setdefault(rank, [])
            windows.append((before, own / median - 1))
            since = windows[0][0]
            if len(windows) >= _WINDOWS and step - since >= _STEPS and rank not in self._told:
                self._told.add(rank)
                found.append(Straggler(rank, statistics.mean(share for _, share in windows), since))
        return found
