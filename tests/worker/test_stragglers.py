"""When a rank counts as slow. With real ranks: tests/e2e/test_stragglers.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from launcher.worker.stragglers import OwnTime, Straggler, Stragglers


def looks(windows: list[list[float]], every: int = 10) -> list[Straggler]:
    """What is said over windows of so many steps, after the first step."""
    seen = Stragglers()
    seen.look(1, windows[0])
    return [one for place, seconds in enumerate(windows) for one in seen.look(1 + every * (place + 1), seconds)]


def test_a_rank_that_stays_behind_is_named_once_and_again_after_it_has_caught_up() -> None:
    slow, even = [1.0, 1.0, 1.2], [1.0, 1.0, 1.0]
    (found,) = looks([slow] * 6)
    assert (found.rank, found.since, round(found.behind, 2)) == (2, 1, 0.2)
    assert [one.since for one in looks([slow] * 3 + [even] + [slow] * 3)] == [1, 41]


def test_of_two_ranks_the_slower_one_is_named() -> None:
    assert [one.rank for one in looks([[1.0, 1.3]] * 3)] == [1]
    assert [one.rank for one in looks([[1.3, 1.0]] * 3)] == [0]


def test_what_is_no_straggler() -> None:
    assert looks([[1.0, 1.0, 1.14]] * 6) == [], "less than 15 %"
    assert looks([[1.0, 1.0, 1.5], [1.0, 1.5, 1.0]] * 3) == [], "not the same one for long"
    assert looks([[0.010, 0.010, 0.014]] * 6) == [], "noise"
    assert looks([[0.0, 0.0, 0.0]] * 6) == [], "not measured"
    assert looks([[1.0, 1.0, 1.5]] * 6, every=1) == [], "too short a time"


def test_own_time_leaves_out_what_lies_between_marks(monkeypatch: Any) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("launcher.worker.stragglers.time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Slow(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock.now += 1.0
            return super().forward(x)

    model = Slow(2, 2)
    own = OwnTime(SimpleNamespace(num_processes=2, strategy="ddp"), model, torch.device("cpu"))  # type: ignore[arg-type]
    for _ in range(2):
        clock.now += 0.25  # rows are read
        own.begin()
        clock.now += 50  # others are waited for, before the forward pass
        model(torch.ones(1, 2)).sum().backward()
        clock.now += 50  # and after the backward pass
        own.end_step()
    with torch.no_grad():
        model(torch.ones(1, 2))  # an evaluation
    assert own.read() == 1.25
    assert own.read() == 0.0
    off = OwnTime(SimpleNamespace(num_processes=2, strategy="fsdp"), model, torch.device("cpu"))  # type: ignore[arg-type]
    off.begin()
    assert off.read() == 0.0
