"""The state of an optimizer in one layout for every strategy, so that any other set of ranks finds its own values in it.

A file `optimizer-rank<k>.safetensors` (or `optimizer-rank<k>-<i>`, where a rank writes several) holds tensors named
`parameter|kind|start`: the values [start, start + n) of a kind of state (`exp_avg`, `exp_avg_sq`, `master`) of a parameter, as if both
were flat. FSDP2's rows, ZeRO's partitions and DDP's shares of the writing are all such runs of values. What is not as large as its
parameter, as the constants of 8-bit blocks, stands as `parameter|kind`. The header has the shape of every parameter and what is no
tensor.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from launcher.errors import PreflightError
from launcher.worker.checkpoint.files import Staging, TensorFile

State = dict[str, Any]
MASTER = "master"  # the fp32 copy of a weight that is trained in half precision
_FILES = "optimizer-rank*.safetensors"


@dataclass(frozen=True)
class Slice:
    """What a rank has of the state of a parameter.

    Args:
        shape: of the whole parameter.
        start: place of the first value in the flat parameter.
        values: kind -> values from there on, in any shape.
        rest: kind -> what is written as it is: tensors of other sizes, numbers.
    """

    name: str
    shape: tuple[int, ...]
    start: int = 0
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    rest: State = field(default_factory=dict)


def write_slices(folder: Staging, rank: int | str, slices: Iterable[Slice]) -> None:
    """Write this rank's file, or one of its several.

    Args:
        rank: its number, and where it writes several what else tells them apart: `0-2`.

    Raises:
        TypeError: there is something in the state that would not be saved; dropped, a resume would start with other moments.
    """
    tensors: dict[str, torch.Tensor] = {}
    about: dict[str, State] = {}
    for each in slices:
        tensors |= {f"{each.name}|{kind}|{each.start}": part.reshape(-1) for kind, part in each.values.items()}
        tensors |= {f"{each.name}|{kind}": part for kind, part in each.rest.items() if isinstance(part, torch.Tensor)}
        plain = {kind: part for kind, part in each.rest.items() if not isinstance(part, torch.Tensor)}
        for kind, part in plain.items():
            if not (isinstance(part, int | float | bool | str) or part is None):
                found = f"the optimizer's state holds {kind}, a {type(part).__name__}"
                raise TypeError(f"{found}, which has no place in a checkpoint")
        about[each.name] = {"shape": list(each.shape), "rest": plain}
    folder.tensors(f"optimizer-rank{rank}.safetensors", tensors, {"parameters": json.dumps(about)})


class Slices:
    """The state that all ranks of a checkpoint have written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._plain: dict[str, State] = {}
        self._whole: dict[str, dict[str, tuple[TensorFile, str]]] = defaultdict(dict)
        self._runs: dict[str, dict[str, list[tuple[int, int, TensorFile, str]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for path in sorted(folder.glob(_FILES)):
            file = TensorFile(path)
            for name, about in json.loads(file.metadata.get("parameters", "{}")).items():
                self.shapes[name] = tuple(about["shape"])
                self._plain.setdefault(name, {}).update(about["rest"])
            for key, (_, shape) in file.layout.items():
                name, kind, start = (*key.split("|"), "")[:3]
                if start:
                    self._runs[name][kind].append((int(start), int(start) + shape[0], file, key))
                else:
                    self._whole[name][kind] = (file, key)
        for kinds in self._runs.values():
            for runs in kinds.values():
                runs.sort(key=lambda run: run[0])

    def kinds(self, name: str) -> list[str]:
        """What there is of a parameter, value by value."""
        return list(self._runs[name])

    def rest(self, name: str) -> State:
        """What there is of a parameter besides."""
        return {**self._plain[name], **{kind: file.whole(key) for kind, (file, key) in self._whole[name].items()}}

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """The values [start, stop) of the flat parameter, on the CPU.

        Raises:
            PreflightError: some of them are in no file.
        """
        parts, at = [torch.empty(0)] if start == stop else [], start
        for first, last, file, key in self._runs[name][kind]:
            if first <= at < min(last, stop):
                parts.append(file.read(key, at - first, min(last, stop) - first))
                at = min(last, stop)
        if at < stop:
            found = f"has no {kind} of {name} from value {at:,} of {stop:,} on"
            raise PreflightError(f"resume from {self.folder.name}", found, "start a new run: launch RECIPE")
        return torch.cat(parts) if len(parts) != 1 else parts[0]
