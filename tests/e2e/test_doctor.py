"""`launch doctor` and `launch check` as a person types them: what they say and their exit code, also without torch and with cards."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click

import launcher
from launcher.plan import Plan
from launcher.plan.continuing import _BESIDE_BYTES, checkpoint_bytes
from launcher.rundir import RunDir, read_json
from tests.e2e.conftest import Launcher

NOT_READY = 4
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "bitsandbytes",
    "numpy",
)
NVIDIA_SMI = """\
#!/bin/sh
case "$1" in
  *driver_version*) echo 580.82.07 ;;
  *) echo "0, GPU-1, NVIDIA GeForce RTX 3090, 24576, 300, 8.6"; echo "1, GPU-2, NVIDIA GeForce RTX 3090, 24576, 1, 8.6" ;;
esac
"""


def test_a_machine_that_is_well(launch: Launcher) -> None:
    done = launch("doctor", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("✓ python ", "torch ", "host memory", "/dev/shm", "open files", "cache ", "all-reduce over gloo"):
        assert word in done.stdout
    assert "✗" not in done.stdout
    assert "ranks agree" in done.stdout or "rank works" in done.stdout


def test_a_build_for_cpus_on_a_machine_with_cards(launch: Launcher, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env["CUDA_VISIBLE_DEVICES"] = "0,1"
    done = launch("doctor", **env)
    assert done.returncode == NOT_READY, done.stdout + done.stderr
    assert "card 1: NVIDIA GeForce RTX 3090, 24.0 GiB of 24.0 GiB free" in done.stdout
    if "cpu" in done.stdout.partition("torch ")[2].partition(",")[0]:
        assert "is a build for CPUs, and there are 2 cards" in done.stdout
        assert "pip install --force-reinstall 'torch" in done.stdout
    assert "✗ all-reduce over nccl: rank" in done.stdout, "torch can use none of them"
    assert "error: this machine: is not ready" in done.stderr


def test_without_torch(launch: Launcher, tmp_path: Path) -> None:
    """A site of links to all that is installed, but for the heavy libraries."""
    site = tmp_path / "site"
    site.mkdir()
    for path in Path(click.__file__).parents[1].iterdir():
        if not path.name.lower().startswith(HEAVY) and path.suffix != ".pth":
            (site / path.name).symlink_to(path)
    folders = [str(site), str(Path(launcher.__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {folders}; from launcher.cli import main; main(['doctor'])"
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, env=dict(launch.env), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == NOT_READY, done.stdout + done.stderr
    assert "✗ package torch: is not installed\n    pip install 'torch<" in done.stdout
    assert "! all-reduce: was not tried: torch is not installed" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_recipe_that_can_start(launch: Launcher, recipe: Path) -> None:
    done = launch("check", recipe, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("2 ranks on", "host memory", "checkpoints of", "copies between cards: none to try", "2 ranks agree"):
        assert word in done.stdout
    assert not (launch.folder / "runs").exists(), "nothing is made"


def test_a_recipe_that_cannot(launch: Launcher, recipe: Path) -> None:
    done = launch("check", recipe, "data.path=nowhere.json", "hardware=8xA800-80GB", "train.global_batch=16")
    assert done.returncode == NOT_READY
    for word in ("✗ data.path", "✗ hardware: 8xA800-80GB", "all-reduce: was not tried"):
        assert word in done.stdout
    assert "is not ready: 2 of the above" in done.stderr


def test_a_run_shows_what_was_warned_of(launch: Launcher, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.json").touch()
    words = [sys.executable, "-m", "launcher.cli", str(recipe), "data.path=empty.json"]
    command = ["bash", "-c", f"ulimit -n 300; exec {shlex.join(words)}"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(launch.env), capture_output=True, text=True, check=False)
    assert done.returncode == NOT_READY, "prepare finds no rows"
    assert "! open files: 300 a process are allowed" in done.stdout
    assert "✓" not in done.stdout.partition("prepare")[0], "what is well is not news"


def test_a_checkpoint_has_the_size_that_was_reckoned_with(finished_run: Path) -> None:
    run = RunDir(finished_run)
    plan = Plan.model_validate_json(run.plan.read_text())
    (newest, *_) = sorted(run.checkpoints.glob("step-*"))
    real = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    reckoned = checkpoint_bytes(plan) - _BESIDE_BYTES
    assert 0 < reckoned < real < reckoned + _BESIDE_BYTES / 50


def test_every_run_says_on_what_it_ran(finished_run: Path) -> None:
    written = read_json(RunDir(finished_run).environment)
    assert {"python", "packages", "torch_cuda", "driver", "devices", "limits", "shared_memory_bytes"} <= set(written)
    assert written["shared_memory_bytes"] == shutil.disk_usage("/dev/shm").total
