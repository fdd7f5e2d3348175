"""torchrun, with one file more: errors/node.json says how each rank ended, because torchrun's own exit code is always 1.

Takes torchrun's command line; the last argument is RUN/plan.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.rundir import RunDir, write_json
from launcher.worker.pulse import die_with_parent


def main(argv: list[str]) -> int:
    """Run torchrun; 0 or the exit code of the rank that torchrun saw fail first (128 + signal when killed)."""
    die_with_parent()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(argv)
    except ChildFailedError as error:
        failures = {
            rank: {"pid": failure.pid, "exit_code": failure.exitcode, "time": failure.timestamp}
            for rank, failure in error.failures.items()
        }
        first_rank, first = error.get_first_failure()
        errors = RunDir(Path(argv[-1]).resolve().parent).errors
        write_json(errors / "node.json", {"first": first_rank, "ranks": failures})
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
