"""One import of torch and transformers for all ranks of a node: a process that loads them, and is copied when torchrun wants a rank.

Loading them takes four seconds of CPU time, and every rank would do it again. What is copied has one thread and touched no device: a lock
that another thread held would stay shut in the copy for ever, and a CUDA context does not survive it. Where there are more threads ranks
are started as torchrun starts them.

`ForkServer.open()` in torchrun's process, before it has any thread; then `ForkServer.handler` in the place of torchrun's own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from launcher.plan import Plan
from launcher.worker.pulse import die_with_parent
from launcher.worker.quiet import leave_out_what_is_unused, quiet_libraries
from launcher.worker.signals import hold

# What every rank imports, heaviest first. Nothing of our own: those are quick, and one that fails should fail in a rank, which has a log.
_LIBRARIES = ("transformers.trainer", "peft", "datasets", "accelerate", "torch.utils.tensorboard")
_SECONDS_BETWEEN_LOOKS = 0.01

Rank = Callable[[str, int], int]  # plan.json and the pid of the parent -> exit code


class ForkServer:
    """The end of the connection that torchrun holds."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rw", encoding="utf-8")

    @classmethod
    def open(cls, plan: Plan, rank: Rank) -> ForkServer:
        """Make the process that imports and waits."""
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        if os.fork() == 0:
            ours.close()
            _serve(theirs, plan, rank, parent)
        theirs.close()
        return cls(ours)

    def ask(self, **question: Any) -> Any:
        """The answer; None where the fork server has ended, and with it all ranks."""
        try:
            self._file.write(json.dumps(question) + "\n")
            self._file.flush()
            line = self._file.readline()
        except OSError:
            return None
        return json.loads(line) if line else None

    def handler(self, **arguments: Any) -> SubprocessHandler:
        """In the place of torch's `get_subprocess_handler`, with its arguments."""
        server = self

        class FromForkServer(SubprocessHandler):
            """A rank that is a copy of the fork server; torchrun's own way where that would not be sound."""

            def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
                started = server.ask(start=args[-1], env=env)
                if started is not None and "pid" in started:
                    return ForkedRank(server, started["pid"])
                print(
                    f"each rank imports for itself: {started or 'what they were to be copies of has ended'}", flush=True
                )
                return super()._popen(args, env)

        return FromForkServer(**arguments)


class ForkedRank:
    """A rank, with what torchrun uses of a Popen."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self._server = server
        self._returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._returncode is None:
            answer = self._server.ask(poll=self.pid)
            self._returncode = -signal.SIGKILL if answer is None else answer["exit_code"]
        return self._returncode

    def wait(self, timeout: float) -> int:
        """Wait for it.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"rank with pid {self.pid}", timeout)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return code


def _serve(connection: socket.socket, plan: Plan, rank: Rank, parent: int) -> None:
    """Import, then start ranks and say how they ended until torchrun has gone; never returns."""
    die_with_parent(parent)
    hold()  # a signal to a rank waits until it listens, one to this process for ever
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    leave_out_what_is_unused(plan)
    quiet_libraries()
    for name in (*_LIBRARIES, *(["deepspeed"] if plan.deepspeed is not None else [])):
        importlib.import_module(name)
    file = connection.makefile("rw", encoding="utf-8")
    for line in file:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer: dict[str, Any] = {"exit_code": os.waitstatus_to_exitcode(status) if pid else None}
        elif num_threads() != 1:
            answer = {"unsound": f"importing has started {num_threads() - 1} threads"}
        else:
            answer = {"pid": _fork_rank(connection, question, rank)}
        file.write(json.dumps(answer) + "\n")
        file.flush()
    os._exit(0)


def _fork_rank(connection: socket.socket, question: dict[str, Any], rank: Rank) -> int:
    """The pid of a new rank."""
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    os.setsid()  # torchrun ends a rank by its process group
    connection.close()
    os.environ.clear()
    os.environ.update(question["env"])
    sys.argv = ["launcher.worker", question["start"]]
    code = rank(question["start"], server)
    with contextlib.suppress(OSError):  # the log's disk is full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def num_threads() -> int:
    """Of this process, those that libraries in C have started too; 0 where there is no /proc to look at."""
    try:
        return len(list(Path("/proc/self/task").iterdir()))
    except OSError:
        return 0
