"""A device map's `devices` in, a `Cluster` out; what is wrong with them stands in its file, with line and column."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.cluster.hardware import resolve_cluster
from launcher.cluster.model import Cluster
from launcher.errors import Problem, RecipeError, UsageError
from launcher.recipe.device_maps import LoadedMap


def cluster_of_map(
    loaded: LoadedMap,
    nproc: int | None = None,
    hostfile: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
) -> Cluster:
    """The cluster that a device map names; the flags are those of `resolve_cluster`.

    Raises:
        RecipeError: cards that there are not, more reserved than a card has, ranges for more or fewer devices.
        UsageError: flags that do not go with it.
    """
    with loaded.locating():
        problems = [*_of_devices(loaded.device_map.devices)]
        if not problems:
            problems += _of_ranges(loaded)
        if problems:
            raise RecipeError(problems)
    return resolve_cluster(loaded.device_map.devices, nproc, hostfile, include, exclude)


def _of_devices(items: tuple[str, ...]) -> Iterator[Problem]:
    """Each item by itself, so that all mistakes are named at once; then all together."""
    wrong = False
    for place, item in enumerate(items):
        problem = _of_items((item,), f"devices.{place}")
        if problem is not None:
            wrong = True
            yield problem
    if not wrong and (problem := _of_items(items, "devices")) is not None:
        yield problem


def _of_items(items: tuple[str, ...], key: str) -> Problem | None:
    try:
        resolve_cluster(items)
    except UsageError as error:
        return Problem(key, f"{error.found}. {error.to_type[0].upper()}{error.to_type[1:]}")
    return None


def _of_ranges(loaded: LoadedMap) -> Iterator[Problem]:
    ranges, num = loaded.device_map.ranges(), resolve_cluster(loaded.device_map.devices).num_devices
    if ranges is not None and len(ranges) != num:
        found = f"has ranges for {len(ranges)} device{'s' if len(ranges) > 1 else ''}, `devices` has {num}"
        yield Problem("placement", f"{found}. Give each one its layers, leave devices out, or set placement: auto")
