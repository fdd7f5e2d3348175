"""A run directory in, chat or export with the terminal of whoever typed it out; the exit code comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from launcher.command import visible_devices
from launcher.plan import ChatPlan, Plan
from launcher.rundir import RunDir, read_json
from launcher.supervise import Supervisor


def run_in_foreground(module: str, run: RunDir, options: dict[str, Any], placed: ChatPlan | None = None) -> int:
    """Run launcher.worker.MODULE on a run directory.

    Args:
        options: flags of the program; None leaves one out.
        placed: where the layers lie, of a model that is spread over several devices.

    Raises:
        PreflightError: what the run was prepared with has gone, and cannot be made again.
    """
    _prepare_again(run)
    flags = [
        text
        for name, value in options.items()
        if value is not None
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_MODULES_CACHE": str(run.module_cache),
    }
    if placed is not None:
        flags += ["--placed", placed.model_dump_json()]
        env |= visible_devices([placed.cluster.devices[stage.device] for stage in placed.stages])
    argv = [sys.executable, "-m", "launcher.worker.foreground", module, str(run.path), *flags]
    with subprocess.Popen(argv, env=env) as process:
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:  # the terminal has told the worker as well, which ends in its own way
                continue
    return code if code >= 0 else 128 - code


def _prepare_again(run: RunDir) -> None:
    """Make what prepare left for a run again, where somebody has emptied the cache since."""
    prepared = read_json(run.prepared)
    folders = [prepared.get(key, "") for key in ("model_dir", "tokenizer_dir")] if isinstance(prepared, dict) else []
    if all(os.path.isdir(folder) for folder in folders):
        return
    print("prepare      what this run was prepared with has left the cache; making it again", file=sys.stderr)
    plan = Plan.model_validate_json(run.plan.read_text(encoding="utf-8"))
    Supervisor(plan, run, lambda event: None).prepare_only()
