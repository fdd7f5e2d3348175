"""All weights of a checkpoint -> safetensors of another size, a tensor at a time: no model is built, and no rank started.

Under every strategy a checkpoint of full training has whole tensors, in files that were dealt out to the ranks; what is left to do is to
put them into files of the size that somebody wants.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from launcher.errors import PreflightError
from launcher.worker.checkpoint.files import TensorFile, write_bytes, write_tensors
from launcher.worker.weights import INDEX_FILE, files_of, index_of, weight_map_of


class Source:
    """The tensors of a folder's safetensors files."""

    def __init__(self, folder: Path) -> None:
        self._files = {
            name: file for file in map(TensorFile, sorted(folder.glob("model*.safetensors"))) for name in file.layout
        }
        self.layout = {name: file.layout[name] for name, file in self._files.items()}

    def tensors(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor), one at a time."""
        return ((name, self._files[name].whole(name)) for name in names)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {name: torch.Size(shape).numel() * dtype.itemsize for name, (dtype, shape) in self.layout.items()}


def restream(source: Path, target: Path, max_shard_size: str) -> int:
    """Write the weights of a folder into another one, in files of at most that size; their bytes.

    Raises:
        OSError: it cannot be written.
    """
    found = Source(source)
    sizes = found.sizes
    files = files_of(sizes, max_shard_size)
    for file, names in files.items():
        write_tensors(target / file, {name: found.layout[name] for name in names}, found.tensors(names))
    if len(files) > 1:
        write_bytes(target / INDEX_FILE, index_of(weight_map_of(files), sum(sizes.values())).encode())
    return sum(sizes.values())


def require_same(source: Path, target: Path) -> None:
    """Read both back and compare, a tensor at a time.

    Raises:
        PreflightError: a tensor is not what it was.
    """
    ours, theirs = Source(source), Source(target)
    names = list(ours.layout)
    wrong = [name for name in names if theirs.layout.get(name) != ours.layout[name]] + sorted(
        theirs.layout.keys() - ours.layout
    )
    pairs = zip(ours.tensors(names), theirs.tensors(names), strict=True) if not wrong else ()
    wrong += [name for (name, one), (_, other) in pairs if not torch.equal(_bits(one), _bits(other))]
    if wrong:
        raise PreflightError("export", f"{wrong[0]} is not what the checkpoint has", "check the disk, and export again")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A value that is no number equals itself, bit by bit."""
    return tensor.reshape(-1).view(torch.uint8)
