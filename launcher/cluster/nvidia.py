"""NVIDIA's cards on this machine: what nvidia-smi says of them, and which of them CUDA_VISIBLE_DEVICES leaves to a process."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launcher.cluster.machine import PROC, host_memory_bytes, read_small
from launcher.cluster.model import MIB, Device

_FIELDS = "index,uuid,name,memory.total,memory.used,compute_cap"
_TIMEOUT_S = 20
# What is said of memory that the card shares with the host; anything else that is no number is a failure.
_SHARED = ("[N/A]", "[Not Supported]")


def nvidia_devices() -> tuple[list[Device], str]:
    """The visible cards of this machine, and a remark that says how it was found out or why there are none."""
    try:
        said = _nvidia_smi(f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
    except FileNotFoundError:
        return [], "there is no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi failed: {type(error).__name__}"
    lines = (said.stdout if said.returncode == 0 else said.stderr or said.stdout).strip().splitlines()
    if said.returncode != 0:
        return [], f"nvidia-smi failed: {lines[0] if lines else f'exit code {said.returncode}'}"
    rows = [[cell.strip() for cell in line.split(",")] for line in lines if line.count(",") == 5]
    if len(rows) < len(lines):
        strange = next(line for line in lines if line.count(",") != 5)
        return [], f"nvidia-smi answers {strange.strip()!r}"
    if not rows:
        return [], "nvidia-smi shows no card"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    kept = rows if visible is None else [rows[place] for place in visible_places(visible, rows)]
    if not kept:
        return [], f"CUDA_VISIBLE_DEVICES={visible} {_why_none(visible or '')}"
    for number, _, name, total, _, _ in kept:
        if not total.isdigit() and total not in _SHARED:
            return [], f"nvidia-smi says {total} for the memory of card {number}, {name}"
    return [_device(row, index) for index, row in enumerate(kept)], "nvidia-smi"


def driver_version(proc: Path = PROC) -> str | None:
    """Version of the NVIDIA driver, None where there is none: from the kernel, else (WSL has no such file) nvidia-smi."""
    told = re.search(r"NVRM version:.*?\s(\d+(?:\.\d+)+)\s", read_small(proc / "driver" / "nvidia" / "version"))
    if told:
        return told[1]
    try:
        answer = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = re.match(r"\d+(\.\d+)+", answer.stdout)
    return said[0] if said and answer.returncode == 0 else None


def nvidia_on_the_bus(sys: Path = Path("/sys")) -> bool:
    """Whether an NVIDIA card is plugged in, driver or not: a PCI device of vendor 10de and class 03 (display)."""
    devices = (sys / "bus" / "pci" / "devices").glob("*")
    return any(
        read_small(device / "vendor").strip() == "0x10de" and read_small(device / "class").startswith("0x03")
        for device in devices
    )


def _nvidia_smi(*options: str) -> subprocess.CompletedProcess[str]:
    """Its answer, whatever bytes are in it."""
    return subprocess.run(
        ["nvidia-smi", *options],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=_TIMEOUT_S,
        check=False,
    )


def _device(row: Sequence[str], index: int) -> Device:
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


def visible_places(visible: str, rows: Sequence[Sequence[str]]) -> list[int]:
    """Places among the rows of nvidia-smi that CUDA_VISIBLE_DEVICES leaves, as CUDA reads it.

    Either beginnings of UUIDs or numbers, as the first one is; a number is what an item begins with, as C's strtoul has it
    (`1a` is 1). The first that names no card ends the list, and one that comes twice leaves none at all.
    """
    by_uuid = visible.startswith("GPU-")
    found: list[int] = []
    for item in visible.split(","):
        if by_uuid:
            match = [place for place, row in enumerate(rows) if item.startswith("GPU-") and row[1].startswith(item)]
        else:
            number = re.match(r"\s*([+-]?[0-9]+)", item)
            match = [place for place, row in enumerate(rows) if number and row[0] == str(int(number[1]))]
        if len(match) != 1:
            return found
        if match[0] in found:
            return []
        found.append(match[0])
    return found


def _why_none(visible: str) -> str:
    """Why no card is left."""
    items = visible.split(",")
    if visible.startswith("MIG-"):
        return "names a slice of a card, which nvidia-smi's list of cards does not have"
    if len(set(items)) < len(items):
        return "names a card twice, for which CUDA shows none"
    return "hides all cards" if items[0] in ("", "-1") else "begins with none of nvidia-smi's cards"
