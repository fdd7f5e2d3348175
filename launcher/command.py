"""Plan in, one NodeCommand a node out: exactly what is started, as a list of arguments from birth to Popen.

Ranks are handed one path and no flags: an option after torchrun's script that begins like one of torchrun's own is taken by
torchrun.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launcher.cluster import Device
from launcher.plan import Plan
from launcher.rundir import RunDir, cache_folder


@dataclass(frozen=True)
class NodeCommand:
    """What one node starts.

    Args:
        host: where.
        argv: the program and its arguments.
        env: variables set beside the inherited ones; never a setting of the recipe, never a secret.
        cwd: working directory.
    """

    host: str
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = ""

    def __str__(self) -> str:
        """A line that a shell runs the same way."""
        env = [f"{key}={shlex.quote(value)}" for key, value in self.env.items()]
        return " ".join([*(["env", *env] if env else []), shlex.join(self.argv)])


def node_commands(plan: Plan, run: RunDir) -> tuple[NodeCommand, ...]:
    """The commands that carry out a plan in a run directory. Today: one node, this one."""
    (node,) = plan.cluster.nodes
    if plan.backend == "python":
        argv: tuple[str, ...] = (sys.executable, "-m", "launcher.worker", str(run.plan))
    else:
        launcher = _deepspeed(plan, node.host) if plan.backend == "deepspeed" else _torchrun(plan, node.host)
        argv = (sys.executable, *launcher, str(run.plan))
    return (NodeCommand(host=node.host, argv=argv, env=_environment(plan, run), cwd=str(Path.cwd())),)


def prepare_command(plan: Plan, run: RunDir) -> NodeCommand:
    """What prepares a node before any rank exists."""
    env = _environment(plan, run) | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(_cores())}
    # Prepare is the one step that may download, and tokenising wants all cores; ranks may do neither.
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        del env[name]
    argv = (sys.executable, "-m", "launcher.worker.prepare", str(run.plan))
    return NodeCommand(host=plan.cluster.nodes[0].host, argv=argv, env=env, cwd=str(Path.cwd()))


def _environment(plan: Plan, run: RunDir) -> dict[str, str]:
    """What the workers of a run get. transformers copies remote code to a cache of its own; here there is none to be had."""
    sealed = {"HF_MODULES_CACHE": str(run.module_cache)} if plan.recipe.model.trust_remote_code else {}
    return worker_environment(plan) | sealed


def worker_environment(plan: Plan) -> dict[str, str]:
    """Variables for libraries that read nothing else."""
    # Under a device map stage 0 is the first card that is seen, whatever its place in the machine.
    devices = [plan.cluster.devices[stage.device] for stage in plan.stages] or plan.cluster.devices
    env = rank_environment(devices, plan.num_processes)
    if plan.deepspeed is not None:
        # Operators that are compiled: kept by library versions, and by the ninja of this environment and no other.
        versions = "-".join(_version(name) for name in ("torch", "deepspeed"))
        folder = cache_folder() / f"operators-py3.{sys.version_info.minor}-{versions}"
        env["TORCH_EXTENSIONS_DIR"] = os.environ.get("TORCH_EXTENSIONS_DIR") or str(folder)
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        env["DS_ACCELERATOR"] = plan.kind
    return env


def rank_environment(devices: Sequence[Device], num_processes: int) -> dict[str, str]:
    """The variables of processes that share these devices of this node, which they see in this order."""
    env = {
        "OMP_NUM_THREADS": str(max(1, _cores() // num_processes)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        # One node: a host name that resolves to another interface would make gloo hang. On cards ranks agree over it after every step.
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if devices[0].kind == "cuda":
        env |= visible_devices(devices)
    else:
        env["CUDA_VISIBLE_DEVICES"] = ""
        # Threads that wait by spinning make a step twenty times as long where others compute on these cores too.
        env["OMP_WAIT_POLICY"] = "PASSIVE"
    return env


def visible_devices(devices: Sequence[Device]) -> dict[str, str]:
    """The variables by which a process sees these cards, in this order, and no others; their indices are those of nvidia-smi."""
    seen = ",".join(device.uuid or str(device.index) for device in devices)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": seen}


def _torchrun(plan: Plan, host: str) -> tuple[str, ...]:
    """torchrun's own arguments; `launcher.worker.torchrun` is torchrun plus a file that says which rank failed how."""
    endpoint = f"127.0.0.1:{plan.recipe.launch.port or 0}"
    return (
        "-m",
        "launcher.worker.torchrun",
        "--nnodes=1",
        f"--nproc-per-node={plan.num_processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={plan.name}",
        "--local-addr=127.0.0.1",
        "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT",  # at SIGTERM ranks save
        "-m",
        "launcher.worker",
    )


def _deepspeed(plan: Plan, host: str) -> tuple[str, ...]:
    """The arguments of DeepSpeed's launcher of one node; `launcher.worker.deepspeed` is that launcher, which ends as torchrun does."""
    world = json.dumps({host: list(range(plan.num_processes))}).encode()
    return (
        "-m",
        "launcher.worker.deepspeed",
        f"--world_info={base64.urlsafe_b64encode(world).decode()}",
        "--node_rank=0",
        "--master_addr=127.0.0.1",
        f"--master_port={plan.recipe.launch.port or 0}",
        "--no_local_rank",
        "--log_level=warning",
        "--module",
        "launcher.worker",
    )


def _version(package: str) -> str:
    """Its version, `none` where it is not installed: commands are shown on machines that cannot run them."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cores() -> int:
    return len(os.sched_getaffinity(0))
