"""A launch that goes on without its terminal: `--detach`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

Begun = Callable[[], None]


def detached(log: Path, work: Callable[[Begun], int]) -> tuple[int, int]:
    """Do something in a process of its own, which no closed terminal and no end of an ssh session ends.

    Args:
        log: where that process prints.
        work: gets a function to call when it has begun well; its exit code is the process's. In that process this function does not
            return: an error of `work` is raised as ever, and is printed to the log.

    Returns:
        (pid, 0) as soon as it has begun well; (pid, its exit code) where it has ended before, with what it printed on stderr.
    """
    before = log.stat().st_size if log.exists() else 0
    reading, writing = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _leave_terminal(log)
        sys.exit(work(lambda: _say_begun(writing)))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        if pipe.read(1):
            return pid, 0
    _, ended = os.waitpid(pid, 0)
    sys.stderr.write(log.read_bytes()[before:].decode(errors="replace"))
    code = os.waitstatus_to_exitcode(ended)
    return pid, code if code >= 0 else 128 - code


def _leave_terminal(log: Path) -> None:
    """A session of its own, deaf to SIGHUP; input from nowhere, output to a log."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    null, file = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(null, 0)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)


def _say_begun(pipe: int) -> None:
    os.write(pipe, b"1")
    os.close(pipe)
