"""The name of every file in a run directory, and the two ways files are written there: whole and renamed, or appended.

recipe.yaml        the resolved recipe           plan.json        what the workers read
deepspeed.json     DeepSpeed's own settings, under zero1, zero2 and zero3
prepared.json      what prepare left for them    environment.json versions and devices
commands.txt       every command line started    logs/            <host>-rank<k>.log, <host>-node.log, launcher.log
events.jsonl       what happened, a line each    errors/          <rank>.json of a rank that failed, node<k>.json: how they ended;
                                                                  stall.json, stacks-<rank>.txt
heartbeat/         <rank>.json, pid and phase    tensorboard/     one writer
checkpoints/       step-N/ with manifest.json    report.json      the end of the story
export/            merged weights                run.lock         held while a launcher works here
save-now           made by anybody: a checkpoint when this step is done
stop-now           the same, and then the end
prepared-node<k>.json  the same as prepared.json for another node, where there are several
mirrored.json      nodes that do not see this directory and have a copy of it; .copy: this one is such a copy
job.sbatch         under --slurm: the job            hosts            its nodes, written by it
code/              <sha256>/: the model's own .py files, read-only
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import PreflightError, UsageError

# The one thing that is said and not written: a node's command started with WAIT loads its libraries, and reads GO from its input when
# the node is prepared.
WAIT, GO = "--wait", b"go\n"
# In a checkpoint: where a stream of rows is gone on with.
STREAM_FILE = "stream.json"


@dataclass(frozen=True)
class RunDir:
    """Paths below one run directory; nothing is created by naming it."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def deepspeed(self) -> Path:
        return self.path / "deepspeed.json"

    @property
    def prepared(self) -> Path:
        return self.path / "prepared.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def commands(self) -> Path:
        return self.path / "commands.txt"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def errors(self) -> Path:
        return self.path / "errors"

    @property
    def heartbeats(self) -> Path:
        return self.path / "heartbeat"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def save_now(self) -> Path:
        return self.path / "save-now"

    @property
    def stop_now(self) -> Path:
        return self.path / "stop-now"

    @property
    def rehearsal_rows(self) -> Path:
        """What a rehearsal learns where the recipe's rows are not here."""
        return self.path / "rehearsal-rows.json"

    @property
    def word(self) -> Path:
        """What the launcher of several nodes writes, and every node answers by `word_of`: that they see the same directory."""
        return self.path / ".word"

    def word_of(self, node: int) -> Path:
        return self.path / f".word-{node}"

    def prepared_on(self, node: int) -> Path:
        """What prepare left for the ranks of a node; the first one's, or one with its own disks."""
        return self.path / f"prepared-node{node}.json" if node else self.prepared

    @property
    def mirrored(self) -> Path:
        """The numbers of the nodes that have a copy of their own of this directory."""
        return self.path / "mirrored.json"

    @property
    def copy(self) -> Path:
        """Stands in such a copy, and nowhere else."""
        return self.path / ".copy"

    def node_heartbeat(self, node: int) -> Path:
        """Of the process that the ranks of a node belong to."""
        return self.heartbeats / f"node{node}.json"

    def node_error(self, node: int) -> Path:
        """How the ranks of a node ended, or why it was lost."""
        return self.errors / f"node{node}.json"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def module_cache(self) -> Path:
        """What transformers is told is its module cache: a folder that stays empty and read-only."""
        return self.code / "no-module-cache"

    @property
    def launcher_log(self) -> Path:
        """What a launcher prints that has no terminal (`--detach`)."""
        return self.logs / "launcher.log"

    def rank_log(self, host: str, rank: int) -> Path:
        return self.logs / f"{host}-rank{rank}.log"

    def node_log(self, host: str) -> Path:
        return self.logs / f"{host}-node.log"

    def error(self, rank: int) -> Path:
        return self.errors / f"{rank}.json"

    def stacks(self, rank: int) -> Path:
        """Where the threads of a rank were when somebody asked (SIGUSR2)."""
        return self.errors / f"stacks-{rank}.txt"

    def state(self, rank: int) -> Path:
        """What the kernel said of a rank's process then."""
        return self.errors / f"state-{rank}.json"

    @property
    def stacks_asked(self) -> Path:
        """Made by the supervisor: every node is to have the stacks of its ranks written."""
        return self.errors / "stacks-asked"

    @property
    def stall(self) -> Path:
        return self.errors / "stall.json"

    def oom_kills(self, host: str) -> Path:
        """How many processes the kernel has killed on a host for lack of memory while the run went."""
        return self.errors / f"oom-{host}.json"

    def heartbeat(self, rank: int) -> Path:
        return self.heartbeats / f"{rank}.json"

    def create(self) -> None:
        """Make the directory and the folders that ranks write to.

        Raises:
            PreflightError: it cannot be written to.
        """
        try:
            for folder in (self.path, self.logs, self.errors, self.heartbeats, self.tensorboard, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-test-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise PreflightError(
                f"run directory {self.path}",
                f"cannot be written: {error.strerror}",
                "name another one: launch.run_dir=/path/with/space",
            ) from None

    def claimed(self) -> RunDir:
        """A new directory of this name, or of this name and a number where another launch was quicker."""
        for number in range(1, 1000):
            path = self.path if number == 1 else self.path.with_name(f"{self.path.name}-{number}")
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
                return RunDir(path)
        return self

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run directory for this process. The lock ends with the process, however it ends.

        Raises:
            PreflightError: another launcher holds it.
        """
        try:
            lock = (self.path / "run.lock").open("a+")
        except OSError as error:
            raise PreflightError(
                f"run directory {self.path}",
                f"run.lock cannot be written: {error.strerror}",
                "make it writable, or name another one: launch.run_dir=DIR",
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                owner = lock.read().strip() or "another launcher"
                raise PreflightError(
                    f"run directory {self.path}",
                    f"is in use by {owner}",
                    "wait for it, or name another one: launch.run_dir=DIR",
                ) from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield
            lock.truncate(0)

    def owner(self) -> str | None:
        """Who works here, as `process 4711 on node-a`; None where nobody does."""
        try:
            with (self.path / "run.lock").open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return lock.read().strip() or "another launcher"
        except FileNotFoundError:
            pass
        return None


def rename_or_yield(temporary: Path, target: Path) -> None:
    """Give a finished folder its name, unless somebody else was faster with theirs."""
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def cache_folder() -> Path:
    """Where prepared things are kept: $LAUNCH_CACHE, else below the user's cache folder."""
    root = os.environ.get("LAUNCH_CACHE")
    folder = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "launch"
    return folder.expanduser().absolute()


def open_run(name: str | Path) -> RunDir:
    """The run directory that a person named.

    Raises:
        UsageError: it is none.
    """
    run = RunDir(Path(os.path.expanduser(name)).resolve())
    if not os.path.isfile(run.plan):  # False for a name that is too long, where Path.is_file raises
        found = "holds no plan.json" if os.path.isdir(run.path) else "there is no such folder"
        raise UsageError(f"run {name}", found, "give the folder of a run; list them with: launch runs")
    return run


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file: a reader sees the old one or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, indented for people."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file, None where there is none or it is torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def append_event(run: RunDir, event: dict[str, Any]) -> None:
    """Add a line to events.jsonl; one write call, so lines of several processes do not mix."""
    line = json.dumps(event, ensure_ascii=False).encode() + b"\n"
    with run.events.open("ab+") as file:
        # A full disk may have cut the line before; it must not take this one with it.
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def read_events(run: RunDir, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The events from a byte offset on, and the offset after the last whole line. A line that was cut is passed over."""
    if not run.events.is_file():
        return [], offset
    with run.events.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    events = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events, offset + len(whole)
