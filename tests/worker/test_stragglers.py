"""Who stays behind, from the own times of all ranks; and what counts as own time where ranks meet within the forward pass."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from launcher.worker.stragglers import OwnTime, Stragglers


def named(unlike: bool, windows: list[list[float]]) -> list[tuple[int, float]]:
    looks = Stragglers(unlike=unlike)
    found = [one for place, seconds in enumerate(windows) for one in looks.look(5 * place, seconds)]
    return [(one.rank, round(one.behind, 2)) for one in found]


@pytest.mark.parametrize(
    ("unlike", "windows", "expected"),
    [
        (False, [[9, 1, 1], *[[1, 1.3, 1]] * 4], [(1, 0.3)]),
        (False, [[1, 1, 1], *[[1, 1.1, 1]] * 9], []),
        (False, [*[[1, 1.3], [1, 1]] * 5], []),
        (True, [[1, 2], *[[1, 2]] * 9], []),
        (True, [[1, 2], [1, 2], *[[1, 2.6]] * 4], [(1, 0.3)]),
        (True, [[1, 2], [1, 2], *[[1.3, 2]] * 4], [(0, 0.3)]),
        (True, [[1, 2], [1, 2], *[[0.5, 1]] * 9], []),
    ],
    ids=["behind", "not far", "now and then", "another share", "a slower stage", "the lighter one", "shorter rows"],
)
def test_a_rank_is_named_once_when_it_has_stayed_behind(
    unlike: bool, windows: list[list[float]], expected: list[tuple[int, float]]
) -> None:
    assert named(unlike, windows) == expected


class Waits(torch.nn.Linear):
    """Waits for others before it computes, as a module does whose weights are gathered."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return super().forward(given)


def test_what_is_waited_for_before_a_part_is_not_its_own() -> None:
    model = torch.nn.Sequential(Waits(2, 2), torch.nn.Sequential(Waits(2, 2)))
    for part in model.modules():
        if isinstance(part, Waits):
            part.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    plan = SimpleNamespace(num_processes=2, pipeline=None, strategy="zero3")
    own = OwnTime(plan, model, torch.device("cpu"))  # type: ignore[arg-type]
    own.begin()
    model(torch.ones(1, 2)).sum().backward()
    with torch.no_grad():
        model(torch.ones(1, 2))  # an evaluation
    own.end_step()
    assert 0.04 <= own.read() < 0.1
    assert own.read() == 0.0
