"""The commit marker of a checkpoint: which files make it up, of what size and checksum, and what they continue.

A checkpoint folder counts when its manifest.json is there and every file in it has the bytes the manifest says. The manifest is
written last into a staging folder, which is then renamed; so a folder named step-N without a manifest never came from us.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.rundir import RunDir, read_json

FILE_NAME = "manifest.json"
_STEP = re.compile(r"step-(\d+)")


class FileEntry(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint is.

    Args:
        step: optimizer steps done.
        rows_key: hash of the training rows (`launcher.worker.prepared`).
        identity: recipe values that must be the same to continue (`launcher.plan.identity`).
        world: layout of the ranks that wrote it: num_processes, strategy, micro_batch, accumulation.
        eval_loss: the last evaluation before it, in nats per supervised token; None before the first.
        files: relative name -> entry.
        seal: checksum of all the rest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    epoch: float
    rows_key: str
    identity: dict[str, Any]
    world: dict[str, Any]
    eval_loss: float | None
    files: dict[str, FileEntry]
    seal: str = ""

    def sealed(self) -> Manifest:
        """The same with its checksum."""
        return self.model_copy(update={"seal": self._checksum()})

    @property
    def is_intact(self) -> bool:
        """Whether it is what was written."""
        return self.seal == self._checksum()

    def _checksum(self) -> str:
        value = self.model_dump(mode="json", exclude={"seal"})
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files.values())


@dataclass(frozen=True)
class Verdict:
    """A folder in checkpoints/ and whether it may be used; `problem` is None for a valid one."""

    folder: Path
    step: int
    manifest: Manifest | None
    problem: str | None


def describe_file(path: Path) -> FileEntry:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileEntry(size_bytes=path.stat().st_size, sha256=digest.hexdigest())


def verify(folder: Path, every_byte: bool = True) -> Verdict:
    """Compare a checkpoint folder with its manifest: every byte of it, or which files there are and their sizes."""
    match = _STEP.fullmatch(folder.name)
    step = int(match.group(1)) if match else -1
    value = read_json(folder / FILE_NAME)
    if value is None:
        found = (
            "its manifest is torn" if (folder / FILE_NAME).exists() else "it has no manifest: the save did not finish"
        )
        return Verdict(folder, step, None, found)
    try:
        manifest = Manifest.model_validate(value)
    except ValidationError:
        return Verdict(folder, step, None, "its manifest is from another version")
    if manifest.step != step:
        return Verdict(folder, step, None, f"its manifest says step {manifest.step}")
    if not manifest.is_intact:
        return Verdict(folder, step, None, "its manifest is not what was written")
    for name, entry in manifest.files.items():
        problem = _compare(folder / name, name, entry, every_byte)
        if problem:
            return Verdict(folder, step, manifest, problem)
    return Verdict(folder, step, manifest, None)


def _compare(path: Path, name: str, entry: FileEntry, every_byte: bool) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry.size_bytes:
        return f"{name} has {size:,} of {entry.size_bytes:,} bytes"
    if not every_byte:
        return None
    try:
        same = describe_file(path).sha256 == entry.sha256
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if same else f"{name} has other bytes than its manifest says"


def folders(run: RunDir) -> list[Path]:
    """The checkpoint folders of a run, newest step first; staging folders are none."""
    if not run.checkpoints.is_dir():
        return []
    found = [(int(match.group(1)), path) for path in run.checkpoints.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def set_aside(folder: Path) -> Path:
    """Take a checkpoint's name away from a folder that cannot be used; it stays for whoever looks into it."""
    place = 1
    while (aside := folder.with_name(f"{folder.name}.damaged-{place}")).exists():
        place += 1
    return folder.rename(aside)


def newest_valid(run: RunDir, identity: dict[str, Any] | None = None) -> tuple[Verdict | None, list[Verdict]]:
    """The newest checkpoint that may be used, and the newer ones that were passed over.

    Args:
        identity: what the run's checkpoints have to agree with (`launcher.plan.identity`). A folder from another run is passed over
            where there is an older one of this run; where none agrees the recipe has changed, and the newest one can say how.
    """
    skipped: list[Verdict] = []
    stranger: tuple[Verdict, list[Verdict]] | None = None
    for folder in folders(run):
        verdict = verify(folder)
        if verdict.problem is None and verdict.manifest is not None:
            theirs = verdict.manifest.identity
            if identity is None or all(identity[key] == theirs[key] for key in identity if key in theirs):
                return verdict, skipped
            stranger = stranger or (verdict, list(skipped))
            verdict = replace(verdict, problem="it is of another run, with other values in its recipe")
        skipped.append(verdict)
    return stranger or (None, skipped)


def newest_whole(run: RunDir) -> Path | None:
    """The newest checkpoint by its manifest and the sizes of its files: enough to name it, and no look at a run reads gigabytes. Whoever
    goes on from one asks `newest_valid`."""
    return next((folder for folder in folders(run) if verify(folder, every_byte=False).problem is None), None)


def best_first(run: RunDir) -> list[tuple[float, Path]]:
    """(evaluation loss, folder) of every committed checkpoint that has one, best first, the earlier of two equals first."""
    found = []
    for folder in folders(run):
        value = read_json(folder / FILE_NAME)
        loss = value.get("eval_loss") if isinstance(value, dict) else None
        if isinstance(loss, float):
            found.append((loss, value["step"], folder))
    return [(loss, folder) for loss, _, folder in sorted(found)]


def sync_folder(path: Path) -> None:
    """Make a rename or a new name in a folder survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
