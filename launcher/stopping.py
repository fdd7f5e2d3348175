"""How a run is stopped from outside: signals to its launcher, and `launch stop RUN`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from types import FrameType

from launcher.errors import UsageError
from launcher.rundir import RunDir, write_atomic

# What schedulers send before they take a machine away: there is time for a checkpoint.
SAVING = (signal.SIGTERM, signal.SIGUSR1)
_POLL_SECONDS = 0.1


class StopRequest:
    """What somebody has asked of this launcher by signals, while it is installed.

    `save`: the first of SIGTERM and SIGUSR1. `now`: Ctrl-C, SIGHUP, and any signal after the first: everything ends at once.
    """

    def __init__(self) -> None:
        self.save: int | None = None
        self.now: int | None = None

    def why(self, run: RunDir) -> str | None:
        """Why the run is to end: the name of the signal, or what stands in its stop-now; None where nobody has asked for it."""
        if number := self.now or self.save:
            return signal.Signals(number).name
        try:
            return run.stop_now.read_text(encoding="utf-8").strip() or run.stop_now.name
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Take the signals over for a while."""

        def handle(number: int, _: FrameType | None) -> None:
            if number in SAVING and self.save is None:
                self.save = number
            else:
                self.now = self.now or number

        numbers = [signal.SIGINT, *SAVING]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup a run outlives its terminal
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def stop_run(run: RunDir, shown: str, save: bool) -> None:
    """Have the launcher of a run end it, and wait until it has.

    Args:
        shown: the run as a person types it.
        save: whether there is to be a checkpoint first, when the step is done that is being worked on.

    Raises:
        UsageError: nobody works there, or on another machine.
    """
    owner = run.owner()
    if owner is None:
        raise UsageError(f"stop {shown}", "no launcher works there", "list the runs and how they ended: launch runs")
    if save:
        write_atomic(run.stop_now, "launch stop --save\n")
    else:
        found = re.fullmatch(r"process (\d+) on (.*)", owner)
        if found is None or found[2] != socket.gethostname():
            to_type = "type it on that machine, or have it save first, from here: launch stop --save"
            raise UsageError(f"stop {shown}", f"it is the run of {owner}", f"{to_type} {shown}")
        os.kill(int(found[1]), signal.SIGINT)
    while run.owner() == owner:
        time.sleep(_POLL_SECONDS)
