"""Processes of a run: started so that they end with the launcher, and ended by pid and start time."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.rundir import RunDir, read_json, write_json

_PR_SET_PDEATHSIG = 1
# torchrun needs about a second to end its workers; ten are promised in all.
_GRACE_SECONDS = 6.0


@dataclass(frozen=True)
class NodeCommand:
    """What one node starts.

    Args:
        host: where.
        argv: the program and its arguments.
        env: variables set beside the inherited ones; never a setting of the recipe, never a secret.
        cwd: working directory.
    """

    host: str
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = ""

    def __str__(self) -> str:
        """A line that a shell runs the same way."""
        env = [f"{key}={shlex.quote(value)}" for key, value in self.env.items()]
        return " ".join([*(["env", *env] if env else []), shlex.join(self.argv)])


def start(command: NodeCommand, **streams: Any) -> subprocess.Popen[bytes]:
    """Start a command; the kernel ends it with this process (Linux)."""
    launcher, libc = os.getpid(), ctypes.CDLL(None)

    def die_with_launcher() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which is ignored in what a script starts with `&`
        # Asked for here, before the program's own start, so that a launcher killed meanwhile leaves nothing either (Linux).
        if sys.platform == "linux":
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != launcher:
                os._exit(1)

    # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which then ends the others in order.
    return subprocess.Popen(
        command.argv,
        env={**os.environ, **command.env},
        cwd=command.cwd,
        start_new_session=True,
        preexec_fn=die_with_launcher,
        **streams,
    )


def end(process: subprocess.Popen[bytes], recorded: list[dict[str, Any]]) -> None:
    """End a node's command and the ranks it recorded: politely, and after some seconds by force.

    By SIGINT: at SIGTERM, which schedulers send to whole trees of processes, torchrun does nothing and ranks save.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
    if process.poll() is None:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 2.0
    while (alive := [beat for beat in recorded if is_running(beat)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for beat in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(beat["pid"], signal.SIGKILL)


def recorded(run: RunDir, node: int = 0, ranks: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """pid and start time of every process of a node that has shown a sign of life; they say nothing about another host's processes.

    Args:
        ranks: of that node, where they are known: among hundreds of nodes each then reads its own files.
    """
    own = [run.node_heartbeat(node), *map(run.heartbeat, ranks)] if ranks is not None else run.heartbeats.glob("*.json")
    return [beat for path in own if (beat := read_json(path)) and beat.get("node", 0) == node]


def count_oom_kills(run: RunDir) -> None:
    """Write down how many processes the kernel has killed on this host for lack of memory since the first call for this run."""
    from launcher.cluster import oom_kills  # here: an agent that begins reads no table of cards

    path, now = run.oom_kills(socket.gethostname()), oom_kills()
    before = (read_json(path) or {"before": now})["before"]
    with contextlib.suppress(OSError):
        write_json(path, {"before": before, "kills": None if now is None or before is None else now - before})


def is_running(beat: dict[str, Any]) -> bool:
    """Whether the very process of a heartbeat is still there, not one that got its pid later."""
    try:
        stat = Path(f"/proc/{beat['pid']}/stat").read_text()
    except OSError:
        return False
    fields = stat.rpartition(")")[2].split()
    return fields[0] != "Z" and int(fields[19]) == beat["started"]
