"""What this machine has: its memory and cores, and the cards that nvidia-smi shows and CUDA_VISIBLE_DEVICES leaves."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launcher.cluster.model import MIB, Cluster, Device, Node

_NVIDIA_SMI_FIELDS = "index,uuid,name,memory.total,memory.used,compute_cap"
_NVIDIA_SMI_TIMEOUT_S = 20
_OOM_KILL = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def host_memory_bytes(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Memory of this host in bytes, or the limit of the container we run in where that is smaller."""
    total = _meminfo_bytes("MemTotal", proc) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(limit for _, limit in _memory_limits(proc, cgroup))])


def available_memory_bytes(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Memory that new processes may take before the kernel kills one, in bytes.

    MemAvailable of the host, or what is left below the container's limit; files that the kernel has cached give way.
    """
    left = [_meminfo_bytes("MemAvailable", proc) or host_memory_bytes(proc, cgroup)]
    for folder, limit in _memory_limits(proc, cgroup):
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        stat = _read(folder / "memory.stat")
        cached = re.search(r"^total_inactive_file (\d+)", stat, re.MULTILINE) or re.search(
            r"^inactive_file (\d+)", stat, re.MULTILINE
        )
        left.append(max(0, limit - used + (int(cached[1]) if cached else 0)))
    return min(left)


def oom_kills(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """How many processes the kernel has killed because memory was full: of our control group (v2 `memory.events`, v1 `memory.oom_control`),
    else of this host (`vmstat`). None where nobody counts."""
    counted = [
        (len(folder.parts), int(found[1]))
        for folder in _cgroup_folders("memory", proc, cgroup)
        for name in ("memory.events", "memory.oom_control")
        if (found := _OOM_KILL.search(_read(folder / name)))
    ]
    if counted:  # a parent counts what it has killed in other groups, too
        return max(counted)[1]
    found = _OOM_KILL.search(_read(proc / "vmstat"))
    return int(found[1]) if found else None


def process_limit(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """Most processes and threads that the container may have (pids.max), None where there is no such limit."""
    limits = (_number(folder / "pids.max") for folder in _cgroup_folders("pids", proc, cgroup))
    return min((limit for limit in limits if limit is not None), default=None)


def driver_version(proc: Path = _PROC) -> str | None:
    """Version of the NVIDIA driver, None where there is none: from the kernel, else (WSL has no such file) nvidia-smi."""
    told = re.search(r"NVRM version:.*?\s(\d+(?:\.\d+)+)\s", _read(proc / "driver" / "nvidia" / "version"))
    if told:
        return told[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = re.match(r"\d+(\.\d+)+", done.stdout)
    return said[0] if said and done.returncode == 0 else None


def nvidia_on_the_bus(sys: Path = Path("/sys")) -> bool:
    """Whether an NVIDIA card is plugged in, driver or not: a PCI device of vendor 10de and class 03 (display)."""
    devices = (sys / "bus" / "pci" / "devices").glob("*")
    return any(
        _read(device / "vendor").strip() == "0x10de" and _read(device / "class").startswith("0x03")
        for device in devices
    )


def _meminfo_bytes(name: str, proc: Path) -> int | None:
    told = re.search(rf"^{name}:\s+(\d+) kB", _read(proc / "meminfo"), re.MULTILINE)
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
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroup / controller if controllers else cgroup
        folder = root / path.lstrip("/")
        folders += [parent for parent in (folder, *folder.parents) if parent.is_relative_to(root)]
    return list(dict.fromkeys(folders))


def _read(file: Path) -> str:
    """The text of a small file of the kernel's, empty where it is not there."""
    try:
        return file.read_text()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    """The number in such a file; None where it is not there or says `max`."""
    text = _read(file).strip()
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
