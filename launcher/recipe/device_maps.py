"""A device map's name in, a checked `DeviceMap` out: the devices that one model is spread over, and what may be fixed about it.

A path works as it is; a bare name is looked up in recipes/device_maps beside the user, then among the shipped ones.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from launcher.errors import Problem, UsageError
from launcher.recipe.document import read_document
from launcher.recipe.reading import located, problems_of
from launcher.recipe.schema import Auto, Names, Section
from launcher.recipe.shipped import looked_up, shipped_folder

_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")


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


def load_device_map(name: str) -> tuple[Path, DeviceMap]:
    """The file of a name or path, read and checked.

    Raises:
        UsageError: there is none.
        RecipeError: mistakes in the file, all of them.
    """
    path = find_device_map(name)
    document = read_document(path)
    problems = list(document.problems)
    try:
        found = DeviceMap.model_validate(document.values)
    except ValidationError as error:
        raise located([*problems, *problems_of(error, DeviceMap)], document) from None
    problems += _broken(found)
    if problems:
        raise located(problems, document)
    return path, found


def _broken(device_map: DeviceMap) -> list[Problem]:
    """What stands against explicit ranges, whatever the model."""
    if isinstance(device_map.placement, str):
        return []
    wrong = [item for item in device_map.placement if not _RANGE.fullmatch(item.strip())]
    if wrong:
        return [Problem("placement", f"{', '.join(map(repr, wrong))} is no range of layers. Write it as 0-12")]
    ranges = device_map.ranges() or ()
    expected = 0
    for first, last in ranges:
        if first != expected or last < first:
            message = f"{first}-{last} does not follow: layers go from 0 on without a gap. Write {expected}-{max(expected, last)}"
            return [Problem("placement", message)]
        expected = last + 1
    return []


def find_device_map(name: str) -> Path:
    """The file that a path or bare name means.

    Raises:
        UsageError: there is none; names the nearest.
    """
    folders = (Path("recipes/device_maps"), shipped_folder() / "device_maps")
    file = looked_up(name, folders)
    if file is not None:
        return file
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    close = difflib.get_close_matches(Path(name).stem, known, n=1)
    to_type = f"did you mean: --device-map {close[0]}" if close else f"there are: {', '.join(known)}"
    raise UsageError(f"device map {name[:200]}", "there is no such device map", to_type)
