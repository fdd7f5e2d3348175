"""torchrun, with two files more: errors/node.json says how each rank ended, because torchrun's own exit code is always 1, and
heartbeat/node.json which process the ranks belong to. On a CPU its ranks are copies of a fork server, which imports for all of them.

Takes torchrun's command line, which ends with RUN/plan.json, and perhaps --wait behind it: loading torchrun takes more than a second, which
the supervisor uses to prepare the node, and then says when to start the ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from launcher.plan import read_plan
from launcher.rundir import WAIT, RunDir, write_json
from launcher.worker.pulse import die_with_parent, process_start, wait_for_go

# Threads that libraries start when they are imported, numpy's BLAS and Arrow's allocator: a process that has some is not copied.
# Ranks compute with torch's own.
WITHOUT_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


def main(argv: list[str]) -> int:
    """Run torchrun; 0 or the exit code of the rank that torchrun saw fail first (128 + signal when killed)."""
    die_with_parent()
    waits = argv[-1] == WAIT
    argv = argv[:-1] if waits else argv
    run = RunDir(Path(argv[-1]).resolve().parent)
    write_json(run.heartbeats / "node.json", {"pid": os.getpid(), "started": process_start(os.getpid())})
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(
            number, lambda *_: None
        )  # the ranks' business, also where a scheduler sends them to every process
    os.environ.update(WITHOUT_THREADS)
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    plan = read_plan(run)
    from launcher.worker.forkserver import ForkServer, num_threads

    if (
        plan.kind == "cpu" and num_threads() == 1
    ):  # whether importing leaves a GPU's driver untouched has not been tried
        from launcher.worker.__main__ import main as rank

        api.get_subprocess_handler = ForkServer.open(plan, rank).handler
    if waits:
        wait_for_go()
    try:
        torchrun(argv)
    except ChildFailedError as error:
        failures = {
            rank: {"pid": failure.pid, "exit_code": failure.exitcode, "time": failure.timestamp}
            for rank, failure in error.failures.items()
        }
        first_rank, first = error.get_first_failure()
        with contextlib.suppress(OSError):  # on a full disk the exit code has to do
            write_json(run.errors / "node.json", {"first": first_rank, "ranks": failures})
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
