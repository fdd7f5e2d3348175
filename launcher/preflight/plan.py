"""What one plan needs of this machine: its strategy, cards, data, code, packages, host memory, port; files and disks are next door."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from launcher.cluster import (
    available_memory_bytes,
    found_on_this_machine,
    host_memory_bytes,
)
from launcher.command import by_agents
from launcher.families import family
from launcher.memory import CPU_CONTEXT_BYTES
from launcher.modelshape.files import cached_snapshot
from launcher.modelshape.headers import stored_dtypes
from launcher.plan import DTYPE_BYTES, Plan, checkpoint_bytes, swap_buffers_bytes
from launcher.preflight.beginning import beginning
from launcher.preflight.devices import devices
from launcher.preflight.disk import room
from launcher.preflight.files import model_files
from launcher.preflight.finding import Finding, size
from launcher.preflight.machine import limits
from launcher.preflight.packages import ranges_kept, torch_wheel
from launcher.preflight.port import port

_STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def check(plan: Plan, run_dir: Path) -> list[Finding]:
    """Everything that can be known before a process is started."""
    found = found_on_this_machine()
    several = by_agents(plan)  # whose cards and files are looked at when they are connected
    return [
        *(devices(plan, found) if not several else ()),
        *_strategy(plan),
        *(torch_wheel(found) if plan.kind == "cuda" else ()),
        *ranges_kept(),
        *_data(plan),
        *(model_files(plan) if plan.rehearsal is None else ()),  # its weights are random
        *beginning(plan, run_dir),
        *_code(plan),
        *_code_versions(plan),
        *_packages(plan),
        *_compiler(plan),
        *_host_memory(plan),
        *limits(plan.kind, len(plan.cluster.nodes[0].devices)),
        *room(plan, run_dir),
        *(port(plan.recipe.launch.port) if not several else ()),
    ]


def _strategy(plan: Plan) -> Iterator[Finding]:
    if plan.cluster.num_nodes > 1 and plan.num_processes != plan.cluster.num_devices:
        found = f"strategy {plan.strategy} has {plan.num_processes} ranks on {plan.cluster.num_devices} devices"
        yield Finding("error", f"{plan.cluster.num_nodes} hosts", found, "take one host, or strategy.type=ddp")
    elif plan.cluster.num_nodes > 1 and plan.stages:
        found = "a device map spreads a model over the devices of one machine"
        yield Finding("error", f"{plan.cluster.num_nodes} hosts", found, "leave --hostfile out, or strategy.type=fsdp")
    elif plan.cluster.num_nodes > 1 and plan.backend == "python":
        yield Finding(
            "error", "launch.backend: python", "starts one process on one host", "set launch.backend=torchrun"
        )
    if plan.shape.remote_code and not plan.recipe.model.trust_remote_code:
        yield Finding(
            "error",
            f"model.path: {plan.shape.name}",
            "; ".join(["its code is not part of transformers and comes with the weights", *plan.shape.not_native]),
            "if you trust that code: model.trust_remote_code=true",
        )


def _data(plan: Plan) -> Iterator[Finding]:
    data = plan.recipe.data
    named = [("data.path", data.path)] + ([("data.eval.path", data.eval.path)] if data.eval and data.eval.path else [])
    for key, paths in named:
        for path in [paths] if isinstance(paths, str) else paths:
            if "://" in path:
                yield Finding("ok", f"{key}: {path}", "is read while it trains")
            elif not os.path.exists(path):
                yield Finding(
                    "error",
                    f"{key}: {path}",
                    "there is no such file or folder",
                    f"give the path of your data: {key}=FILE",
                )
            elif not os.access(path, os.R_OK):
                yield Finding("error", f"{key}: {path}", "may not be read by you", f"chmod +r {path}")
            else:
                yield Finding("ok", f"{key}: {path}", "is there")


def _code(plan: Plan) -> Iterator[Finding]:
    """Code that comes with the model; that it can be loaded was found out when it was planned."""
    code = plan.code
    if code is not None:
        what, files = f"code of {plan.shape.name}", f"{len(code.files)} files, sha256 {code.sha256[:12]}…"
        if code.pinned_by:
            yield Finding("ok", what, f"{files}, pinned by {code.pinned_by}")
        else:
            yield Finding("warning", what, f"{files}; nothing pins it", "look at it and pin it: launch trust RECIPE")
    elif plan.recipe.model.trust_remote_code and plan.shape.remote_code and plan.recipe.model.code_sha256 is None:
        found = "is not here yet, so nobody can have looked at it"
        to_type = "fetch it: launch prepare RECIPE; then look at it and pin it: launch trust RECIPE"
        yield Finding("warning", f"code of {plan.shape.name}", found, to_type)


def _code_versions(plan: Plan) -> Iterator[Finding]:
    """A family's own code on a transformers that it was not written for."""
    from packaging.version import Version

    known = family(plan.shape.family).code_versions
    if not plan.shape.remote_code or plan.fixes or known is None or importlib.util.find_spec("transformers") is None:
        return
    here = Version(importlib.metadata.version("transformers"))
    if not Version(known[0]) <= here <= Version(known[1]):
        found = f"runs unchanged on transformers {known[0]} to {known[1]}; {here} is installed"
        to_type = "nothing: prepare tries it before any rank starts; what is known of it is in docs/families.md"
        yield Finding("warning", f"code of {plan.shape.name}", found, to_type)


def _packages(plan: Plan) -> Iterator[Finding]:
    needs_deepspeed = plan.strategy.startswith("zero") or plan.backend == "deepspeed"
    for needed, package in ((plan.needs_bitsandbytes, "bitsandbytes"), (needs_deepspeed, "deepspeed")):
        if needed and importlib.util.find_spec(package) is None:
            yield Finding(
                "error",
                f"package {package}",
                "this recipe needs it and it is not installed",
                f"pip install 'launch-trainer[{package}]'",
            )


def _compiler(plan: Plan) -> Iterator[Finding]:
    """What torch.compile makes kernels with: a C++ compiler on a CPU, Triton and a C compiler on cards."""
    if not plan.recipe.train.compile:
        return
    on_cpu = plan.kind == "cpu"
    named = os.environ.get("CXX" if on_cpu else "CC")
    programs = [named] if named else ["g++", "clang++"] if on_cpu else ["gcc", "clang", "cc"]
    found = next(filter(None, map(shutil.which, programs)), None)
    if found is None:
        without = "torch.compile needs a C++ compiler" if on_cpu else "torch.compile's Triton needs a C compiler"
        to_type = "install one (apt-get install g++), or train.compile=false"
        yield Finding("error", "train.compile: true", f"{without}, and there is no {' or '.join(programs)}", to_type)
    elif not on_cpu and importlib.util.find_spec("triton") is None:
        to_type = "pip install triton, or train.compile=false"
        yield Finding("error", "train.compile: true", "torch.compile needs Triton, which is not installed", to_type)
    else:
        yield Finding("ok", "compiler", found)


def _host_memory(plan: Plan) -> Iterator[Finding]:
    """What the ranks of this host hold in its memory at their fullest, while they load the model or train.

    On a CPU that is the plan's own figure. With cards each rank loads the weights into host memory first: mapped from the file, and
    shared, where that has the wanted precision (2 MiB of 223 were a process's own, transformers 5.23), else a copy for
    each rank (446 of 446). Quantised weights go to the card one by one, and so do those of a device map.
    """
    num_ranks = min(plan.num_processes, max(len(node.devices) for node in plan.cluster.nodes))
    if plan.kind == "cpu":
        each, why = plan.memory.total_bytes // (num_ranks if plan.pipeline else 1), "to train"
    elif plan.pipeline is not None:
        each, why = CPU_CONTEXT_BYTES, "beside the cards"
    else:
        one_by_one = plan.recipe.model.quantization != "none" or (
            plan.schedule == "naive" and not plan.shape.remote_code
        )
        copied = not one_by_one and _weights_folder_dtypes(plan) != {_STORED[plan.weights_dtype]}
        each = CPU_CONTEXT_BYTES + (plan.shape.num_parameters * DTYPE_BYTES[plan.weights_dtype] if copied else 0)
        why = "while the weights are loaded" if copied else "beside the cards"
    offloaded = _offloaded_bytes(plan)
    copied_once = checkpoint_bytes(plan) if plan.recipe.checkpoint.async_ else 0
    needed = num_ranks * each + offloaded + copied_once
    total, available = host_memory_bytes(), available_memory_bytes()
    ranks = f"{num_ranks} rank{'s' if num_ranks > 1 else ''} of {size(each)} {why}"
    ranks += f", {size(offloaded)} of offloaded state" if offloaded else ""
    ranks += f", {size(copied_once)} of a checkpoint on its way to the disk" if copied_once else ""
    found = f"{size(needed)} needed ({ranks}), {size(available)} of {size(total)} available"
    if needed <= available:
        yield Finding("ok", "host memory", found)
        return
    end = "; the kernel would kill a rank without a word (exit code -9, 137)"
    fewer = f"fewer ranks: --nproc {max(1, num_ranks // 2)}" if num_ranks > 1 else "a smaller model"
    if plan.kind == "cuda" and needed > total:
        fewer += f", or weights stored in {plan.weights_dtype}, which ranks share"
    yield Finding("warning", "host memory", found + end, f"end what else uses it (`free -g`, `top`), or {fewer}")


def _weights_folder_dtypes(plan: Plan) -> set[str]:
    """Precisions of the safetensors files that ranks will load (a conversion keeps them); empty where that is not known yet."""
    path = plan.recipe.model.path
    if path is None:
        return {"F32"}  # as `worker/fresh.py` writes it
    folder = Path(path) if os.path.isdir(path) else cached_snapshot(path, plan.recipe.model.revision)
    return stored_dtypes(folder) if folder is not None else set()


def _offloaded_bytes(plan: Plan) -> int:
    """ZeRO-Offload keeps two fp32 values, an fp32 copy and a gradient a trained parameter, and the weights if asked to; with a disk for
    them what is on its way there."""
    if plan.recipe.strategy.nvme_path is not None:
        return swap_buffers_bytes(plan)
    offload = plan.recipe.strategy.offload
    weights = plan.shape.num_parameters * DTYPE_BYTES[plan.weights_dtype] if offload == "parameters" else 0
    return 0 if offload == "none" else weights + 16 * plan.trainable_parameters
