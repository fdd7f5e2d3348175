"""What this machine has beside its cards: memory, cores, limits, and the kernel's word on what was killed."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from pathlib import Path

from launcher.cluster.model import Cluster, Device, Node

_OOM_KILL = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def host_memory_bytes(proc: Path = PROC, cgroup: Path = _CGROUP) -> int:
    """Memory of this host in bytes, or the limit of the container we run in where that is smaller."""
    total = _meminfo_bytes("MemTotal", proc) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(limit for _, limit in _memory_limits(proc, cgroup))])


def available_memory_bytes(proc: Path = PROC, cgroup: Path = _CGROUP) -> int:
    """Memory that new processes may take before the kernel kills one, in bytes.

    MemAvailable of the host, or what is left below the container's limit; files that the kernel has cached give way.
    """
    left = [_meminfo_bytes("MemAvailable", proc) or host_memory_bytes(proc, cgroup)]
    for folder, limit in _memory_limits(proc, cgroup):
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        stat = read_small(folder / "memory.stat")
        cached = re.search(r"^total_inactive_file (\d+)", stat, re.MULTILINE) or re.search(
            r"^inactive_file (\d+)", stat, re.MULTILINE
        )
        left.append(max(0, limit - used + (int(cached[1]) if cached else 0)))
    return min(left)


def oom_kills(proc: Path = PROC, cgroup: Path = _CGROUP) -> int | None:
    """How many processes the kernel has killed because memory was full: of our control group (v2 `memory.events`, v1 `memory.oom_control`),
    else of this host (`vmstat`). None where nobody counts."""
    counted = [
        (len(folder.parts), int(found[1]))
        for folder in _cgroup_folders("memory", proc, cgroup)
        for name in ("memory.events", "memory.oom_control")
        if (found := _OOM_KILL.search(read_small(folder / name)))
    ]
    if counted:  # a parent counts what it has killed in other groups, too
        return max(counted)[1]
    found = _OOM_KILL.search(read_small(proc / "vmstat"))
    return int(found[1]) if found else None


def process_limit(proc: Path = PROC, cgroup: Path = _CGROUP) -> int | None:
    """Most processes and threads that the container may have (pids.max), None where there is no such limit."""
    limits = (_number(folder / "pids.max") for folder in _cgroup_folders("pids", proc, cgroup))
    return min((limit for limit in limits if limit is not None), default=None)


def _meminfo_bytes(name: str, proc: Path) -> int | None:
    told = re.search(rf"^{name}:\s+(\d+) kB", read_small(proc / "meminfo"), re.MULTILINE)
    return int(told[1]) * 1024 if told else None


def _memory_limits(proc: Path, cgroup: Path) -> list[tuple[Path, int]]:
    """Every memory limit of our control group and its parents, with its folder: v2 `memory.max`, v1 `memory.limit_in_bytes`."""
    return [
        (folder, limit)
        for folder in _cgroup_folders("memory", proc, cgroup)
        for name in ("memory.max", "memory.limit_in_bytes")
        if (limit := _number(folder / name)) is not None
    ]


def _cgroup_folders(controller: str, proc: Path, cgroup: Path) -> list[Path]:
    """Folders of our control group and its parents, under v2 and under that controller of v1; some may not be there."""
    folders = [cgroup, cgroup / controller]
    for line in read_small(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroup / controller if controllers else cgroup
        folder = root / path.lstrip("/")
        folders += [parent for parent in (folder, *folder.parents) if parent.is_relative_to(root)]
    return list(dict.fromkeys(folders))


def read_small(file: Path) -> str:
    """The text of a small file of the kernel's, empty where it is not there."""
    try:
        return file.read_text()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    """The number in such a file; None where it is not there or says `max`."""
    text = read_small(file).strip()
    return int(text) if text.isdigit() else None


def is_here(host: str) -> bool:
    """Whether a name or address of a hostfile is this machine's. No name server is asked: ssh would lead here too."""
    bare = host.rpartition("@")[2].strip("[]")
    own = socket.gethostname()
    if bare in ("localhost", "127.0.0.1", "::1", own, own.partition(".")[0]):
        return True
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError, ValueError):
        if re.fullmatch(r"[\d.]+|[\da-fA-F:]+", bare):
            probe.bind((bare, 0))
            return True
    return False


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
