"""DeepSpeed's launcher of one node, `deepspeed.launcher.launch`, with the files and the manners of `launcher.worker.torchrun`.

Not the command `deepspeed`, which calls it on every host through pdsh and at Ctrl-C ends processes by a pattern that fits others, too:
here the supervisor starts it on each node and ends it by pid.

Takes the launcher's command line, which ends with RUN/plan.json, and perhaps --wait behind it. Its --master_port=0 stands for a free one.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from launcher.worker import node
from launcher.worker.pulse import wait_for_go

_ANY_PORT = "--master_port=0"


def main(argv: list[str]) -> int:
    """Run DeepSpeed's launcher; 0 or the exit code of the rank that it saw fail first (128 + signal when killed)."""
    run, argv, waits = node.begin(argv)
    from deepspeed.launcher import launch

    ranks: dict[int, subprocess.Popen[bytes]] = {}

    def start(command: list[str], env: dict[str, str], **streams: Any) -> subprocess.Popen[bytes]:
        env["LOCAL_WORLD_SIZE"] = env["LOCAL_SIZE"]  # torch's and accelerate's name for it
        env["GROUP_RANK"] = str(node.rank_of(argv))  # torchrun's name for it
        env["CUDA_VISIBLE_DEVICES"] = os.environ[
            "CUDA_VISIBLE_DEVICES"
        ]  # the plan's, which the launcher has counted anew from 0
        process = subprocess.Popen(command, env=env, **streams)
        ranks[int(env["RANK"])] = process
        return process

    end = launch.terminate_process_tree

    def end_rank(pid: int) -> None:
        for process in ranks.values():
            process.poll()  # before psutil takes the exit codes of those that have ended
        end(pid)

    launch.subprocess, launch.terminate_process_tree = SimpleNamespace(Popen=start), end_rank
    if waits:
        wait_for_go()
    # At SIGTERM ranks save, and it would end them. They inherit this, and wait for SIGTERM in a way of their own.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    node.answer_for_ranks(run)
    sys.argv = ["launch", *(f"--master_port={_free_port()}" if word == _ANY_PORT else word for word in argv)]
    try:
        launch.main()
    except SystemExit as ended:
        codes = {rank: process.returncode for rank, process in ranks.items() if process.returncode}
        firsts = [rank for rank, code in codes.items() if code == ended.code]
        return node.failed(run, node.rank_of(argv), firsts[0], codes) if firsts else 1
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
