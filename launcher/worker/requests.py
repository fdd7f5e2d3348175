"""What is asked of a run from outside while it trains: a checkpoint, or a checkpoint and the end. All ranks agree on it after every step.

RUN/save-now       made by anybody: a checkpoint when this step is done
RUN/stop-now       made by the supervisor and by `launch stop RUN --save`: a checkpoint, then the end
SIGTERM, SIGUSR1   to any rank: the same; schedulers send them before they take a machine away
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from launcher.rundir import RunDir, append_event
from launcher.worker.signals import received


@dataclass(frozen=True)
class Asked:
    """What all ranks have agreed on.

    Args:
        stop: why training is to end, None where it is not.
        save: whether a checkpoint is wanted now.
        failed: whether a rank says that something of its own has failed.
    """

    stop: str | None = None
    save: bool = False
    failed: bool = False


class Requests:
    """Reads what is asked of a run. Made and called by all ranks at the same time.

    `stopped_by`: why training has ended before its last step, None where nobody has asked for it.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        # A day: who stands still is the supervisor's business, and a rank may compute for longer than gloo's half an hour.
        wait = timedelta(days=1)
        self.group = dist.new_group(backend="gloo", timeout=wait) if dist.is_initialized() else None
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        self.stopped_by: str | None = None

    def agreed(self, failed: bool = False) -> Asked:
        """What is asked now, the same on every rank.

        Args:
            failed: what this rank says of itself.
        """
        save, stop = False, received()
        if self.is_first:  # one rank looks at the disk
            save = self.run.save_now.exists()
            self.run.save_now.unlink(missing_ok=True)
            stop = stop or int(self.run.stop_now.exists())
        asked = torch.tensor([stop, save, failed], dtype=torch.int64)
        if self.group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        stop, save, failed = asked.tolist()
        return Asked(self._reason(stop) if stop else None, bool(save), bool(failed))

    def tell(self, step: int, why: str) -> None:
        """Write down, once, that a checkpoint is made because somebody has asked for it."""
        if self.is_first:
            append_event(self.run, {"event": "asked", "time": time.time(), "step": step, "why": why})

    def _reason(self, stop: int) -> str:
        """The name of the signal, or what stands in the file."""
        if stop > 1:
            return signal.Signals(stop).name
        return (
            self.run.stop_now.read_text(encoding="utf-8") if self.run.stop_now.exists() else ""
        ).strip() or "stop-now"
