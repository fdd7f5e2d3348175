"""Plan in, one NodeCommand a node out: exactly what is started, as a list of arguments from birth to Popen.

Ranks are handed one path and no flags: an option after torchrun's script that begins like one of torchrun's own is taken by
torchrun.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster import Device, is_here
from launcher.installed import version_of
from launcher.plan import Plan
from launcher.processes import NodeCommand
from launcher.rundir import RunDir, cache_folder


@dataclass(frozen=True)
class Rendezvous:
    """Where the nodes of a run meet, decided before any of them starts.

    Args:
        address, port: of the first node, whose torchrun listens there.
        interfaces: by which each node reaches it, in the nodes' order; empty where that is not known yet.
    """

    address: str
    port: int
    interfaces: tuple[str, ...] = ()


def node_commands(plan: Plan, run: RunDir, rendezvous: Rendezvous | None = None) -> tuple[NodeCommand, ...]:
    """The commands that carry out a plan in a run directory, one a node.

    Args:
        rendezvous: of several nodes; without it they show the first host's name and `launch.port`.
    """
    if by_agents(plan) and rendezvous is None:
        rendezvous = Rendezvous(plan.cluster.nodes[0].host, plan.recipe.launch.port or 29500)
    return tuple(_node_command(plan, run, rendezvous, rank) for rank in range(plan.cluster.num_nodes))


def _node_command(plan: Plan, run: RunDir, rendezvous: Rendezvous | None, node_rank: int) -> NodeCommand:
    host = plan.cluster.nodes[node_rank].host
    env = worker_environment(plan, node_rank) | _sealed(plan, run)
    python = python_on(plan, host)
    if plan.backend == "python":
        return NodeCommand(host, (python, "-m", "launcher.worker", str(run.plan)), env, str(Path.cwd()))
    path = run.plan
    if rendezvous is not None:
        del env["GLOO_SOCKET_IFNAME"]
        env |= _interface(rendezvous, node_rank)
        path = path.absolute()
    starting = _deepspeed if plan.backend == "deepspeed" else _torchrun
    argv = (python, *starting(plan, rendezvous, node_rank), str(path))
    return NodeCommand(host=host, argv=argv, env=env, cwd=str(Path.cwd()))


def _interface(rendezvous: Rendezvous, node_rank: int) -> dict[str, str]:
    """gloo and NCCL are told the network: they would ask for the host's own name, which Debian resolves to 127.0.1.1."""
    if not rendezvous.interfaces:
        return {}
    own = {"GLOO_SOCKET_IFNAME": rendezvous.interfaces[node_rank]}
    if "NCCL_SOCKET_IFNAME" not in os.environ:  # with = it is that interface, without all whose names begin so
        own["NCCL_SOCKET_IFNAME"] = f"={rendezvous.interfaces[node_rank]}"
    return own


def by_agents(plan: Plan) -> bool:
    """Whether its nodes are reached through agents: several, or one that is another machine."""
    return plan.cluster.num_nodes > 1 or not is_here(plan.cluster.nodes[0].host)


def python_on(plan: Plan, host: str) -> str:
    """The Python of a host: this one, or what `launch.ssh.python` says of the others."""
    named = plan.recipe.launch.ssh.python
    return sys.executable if named is None or is_here(host) else named


def prepare_command(plan: Plan, run: RunDir, node_rank: int | None = None) -> NodeCommand:
    """What prepares this machine before any rank exists, or one of several nodes."""
    env = worker_environment(plan) | _sealed(plan, run) | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(_cores())}
    # Prepare is the one step that may download, and tokenising wants all cores; ranks may do neither.
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        env.pop(name, None)
    host = plan.cluster.nodes[node_rank or 0].host
    argv: tuple[str, ...] = (sys.executable, "-m", "launcher.worker.prepare", str(run.plan))
    if node_rank is not None:
        argv = (python_on(plan, host), *argv[1:3], str(run.plan.absolute()), str(node_rank))
    return NodeCommand(host=host, argv=argv, env=env, cwd=str(Path.cwd()))


def _sealed(plan: Plan, run: RunDir) -> dict[str, str]:
    """transformers copies remote code to a cache of its own; here there is none to be had."""
    return {"HF_MODULES_CACHE": str(run.module_cache)} if plan.recipe.model.trust_remote_code else {}


def worker_environment(plan: Plan, node_rank: int = 0) -> dict[str, str]:
    """Variables for libraries that read nothing else."""
    # Under a device map stage 0 is the first card that is seen, whatever its place in the machine.
    devices: Sequence[Device] = [plan.cluster.devices[stage.device] for stage in plan.stages]
    devices = devices or plan.cluster.nodes[node_rank].devices
    env = rank_environment(devices, min(plan.num_processes, len(devices)))
    paths = plan.recipe.data.path
    if any(path.startswith("hf://") for path in ([paths] if isinstance(paths, str) else paths)):
        del env["HF_HUB_OFFLINE"]  # the rows of a stream come from there
    if plan.recipe.train.compile:  # what is compiled once is there for the next run
        folder = cache_folder() / f"compiled-py3.{sys.version_info.minor}-torch-{version_of('torch') or 'none'}"
        env["TORCHINDUCTOR_CACHE_DIR"] = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(folder)
    if plan.deepspeed is not None:
        # Operators that are compiled: kept by library versions, and by the ninja of this environment and no other.
        versions = "-".join(version_of(name) or "none" for name in ("torch", "deepspeed"))
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
        # A host name that resolves to another interface would make gloo hang. On cards ranks agree over it after every step.
        # Several nodes are told another one.
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


def _torchrun(plan: Plan, rendezvous: Rendezvous | None, node_rank: int) -> tuple[str, ...]:
    """torchrun's own arguments; `launcher.worker.torchrun` is torchrun plus a file that says which rank failed how."""
    if rendezvous is None:
        meet: tuple[str, ...] = (
            "--nnodes=1",
            f"--nproc-per-node={plan.num_processes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{plan.recipe.launch.port or 0}",
            f"--rdzv-id={plan.name}",
            "--local-addr=127.0.0.1",
        )
    else:  # each is told its number, so that none has to find out by its name whether it is the first one
        meet = (
            f"--nnodes={plan.cluster.num_nodes}",
            f"--node-rank={node_rank}",
            f"--nproc-per-node={len(plan.cluster.nodes[node_rank].devices)}",
            f"--master-addr={rendezvous.address}",
            f"--master-port={rendezvous.port}",
            f"--rdzv-id={plan.name}",
        )
    at_sigterm_ranks_save = "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"
    return ("-m", "launcher.worker.torchrun", *meet, at_sigterm_ranks_save, "-m", "launcher.worker")


def _deepspeed(plan: Plan, rendezvous: Rendezvous | None, node_rank: int) -> tuple[str, ...]:
    """The arguments of DeepSpeed's launcher of one node; `launcher.worker.deepspeed` is that launcher, which ends as torchrun does."""
    nodes, port = plan.cluster.nodes, plan.recipe.launch.port or 0
    several = len(nodes) > 1
    world = {node.host: list(range(len(node.devices) if several else plan.num_processes)) for node in nodes}
    return (
        "-m",
        "launcher.worker.deepspeed",
        f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
        f"--node_rank={node_rank}",
        f"--master_addr={rendezvous.address if rendezvous else '127.0.0.1'}",
        f"--master_port={rendezvous.port if rendezvous else port}",
        "--no_local_rank",
        "--log_level=warning",
        "--module",
        "launcher.worker",
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))
