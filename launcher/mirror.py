"""A node that does not see the run directory: it gets a copy at the same path, and what its ranks write there is brought back.

There goes, as one stream of tar, what its ranks read: plan, recipe, what prepare left, the checkpoint to go on from; and, where the
recipe's data are not there, the prepared rows, for its cache. Back come heartbeats, errors and logs, a line of JSON for each that has
changed, through the agent: whoever looks at a run looks at the launcher's directory alone. Checkpoints are written there, too:
see `worker.checkpoint.saving`.

Only the standard library is imported, as by the agent.

python -m launcher.mirror give RUN NAME…    run/plan.json, cache/data-… -> tar on the output, here
python -m launcher.mirror take RUN OWNER    tar from the input -> the copy, there
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from launcher.rundir import RunDir, cache_folder, rename_or_yield

# What comes back: whole whenever it has changed, of logs what they have grown by.
_WHOLE = ("heartbeat/*.json", "errors/*.json", "errors/*.txt", "prepared-node*.json")
_GROWING = ("logs/*.log",)
_NAME = re.compile(r"(?:heartbeat|errors|logs)/[^./\0][^/\0]*|prepared-node\d+\.json")
_PIECE_BYTES = 2**16
_SHOWN = 3


def occupied(run: RunDir) -> str:
    """Why no copy can be put here; empty where there is nothing yet, or an earlier copy."""
    try:
        there = sorted(path.name for path in run.path.iterdir())
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not there or run.copy.exists():
        return ""
    more = "" if len(there) <= _SHOWN else f" and {len(there) - _SHOWN} more"
    return f"holds {', '.join(there[:_SHOWN])}{more} that are not this run's"


def give(run: RunDir, names: Sequence[str], into: IO[bytes]) -> None:
    """Write files and folders of the run directory (`run/…`) and of the cache (`cache/…`) as a stream."""
    with tarfile.open(fileobj=into, mode="w|", format=tarfile.PAX_FORMAT) as stream:
        for name in names:
            root, _, rest = name.partition("/")
            stream.add((run.path if root == "run" else cache_folder()) / rest, arcname=name)


def take(run: RunDir, owner: str, out_of: IO[bytes]) -> None:
    """Make the copy from a stream; what an earlier one has left of heartbeats, errors and checkpoints is gone.

    Args:
        owner: node and launcher that it is for.

    Raises:
        FileExistsError: the directory is not free, or another node of this run writes to it.
        OSError: it cannot be written.
    """
    if reason := occupied(run):
        raise FileExistsError(f"{run.path} {reason}")
    run.path.mkdir(parents=True, exist_ok=True)
    run.copy.write_text(owner, encoding="utf-8")
    for folder in (run.heartbeats, run.errors, run.checkpoints):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (run.heartbeats, run.errors, run.checkpoints, run.logs):
        folder.mkdir(exist_ok=True)
    for stale in run.path.glob("prepared*.json"):
        stale.unlink()
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    temporary = cache / f".sent.{os.getpid()}"
    try:
        with tarfile.open(fileobj=out_of, mode="r|") as stream:
            for member in stream:
                target = _target(member.name, run.path, temporary)
                source = stream.extractfile(member) if member.isfile() else None
                if source is not None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as file:
                        shutil.copyfileobj(source, file)
        for folder in temporary.iterdir() if temporary.is_dir() else ():
            rename_or_yield(folder, cache / folder.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if run.copy.read_text(encoding="utf-8") != owner:
        raise FileExistsError(f"{run.path} is shared with another host of this run, but not with the launcher's")


def _target(name: str, run: Path, cache: Path) -> Path:
    """Where a member of the stream goes: below the run directory or the cache, never beside them."""
    root, *parts = PurePosixPath(name).parts
    if root not in ("run", "cache") or not parts or ".." in parts:
        raise ValueError(f"{name!r} is no name of a run directory or cache")
    return (run if root == "run" else cache).joinpath(*parts)


class Mirror:
    """What has changed in a copy since the last look, at the node's end."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._seen: dict[Path, tuple[int, int]] = {}
        self._sent = {path: path.stat().st_size for path in self._files(_GROWING)}  # of earlier attempts

    def changes(self) -> Iterator[dict[str, Any]]:
        """name, text, and whether it is to be appended."""
        for path in self._files(_WHOLE):
            with contextlib.suppress(OSError):
                state = path.stat()
                if self._seen.get(path) != (state.st_mtime_ns, state.st_size):
                    yield self._told(path, path.read_bytes(), False)
                    self._seen[path] = (state.st_mtime_ns, state.st_size)
        for path in self._files(_GROWING):
            with contextlib.suppress(OSError):
                yield from self._growth(path)

    def _growth(self, path: Path) -> Iterator[dict[str, Any]]:
        """Whole lines, as long as there are; a piece without an end of line as it is."""
        start = self._sent.get(path, 0)
        if path.stat().st_size <= start:
            return
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(_PIECE_BYTES)
        data = data[: data.rfind(b"\n") + 1] or data
        self._sent[path] = start + len(data)
        yield self._told(path, data, True)

    def _files(self, patterns: Sequence[str]) -> list[Path]:
        return [path for pattern in patterns for path in self.run.path.glob(pattern)]

    def _told(self, path: Path, data: bytes, appended: bool) -> dict[str, Any]:
        text = data.decode(errors="replace")
        return {"name": path.relative_to(self.run.path).as_posix(), "text": text, "appended": appended}


def put(run: RunDir, change: dict[str, Any]) -> None:
    """Carry a change of a copy out in the launcher's directory. What is no name of such a file is left alone."""
    if not _NAME.fullmatch(change["name"]):
        return
    path = run.path / change["name"]
    with contextlib.suppress(OSError):  # a full disk is found by whoever has something to save
        if change["appended"]:
            with path.open("a", encoding="utf-8") as file:
                file.write(change["text"])
        else:
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(change["text"], encoding="utf-8")
            temporary.rename(path)


def main(argv: Sequence[str]) -> int:
    """Give or take; what went wrong is the last line on stderr."""
    run = RunDir(Path(argv[1]))
    try:
        if argv[0] == "give":
            give(run, argv[2:], sys.stdout.buffer)
        else:
            take(run, argv[2], sys.stdin.buffer)
    except (OSError, ValueError, tarfile.TarError) as error:
        said = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
        print(said, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
