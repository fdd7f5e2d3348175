"""A pipeline's placement in, one that a step is faster with out, where a small change makes it so.

What the search of `launcher.placement` makes smallest, the sum of all stages and m − 1 times the slowest, is what a step takes at most:
while few micro batches go through unlike stages, some of what it adds up happens at the same time. A step that is played through
(`launcher.pipeline.flow`) knows, and cannot be searched set by set; so the best of all small changes is taken, as long as one is better.
Held against trying everything: `tests/test_plan_mapped.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from launcher.placement import Placement, Search

# With more micro batches a stage than this, filling and emptying is a few per cent of a step, and the search has found it.
_MANY = 6
_MOST_ROUNDS = 40
_FEW = 4

Parts = list[tuple[int, int]]  # (device, number of layers), in the order of the layers


def refined(search: Search, found: Placement, seconds: Callable[[Placement], float]) -> Placement:
    """The placement, or a better one.

    Args:
        seconds: of a step.
    """
    if search.micro_batches > _MANY * len(found.stages):
        return found
    parts, starts = [(stage.device, stage.stop - stage.start) for stage in found.stages], [found]
    if len(parts) <= _FEW:  # then every order of the same stages is a place to begin at
        begun = (search.given(order) for order in itertools.permutations(parts))
        starts += [
            start for start in begun if start is not None and _at_least(start, search.micro_batches) < seconds(found)
        ]
    return min((_improved(search, start, seconds) for start in starts), key=seconds)


def _improved(search: Search, found: Placement, seconds: Callable[[Placement], float]) -> Placement:
    """The best that small changes lead to."""
    best, least = found, seconds(found)
    for _ in range(_MOST_ROUNDS):
        parts = [(stage.device, stage.stop - stage.start) for stage in best.stages]
        before = least
        # Of devices that are alike it does not matter which.
        others = {
            tuple((search.kinds[device], num) for device, num in other): other for other in _changes(parts, search)
        }
        for changed in others.values():
            other = search.given(changed)
            if other is None or _at_least(other, search.micro_batches) >= least:
                continue
            if (its := seconds(other)) < least:
                best, least = other, its
        if least >= before:
            break
    return best


def _at_least(placement: Placement, micro_batches: int) -> float:
    """Seconds that a step takes at least: a stage has all micro batches between the first and the last pass of the stages before it."""
    ahead = most = 0.0
    for stage in placement.stages:
        most = max(most, micro_batches * stage.seconds + ahead)
        ahead += stage.seconds
    return most


def _changes(parts: Parts, search: Search) -> Iterator[Parts]:
    """Some layers go to another stage, two stages change places, a device joins or leaves."""
    places = range(len(parts))
    for a in places:
        for b in places:
            if a < b:
                yield _swapped(parts, a, b)
            for num in (1, 2, 4, 8) if a != b else ():
                if parts[a][1] >= num:
                    yield _moved(parts, a, b, num)
                    yield _moved(_swapped(parts, min(a, b), max(a, b)), b, a, num)
    if len(parts) < search.most_stages:
        for device in search.unused([device for device, _ in parts]):
            yield [(device, 0), *parts]  # an end alone
            yield [*parts, (device, 0)]
            for at in range(len(parts) + 1):
                for giving in places:
                    if parts[giving][1]:
                        smaller = [(d, num - (place == giving)) for place, (d, num) in enumerate(parts)]
                        yield [*smaller[:at], (device, 1), *smaller[at:]]
    if len(parts) > search.least_stages:
        for out in places:
            for into in places:
                if into != out:
                    yield [part for place, part in enumerate(_moved(parts, out, into, parts[out][1])) if place != out]


def _swapped(parts: Parts, a: int, b: int) -> Parts:
    changed = list(parts)
    changed[a], changed[b] = changed[b], changed[a]
    return changed


def _moved(parts: Sequence[tuple[int, int]], giving: int, taking: int, num: int) -> Parts:
    changes = {giving: -num, taking: num}
    return [(device, have + changes.get(place, 0)) for place, (device, have) in enumerate(parts)]
