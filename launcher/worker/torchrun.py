"""torchrun, with two files more: errors/node<k>.json says how each rank ended, because torchrun's own exit code is always 1, and
heartbeat/node<k>.json which process the ranks of node k belong to. On a CPU its ranks are copies of a fork
server, which imports for all of them.

Takes torchrun's command line, which ends with RUN/plan.json, and perhaps --wait behind it: loading torchrun takes more than a second, which
the supervisor uses to prepare the node, and then says when to start the ranks.
"""

from __future__ import annotations

import os
import sys

from launcher.plan import read_plan
from launcher.worker import node
from launcher.worker.pulse import wait_for_go

# Threads that libraries start when they are imported, numpy's BLAS and Arrow's allocator: a process that has some is not copied.
# Ranks compute with torch's own.
WITHOUT_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


def main(argv: list[str]) -> int:
    """Run torchrun; 0 or the exit code of the rank that torchrun saw fail first (128 + signal when killed)."""
    run, argv, waits = node.begin(argv)
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
    node.answer_for_ranks(run)
    try:
        torchrun(argv)
    except ChildFailedError as error:
        first, _ = error.get_first_failure()
        return node.failed(
            run, node.rank_of(argv), first, {rank: failure.exitcode for rank, failure in error.failures.items()}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
