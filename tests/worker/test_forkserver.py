"""Ranks that are copies of a process which has imported for them, and torchrun's own way where copying is not sound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """\
import os, sys
from types import SimpleNamespace
from launcher.worker import forkserver
from launcher.worker.torchrun import WITHOUT_THREADS

os.environ.update(WITHOUT_THREADS)
forkserver._LIBRARIES = ("heavy",)

def rank(plan, parent):
    import heavy
    print("copied", heavy.pid == parent == os.getppid(), os.environ["RANK"], plan, flush=True)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    return 7

handler = forkserver.ForkServer.open(SimpleNamespace(needs_bitsandbytes=False, deepspeed=None), rank).handler
started = [
    handler(entrypoint=sys.executable, args=("-c", "import sys; print('executed', sys.argv[1]); sys.exit(5)", "plan.json"),
            env={"RANK": str(number)}, stdout=None, stderr=None, local_rank_id=number, numa_options=None)
    for number in range(2)
]
print("ended", *(process.proc.wait(20) for process in started), *(process.proc.poll() for process in started), flush=True)
"""


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("import os; pid = os.getpid()", ["copied True 0 plan.json", "copied True 1 plan.json", "ended 7 -9 7 -9"]),
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            [
                "each rank imports for itself: {'unsound': 'importing has started 1 threads'}",
                "each rank imports for itself: {'unsound': 'importing has started 1 threads'}",
                "ended 5 5 5 5",
                "executed plan.json",
                "executed plan.json",
            ],
        ),
        ("import os; os._exit(3)", ["ended 5 5 5 5", "executed plan.json", "executed plan.json"]),
    ],
    ids=["copied", "a thread", "ends"],
)
def test_ranks_are_copied_where_that_is_sound(tmp_path: Path, module: str, expected: list[str]) -> None:
    (tmp_path / "heavy.py").write_text(module)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in sorted(done.stdout.splitlines()) if "has ended" not in line]
    assert lines == sorted(expected), done.stderr
