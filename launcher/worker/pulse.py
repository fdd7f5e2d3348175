"""What a rank leaves on disk while it lives and when it fails: heartbeat/<rank>.json, errors/<rank>.json and errors/stacks-<rank>.txt.

The supervisor reads them; they name the process by pid and start time, so that no other process is ever taken for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.cluster import available_memory_bytes
from launcher.errors import LaunchError
from launcher.rundir import GO, RunDir, write_json

_PR_SET_PDEATHSIG = 1
_SECONDS_BETWEEN = 0.5


class Pulse:
    """The heartbeat of one rank: in which phase it is, at which step, and how many signs of life it has given there.

    Args:
        run: where it is written.
        rank: global rank, from torchrun's variables; 0 for a single process.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.phase = "start"
        self.step = 0
        # Of the micro batch that is being worked on: rows, tokens in a row, and where the rows stand in the recipe's data.
        self.batch: tuple[int, int, list[str]] | None = None
        # What says how full this rank's devices are.
        self.device_memory: Callable[[], dict[str, int]] = dict
        self._beats = 0
        self._time, self._last = time.time(), time.monotonic()
        self._began, self._written = self._last, 0.0
        self._longest: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._identity = {
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "host": socket.gethostname(),
            "node": own_node(),
            "rank": self.rank,
        }

    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        """Say that this rank lives. A new phase is written at once, the rest at most twice a second."""
        now, phase = time.monotonic(), phase or self.phase
        with self._lock:
            changed = phase != self.phase
            measured = "train" if self.phase == "first_step" else self.phase
            self._longest[measured] = max(self._longest.get(measured, 0.0), now - self._last)
            if changed:
                self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._began
                self._began, self.phase, self.batch = now, phase, None
            moved = step is not None and step != self.step
            self.step = self.step if step is None else step
            self._beats = 0 if changed or moved else self._beats + 1
            self._time, self._last = time.time(), now
            if changed or now - self._written >= _SECONDS_BETWEEN:
                self._write(now)

    def keep(self) -> None:
        """From now on write down what `beat` has left out, so that a rank that stands still has said where; and, at SIGUSR2, where each
        of its threads is. That is done in C by whichever thread has the signal: no thread has to be able to go on for it."""
        stacks = self.run.stacks(self.rank).open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True, chain=False)
        threading.Thread(target=self._keep, daemon=True, name="pulse").start()

    def _keep(self) -> None:
        while True:
            time.sleep(_SECONDS_BETWEEN)
            with self._lock:
                if self._written < self._last:
                    self._write(time.monotonic())

    def _write(self, now: float) -> None:
        """No fsync: after a crash of the machine nobody needs it, and a disk must not slow a step down."""
        self._written = now
        path = self.run.heartbeat(self.rank)
        temporary = path.with_name(f".{path.name}.tmp")
        seconds = {**self._seconds, self.phase: self._seconds.get(self.phase, 0.0) + now - self._began}
        told = {
            **self._identity,
            "phase": self.phase,
            "step": self.step,
            "beats": self._beats,
            "time": self._time,
            "longest": self._longest.get(self.phase),
            "memory": memory(),
            "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        }
        with contextlib.suppress(OSError):  # a full disk is found by whoever has something to save
            temporary.write_text(json.dumps(told))
            temporary.rename(path)

    def failed(self, error: BaseException, device: str) -> int:
        """Write errors/<rank>.json; the exit code of this rank."""
        taken = memory()
        exit_code = error.exit_code if isinstance(error, LaunchError) else 1
        parts = (
            {"you_set": error.you_set, "found": error.found, "to_type": error.to_type}
            if isinstance(error, LaunchError)
            else {}
        )
        told = {
            **self._identity,
            "local_rank": self.local_rank,
            "device": device,
            "time": time.time(),
            "phase": self.phase,
            "step": self.step,
            "type": f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins."),
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
            "exit_code": exit_code,
            "memory": {**taken, **self.device_memory()},
            "batch": self.batch,
            **parts,
        }
        with contextlib.suppress(OSError):  # on a full disk the exit code has to do
            write_json(self.run.error(self.rank), told)
        return exit_code


def own_node() -> int:
    """The number of this rank's node, from torchrun's variables."""
    return int(os.environ.get("GROUP_RANK", "0"))


def memory() -> dict[str, int]:
    """Bytes of host memory that this process has, and that are left for all."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        pages = 0
    return {"rss": pages * os.sysconf("SC_PAGE_SIZE"), "available": available_memory_bytes()}


def process_start(pid: int) -> int:
    """Start time of a process in clock ticks since boot (field 22 of /proc/PID/stat), 0 where there is no /proc."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(values.rpartition(")")[2].split()[19])


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent ends, so that a killed launcher leaves no orphan (Linux).

    Args:
        parent: pid of who started it, where that is known; without it a parent that ended before this call is not missed.
    """
    if sys.platform == "linux":
        parent = parent or os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), signal.SIGKILL)


def wait_for_go() -> None:
    """Wait until the supervisor says that the node is prepared; ends this process where the supervisor ended instead."""
    if os.read(0, len(GO)) != GO:
        sys.exit(128 + signal.SIGHUP)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def log_to(path: Path) -> None:
    """Send everything this process prints, C libraries included, to its own log file, a line at a time."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # a rank that is killed leaves its last words
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def first_line(value: Any) -> str:
    """The first line of a message that may be long."""
    return (str(value).strip().splitlines() or [""])[0]
