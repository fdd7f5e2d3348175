"""A sharded model's weights in a checkpoint that is written in the background: training waits for copies of each rank's share alone.

The shares become whole tensors while training goes on, by way of the ranks' CPUs (gloo), on whichever rank writes their file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from launcher.worker.checkpoint import Staging
from launcher.worker.dtensors import first_row_of


@dataclass(frozen=True)
class Share:
    """A copy of this rank's run of a weight's values.

    Args:
        shape: of the whole weight.
        values: flat, on the CPU.
        ends: for each rank the place behind its last value in the flat weight.
    """

    shape: tuple[int, ...]
    values: torch.Tensor
    ends: tuple[int, ...]


def can_be_copied(model: torch.nn.Module) -> bool:
    """Whether this rank's share of every weight is in memory; ZeRO-3 can keep it on a disk."""
    return all(not _on_disk(parameter) for parameter in model.parameters())


def put_off(folder: Staging, files: Mapping[str, list[str]], model: torch.nn.Module) -> None:
    """Copy this rank's share of all weights; `folder` has the files (name -> names of their weights) made of them when it is written.

    Every rank has to call it. A rank then holds one file's tensors at a time, beside its share.
    """
    assert folder.copies is not None
    group, num_ranks = folder.copies.group, dist.get_world_size()
    shares = {name: _share(folder, name, parameter) for name, parameter in model.named_parameters()}
    pending = list(files.items())
    for start in range(0, len(pending), num_ranks):
        together = pending[start : start + num_ranks]
        folder.put_off(lambda together=together: _write(folder, together, shares, group))


def _share(folder: Staging, name: str, parameter: Any) -> Share:
    assert folder.copies is not None
    num_ranks = dist.get_world_size()
    if isinstance(parameter, DTensor):
        shape, mine = tuple(parameter.shape), parameter.to_local()
        row = parameter.numel() // max(1, parameter.shape[0])
        ends = [first_row_of(rank + 1, num_ranks, parameter.shape[0]) * row for rank in range(num_ranks)]
    else:  # ZeRO-3: flat, cut into equal parts, the last ones filled up
        shape, mine = tuple(parameter.ds_shape), parameter.ds_tensor
        size, total = math.ceil(parameter.ds_numel / num_ranks), int(parameter.ds_numel)
        ends = [min((rank + 1) * size, total) for rank in range(num_ranks)]
    length = _length(ends, dist.get_rank())
    return Share(shape, folder.copies.of(f"share/{name}", mine.reshape(-1)[:length]), tuple(ends))


def _write(folder: Staging, together: list[tuple[str, list[str]]], shares: Mapping[str, Share], group: Any) -> None:
    """Files that are written at the same time, by a rank each."""
    mine: dict[str, torch.Tensor] = {}
    for writer, (_, names) in enumerate(together):
        for name in names:
            whole = _put_together(shares[name], writer, group)
            if whole is not None:
                mine[name] = whole
    if mine:
        folder.tensors(together[dist.get_rank()][0], mine)


def _put_together(share: Share, writer: int, group: Any) -> torch.Tensor | None:
    """The whole weight on the rank that writes it, None on the others."""
    rank = dist.get_rank()
    if rank != writer:
        if share.values.numel():
            dist.send(_bytes(share.values), writer, group)
        return None
    whole = torch.empty(share.ends[-1], dtype=share.values.dtype)
    for other, end in enumerate(share.ends):
        part = whole[end - _length(share.ends, other) : end]
        if other == rank:
            part.copy_(share.values)
        elif part.numel():
            dist.recv(_bytes(part), other, group)
    return whole.view(share.shape)


def _length(ends: Any, rank: int) -> int:
    return int(ends[rank] - (ends[rank - 1] if rank else 0))


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.uint8)


def _on_disk(parameter: Any) -> bool:
    part = getattr(parameter, "ds_tensor", None)
    return part is not None and getattr(part, "final_location", None) == "nvme"
