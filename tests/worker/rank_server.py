"""Runs ranks of the real worker without paying for the imports every time.

Started once a test session: imports torch, transformers, PEFT and datasets, then forks the ranks of each job it reads from stdin (one JSON
object a line: plan, ranks, the pretend devices that each has or null, code that breaks some) and answers with their exit codes. A rank is
`launcher.worker.__main__.main`, over real gloo; or, where a job names one (`module:function`, with an `argument`), a function that
is called in a process group of so many ranks.
"""

import importlib
import json
import os
import socket
import sys
import traceback
import warnings
from pathlib import Path

# The very modules a rank imports; none of them may start a thread, because the ranks are forked.
import datasets  # noqa: F401
import peft  # noqa: F401
import torch

import launcher.worker.pipeline.loop  # noqa: F401
from launcher.worker.__main__ import main

sys.path.insert(0, str(Path(__file__).parents[2]))  # this file is started, not imported
from tests import logical_devices


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_rank(job: dict, rank: int, port: int) -> int:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job["ranks"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if job.get("pretend") is not None:
        logical_devices.register(**job["pretend"])
    if rank in job.get("struck", ()):
        exec(job["fault"], {})
    return main(job["plan"]) if "plan" in job else call(job)


def call(job: dict) -> int:
    """Call what a job names; 0, or 1 where it raises."""
    module, _, function = job["function"].partition(":")
    torch.distributed.init_process_group("gloo")
    try:
        getattr(importlib.import_module(module), function)(job["argument"])
    except Exception:  # noqa: BLE001 - the parent only sees an exit code
        traceback.print_exc()
        return 1
    torch.distributed.destroy_process_group()
    return 0


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        port = free_port()
        sys.stdout.flush()
        children = []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                code = 99
                try:
                    code = run_rank(job, rank, port)
                finally:
                    os._exit(code)
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
    serve()
