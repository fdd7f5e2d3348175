"""Commits checkpoints/step-N: a staging folder, every rank's files flushed by that rank, a meeting, the manifest last, one rename."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from launcher.manifest import (
    FILE_NAME,
    FileEntry,
    Manifest,
    best_first,
    describe_file,
    folders,
    set_aside,
    sync_folder,
    verify,
)
from launcher.plan import Plan, checkpoint_bytes, identity
from launcher.rundir import RunDir, append_event, read_json
from launcher.worker.checkpoint.files import Copies, Staging, write_bytes

_STAGING, _DELETING = ".staging-", ".deleting-"


Join = Callable[[Path], None]


@dataclass(frozen=True)
class Position:
    """Where in training a checkpoint is taken; `eval_loss` is the newest one, None before the first."""

    step: int
    epoch: float
    rows_key: str
    eval_loss: float | None


class NotSavedError(OSError):
    """A checkpoint that was not committed: raised on every rank, with the reason of the first; older ones are as they were."""


def save_checkpoint(
    run: RunDir, plan: Plan, at: Position, write: Callable[[Staging], None], join: Join | None = None
) -> Path:
    """Commit checkpoints/step-N. Called by every rank; `write` puts this rank's files into the folder it is given, then `join` on rank 0
    makes of them what it has to be.

    Raises:
        NotSavedError: a file could not be written; the staging folder is removed and nothing older is touched.
    """
    return commit(run, plan, at, stage(run, plan, at, write), join)


class Saver:
    """Saves the checkpoints of a run, one at a time; under checkpoint.async while training goes on. Every rank makes the same calls.

    Args:
        join: see `save_checkpoint`.
    """

    def __init__(self, run: RunDir, plan: Plan, join: Join | None = None) -> None:
        self.run = run
        self.plan = plan
        self.join = join
        later = plan.recipe.checkpoint.async_
        # A day: whoever has written waits in another thread for whoever has not, and a dead rank is noticed by training.
        wait = timedelta(days=1)
        self._group = dist.new_group(backend="gloo", timeout=wait) if later and dist.is_initialized() else None
        self._copies = Copies(self._group) if later else None
        self._thread = ThreadPoolExecutor(1, "save")
        self._pending: Future[Path] | None = None

    def save(self, at: Position, write: Callable[[Staging], None]) -> None:
        """Commit a checkpoint, or copy what belongs to it and have it committed. The one before has to be finished.

        Raises:
            NotSavedError: it could not be written, or not begun.
        """
        folder = stage(self.run, self.plan, at, write, self._copies)
        if self._copies is not None:
            self._pending = self._thread.submit(
                commit, self.run, self.plan, at, folder, join=self.join, group=self._group
            )
        else:
            commit(self.run, self.plan, at, folder, self.join)

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint that was being written in the background is known not to have been."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            NotSavedError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def stage(
    run: RunDir, plan: Plan, at: Position, write: Callable[[Staging], None], copies: Copies | None = None
) -> Staging:
    """Make the staging folder and have this rank's files written, or copied to be written later.

    Raises:
        NotSavedError: there can be no folder, or there is no room for what belongs into it.
    """
    folder = Staging(run.checkpoints / f"{_STAGING}step-{at.step}", copies, _share(run, plan))
    error = _begun(run, plan, folder.path) if _rank() == 0 else None
    _require(at, gathered(error))
    try:
        if folder.share is None:
            folder.path.mkdir(parents=True, exist_ok=True)
        write(folder)
    except (OSError, RuntimeError, SafetensorError) as failure:
        # torch and safetensors have errors of their own for a full disk.
        folder.error = folder.error or failure
    return folder


def commit(run: RunDir, plan: Plan, at: Position, folder: Staging, join: Join | None = None, group: Any = None) -> Path:
    """Write what was put off, meet, and give the folder its name; every rank calls it.

    Args:
        group: the ranks' way to meet; one of its own in another thread.

    Raises:
        NotSavedError: on every rank, where one of them could not write.
    """
    target = run.checkpoints / f"step-{at.step}"
    folder.write()
    found = gathered(_told(folder), group)
    error = next((message for message, _, _ in found if message), None)
    if _rank() == 0:
        error = error or _taken_over(folder.path, [content for _, _, content in found])
        if error is None:
            files = {name: entry for _, mine, _ in found for name, entry in mine.items()}
            manifest = _manifest(plan, at, len(found)).model_copy(update={"files": files})
            error = _committed(folder.path, target, manifest, join)
        if error is None:
            with suppress(OSError):  # it is saved, and may have taken the last room there was
                append_event(run, {"event": "save", "time": time.time(), "step": at.step})
            _rotate(run, plan, target)
        else:
            shutil.rmtree(folder.path, ignore_errors=True)
    errors = gathered(error, group)
    if folder.share is None:  # by now every rank of this node has been heard
        shutil.rmtree(folder.path, ignore_errors=True)
    _require(at, errors)
    return target


def _share(run: RunDir, plan: Plan) -> tuple[int, int] | None:
    """This rank's place among those that see the launcher's run directory, and how many these are; None for one that does not."""
    copies = (read_json(run.mirrored) or {}).get("nodes", [])
    apart = {rank for node in copies for rank in plan.cluster.ranks_of(node)}
    writing = [rank for rank in range(dist.get_world_size() if dist.is_initialized() else 1) if rank not in apart]
    return (writing.index(_rank()), len(writing)) if _rank() in writing else None


def _told(folder: Staging) -> tuple[str | None, dict[str, FileEntry], dict[str, bytes]]:
    """What this rank tells the others: why it could not write, what it has written, and that itself where nobody else can read it."""
    content: dict[str, bytes] = {}
    if folder.share is None:
        try:
            content = folder.content()
        except OSError as error:
            folder.error = folder.error or error
    return f"rank {_rank()}: {folder.error}" if folder.error else None, folder.files, content


def _taken_over(folder: Path, contents: Sequence[dict[str, bytes]]) -> str | None:
    """Write what ranks on other disks have sent; why it could not be done."""
    try:
        for content in contents:
            for name, data in content.items():
                write_bytes(folder / name, data)
    except OSError as error:
        return f"rank 0: {error}"
    return None


def _require(at: Position, errors: list[str | None]) -> None:
    if errors[0] is not None:
        raise NotSavedError(f"checkpoint step-{at.step} was not saved: {errors[0]}")


def _begun(run: RunDir, plan: Plan, folder: Path) -> str | None:
    """Make the folder, and remove what earlier attempts left half done; why it cannot be done."""
    try:
        run.checkpoints.mkdir(exist_ok=True)
        for left in run.checkpoints.iterdir():
            if left.name.startswith((_STAGING, _DELETING)):
                shutil.rmtree(left)
        free, needed = shutil.disk_usage(run.checkpoints).free, _expected_bytes(run, plan)
        if free < needed:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free:,} bytes free, {needed:,} needed")
        folder.mkdir()
    except OSError as error:
        return f"rank 0: {error}"
    return None


def _expected_bytes(run: RunDir, plan: Plan) -> int:
    """Bytes of the checkpoint before, which the next one is as large as; before the first what the plan expects."""
    known = (verify(folder, every_byte=False).manifest for folder in folders(run))
    return next((manifest.size_bytes for manifest in known if manifest is not None), checkpoint_bytes(plan))


def _manifest(plan: Plan, at: Position, num_ranks: int) -> Manifest:
    return Manifest(
        step=at.step,
        epoch=at.epoch,
        rows_key=at.rows_key,
        identity=identity(plan),
        eval_loss=at.eval_loss,
        world={
            "num_processes": num_ranks,
            "strategy": plan.strategy,
            "micro_batch": plan.micro_batch,
            "accumulation": plan.accumulation,
        },
        files={},
    )


def _committed(staging: Path, target: Path, manifest: Manifest, join: Join | None) -> str | None:
    """Manifest, flush, rename; why it could not be done."""
    try:
        if join is not None:
            join(staging)
        files = {**_written_past_us(staging, manifest), **manifest.files}
        whole = manifest.model_copy(update={"files": dict(sorted(files.items()))}).sealed()
        write_bytes(staging / FILE_NAME, whole.model_dump_json(indent=1).encode() + b"\n")
        sync_folder(staging)
        if target.exists():
            set_aside(target)  # only a damaged folder can be in the way: a valid one would have been resumed from
        staging.rename(target)
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        return f"rank 0: {error}"
    return None


def _written_past_us(staging: Path, manifest: Manifest) -> dict[str, Any]:
    """Files that a library wrote into the folder itself: flushed, given the permissions of other files, and read back."""
    umask = os.umask(0)
    os.umask(umask)
    found = {}
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        name = str(path.relative_to(staging))
        if name not in manifest.files:
            path.chmod(0o666 & ~umask)  # safetensors writes 0600, which locks colleagues out of a shared folder
            with path.open("rb") as file:
                os.fsync(file.fileno())
            found[name] = describe_file(path)
    return found


def _rotate(run: RunDir, plan: Plan, newest: Path) -> None:
    """Delete what is older than `keep` complete checkpoints; the best one stays, and folders without a manifest are not counted."""
    with suppress(OSError):  # what cannot be deleted now is tried again after the next save
        for folder in folders(run):
            if folder == newest:
                break
            set_aside(
                folder
            )  # of a later step than the one just committed: passed over on resume, it counts for nothing
        complete = [folder for folder in folders(run) if (folder / FILE_NAME).is_file()]
        best = [folder for _, folder in best_first(run)[:1]]
        for folder in complete[plan.recipe.checkpoint.keep :]:
            if folder not in best:
                # The name goes first: a half-deleted folder must not look like a checkpoint.
                doomed = folder.with_name(f"{_DELETING}{folder.name}")
                folder.rename(doomed)
                shutil.rmtree(doomed)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gathered(value: Any, group: Any = None) -> list[Any]:
    """The value of every rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values
