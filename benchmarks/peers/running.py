"""Runs a system once with the probe inside it; what the probe wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from page import environment

from .systems import RANKS, System
from .task import Task

_LONGEST_SECONDS = 900
Lines = list[dict[str, Any]]


def run(system: System, task: Task, home: Path, environments: Path, epochs: int) -> tuple[list[Lines], float]:
    """Of each rank the lines of its probe, and when the command was given.

    Args:
        home: a folder for its files, emptied first.

    Raises:
        SystemExit: it did not train.
    """
    shutil.rmtree(home, ignore_errors=True)
    probe = home / "probe"
    probe.mkdir(parents=True)
    job = system.job(task, home, environments, epochs)
    variables = environment() | {
        "PYTHONPATH": str(Path(__file__).parent / "probe"),
        "LAUNCH_PROBE": str(probe),
        "LAUNCH_PROBE_ROWS": str(task.validation),
        "LAUNCH_PROBE_PAD": str(task.pad),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    log = home / "output.txt"
    started = time.time()
    with log.open("wb") as output:
        ended = subprocess.run(
            job.argv, cwd=job.cwd, env=variables | job.env, check=False, stdout=output, stderr=subprocess.STDOUT,
            timeout=_LONGEST_SECONDS,
        )  # fmt: skip
    ranks = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(probe.glob("*.jsonl"))]
    if len(ranks) != RANKS or not all(ranks):
        text = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{system.name} ended with {ended.returncode}, {len(ranks)} ranks trained:\n{text}")
    return ranks, started
