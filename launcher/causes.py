"""What ended a rank in, words and something to type out: memory that ran out, a lost connection, packages that do not belong together.

Only what the messages themselves say, and what was measured beside them; where nothing is known there is no `Reason`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from launcher.cluster import GIB
from launcher.plan import Plan
from launcher.shares import most_rows

_ROWS_SHOWN = 6
_OUT_OF_MEMORY = "OutOfMemoryError"
_HOST_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory|std::bad_alloc"
)
_CONNECTION = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Socket Timeout|gloo/transport|NCCL|Timed out waiting|store->get|recvValue failed"
)
# (what messages say, what that is, what to type). RUN stands for the run.
_KNOWN = (
    (
        r"no kernel image is available",
        "this build of torch has no kernels for this card",
        "see which build has: launch doctor",
    ),
    (
        r"driver .*(too old|insufficient)|CUDA driver version is insufficient",
        "the driver is older than the CUDA that torch was built for",
        "update the driver, or take the build of torch that it can run: launch doctor",
    ),
    (
        r"undefined symbol|version `\w+_[\d.]+' not found|cannot import name|No module named|has no attribute '__version__'",
        "two packages do not belong together, or one is missing",
        "see which versions are tested: launch doctor",
    ),
    (
        r"uncorrectable ECC|fallen off the bus|unspecified launch failure|CUDA error: unknown error",
        "the card has failed",
        "look at dmesg (NVRM: Xid) and nvidia-smi -q, leave the card out (--nproc), then: launch resume RUN",
    ),
    (
        r"device-side assert|illegal memory access",
        "a kernel was given values out of its range, mostly token ids beyond the vocabulary; the line shown may be a later one",
        "see the true line: CUDA_LAUNCH_BLOCKING=1 launch resume RUN",
    ),
    (
        r"Too many open files",
        "this process may open no more files",
        "raise the limit (ulimit -n 65536), then: launch resume RUN",
    ),
)


@dataclass(frozen=True)
class Reason:
    """What is known beyond the message.

    Args:
        found: in plain words; empty where the message says it.
        to_type: what makes it right.
        notes: what was measured and planned, a line each.
    """

    found: str
    to_type: str
    notes: tuple[str, ...] = ()


def reason_of(error: dict[str, Any], plan: Plan) -> Reason | None:
    """What is known of an exception, as it stands in errors/<rank>.json."""
    kind, message = error["type"].rpartition(".")[2], error["message"]
    if kind == _OUT_OF_MEMORY:
        return Reason("", f"launch resume RUN {_smaller(plan)}", tuple(_of_memory(error, plan)))
    if kind == "MemoryError" or _HOST_MEMORY.search(message):
        left = error.get("memory", {}).get("available")
        notes = [f"{_gib(left)} of host memory were left"] if left else []
        to_type = f"launch resume RUN {_smaller(plan)}, or fewer ranks: --nproc"
        return Reason("host memory is full", to_type, (*notes, *_of_batch(error, plan)))
    if kind in ("ImportError", "ModuleNotFoundError", "OSError", "AttributeError", "RuntimeError", "AcceleratorError"):
        for pattern, found, to_type in _KNOWN:
            if re.search(pattern, message):
                return Reason(found, to_type)
    return None


def lost_connection(message: str) -> Reason | None:
    """For an error of a collective that no rank explains: who is named has only noticed it."""
    if not _CONNECTION.search(message):
        return None
    return Reason(
        "the connection between ranks was lost, and no rank gave a reason",
        "look at the network and at dmesg on every host (launch doctor), then: launch resume RUN",
    )


def killed(oom_kills: int | None, beat: dict[str, Any], plan: Plan) -> Reason:
    """For a rank that was ended by SIGKILL.

    Args:
        oom_kills: how many processes the kernel killed meanwhile for lack of memory on that host; None where nobody counted.
        beat: the rank's last heartbeat.
    """
    taken = beat.get("memory") or {}
    note = (
        (f"just before, this rank had {_gib(taken['rss'])} of host memory, and {_gib(taken['available'])} were left",)
        if taken
        else ()
    )
    if oom_kills:
        found = "killed by the kernel's OOM killer (SIGKILL): host memory was full"
        return Reason(found, f"fewer ranks on that host (--nproc), or: launch resume RUN {_smaller(plan)}", note)
    if oom_kills == 0:
        found = "killed by somebody (SIGKILL): the kernel's OOM killer has killed nothing here"
        return Reason(found, "find out who ends processes on that host, then: launch resume RUN", note)
    found = "killed (SIGKILL): by somebody, or by the kernel because host memory was full"
    return Reason(found, "look at dmesg on that host, then: launch resume RUN", note)


def _of_memory(error: dict[str, Any], plan: Plan) -> list[str]:
    """Planned and found, and the batch that did it."""
    rank = int(error["rank"])
    device = plan.cluster.devices[plan.device_of(rank)]
    planned = plan.rank_bytes[rank] if plan.rank_bytes else plan.fullest_bytes
    notes = [f"planned {_gib(planned)} of {_gib(device.memory_bytes)} on {device.name}"]
    taken = error.get("memory") or {}
    if "reserved" in taken:
        others = taken["total"] - taken["free"] - taken["reserved"]
        notes[0] += f"; this rank had {_gib(taken['reserved'])}, others {_gib(max(0, others))}"
    return [*notes, *_of_batch(error, plan)]


def _of_batch(error: dict[str, Any], plan: Plan) -> list[str]:
    """The micro batch that was worked on: its size, and which rows it is made of; under a pipeline those of the whole step."""
    if not error.get("batch"):
        return []
    rows, tokens, places = error["batch"]
    most_of_all = most_rows(plan.shares, plan.micro_batch) if plan.shares else None
    most = (most_of_all[int(error["rank"])] if most_of_all else plan.micro_batch) * plan.recipe.data.max_length
    notes = [f"this batch had {rows} × {tokens:,} = {rows * tokens:,} tokens; the plan is for {most:,} at most"]
    if places:
        more = f" and {len(places) - _ROWS_SHOWN} more" if len(places) > _ROWS_SHOWN else ""
        what = "rows of this step" if plan.pipeline is not None else "its rows"
        notes.append(f"{what}, the longest first: {', '.join(places[:_ROWS_SHOWN])}{more}")
    return notes


def _smaller(plan: Plan) -> str:
    """The setting that saves most for its price."""
    if not plan.gradient_checkpointing and plan.strategy != "device_map":
        return "train.gradient_checkpointing=true"
    if plan.micro_batch > 1:
        return f"train.micro_batch={plan.micro_batch // 2}"
    return f"data.max_length={max(64, plan.recipe.data.max_length // 2)}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
