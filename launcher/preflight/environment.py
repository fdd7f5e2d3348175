"""What is written down in every run, as environment.json: versions, devices, memory and limits. No environment variable is part of it."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
from typing import Any

from launcher.cluster import (
    Cluster,
    available_memory_bytes,
    driver_version,
    host_memory_bytes,
    process_limit,
    usable_cores,
)
from launcher.installed import version_of
from launcher.preflight.machine import SHM
from launcher.preflight.packages import torch_cuda

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "bitsandbytes",
    "deepspeed",
)
_LIMITS = {
    "open_files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
    "locked_memory_bytes": resource.RLIMIT_MEMLOCK,
}


def environment(cluster: Cluster) -> dict[str, Any]:
    """This machine as JSON. `memory_bytes` is the container's limit where that is smaller; a limit of None is none."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "host": socket.gethostname(),
        "cores": usable_cores(),
        "memory_bytes": host_memory_bytes(),
        "memory_available_bytes": available_memory_bytes(),
        "shared_memory_bytes": shutil.disk_usage(SHM).total if os.path.isdir(SHM) else None,
        "limits": {name: _soft_limit(number) for name, number in _LIMITS.items()} | {"container": process_limit()},
        "packages": {name: version_of(name) for name in _PACKAGES},
        "torch_cuda": torch_cuda(),
        "driver": driver_version(),
        "devices": [device.model_dump(mode="json") for device in cluster.devices],
    }


def _soft_limit(number: int) -> int | None:
    soft, _ = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft
