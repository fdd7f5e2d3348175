"""What every node's command begins with, torchrun and DeepSpeed's launcher alike: it ends with the supervisor, says who it is, and leaves
signals that mean `save` to the ranks.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.plan import Plan
from launcher.processes import count_oom_kills
from launcher.rundir import WAIT, RunDir, write_json
from launcher.stacks import ask_ranks_here
from launcher.worker.pulse import die_with_parent, process_start

_SECONDS_BETWEEN_LOOKS = 1.0


def begin(argv: Sequence[str]) -> tuple[RunDir, list[str], bool]:
    """Become the process that a node's ranks belong to.

    Args:
        argv: of a launcher, ending with RUN/plan.json and perhaps --wait.

    Returns:
        The run, argv without --wait, and whether it was there.
    """
    die_with_parent()
    waits = argv[-1] == WAIT
    argv = list(argv[:-1] if waits else argv)
    run = RunDir(Path(argv[-1]).resolve().parent)
    rank = rank_of(argv)
    write_json(run.node_heartbeat(rank), {"pid": os.getpid(), "started": process_start(os.getpid()), "node": rank})
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(
            number, lambda *_: None
        )  # the ranks' business, also where a scheduler sends them to every process
    count_oom_kills(run)
    return run, argv, waits


def answer_for_ranks(run: RunDir, plan: Plan, rank: int) -> None:
    """From now on have this node's ranks write down where they are when the supervisor asks for it, which may be on another host.

    Args:
        rank: of this node.
    """
    ranks = plan.cluster.ranks_of(rank) if plan.cluster.num_nodes > 1 else range(plan.num_processes)
    threading.Thread(target=_answer, args=(run, rank, ranks), daemon=True).start()


def _answer(run: RunDir, rank: int, ranks: range) -> None:
    while True:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        with contextlib.suppress(OSError):
            if run.stacks_asked.exists():
                ask_ranks_here(run, rank, ranks)


def rank_of(argv: Sequence[str]) -> int:
    """The number of this node, from either launcher's arguments; 0 where there is no other."""
    found = (re.fullmatch(r"--node[-_]rank=(\d+)", word) for word in argv)
    return next((int(match[1]) for match in found if match), 0)


def failed(run: RunDir, rank: int, first: int, exit_codes: dict[int, int]) -> int:
    """Write down how the ranks of this node ended; the exit code of the first that failed (128 + signal when killed).

    Args:
        rank: of this node.
        exit_codes: by global rank, negative for a signal.
    """
    count_oom_kills(run)
    ranks = {rank: {"exit_code": code} for rank, code in exit_codes.items()}
    with contextlib.suppress(OSError):  # on a full disk the exit code has to do
        write_json(run.node_error(rank), {"first": first, "ranks": ranks})
    return exit_codes[first] if exit_codes[first] > 0 else 128 - exit_codes[first]
