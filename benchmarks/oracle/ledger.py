"""Which tensors are alive, how large they are, and which part of the memory they belong to."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.memory import Memory

_PARTS = [name.removesuffix("_bytes") for name in Memory.model_fields]


class Ledger(TorchDispatchMode):
    """Every storage that is alive, from the tensors that operations return; fake or real.

    `default` is the part that unknown storages belong to; `claim` moves storages to another part, also afterwards: a
    gradient is known as one only when the backward pass is over.
    """

    def __init__(self, logits_elements: int = 0) -> None:
        super().__init__()
        self.default = "activations"
        self.logits_elements = logits_elements
        self.serial: dict[int, int] = {}  # id of a living storage -> its number
        self.part: list[str] = []  # of every storage by number
        self.size: list[int] = []
        self.events: list[tuple[int, int]] = []  # number of the storage, bytes that came or went

    def __enter__(self) -> Ledger:
        resize = torch.UntypedStorage.resize_

        def seen(storage: Any, size: int) -> None:
            """FSDP empties and fills the same storage, and no operation shows it."""
            resize(storage, size)
            number = self.serial.get(id(storage))
            if number is not None and size != self.size[number]:
                self.events.append((number, size - self.size[number]))
                self.size[number] = size

        self._resizing = mock.patch.object(torch.UntypedStorage, "resize_", seen)
        self._resizing.start()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._resizing.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._see(tensor, func, args)
        return result

    def _see(self, tensor: torch.Tensor, func: Any, args: Any) -> None:
        storage = _storage(tensor)
        if id(storage) in self.serial:
            return
        part = self.default
        if part == "activations":
            if tensor.numel() == self.logits_elements:
                part = "logits"
            elif func is torch.ops.aten._to_copy.default and self._is_weight(args[0]):
                part = "buffers"  # autocast's own copy of a weight
            elif func is torch.ops.aten.empty.memory_format and tensor.dim() == 1:
                part = "buffers"  # FSDP gathers and reduces in flat ones
        self._add(storage, part)

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        number = self.serial.get(id(_storage(tensor)))
        return number is not None and self.part[number] in ("weights", "adapter")

    def _add(self, storage: Any, part: str) -> int:
        number = len(self.part)
        self.serial[id(storage)] = number
        self.part.append(part)
        self.size.append(storage.nbytes())
        self.events.append((number, storage.nbytes()))
        weakref.finalize(storage, self._gone, id(storage), number)
        return number

    def _gone(self, key: int, number: int) -> None:
        if self.serial.get(key) == number:
            del self.serial[key]
        self.events.append((number, -self.size[number]))

    def claim(self, part: str, tensors: Iterable[torch.Tensor | None]) -> None:
        """These tensors are of that part, and have been since they exist."""
        for tensor in tensors:
            if tensor is not None:
                storage = _storage(tensor)
                number = self.serial.get(id(storage))
                self.part[self._add(storage, part) if number is None else number] = part

    @contextlib.contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """New storages belong to that part meanwhile."""
        before, self.default = self.default, part
        yield
        self.default = before

    def memory(self) -> Memory:
        """The parts at the fullest moment."""
        return Memory(**{f"{part}_bytes": size for part, size in self.peak().items()})

    def peak(self) -> dict[str, int]:
        """Bytes by part at the fullest moment."""
        now = dict.fromkeys(_PARTS, 0)
        total = highest = 0
        fullest = dict(now)
        for number, change in self.events:
            now[self.part[number]] += change
            total += change
            if total > highest:
                highest, fullest = total, dict(now)
        return fullest


def _storage(tensor: torch.Tensor) -> Any:
    """The storage of a tensor; of a DTensor that of this rank's share."""
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()
