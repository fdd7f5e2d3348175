"""When a rank counts as slow. With real ranks: tests/e2e/test_stragglers.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.worker.stragglers import OwnTime, Straggler, Stragglers


def looks(windows: list[list[float]], every: int = 10, unlike: bool = False) -> list[Straggler]:
    """What is said over windows of so many steps, after the first step."""
    seen = Stragglers(unlike=unlike)
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


def test_stages_of_a_pipeline_are_held_against_their_own_beginning() -> None:
    assert looks([[1.0, 2.0]] * 9, unlike=True) == [], "another share of the work"
    assert looks([[1.0, 2.0], *[[0.5, 1.0]] * 6], unlike=True) == [], "shorter rows"
    slower, lighter = ([[1.0, 2.0], *[then] * 3] for then in ([1.0, 2.6], [1.3, 2.0]))
    assert [(one.rank, round(one.behind, 2)) for one in looks(slower, unlike=True)] == [(1, 0.3)]
    assert [(one.rank, round(one.behind, 2)) for one in looks(lighter, unlike=True)] == [(0, 0.3)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What `now` own times are taken at, in seconds."""
    made = SimpleNamespace(now=0.0)
    monkeypatch.setattr("launcher.worker.stragglers.time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def test_own_time_leaves_out_what_lies_between_marks(clock: SimpleNamespace) -> None:
    class Slow(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock.now += 1.0
            return super().forward(x)

    model = Slow(2, 2)
    plan: Any = SimpleNamespace(num_processes=2, strategy="ddp", pipeline=None)
    own = OwnTime(plan, model, torch.device("cpu"))
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


def test_where_weights_are_gathered_own_time_is_the_forward_pass_less_what_is_waited_in_it(
    clock: SimpleNamespace,
) -> None:
    class Layer(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock.now += 1.0
            return super().forward(x)

    def gathers(*_: Any) -> None:
        clock.now += 50

    model = torch.nn.Sequential(Layer(2, 2), torch.nn.Sequential(Layer(2, 2), torch.nn.Tanh()))
    for layer in (model[0], model[1][0]):  # type: ignore[index]
        layer.register_forward_pre_hook(gathers)
    plan: Any = SimpleNamespace(num_processes=2, strategy="zero3", pipeline=None)
    own = OwnTime(plan, model, torch.device("cpu"))
    own.begin()
    out = model(torch.ones(1, 2)).sum()
    clock.now += 50
    out.backward()
    own.end_step()
    with torch.no_grad():
        model(torch.ones(1, 2))  # an evaluation
    assert own.read() == 2.0
