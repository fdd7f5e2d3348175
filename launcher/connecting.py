"""What starts the agent of a host, by ssh, by srun or, on this machine, at once; and what of this environment it is told."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from launcher.cluster import Node, is_here, nodes_of_job
from launcher.command import python_on
from launcher.plan import Plan
from launcher.processes import NodeCommand

# What other hosts are told of this one's environment, beside what a command sets itself. Over ssh's own channel, never on a command line.
TRAVELS = (
    "CUDA_",
    "FI_",
    "GLOO_",
    "HF_",
    "HUGGINGFACE_",
    "LAUNCH_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "TORCH_",
    "UCX_",
)
TRAVELS_TOO = (
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)
_STAYS = ("CUDA_VISIBLE_DEVICES",)  # of this host's cards
_NEEDED_TO_BEGIN = ("PYTHONPATH", "LAUNCH_CACHE")  # paths, before the agent can be told the rest


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that other hosts are told."""
    return {
        name: value
        for name, value in environment.items()
        if (name.startswith(TRAVELS) or name in TRAVELS_TOO) and name not in _STAYS
    }


def connecting_command(plan: Plan, node: Node, module: str = "launcher.agent", *args: str) -> NodeCommand:
    """What starts the agent of a node, or another module there.

    The one text that a shell will read, that of the other host, is quoted word for word.
    """
    agent = (python_on(plan, node.host), "-m", module, *args)
    if is_here(node.host):
        return NodeCommand(node.host, agent, cwd=str(Path.cwd()))
    if node.host in nodes_of_job():
        return NodeCommand(node.host, (*_srun(node.host), *agent), cwd=str(Path.cwd()))
    ssh = plan.recipe.launch.ssh
    options = ["BatchMode=yes", f"ConnectTimeout={ssh.timeout_s}", "ServerAliveInterval=5", "ServerAliveCountMax=3"]
    # A connection of its own, which ends with this process: a shared one would outlive it.
    options += [
        "ControlMaster=no",
        "ControlPath=none",
        "ClearAllForwardings=yes",
        "RemoteCommand=none",
        "LogLevel=ERROR",
    ]
    argv = ["ssh", "-T", *(word for option in options for word in ("-o", option))]
    argv += ["-p", str(ssh.port)] if ssh.port else []
    argv += ["-i", os.path.expanduser(ssh.key)] if ssh.key else []
    argv += ["-l", ssh.user] if ssh.user else []
    user, at, name = node.host.rpartition("@")
    told = [f"{name}={os.environ[name]}" for name in _NEEDED_TO_BEGIN if os.environ.get(name)]
    there = shlex.join(["exec", "env", *told, *agent])
    return NodeCommand(node.host, (*argv, "--", f"{user}{at}{name.strip('[]')}", there), cwd=str(Path.cwd()))


def _srun(host: str) -> tuple[str, ...]:
    """A step of this job on one of its nodes. Since 22.05 Slurm gives a step the cores of its job only where it is told to."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK")
    more = (f"--cpus-per-task={cores}",) if cores else ()
    return ("srun", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--overlap", *more, "--")
