"""What ZeRO-3's optimizer keeps on a disk: its flat tensors and their state come into host memory one at a time, to be read or changed.

DeepSpeed leaves what is smaller than a megabyte in host memory, whatever it was asked to do.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.errors import PreflightError
from launcher.plan import Plan

_BELOW = "zero_stage_3"  # what DeepSpeed writes to


@contextmanager
def own_folder(plan: Plan, rank: int, local_rank: int) -> Iterator[None]:
    """Keep other runs out of strategy.nvme_path, where all have the same names for their files, and leave nothing there.

    Entered before the ranks meet, so that the first of a node clears away what a killed run has left before the others write.

    Raises:
        PreflightError: another run is there, or another node where it is no disk of this one.
    """
    path = plan.recipe.strategy.nvme_path
    if path is None:
        yield
        return
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "in-use").open("w") as held:
        if local_rank == 0:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however it ends
            except BlockingIOError:
                found = "another run keeps what is offloaded there, or another node of this one"
                instead = "name a folder of its own, on a disk of each node: strategy.nvme_path=DIR"
                raise PreflightError(f"strategy.nvme_path: {path}", found, instead) from None
            shutil.rmtree(folder / _BELOW, ignore_errors=True)
        try:
            yield
        finally:
            for mine in folder.glob(f"{_BELOW}/*/rank{rank}"):
                shutil.rmtree(mine, ignore_errors=True)


def is_swapped(engine: Any, group: int) -> bool:
    """Whether a flat tensor lies on a disk, and is empty but while the optimizer steps on it."""
    swappable = getattr(engine.optimizer, "_swappable_optimizer_subgroup", None)  # no stage but the third has any
    return swappable is not None and bool(swappable(group))


@contextmanager
def in_memory(engine: Any, group: int, changed: bool = False) -> Iterator[None]:
    """Have a flat tensor of the optimizer and its state in host memory, and write it back where it is changed."""
    optimizer, is_on_disk = engine.optimizer, is_swapped(engine, group)
    if is_on_disk:
        optimizer._optimizer_states_and_gradient_swap_in(group)
    try:
        yield
    finally:
        if is_on_disk and changed:
            optimizer._optimizer_states_and_gradient_swap_out(group)
        elif is_on_disk:
            optimizer._release_swap_buffers(group)


def missing(engine: Any) -> str | None:
    """A file that has to hold a flat tensor and does not; None where all do."""
    swapper = engine.optimizer.optimizer_swapper
    for group, flat in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
        if is_swapped(engine, group):
            num_bytes = 4 * engine.optimizer.fp16_partitioned_groups_flat_numel[group]
            for path in swapper.swap_params_info[flat.ds_id].get_swap_paths():
                if not os.path.exists(path) or os.path.getsize(path) < num_bytes:
                    return str(path)
    return None
