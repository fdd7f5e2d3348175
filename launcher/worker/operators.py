"""DeepSpeed's C++ operators: which a JSON needs, and `python -m launcher.worker.operators NAME` to compile one.

Compiled ones are kept in TORCH_EXTENSIONS_DIR, which `launcher.command` pins for every rank, as it does the ninja that PATH finds:
another ninja would compile all of it again.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADAM, DISK = "CPUAdamBuilder", "AsyncIOBuilder"
_LOOK_S = 5
_LIBRARIES = {ADAM: "cpu_adam", DISK: "async_io"}


def operators(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the builders that DeepSpeed will ask for: Adam on the host where the optimizer's state does not lie on the device, and what
    reads and writes a disk where something lies on one."""
    device = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return {"none": (), "nvme": (ADAM, DISK)}.get(device, (ADAM,))


def is_compiled(name: str, folder: Path) -> bool:
    """Whether the library of an operator lies in the folder of extensions, whose name has the versions it belongs to."""
    return any(folder.glob(f"**/{_LIBRARIES[name]}.so"))


def compile_apart(name: str, variables: dict[str, str], progress: Callable[[int, int], None]) -> tuple[int, str]:
    """Compile in a process with the ranks' own variables; its exit code and what it printed.

    Args:
        progress: called now and then with the files that are compiled and how many there are.

    Prepare itself sees no GPU, and for another device something else is compiled. Should prepare be stopped, ninja and the compilers
    end with it. One launcher compiles at a time; what torch takes for a lock, a file, stays for ever where somebody was killed, and
    the next one would wait for it.
    """
    folder = Path(variables["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compiling").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # ends with this process, however it ends
        for stale in folder.glob("**/lock"):
            stale.unlink()
        command = [sys.executable, "-m", "launcher.worker.operators", name]
        return _run(command, variables, lambda: progress(*compiled_files(name, folder)))


def compiled_files(name: str, folder: Path) -> tuple[int, int]:
    """How many files of an operator are compiled, and of how many, by ninja's own list; (0, 0) before it is there."""
    for plan in folder.glob(f"**/{_LIBRARIES[name]}/build.ninja"):
        wanted = [
            line.split(":")[0].removeprefix("build ") for line in plan.read_text().splitlines() if ": compile" in line
        ]
        return sum((plan.parent / file).exists() for file in wanted), len(wanted)
    return 0, 0


def _run(command: list[str], variables: dict[str, str], look: Callable[[], None]) -> tuple[int, str]:
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=_LOOK_S)
                    break
                except subprocess.TimeoutExpired:
                    look()
        finally:
            if process.poll() is None:
                # Not SIGKILL: ninja gives every compiler a process group of its own, and ends them when it is asked to end.
                os.killpg(process.pid, signal.SIGTERM)
    return process.returncode, output


def compile_operator(name: str) -> None:
    """Load an operator, compiling it where that was not done yet."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder(name).load(verbose=False)


if __name__ == "__main__":
    compile_operator(sys.argv[1])
