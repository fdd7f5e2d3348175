"""Between a tensor that is spread over the ranks (FSDP2) and the rows of it that this rank holds."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of_this_rank(tensor: DTensor) -> slice:
    """FSDP2 cuts the first dimension as torch.chunk does: the last ranks may get fewer rows, or none."""
    num_ranks, rank, num_rows = tensor.device_mesh.size(), tensor.device_mesh.get_local_rank(), tensor.shape[0]
    return slice(first_row_of(rank, num_ranks, num_rows), first_row_of(rank + 1, num_ranks, num_rows))


def first_row_of(rank: int, num_ranks: int, num_rows: int) -> int:
    """Where the rows of a rank begin."""
    return min(rank * -(-num_rows // num_ranks), num_rows)


def placed_like(like: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """This rank's rows as a tensor that is spread like another one; counts and the like stay what they are."""
    if not isinstance(like, DTensor) or rows.shape != like.to_local().shape:
        return rows
    return DTensor.from_local(
        rows.to(like.device_mesh.device_type),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
