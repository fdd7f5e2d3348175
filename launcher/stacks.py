"""Where ranks are that stand still: asked of every rank of this machine by SIGUSR2, read back from what faulthandler wrote.

A rank answers in RUN/errors/stacks-<rank>.txt, in C, also where none of its threads can go on. Who cannot answer, because it is stopped or
waits for a disk, is described by what the kernel says of it, in RUN/errors/state-<rank>.json. Each node looks after its own ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.processes import is_running
from launcher.rundir import RunDir, read_json

_STOPPED = ("T", "t")
_BLOCK = re.compile(r"^(?:Current t|T)hread 0x.*$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
# The outermost frames of a rank's main thread, and those in which Python waits for another thread.
_MAIN = "launcher/worker/__main__.py"
_FOR_A_THREAD = ("concurrent/futures/_base.py", "/threading.py")
# Frames of Python between a collective and who waits in it: wrappers, autograd functions of FSDP and DeepSpeed.
_NEAR = 6
_MEETINGS = ("/torch/distributed/", "/deepspeed/comm/")
# Below these they meet in C++; further out they are on every stack of a step under DDP.
_LAST = ("_engine_run_backward", "_distributed_broadcast_coalesced", "_sync_module_states")


@dataclass(frozen=True)
class Frame:
    """A line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f'  File "{self.file}", line {self.line}, in {self.function}'


@dataclass(frozen=True)
class Stacks:
    """What is known of a rank that was asked.

    Args:
        main: the frames of its main thread, innermost last, as in a traceback; empty where it did not answer.
        waits: whether it waits for other ranks there.
        state: of its process, as in /proc: R, S, D, T, …; empty where nobody could look.
    """

    main: tuple[Frame, ...] = ()
    waits: bool = False
    state: str = ""

    @property
    def is_stopped(self) -> bool:
        """By SIGSTOP, a debugger or a job control."""
        return self.state in _STOPPED

    @property
    def text(self) -> str:
        """The main thread as a traceback shows it; empty without one."""
        return "\n".join(["Stack (most recent call last):", *map(str, self.main)]) if self.main else ""


def ask_ranks_here(run: RunDir) -> None:
    """Have every rank that runs on this machine and was not asked yet write down where it is."""
    for path in run.heartbeats.glob("[0-9]*.json"):
        beat = read_json(path)
        if not beat or not is_running(beat):
            continue
        rank, pid = int(beat["rank"]), int(beat["pid"])
        state = _state(pid)
        with contextlib.suppress(FileExistsError, ProcessLookupError):
            with run.state(rank).open("x", encoding="utf-8") as file:  # one asks it, once
                json.dump({"pid": pid, "state": state}, file)
            if state not in _STOPPED:  # it would answer when it goes on
                os.kill(pid, signal.SIGUSR2)


def answer_of(run: RunDir, rank: int, is_last: bool = False) -> Stacks:
    """What a rank that was asked has answered.

    Args:
        is_last: whether nothing more is to be expected: then an answer counts that may not be whole.
    """
    state = (read_json(run.state(rank)) or {}).get("state", "")
    try:
        text = run.stacks(rank).read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    threads = _threads(text)
    main = next((thread for thread in threads if any(_MAIN in frame.file for frame in thread)), ())
    if is_last and not main:  # a stack deeper than faulthandler shows has no outermost frame: then it is the longest
        main = max(threads, key=len, default=())
    others = [thread for thread in threads if thread is not main]
    return Stacks(main, _meets(main) or (_joins(main) and any(map(_meets, others))), state)


def _threads(text: str) -> list[tuple[Frame, ...]]:
    """The threads of the last answer, each with its innermost frame last."""
    found: list[tuple[Frame, ...]] = []
    for block in reversed(_BLOCK.split(text)[1:]):
        frames = [Frame(file, int(line), name) for file, line, name in _FRAME.findall(block)]
        found.append(tuple(reversed(frames)))
    return found


def _meets(thread: tuple[Frame, ...]) -> bool:
    """Whether it waits for other ranks."""
    if thread and thread[-1].function in _LAST:
        return True
    return any(part in frame.file for frame in thread[-_NEAR:] for part in _MEETINGS)


def _joins(thread: tuple[Frame, ...]) -> bool:
    """Whether it waits for another thread of its own."""
    return bool(thread) and any(part in thread[-1].file for part in _FOR_A_THREAD)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def described(state: str) -> dict[str, Any]:
    """What the kernel's letter for the state of a process means for a rank: what is the matter, and what to type; empty for nothing."""
    if state in _STOPPED:
        return {
            "found": "its process is stopped (SIGSTOP, Ctrl-Z or a debugger)",
            "to_type": "find out who stops processes here; go on with: launch resume RUN",
        }
    if state == "D":
        return {
            "found": "its process waits for a disk or driver that does not answer (state D)",
            "to_type": "look at the disk and at dmesg on that host; go on with: launch resume RUN",
        }
    return {}
