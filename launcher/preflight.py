"""A plan and this machine in, Findings out: what stands in the way of a start, each with what to type.

Nothing is changed and no library that needs a device is imported; a whole check takes milliseconds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.cluster import Cluster, found_on_this_machine
from launcher.errors import PreflightError
from launcher.modelshape.files import cached_snapshot
from launcher.plan import Plan

GIB = 2**30
_RUNS = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp")
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZERS = ("tokenizer*", "*.model", "vocab*", "*.tiktoken")
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


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `to_type` is empty where all is well."""

    level: Literal["ok", "warning", "error"]
    what: str
    found: str
    to_type: str = ""


def check(plan: Plan, run_dir: Path) -> list[Finding]:
    """Everything that can be known before a process is started."""
    return [
        *_strategy(plan),
        *_devices(plan, found_on_this_machine()),
        *_data(plan),
        *_model(plan),
        *_code(plan),
        *_packages(plan),
        *_disk(plan, run_dir),
        *_port(plan),
    ]


def require(findings: list[Finding], listed: bool = False) -> None:
    """Raise the first error among the findings.

    Args:
        listed: whether the person has seen them all.

    Raises:
        PreflightError: there is one; further ones are counted.
    """
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        if listed:
            raise PreflightError("this machine", f"is not ready: {len(errors)} of the above", "mend what is marked ✗")
        more = f"\n  and {len(errors) - 1} more: launch check RECIPE lists them all" if len(errors) > 1 else ""
        raise PreflightError(errors[0].what, errors[0].found, errors[0].to_type + more)


def environment(cluster: Cluster) -> dict[str, Any]:
    """Versions and devices of this machine, for environment.json. No environment variable is part of it."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "host": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": versions,
        "devices": [device.model_dump(mode="json") for device in cluster.devices],
    }


def _strategy(plan: Plan) -> Iterator[Finding]:
    if plan.strategy not in _RUNS:
        yield Finding(
            "error",
            f"strategy.type: {plan.strategy}",
            "this version plans it but does not run it",
            _instead(plan),
        )
    if plan.cluster.num_nodes > 1:
        hosts = f"{plan.cluster.num_nodes} hosts"
        yield Finding(
            "error", hosts, "this version plans several hosts but starts ranks on one", "leave --hostfile out"
        )
    if plan.backend == "deepspeed":
        yield Finding(
            "error",
            "launch.backend: deepspeed",
            "this version starts ranks by torchrun or python",
            "set launch.backend=torchrun",
        )
    if plan.shape.remote_code and not plan.recipe.model.trust_remote_code:
        yield Finding(
            "error",
            f"model.path: {plan.shape.name}",
            "; ".join(["its code is not part of transformers and comes with the weights", *plan.shape.not_native]),
            "if you trust that code: model.trust_remote_code=true",
        )


def _instead(plan: Plan) -> str:
    """What to type for a strategy that is only planned yet."""
    if plan.strategy == "device_map":
        return "train on one card: strategy.type=single strategy.device_map=null hardware=auto"
    if plan.recipe.adapter.type == "full":
        return "train an adapter instead: adapter.type=lora strategy.type=ddp"
    return "set strategy.type=ddp"


def _devices(plan: Plan, found: Cluster) -> Iterator[Finding]:
    source = plan.cluster.source
    planned = source if source.startswith("hardware:") else f"hardware: auto ({source})"
    if plan.kind == "cpu":
        yield Finding("ok", planned, f"{plan.num_processes} ranks on {len(os.sched_getaffinity(0))} cores")
        return
    if found.kind == "cpu":
        yield Finding(
            "error", planned, "this machine has no GPU that nvidia-smi shows", "run on what is here: hardware=auto"
        )
        return
    if found.num_devices < plan.cluster.num_devices:
        to_type = f"use what is here: hardware=auto, or add --nproc {found.num_devices}"
        yield Finding(
            "error", planned, f"{plan.cluster.num_devices} devices planned, {found.num_devices} here", to_type
        )
        return
    for wanted, here in zip(plan.cluster.devices, found.devices, strict=False):
        free = here.memory_bytes - here.reserved_bytes
        if free < plan.memory.total_bytes:
            text = f"{here.name} has {free / GIB:.1f} GiB free, {plan.memory.total_bytes / GIB:.1f} GiB are planned"
            yield Finding(
                "error", planned, text, "end what uses the card (nvidia-smi shows it), or plan for it: hardware=auto"
            )
        elif wanted.name != here.name:
            yield Finding(
                "warning", planned, f"{here.name} is here instead of {wanted.name}", "plan for it: hardware=auto"
            )


def _data(plan: Plan) -> Iterator[Finding]:
    data = plan.recipe.data
    named = [("data.path", data.path)] + ([("data.eval.path", data.eval.path)] if data.eval and data.eval.path else [])
    for key, paths in named:
        for path in [paths] if isinstance(paths, str) else paths:
            if not os.path.exists(path):
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


def _model(plan: Plan) -> Iterator[Finding]:
    model = plan.recipe.model
    if model.path is None:
        yield Finding("ok", f"model {plan.shape.name}", plan.shape.source)
    elif os.path.isdir(model.path):
        lacks = [
            f"{what} ({', '.join(patterns)})"
            for what, patterns in (("weights", _WEIGHTS), ("tokenizer", _TOKENIZERS))
            if not any(any(Path(model.path).glob(pattern)) for pattern in patterns)
        ]
        if lacks:
            to_type = "give the whole folder that save_pretrained wrote: model.path=DIR"
            yield Finding("error", f"model.path: {model.path}", f"the folder has no {' and no '.join(lacks)}", to_type)
        else:
            yield Finding("ok", f"model {plan.shape.name}", plan.shape.source)
    elif cached_snapshot(model.path, model.revision) is not None:
        yield Finding("ok", f"model.path: {model.path}", "is in the hub cache")
    elif os.environ.get("HF_HUB_OFFLINE") == "1":
        yield Finding(
            "error",
            f"model.path: {model.path}",
            "is not here and HF_HUB_OFFLINE=1 forbids fetching it",
            "give a folder: model.path=DIR",
        )
    else:
        yield Finding("ok", f"model.path: {model.path}", "will be fetched from the hub by prepare")


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


def _disk(plan: Plan, run_dir: Path) -> Iterator[Finding]:
    """Room for the checkpoints that are kept, and one more while it is written."""
    # Weights and two moments in fp32; DeepSpeed's fp32 copy comes beside weights in their own precision.
    beside = 0 if plan.deepspeed is None else 4 if plan.weights_dtype == "fp32" else 2
    checkpoint_bytes = plan.trainable_parameters * (4 + 8 + beside) + 16 * 2**20
    needed = checkpoint_bytes * (plan.recipe.checkpoint.keep + 1)
    folder = run_dir
    while not os.path.exists(folder):  # False for a name that is too long, where Path.exists raises
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        yield Finding(
            "error",
            f"run directory {run_dir}",
            f"cannot be written: {folder} {'may not be written by you' if folder.is_dir() else 'is no folder'}",
            "name another one: launch.run_dir=/path/with/space",
        )
        return
    free, keep = shutil.disk_usage(folder).free, plan.recipe.checkpoint.keep
    found = f"{_size(free)} free, {_size(needed)} needed for {keep} + 1 checkpoints"
    if free < needed:
        fewer = "keep fewer (checkpoint.keep=1), or " if keep > 1 else ""
        yield Finding("error", f"run directory {run_dir}", found, f"{fewer}name another disk: launch.run_dir=DIR")
    else:
        yield Finding("ok", f"run directory {run_dir}", found)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"


def _port(plan: Plan) -> Iterator[Finding]:
    port = plan.recipe.launch.port
    if port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))  # as torch binds it: on every address
        except OSError as error:
            yield Finding(
                "error",
                f"launch.port: {port}",
                f"cannot be used: {error.strerror}",
                "take a free one: launch.port=null",
            )
        else:
            yield Finding("ok", f"launch.port: {port}", "is free")
