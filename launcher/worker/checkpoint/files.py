"""Files of a checkpoint: their checksums are made of the bytes on their way to the disk, so that a byte that is lost on it is found.

Tensors are written as safetensors by our own few lines, because the library's writer shows nobody the bytes. The format: eight bytes
with the length of a JSON header (name -> dtype, shape, offsets), the header, then the values of all tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from launcher.manifest import FileEntry

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_PLAIN = {"format": "pt"}  # what transformers asks of a file
_PIECE_BYTES = 2**22
# Name -> dtype and shape.
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class HashedFile:
    """A new file that is written once, from its first byte to its last; flushed to the disk when it is closed.

    Raises:
        OSError: from any method; what was written stays there, for whoever removes the folder.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: Any) -> None:
        """Append bytes, or anything that shows its memory."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            self._digest.update(piece)
            self._file.write(piece)
        self._size += len(view)

    def close(self) -> FileEntry:
        """Everything on the disk; size and checksum of what was handed over."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return FileEntry(size_bytes=self._size, sha256=self._digest.hexdigest())

    def abandon(self) -> None:
        """Close it as it is."""
        with suppress(OSError):
            self._file.close()


def write_bytes(path: Path, data: bytes) -> FileEntry:
    """Write a small file."""
    file = HashedFile(path)
    try:
        file.write(data)
        return file.close()
    finally:
        file.abandon()


def write_tensors(
    path: Path, layout: Layout, values: Iterable[tuple[str, torch.Tensor]], metadata: Mapping[str, str] = _PLAIN
) -> FileEntry:
    """Write a safetensors file, a tensor at a time.

    Args:
        layout: dtype and shape of every tensor, in the order in which `values` hands them over.
        metadata: more that stands in the header.

    Raises:
        ValueError: a tensor is other than its layout says.
    """
    header: dict[str, Any] = {"__metadata__": {**_PLAIN, **metadata}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin where they can be mapped
    file = HashedFile(path)
    try:
        file.write(len(text).to_bytes(8, "little") + text)
        given = iter(values)
        for name, (dtype, shape) in layout.items():
            found, tensor = next(given)
            if (found, tensor.dtype, tuple(tensor.shape)) != (name, dtype, tuple(shape)):
                raise ValueError(
                    f"{name} was to come as {dtype} {shape}, {found} came as {tensor.dtype} {tensor.shape}"
                )
            file.write(_memory(tensor))
        return file.close()
    finally:
        file.abandon()


def layout_of(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Dtype and shape by name, the widest dtypes first: no value then lies across the boundary of its size."""
    ordered = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    return {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in ordered}


def _memory(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor, not copied where it lies on the CPU in one piece."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class TensorFile:
    """A safetensors file of which single values are read; nothing of it stays mapped or in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.layout = {name: (_DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()}
        self._start = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The values [start, stop) of a tensor as if it were flat, on the CPU."""
        dtype, shape = self.layout[name]
        stop = torch.Size(shape).numel() if stop is None else stop
        values = torch.empty(stop - start, dtype=dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start[name] + start * dtype.itemsize)
            view = memoryview(_memory(values))
            while view:
                done = file.readinto(view)
                if not done:
                    raise OSError(f"{self.path} ends within {name}")
                view = view[done:]
        return values

    def whole(self, name: str) -> torch.Tensor:
        """A tensor in its shape."""
        return self.read(name).view(self.layout[name][1])


class Copies:
    """Host memory for the copies of a checkpoint, kept for the next one: the system takes longer to hand it out than a copy takes.

    Args:
        group: the ranks' way to meet, over their CPUs, while the copies are written; None for one rank.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self._kept: dict[str, torch.Tensor] = {}

    def of(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, where that of the same key was; whoever asks for it is done with the one before."""
        kept = self._kept.get(key)
        if kept is None or (kept.dtype, kept.shape) != (tensor.dtype, tensor.shape):
            kept = self._kept[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return kept.copy_(tensor.detach())


class Staging(os.PathLike[str]):
    """The folder of a checkpoint that is being written, and what this rank has put there.

    An error is kept and no more is written after it: writing goes along with gathering, and a rank that left would let the others wait
    for ever. Whoever needs a path takes this object for one; a file written past it counts too, its checksum is then read back.

    Args:
        copies: where tensors are kept until `write` is called, perhaps by another thread; without it everything is written at once.
        share: this rank's place among those who share the writing of what all of them have, and how many these are. None for a rank
            that does not see the launcher's run directory: it writes what it alone has, beside its copy, and rank 0 takes that over.
    """

    def __init__(self, path: Path, copies: Copies | None = None, share: tuple[int, int] | None = (0, 1)) -> None:
        self.path = path
        self.copies = copies
        self.share = share
        self.files: dict[str, FileEntry] = {}
        self.error: Exception | None = None
        self._jobs: list[Callable[[], None]] = []

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def text(self, name: str, text: str) -> None:
        """A small file."""
        self._do(name, lambda: write_bytes(self.path / name, text.encode()))

    def tensors(self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] = _PLAIN) -> None:
        """A safetensors file. What is handed over may change afterwards."""
        layout = layout_of(tensors)
        if self.copies is not None:
            tensors = {key: self.copies.of(f"{name}/{key}", tensors[key]) for key in layout}
        values = ((key, tensors[key]) for key in layout)
        self._do(name, lambda: write_tensors(self.path / name, layout, values, metadata))

    def by_library(self, save: Callable[[Path], Any]) -> None:
        """Small files that a library writes: it gets a folder aside, and from there they go our way."""
        if self.error is not None:
            return
        aside = self.path / f".aside-{os.getpid()}"
        try:
            aside.mkdir()
            save(aside)
            content = {file.name: file.read_bytes() for file in sorted(aside.iterdir())}
        except (OSError, RuntimeError) as error:  # torch has errors of its own for a full disk
            self.error = error
            return
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        for name, data in content.items():
            self._do(name, lambda name=name, data=data: write_bytes(self.path / name, data))

    def put_off(self, job: Callable[[], None]) -> None:
        """Have something done by `write`, in every case: other ranks may take part in it."""
        self._jobs.append(job)

    def content(self) -> dict[str, bytes]:
        """The bytes of what this rank has written."""
        return {name: (self.path / name).read_bytes() for name in self.files}

    def write(self) -> None:
        """Do what was put off."""
        self.copies = None
        while self._jobs:
            self._jobs.pop(0)()

    def _do(self, name: str, write: Callable[[], FileEntry]) -> None:
        def job() -> None:
            if self.error is None:
                try:
                    self.files[name] = write()
                except OSError as error:
                    self.error = error

        if self.copies is not None:
            self._jobs.append(job)
        else:
            job()
