"""This machine in, Findings out, whatever will be run: packages, cards, host memory, /dev/shm, limits, the cache."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from launcher.cluster import (
    GIB,
    MIB,
    Cluster,
    available_memory_bytes,
    found_on_this_machine,
    host_memory_bytes,
    process_limit,
    usable_cores,
)
from launcher.preflight.disk import first_folder, refusal
from launcher.preflight.finding import Finding, size
from launcher.preflight.packages import ranges_kept, torch_wheel
from launcher.rundir import cache_folder

SHM = Path("/dev/shm")
# What NCCL takes of it for each rank where cards talk through the host: Docker's default of 64 MiB is known to be too
# little from two ranks on (github.com/NVIDIA/nccl/issues/290, pytorch/tutorials#2475).
_SHM_BYTES_A_RANK = 64 * MIB
# What systems give by default. A CPU rank of two has 9 files open (measured); NCCL has several sockets for each other rank.
_OPEN_FILES = 1024
# A CPU rank has 7 (measured); those of CUDA, NCCL and data loaders come on top: a round figure, not measured.
_THREADS_A_RANK = 64
_LITTLE_DISK_BYTES = 2 * GIB


def diagnose() -> Iterator[Finding]:
    """All that can be said without a plan and without starting a process; nothing but nvidia-smi is run."""
    found = found_on_this_machine()
    yield Finding("ok", f"python {platform.python_version()}", f"on {platform.system()} {platform.release()}")
    yield from ranges_kept()
    yield from torch_wheel(found)
    yield from _devices(found)
    yield _memory()
    yield from limits(found.kind, found.num_devices)
    yield from _cache()


def limits(kind: str, num_ranks: int, shm: Path = SHM) -> Iterator[Finding]:
    """What the kernel or the container allows so many ranks."""
    yield from _shared_memory(kind, num_ranks, shm)
    yield from _open_files()
    yield from _processes(num_ranks)


def _devices(found: Cluster) -> Iterator[Finding]:
    if found.kind == "cpu":
        yield Finding("ok", "devices", f"{found.source}: {usable_cores()} cores, {found.num_devices} ranks by default")
    for device in found.devices if found.kind == "cuda" else ():
        free = size(device.memory_bytes - device.reserved_bytes)
        dtype = "bf16" if device.bf16 else "fp16, no bf16"
        yield Finding(
            "ok", f"card {device.index}", f"{device.name}, {free} of {size(device.memory_bytes)} free, {dtype}"
        )


def _memory() -> Finding:
    total, available = host_memory_bytes(), available_memory_bytes()
    return Finding("ok", "host memory", f"{size(available)} of {size(total)} available")


def room_in_host(num_bytes: int) -> Iterator[Finding]:
    """Whether so much can be kept in host memory; nothing where that is nothing."""
    available = available_memory_bytes()
    if num_bytes > available:
        found = f"{size(num_bytes)} of weights would lie there, {size(available)} are available"
        yield Finding("error", "host memory", found, "end what else uses it (`free -g`, `top`), or add a card")


def _shared_memory(kind: str, num_ranks: int, shm: Path) -> Iterator[Finding]:
    what, wanted = str(shm), _SHM_BYTES_A_RANK * num_ranks
    larger = f"docker run --shm-size={max(1, round(2 * wanted / GIB))}g …  (Kubernetes: an emptyDir of medium Memory)"
    if kind == "cpu" or num_ranks == 1:
        if shm.is_dir():
            yield Finding("ok", what, f"{size(shutil.disk_usage(shm).total)}; one card, or ranks on a CPU, need little")
        return
    if not shm.is_dir():
        yield Finding("warning", what, "is not there: ranks cannot share memory", f"mount it: {larger}")
        return
    usage = shutil.disk_usage(shm)
    found = f"{size(usage.free)} of {size(usage.total)} free"
    if usage.total < wanted + MIB:
        yield Finding("warning", what, f"{found}; {num_ranks} ranks want more than {size(wanted)}", larger)
    elif usage.free < wanted:
        to_type = f"look at what runs that ended left there: ls -l {shm}"
        yield Finding("warning", what, f"{found}; {num_ranks} ranks want {size(wanted)}", to_type)
    else:
        yield Finding("ok", what, found)


def _open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        more = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
        to_type = (
            f"ulimit -n {more}"
            if more >= _OPEN_FILES
            else f"docker run --ulimit nofile=4096 …, or raise `nofile` in /etc/security/limits.conf (at most {hard} now)"
        )
        yield Finding("warning", "open files", f"{soft} a process are allowed, a rank wants {_OPEN_FILES}", to_type)
    else:
        yield Finding("ok", "open files", f"{'any number' if soft == resource.RLIM_INFINITY else soft} a process")


def _processes(num_ranks: int) -> Iterator[Finding]:
    """Threads count as processes: of the user (RLIMIT_NPROC, not for root) and of the container (pids.max)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    unlimited = resource.RLIM_INFINITY
    more = (
        "raise `nproc` in /etc/security/limits.conf"
        if soft == hard
        else f"ulimit -u {'unlimited' if hard == unlimited else hard}"
    )
    allowed = [] if soft == unlimited or os.geteuid() == 0 else [(soft, more)]
    container = process_limit()
    if container is not None:
        allowed.append((container, "docker run --pids-limit=-1 …"))
    wanted = num_ranks * _THREADS_A_RANK + usable_cores()
    limit, to_type = min(allowed, default=(None, ""))
    if limit is not None and limit < wanted:
        found = f"{limit} are allowed, {num_ranks} ranks want {wanted}"
        yield Finding("warning", "processes and threads", found, to_type)
    else:
        yield Finding("ok", "processes and threads", f"{'any number' if limit is None else limit} allowed")


def _cache() -> Iterator[Finding]:
    cache = cache_folder()
    elsewhere = "set another folder: export LAUNCH_CACHE=/path/with/space"
    problem = refusal(cache)
    if problem:
        yield Finding("error", f"cache {cache}", problem, elsewhere)
        return
    free = shutil.disk_usage(first_folder(cache)).free
    little = free < _LITTLE_DISK_BYTES
    yield Finding("warning" if little else "ok", f"cache {cache}", f"{size(free)} free", elsewhere if little else "")
