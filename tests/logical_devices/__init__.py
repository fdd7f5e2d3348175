"""Cards that are not there: `pretend:0`, `pretend:1`, …, with a capacity and an out-of-memory error of their own, on a CPU machine.

What is placed on them is really placed: a tensor knows its device, mixing two devices is an error, every byte is counted where it
lies, and torch.accelerator sees them. Not pretended: a card's kernels, its speed, and the gaps in its allocator.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.training_args

SOURCE = Path(__file__).with_name("devices.cpp")
_NAME = "pretend"


def why_not() -> str | None:
    """Why they cannot be built here; None where they can."""
    missing = [program for program in ("g++", "ninja") if shutil.which(program) is None]
    return f"no {' and no '.join(missing)} to build the pretend devices with" if missing else None


def version() -> str:
    """What a build is for: this source, on this torch and Python."""
    source = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return f"pretend-devices-{source}-torch{torch.__version__}-py3.{sys.version_info.minor}"


def build(folder: Path) -> Path:
    """The library, compiled into a folder of its own (half a minute the first time, nothing after that)."""
    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-O1", "-fvisibility=hidden"]
    cpp_extension.load(
        "pretend_devices", [str(SOURCE)], build_directory=str(folder), extra_cflags=flags, is_python_module=False
    )
    return folder / "pretend_devices.so"


def register(library: Path, capacities: Sequence[int]) -> None:
    """Make them the accelerator of this process, once and for good.

    Args:
        capacities: of each device in bytes; 0 is without end.
    """
    torch.ops.load_library(library)
    torch.ops.pretend.register_devices(list(capacities))
    torch.utils.rename_privateuse1_backend(_NAME)
    torch._register_device_module(_NAME, _module(len(capacities)))
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.compiler.set_stance("force_eager")  # bitsandbytes would have kernels compiled, for minutes
    # accelerate and transformers look for the makes that they know.
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{_NAME}:0"
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def _module(num: int) -> types.ModuleType:
    """What torch, transformers and accelerate expect below `torch.pretend`. Random numbers are the CPU's."""
    module: Any = types.ModuleType(f"torch.{_NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: num
    module.current_device = torch.accelerator.current_device_index
    module.set_device = torch.accelerator.set_device_index
    module.synchronize = module.empty_cache = module.manual_seed = module.manual_seed_all = lambda *_: None
    module._is_in_bad_fork = lambda: False
    module._lazy_init = lambda: None
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.set_rng_state = lambda *_: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.device = torch.accelerator.device_index
    return module
