"""Compiling DeepSpeed's operators, with a stand-in for the compiler: what is left behind by somebody who was killed stops nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.worker import operators


def test_only_what_a_json_offloads_is_compiled() -> None:
    assert operators.operators({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}) == ()
    assert operators.operators({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}) == ("CPUAdamBuilder",)
    disk = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    assert operators.operators(disk) == ("CPUAdamBuilder", "AsyncIOBuilder")


def test_a_lock_of_somebody_who_was_killed_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    monkeypatch.setattr(
        operators, "_run", lambda command, variables, look: (0, str((tmp_path / "cpu_adam/lock").exists()))
    )
    assert operators.compile_apart("CPUAdamBuilder", {"TORCH_EXTENSIONS_DIR": str(tmp_path)}, print) == (0, "False")
    assert not operators.is_compiled("CPUAdamBuilder", tmp_path)
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    assert operators.is_compiled("CPUAdamBuilder", tmp_path)


def test_the_compiler_ends_with_who_started_it(tmp_path: Path) -> None:
    sign = tmp_path / "pid"
    compiler = f"import os, time; open({str(sign)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import os, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"from launcher.worker.operators import _run\n_run([sys.executable, '-c', {compiler!r}], dict(os.environ), print)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        while not sign.is_file() or not sign.read_text():
            time.sleep(0.02)
        process.terminate()
        assert process.wait() == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(sign.read_text()), 0)


def test_it_is_told_how_many_files_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "async_io").mkdir()
    assert operators.compiled_files("AsyncIOBuilder", tmp_path) == (0, 0)
    (tmp_path / "async_io" / "build.ninja").write_text(
        "rule compile\nbuild a.o: compile a.cpp\nbuild b.o: compile b.cpp\n"
    )
    (tmp_path / "async_io" / "b.o").touch()
    monkeypatch.setattr(operators, "_LOOK_S", 0.01)
    seen: list[tuple[int, int]] = []
    look = [sys.executable, "-c", "import time; time.sleep(0.2); print('done')"]
    assert operators._run(
        look, dict(os.environ), lambda: seen.append(operators.compiled_files("AsyncIOBuilder", tmp_path))
    ) == (0, "done\n")
    assert set(seen) == {(1, 2)}
