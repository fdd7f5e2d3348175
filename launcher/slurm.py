"""A recipe and options of sbatch in, one batch script out, submitted: `launch RECIPE --slurm partition=gpu nodes=2`.

The job's script is the launcher on its first node: `launch resume RUN`, on the hosts that Slurm has given it, whose agents srun starts
(`launcher.nodes`). So a job that is started again, after its time or a node was up, goes on from the newest checkpoint.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher import show, start
from launcher.cluster import resolve_cluster
from launcher.errors import PreflightError, UsageError
from launcher.plan import Plan
from launcher.recipe import find_recipe, load_recipe
from launcher.rundir import RunDir, write_atomic
from launcher.start import Asked, Where
from launcher.supervise import write_run

_OPTION = re.compile(r"([a-z][a-z-]*)=([\w.,:/@%+=*()\[\]-]+)")
# What the script or the plan decides.
_OURS = ("array", "chdir", "job-name", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "wrap")
_SECONDS_TO_SAVE = 120
# Cores for each card: rows are ready, so this is for the ranks' own Python and the threads of NCCL.
_CORES_PER_CARD = 4


def options_of(words: Sequence[str]) -> dict[str, str]:
    """`partition=gpu`, `nodes=2` -> options of sbatch by their long names.

    Raises:
        UsageError: one that is none, or that is decided here.
    """
    options = {"nodes": "1"}
    for word in words:
        match = _OPTION.fullmatch(word)
        if match is None:
            raise UsageError(f"--slurm {word}", "is no option of sbatch with a value", "write it as: partition=gpu")
        if match[1] in _OURS:
            raise UsageError(f"--slurm {word}", "is decided by the plan and the run directory", "leave it out")
        options[match[1]] = match[2]
    if not re.fullmatch(r"[1-9]\d{0,4}", options["nodes"]):
        raise UsageError(f"--slurm nodes={options['nodes']}", "is no number of nodes", "write it as: nodes=2")
    if options.get("requeue", "yes") not in ("yes", "no"):
        raise UsageError(f"--slurm requeue={options['requeue']}", "is neither yes nor no", "write it as: requeue=no")
    return options


def script(plan: Plan, run: RunDir, options: dict[str, str]) -> str:
    """The batch script of a run.

    Raises:
        UsageError: a folder whose name a line of #SBATCH cannot hold.
    """
    where = str(run.path.absolute())
    if odd := re.search(r'["\\%\n]', where + os.getcwd()):
        raise UsageError(f"run directory {where}", f"Slurm reads {odd[0]!r} in a path in its own way", "rename it")
    slots, cuda = len(plan.cluster.nodes[0].devices), plan.kind == "cuda"
    given = {name: value for name, value in options.items() if name != "requeue"}
    asked = {"ntasks-per-node": "1", "cpus-per-task": str(slots * (_CORES_PER_CARD if cuda else 1))}
    if cuda and not any(name == "gres" or name.startswith("gpus") for name in given):
        asked["gpus-per-node"] = str(slots)
    asked |= {"signal": f"B:USR1@{_SECONDS_TO_SAVE}", **given}
    requeue = "requeue" if options.get("requeue", "yes") == "yes" else "no-requeue"
    lines = [f"#SBATCH --{name}={value}" for name, value in asked.items()]
    launch = shlex.join([sys.executable, "-m", "launcher.cli", "resume", where, "--hostfile", f"{where}/hosts"])
    return f"""\
#!/bin/bash
#SBATCH --job-name={re.sub(r"[^A-Za-z0-9_.-]", "-", plan.name)}
#SBATCH --chdir="{os.getcwd()}"
#SBATCH --output="{where}/logs/slurm-%j.log"
#SBATCH --open-mode=append
#SBATCH --{requeue}
{chr(10).join(lines)}

scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots={slots}/' > {shlex.quote(f"{where}/hosts")}
{launch} &
launch=$!
# Before its time is up Slurm sends USR1: all ranks save, the launcher ends with 130, and the job stands in the queue again.
trap 'out_of_time=1; kill -USR1 $launch' USR1
trap 'kill -TERM $launch' TERM
wait $launch
code=$?
while kill -0 $launch 2> /dev/null; do
  wait $launch
  code=$?
done
{_again(requeue)}exit $code
"""


def _again(requeue: str) -> str:
    if requeue == "no-requeue":
        return ""
    return 'if [ "$code" = 130 ] && [ -n "$out_of_time" ]; then\n  scontrol requeue "$SLURM_JOB_ID"\nfi\n'


def submit_run(asked: Asked, first: str, dry_run: bool) -> None:
    """Plan for nodes that Slurm will choose, write the run directory, and submit a job that carries it out.

    Args:
        first: the first option of sbatch; further ones stand among the overrides, which all have a dot or are `hardware`.

    Raises:
        UsageError: no option of sbatch, `hardware: auto`, or a hostfile beside Slurm's.
        PreflightError: sbatch refuses.
    """
    words = [word for word in asked.overrides if re.fullmatch(r"(?!hardware=)[a-z-]+=.*", word)]
    asked = replace(asked, overrides=tuple(word for word in asked.overrides if word not in words))
    options = options_of([first, *words])
    if asked.where != Where():
        raise UsageError("--slurm", "Slurm chooses the hosts", "leave --hostfile, --nproc and --device-map out")
    loaded = load_recipe(find_recipe(asked.recipe), asked.overrides)
    if loaded.recipe.hardware == "auto":
        found = "is what this machine has, and another one will run it"
        raise UsageError("hardware: auto", found, "say what a node has: hardware=8xA800-80GB")
    run, plan = start.new_run_dir(loaded), _planned(asked, loaded.recipe.hardware, int(options["nodes"]))
    if dry_run:
        print(script(plan, run, options), end="")
        return
    if loaded.recipe.launch.run_dir is None:
        run = run.claimed()
    text = script(plan, run, options)
    run.create()
    with run.locked():
        write_run(plan, run, False)
        job = submit(text, run)
    show.show_submitted(show.console(), job, run.path)


def _planned(asked: Asked, hardware: str | tuple[str, ...], num_nodes: int) -> Plan:
    """The plan for so many nodes without a name yet."""
    slots = resolve_cluster(hardware).num_devices
    with tempfile.TemporaryDirectory(prefix="launch-slurm-") as folder:
        hosts = Path(folder) / "hosts"
        hosts.write_text("".join(f"node-{number} slots={slots}\n" for number in range(num_nodes)), encoding="utf-8")
        _, plan = start.plan_recipe(replace(asked, where=Where(hostfile=str(hosts))))
    return plan


def submit(text: str, run: RunDir) -> str:
    """Write the script into the run directory and submit it; the number of the job.

    Raises:
        PreflightError: there is no sbatch here, or it refuses.
    """
    path: Path = run.path / "job.sbatch"
    write_atomic(path, text)
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        to_type = "type it on a machine of the cluster, or see the script: --slurm … --dry-run"
        raise PreflightError("--slurm", "there is no sbatch here", to_type) from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no word why").splitlines()[-1]
        raise PreflightError("--slurm", f"sbatch refuses: {said}", f"see the script, {path}; then name other options")
    return done.stdout.strip().partition(";")[0]
