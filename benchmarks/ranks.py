"""How a benchmark starts ranks that run a script of its own in place of the product's worker, with everything else as in a run."""

from __future__ import annotations

from pathlib import Path

from launcher.processes import NodeCommand


def with_script(command: NodeCommand, script: str) -> list[str]:
    """The arguments that start the same ranks with a script, which is handed the path of plan.json.

    By torch's own torchrun: the product's copies its ranks from a process that has imported the worker, and reads no script.
    """
    *start, module, worker, plan_path = command.argv
    assert (module, worker) == ("-m", "launcher.worker"), "how ranks are started has changed"
    assert "launcher.worker.torchrun" in start, "how ranks are started has changed"
    argv = ["torch.distributed.run" if part == "launcher.worker.torchrun" else part for part in start]
    return [*argv, str(Path(script).resolve()), plan_path]
