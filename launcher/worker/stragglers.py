"""Which rank is slower than the others: the seconds of its own work in a step, without its waiting for them.

Ranks of a step are as slow as the slowest, so their times say nothing. Own work is what lies between two meetings: from the end of the
last step to the next micro batch (rows are read), and then

- ddp, zero1, zero2: from the model's forward pass to the gradient that the backward pass reaches last;
- fsdp, zero3: the forward pass, less the time in which a layer or module waits until its weights are gathered;
- a pipeline: the forward passes of the stage, which begin when its input is there. Stages do unlike work, so each is held against
  its own first steps.

On a card the ends are events in its queue, which are read at the next log, long after they happened; nobody waits for them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from launcher.plan import Plan
from launcher.worker.weights import PARAMETERS_SHARDED

_BEHIND = 0.15
_LEAST_SECONDS = 0.005  # a step; less is noise
_WINDOWS, _STEPS = 3, 10  # so long a rank has to stay behind


class OwnTime:
    """Measures this rank's own work. Without `model` nothing is measured, and `read` gives 0.

    Args:
        model: the model itself, inside of whatever wraps it; of a pipeline this rank's stage.
    """

    def __init__(self, plan: Plan, model: torch.nn.Module | None, device: torch.device) -> None:
        self.plan = plan
        self.model = model
        self.measures = plan.num_processes > 1 and model is not None
        self.on_card = device.type != "cpu"
        self._spans: list[tuple[Any, Any]] = []
        self._waited: list[tuple[Any, Any]] = []
        self._start: Any = None
        self._waits_since: Any = None
        self._steps, self._seconds = 0, 0.0
        self._is_hooked = False
        self.mark()

    def mark(self) -> None:
        """All ranks may have waited for each other up to now."""
        self._marked = time.perf_counter()

    def begin(self) -> None:
        """A micro batch is here, and the forward pass is next."""
        self._seconds += time.perf_counter() - self._marked
        if (
            self.measures and not self._is_hooked
        ):  # DeepSpeed has its own hooks by now: ours come after those that gather
            self._is_hooked = True
            self._hook()

    def _hook(self) -> None:
        assert self.model is not None
        self.model.register_forward_pre_hook(self._begins)
        if self.plan.pipeline is not None or self.plan.strategy in PARAMETERS_SHARDED:
            self.model.register_forward_hook(self._ends)
        else:
            first = next(parameter for parameter in self.model.parameters() if parameter.requires_grad)
            first.register_post_accumulate_grad_hook(self._ends)
        for part in _gathered(self.plan, self.model):
            part.register_forward_pre_hook(self._waits, prepend=True)
            part.register_forward_pre_hook(self._goes_on)

    def end_step(self) -> None:
        """A step is done, on all ranks."""
        self._steps += 1
        self.mark()

    def read(self) -> float:
        """Seconds of a step since the last reading, on average."""
        spans = sum(self._elapsed(*span) for span in self._spans) - sum(self._elapsed(*wait) for wait in self._waited)
        seconds = (self._seconds + spans) / max(1, self._steps)
        self._spans.clear()
        self._waited.clear()
        self._steps, self._seconds = 0, 0.0
        return seconds if self.measures else 0.0

    def _begins(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._start = self._now()

    def _ends(self, *_: Any) -> None:
        if self._start is not None:
            self._spans.append((self._start, self._now()))
            self._start = None

    def _waits(self, *_: Any) -> None:
        if self._start is not None:  # not while layers are computed again
            self._waits_since = self._now()

    def _goes_on(self, *_: Any) -> None:
        if self._waits_since is not None:
            self._waited.append((self._waits_since, self._now()))
            self._waits_since = None

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


def _gathered(plan: Plan, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules that wait for their weights before their forward pass; the whole model begins when its own are there."""
    if plan.strategy == "fsdp":
        yield from (module for module in model.modules() if isinstance(module, FSDPModule) and module is not model)
    elif plan.strategy == "zero3":
        yield from (module for module in model.modules() if module._parameters and not module._modules)


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
    """Sees the own times of all ranks at every log, and tells of a rank once, when it has stayed behind.

    Args:
        unlike: whether ranks do unlike work: each then counts by its own first window.
    """

    unlike: bool = False
    _units: Sequence[float] | None = None
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
        if self.unlike and self._units is None:
            self._units = [max(own, _LEAST_SECONDS) for own in seconds]
        scale = statistics.median(self._units) if self._units else 1.0
        seconds = [own * scale / unit for own, unit in zip(seconds, self._units or [1.0] * len(seconds), strict=True)]
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
