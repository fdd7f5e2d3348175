"""A device map's name in, a checked `DeviceMap` out: the devices that one model is spread over, and what may be fixed about it.

A path works as it is; a bare name is looked up in recipes/device_maps beside the user, then among the shipped ones.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from launcher.errors import Problem, RecipeError, UsageError
from launcher.recipe.document import Document, read_document
from launcher.recipe.reading import located, problems_of
from launcher.recipe.schema import Auto, Names, Section
from launcher.recipe.shipped import looked_up, shipped_folder

_RANGE = re.compile(r"([0-9]{1,4})\s*[-–]\s*([0-9]{1,4})")  # the plan itself writes a dash
_HOW_PLACED = "Write first and last layer of each device, such as [0-12, 13-27], or placement: auto"


class DeviceMap(Section):
    """Devices that one model is spread over."""

    recipe: str | None = Field(
        None,
        description="The recipe that `launch --device-map NAME` runs when none is named; counts from this file's folder.",
    )
    devices: Names = Field(
        description="The devices in order, as `hardware` of a recipe names them, with what others hold of each: "
        "`RTX 3060 Ti 8GiB reserved=921MiB`."
    )
    schedule: Literal["auto", "naive", "pipelined"] = Field(
        "auto",
        description="One device after the other, micro batches in flight on all of them, or whichever is faster.",
    )
    placement: Auto | Names = Field(
        "auto",
        description="Layers of each device in order, such as `[0-12, 13-27]`, with the embedding before the first and the head "
        "behind the last; auto finds the fastest.",
    )
    spill: Literal["none", "host"] = Field(
        "none",
        description="host keeps in host memory what fits on no device; such a model can chat and cannot be trained.",
    )

    def ranges(self) -> tuple[tuple[int, int], ...] | None:
        """(first, last) layer of each device; None where they are to be found."""
        if isinstance(self.placement, str):
            return None
        found = [_RANGE.fullmatch(item.strip()) for item in self.placement]
        return tuple((int(match[1]), int(match[2])) for match in found if match is not None)


@dataclass(frozen=True)
class LoadedMap:
    """A checked device map, with the file it came from for messages that name a place."""

    path: Path
    device_map: DeviceMap
    document: Document

    @contextlib.contextmanager
    def locating(self) -> Iterator[None]:
        """Give every RecipeError raised inside the place in this file of those keys that are its own."""
        try:
            yield
        except RecipeError as error:
            raise RecipeError([self._placed(problem) for problem in error.problems]) from None

    def _placed(self, problem: Problem) -> Problem:
        own = not problem.where and problem.key.partition(".")[0] in DeviceMap.model_fields
        return replace(problem, where=self.document.place(problem.key)) if own else problem


def load_device_map(name: str) -> LoadedMap:
    """The file of a name or path, read and checked; what its devices are is `cluster_of_map`'s to find out.

    Raises:
        UsageError: there is none.
        RecipeError: mistakes in the file, all of them.
    """
    path = find_device_map(name)
    document = read_document(path, "device map", "`devices`, such as devices: [RTX 3090, RTX 3060 12GiB]")
    problems = [*document.problems, *_no_ranges(document.values.get("placement"))]
    values = {key: value for key, value in document.values.items() if key != "placement" or not problems}
    try:
        found = DeviceMap.model_validate(values)
    except ValidationError as error:
        raise located([*problems, *problems_of(error, DeviceMap)], document) from None
    if not found.devices:
        problems.append(Problem("devices", "is an empty list. Name a card or more, such as [RTX 3090, RTX 3060 12GiB]"))
    problems += _broken(found)
    if problems:
        raise located(problems, document)
    return LoadedMap(path, found, document)


def _no_ranges(placement: Any) -> list[Problem]:
    """Items of a list under `placement` that are no range of layers."""
    if not isinstance(placement, list):
        return []
    if not placement:
        return [Problem("placement", f"is an empty list. {_HOW_PLACED}")]
    problems = []
    for place, item in enumerate(placement):
        if isinstance(item, str) and _RANGE.fullmatch(item.strip()):
            continue
        is_number = isinstance(item, int) and not isinstance(item, bool)
        single = f" and no number of layers; layer {item} alone is {item}-{item}" if is_number else ""
        found = "null" if item is None else str(item)
        problems.append(Problem(f"placement.{place}", f"`{found}` is no range of layers{single}. {_HOW_PLACED}"))
    return problems


def _broken(device_map: DeviceMap) -> list[Problem]:
    """What stands against explicit ranges, whatever the model."""
    ranges = device_map.ranges()
    if ranges is None:
        return []
    if device_map.spill == "host":
        found = "says where each layer lies, and spill: host leaves open which of them lie in host memory"
        return [Problem("placement", f"{found}. Set placement: auto, or spill: none")]
    expected = 0
    for place, (first, last) in enumerate(ranges):
        if last < first:
            return [Problem(f"placement.{place}", f"{first}-{last} ends before it begins. {_mended(ranges)}")]
        if first != expected:
            found = f"{first}-{last} does not follow: the next layer is {expected}, without a gap and none twice"
            return [Problem(f"placement.{place}", f"{found}. {_mended(ranges)}")]
        expected = last + 1
    return []


def _mended(ranges: Sequence[tuple[int, int]]) -> str:
    """What to write instead: each range ends where somebody has written that it does, and begins behind the one before."""
    ends = [max(both) for both in ranges]
    if sorted(set(ends)) != ends:
        if sorted(set(ends)) == sorted(ends):
            return "Layers come in their order: list the devices in the order of their ranges"
        return _HOW_PLACED
    starts = [0, *(end + 1 for end in ends[:-1])]
    written = ", ".join(f"{first}-{last}" for first, last in zip(starts, ends, strict=True))
    return f"Write placement: [{written}]"


def find_device_map(name: str) -> Path:
    """The file that a path or bare name means.

    Raises:
        UsageError: there is none; names the nearest.
    """
    file = looked_up(name, _folders())
    if file is not None:
        return file
    known = [path.stem for path in device_maps()]
    close = difflib.get_close_matches(Path(name).stem, known, n=1)
    to_type = f"did you mean: --device-map {close[0]}" if close else f"there are: {', '.join(known)}"
    raise UsageError(f"device map {name[:200]}", "there is no such device map", to_type)


def device_maps() -> list[Path]:
    """All device maps beside the user and shipped, by name; of two with one name the user's own."""
    found: dict[str, Path] = {}
    for folder in _folders():
        for path in folder.glob("*.yaml"):
            found.setdefault(path.stem, path)
    return [found[name] for name in sorted(found)]


def _folders() -> tuple[Path, Path]:
    return Path("recipes/device_maps"), shipped_folder() / "device_maps"
