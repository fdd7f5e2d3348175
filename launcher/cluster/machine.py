"""What this machine has: its memory and cores, and the cards that nvidia-smi shows and CUDA_VISIBLE_DEVICES leaves."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launcher.cluster.model import MIB, Cluster, Device, Node

_NVIDIA_SMI_FIELDS = "index,uuid,name,memory.total,memory.used,compute_cap"
_NVIDIA_SMI_TIMEOUT_S = 20


def host_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of this host in bytes, or the limit of the container we run in where that is smaller."""
    try:
        total = int(re.findall(r"^MemTotal:\s+(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)[0]) * 1024
    except (OSError, IndexError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_cgroup_limits(proc, cgroup)])


def _cgroup_limits(proc: Path, cgroup: Path) -> list[int]:
    """Every memory limit of our control group and its parents: v2 `memory.max`, v1 `memory.limit_in_bytes`."""
    files = [cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"]
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (cgroup / "memory", "memory.limit_in_bytes") if controllers else (cgroup, "memory.max")
        folder = root / path.lstrip("/")
        files += [parent / name for parent in (folder, *folder.parents) if parent.is_relative_to(root)]
    limits = []
    for file in files:
        try:
            limits.append(int(file.read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return limits


def usable_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_cluster(num_ranks: int, source: str) -> Cluster:
    """CPU ranks on this host, each with its share of the memory."""
    share_bytes, cores = host_memory_bytes() // num_ranks, max(1, usable_cores() // num_ranks)
    ranks = [
        Device(name="cpu", kind="cpu", memory_bytes=share_bytes, bf16=True, index=index, cores=cores)
        for index in range(num_ranks)
    ]
    return Cluster(nodes=(Node(host="localhost", devices=tuple(ranks)),), source=source)


def nvidia_devices() -> tuple[list[Device], str]:
    """The visible cards of this machine, and a remark that says how it was found out or why there are none."""
    command = ["nvidia-smi", f"--query-gpu={_NVIDIA_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False)
    except FileNotFoundError:
        return [], "there is no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi failed: {type(error).__name__}"
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        return [], f"nvidia-smi failed: {said[0] if said else f'exit code {done.returncode}'}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 5]
    rows = _visible(rows, os.environ.get("CUDA_VISIBLE_DEVICES"))
    remark = "nvidia-smi" if rows else "nvidia-smi shows no card, or CUDA_VISIBLE_DEVICES hides all of them"
    return [_nvidia_device(row, index) for index, row in enumerate(rows)], remark


def _nvidia_device(row: Sequence[str], index: int) -> Device:
    """One line of nvidia-smi; a figure that it does not give (`[N/A]` where memory is shared) is the host's."""
    _, uuid, name, total_mib, used_mib, capability = row
    return Device(
        name=name,
        kind="cuda",
        memory_bytes=int(total_mib) * MIB if total_mib.isdigit() else host_memory_bytes(),
        reserved_bytes=int(used_mib) * MIB if used_mib.isdigit() else 0,
        bf16=int(capability.split(".")[0]) >= 8 if capability[:1].isdigit() else False,
        index=index,
        uuid=uuid,
    )


def _visible(rows: list[list[str]], visible: str | None) -> list[list[str]]:
    """CUDA's own rule: indices or beginnings of UUIDs, in that order, and nothing after the first that is none."""
    if visible is None:
        return rows
    kept: list[list[str]] = []
    for wanted in (part.strip() for part in visible.split(",")):
        match = [row for row in rows if row[0] == wanted or (wanted and row[1].startswith(wanted))]
        if len(match) != 1:
            break
        kept.append(match[0])
    return kept
