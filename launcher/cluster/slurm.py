"""Which nodes belong to the Slurm job that this process is part of."""

from __future__ import annotations

import os
import subprocess
from functools import cache


@cache
def nodes_of_job() -> tuple[str, ...]:
    """Their names, in Slurm's order; none outside of a job. Slurm writes `gpu[01-04,07]`, which scontrol takes apart."""
    listed = os.environ.get("SLURM_JOB_NODELIST")
    if not listed or "SLURM_JOB_ID" not in os.environ:
        return ()
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(done.stdout.split())
