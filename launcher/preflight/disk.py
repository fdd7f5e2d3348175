"""Room on the disks that a plan writes to: the hub's cache, our cache, the run directory. What lies on one disk is added up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster import MIB
from launcher.modelshape.files import hub_cache
from launcher.plan import DTYPE_BYTES, Plan, checkpoint_bytes
from launcher.preflight.files import offline, to_fetch
from launcher.preflight.finding import Finding, size
from launcher.rundir import RunDir, cache_folder

_NEGLIGIBLE_BYTES = 16 * MIB


@dataclass(frozen=True)
class Need:
    """So many bytes are wanted in a folder; `elsewhere` is typed to have them in another one."""

    what: str
    folder: Path
    num_bytes: int
    why: str
    elsewhere: str
    perhaps_there: bool = False


def room(plan: Plan, run_dir: Path) -> Iterator[Finding]:
    """Whether each folder can be written and its disk has room, after what comes before it on the same disk."""
    taken: dict[int, int] = {}
    for need in _needs(plan, run_dir):
        problem = refusal(need.folder)
        if problem:
            yield Finding("error", need.what, f"cannot be written: {problem}", f"name another one: {need.elsewhere}")
            continue
        folder = first_folder(need.folder)
        disk = folder.stat().st_dev
        free = shutil.disk_usage(folder).free - taken.get(disk, 0)
        after = " after the above" if taken.get(disk) else ""
        found = f"{size(max(0, free))} free{after}, {size(need.num_bytes)} needed for {need.why}"
        taken[disk] = taken.get(disk, 0) + need.num_bytes
        if free >= need.num_bytes:
            yield Finding("ok", need.what, found)
        elif need.perhaps_there:
            yield Finding("warning", need.what, f"{found}, if an earlier run did not leave it there", need.elsewhere)
        else:
            yield Finding("error", need.what, found, f"make room there, or name another disk: {need.elsewhere}")


def first_folder(path: Path) -> Path:
    """The path itself, or the nearest parent that is there."""
    while not os.path.exists(path):  # False for a name that is too long, where Path.exists raises
        path = path.parent
    return path


def refusal(path: Path) -> str:
    """Why nothing can be written below that path; empty where something can."""
    folder = first_folder(path)
    if not folder.is_dir():
        return f"{folder} is no folder"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} may not be written by you"


def _needs(plan: Plan, run_dir: Path) -> Iterator[Need]:
    model, cache = plan.recipe.model, cache_folder()
    weights = plan.shape.stored_bytes or 2 * plan.shape.num_parameters  # public weights are in half precision
    if model.path is not None and not offline() and to_fetch(model):
        yield Need("hub cache", hub_cache(), weights, f"the download of {model.path}", "export HF_HOME=DIR")
    if model.path is None:
        weights = 4 * plan.shape.num_parameters
    if (plan.shape.native is not None or model.path is None) and weights > _NEGLIGIBLE_BYTES:
        kind, why = ("native", "the converted copy") if plan.shape.native is not None else ("model", "the random model")
        there = any(_folder_bytes(folder) >= 0.9 * weights for folder in cache.glob(f"{kind}-*"))
        yield Need(f"cache {cache}", cache, weights, why, "export LAUNCH_CACHE=DIR", there)
    yield _checkpoints(plan, run_dir)
    if (path := plan.recipe.strategy.nvme_path) is not None:
        yield Need(
            f"strategy.nvme_path {path}", Path(path), _offloaded(plan), "what is offloaded", "strategy.nvme_path=DIR"
        )


def _offloaded(plan: Plan) -> int:
    """A weight in fp32, its gradient and two moments for each trained value, and the weights if asked to; the share of this node."""
    weights = plan.shape.num_parameters * DTYPE_BYTES[plan.weights_dtype]
    whole = 4 * 4 * plan.trainable_parameters + (weights if plan.recipe.strategy.offload == "parameters" else 0)
    here = max(len(node.devices) for node in plan.cluster.nodes)
    return whole * min(here, plan.num_processes) // plan.num_processes


def _checkpoints(plan: Plan, run_dir: Path) -> Need:
    """The checkpoints that are kept, the best one under early stopping, and one more while it is written."""
    keep, one = plan.recipe.checkpoint.keep, checkpoint_bytes(plan)
    best = plan.recipe.train.early_stopping is not None
    there = _folder_bytes(RunDir(run_dir).checkpoints)
    why = f"{keep} + 1 checkpoints{' and the best one' if best else ''} of {size(one)}"
    if there:
        why += f", {size(there)} of it there already"
    elsewhere = f"launch.run_dir=DIR{', or keep fewer: checkpoint.keep=1' if keep > 1 else ''}"
    return Need(f"run directory {run_dir}", run_dir, max(0, (keep + 1 + best) * one - there), why, elsewhere)


def _folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, 0 where it is not there."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            total += os.path.getsize(path) if os.path.exists(path) else 0
    return total
