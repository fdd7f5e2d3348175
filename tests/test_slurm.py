"""The batch script, word for word, and what is no option of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import connecting
from launcher.cluster import resolve_cluster
from launcher.cluster.slurm import nodes_of_job
from launcher.errors import UsageError
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan
from launcher.recipe import load_recipe
from launcher.rundir import RunDir
from launcher.slurm import options_of, script

RECIPES = Path(__file__).parents[1] / "recipes"


def plan_of(name: str, folder: Path) -> Plan:
    (folder / "hosts").write_text("node-0 slots=8\nnode-1 slots=8\n")
    loaded = load_recipe(RECIPES / f"{name}.yaml", [])
    cluster = resolve_cluster(loaded.recipe.hardware, hostfile=str(folder / "hosts"))
    return make_plan(name, loaded.recipe, cluster, shape_of(loaded.recipe.model, RECIPES))


def test_the_script_is_the_launcher_on_the_first_node(
    tmp_path: Path, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.slurm.sys.executable", "/venv/bin/python")
    monkeypatch.setattr("launcher.slurm.os.getcwd", lambda: "/home/me/my work")
    text = script(
        plan_of("full_fsdp_8xa800", tmp_path),
        RunDir(Path("/runs/it's one")),
        options_of(["partition=gpu", "nodes=2", "time=24:00:00", "gres=gpu:a800:8"]),
    )
    golden("slurm_full_fsdp_2x8xa800", text)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["partition"], "write it as: partition=gpu"),
        (["partition=gpu\n#SBATCH --uid=root"], "is no option of sbatch"),
        (["partition=$(id)"], "is no option of sbatch"),
        (["--partition=gpu"], "is no option of sbatch"),
        (["nodes=two"], "write it as: nodes=2"),
        (["output=x"], "is decided by the plan and the run directory"),
        (["requeue=maybe"], "write it as: requeue=no"),
    ],
)
def test_what_is_no_option_never_reaches_the_script(words: list[str], found: str) -> None:
    with pytest.raises(UsageError) as caught:
        options_of(words)
    assert found in str(caught.value)


def test_a_folder_that_slurm_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    plan = plan_of("full_fsdp_8xa800", tmp_path)
    with pytest.raises(UsageError, match="Slurm reads '%' in a path in its own way"):
        script(plan, RunDir(Path("/runs/100%")), options_of([]))


def test_in_a_job_srun_takes_the_place_of_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node-[0-1]" ] && printf "node-0\\nnode-1\\n"\n')
    scontrol.chmod(0o755)
    plan = plan_of("full_fsdp_8xa800", tmp_path)
    for name, value in (("JOB_ID", "7"), ("JOB_NODELIST", "node-[0-1]"), ("CPUS_PER_TASK", "32")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("launcher.command.sys.executable", "/venv/bin/python")
    nodes_of_job.cache_clear()
    try:
        argv = connecting.connecting_command(plan, plan.cluster.nodes[1]).argv
    finally:
        nodes_of_job.cache_clear()
    assert " ".join(argv) == (
        "srun --nodes=1 --ntasks=1 --nodelist=node-1 --overlap --cpus-per-task=32 -- /venv/bin/python -m launcher.agent"
    )
