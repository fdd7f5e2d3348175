"""In: `hardware:` of a recipe (`8xA800-80GB`, `2xcpu`, a list of cards, `auto`), nvidia-smi, /proc. Out: a `Cluster`.

`auto` is what this machine has: the cards that nvidia-smi shows and CUDA_VISIBLE_DEVICES leaves, else CPU ranks.
What a named card can do stands in gpus.yaml.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML

from launcher.errors import UsageError

MIB = 2**20
GIB = 2**30
_UNIT_BYTES = {"mib": MIB, "gib": GIB, "mb": 10**6, "gb": 10**9}
# What nvidia-smi and people write around the part of a name that says which card it is.
_NOISE = re.compile(r"^(nvidia|geforce|tesla|rtx|sxm\d*|pcie|hbm\d\w*|gpu)$")
_NVIDIA_SMI_FIELDS = "index,uuid,name,memory.total,memory.used,compute_cap"
_NVIDIA_SMI_TIMEOUT_S = 20


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Card(_Frozen):
    """One line of gpus.yaml: memory in GiB, dense TFLOP/s with fp32 accumulation, GB/s of memory and link."""

    name: str
    memory_gib: float
    bf16: float | None
    fp16: float
    bandwidth_gb_s: float
    capability: str
    link: Literal["nvlink", "pcie"]
    link_gb_s: float
    source: str


class Device(_Frozen):
    """One card or one CPU rank.

    `index` counts the devices that a process sees (after CUDA_VISIBLE_DEVICES); `uuid` is the card's own, None in a
    profile. `memory_bytes` is the whole, `reserved_bytes` what others already hold of it (a display, another job).
    """

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int
    reserved_bytes: int = 0
    bf16: bool
    index: int
    uuid: str | None = None


class Node(_Frozen):
    """One host and its devices, in the order of their local ranks."""

    host: str
    devices: tuple[Device, ...]


class Cluster(_Frozen):
    """All nodes of a run; `source` says in words where the knowledge comes from."""

    nodes: tuple[Node, ...]
    source: str

    @property
    def num_nodes(self) -> int:
        """Number of hosts."""
        return len(self.nodes)

    @property
    def num_devices(self) -> int:
        """Number of devices over all hosts."""
        return sum(len(node.devices) for node in self.nodes)

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices, node by node."""
        return tuple(device for node in self.nodes for device in node.devices)

    @property
    def kind(self) -> Literal["cuda", "cpu"]:
        """What computes: a cluster never mixes cards and CPU ranks."""
        return self.devices[0].kind


@cache
def _lines() -> dict[str, str]:
    """The lines of gpus.yaml by name. YAML is slow here: all of it takes 25 ms, a line less than one."""
    lines = (Path(__file__).parent / "gpus.yaml").read_text(encoding="utf-8").splitlines()
    return {line.split(":", 1)[0]: line for line in lines if line and not line.startswith("#")}


@cache
def card(name: str) -> Card:
    """The card of exactly that name in gpus.yaml; KeyError for another."""
    return Card(name=name, **YAML(typ="safe", pure=False).load(_lines()[name])[name])


def card_names() -> tuple[str, ...]:
    """Names of all cards of gpus.yaml."""
    return tuple(_lines())


def card_of(device: Device) -> Card | None:
    """The line of gpus.yaml for a device, None for a CPU rank or a card that the table does not know."""
    if device.kind == "cpu":
        return None
    model, _ = _split_name(device.name)
    return _matching(model, device.memory_bytes / GIB)


def resolve_cluster(hardware: str | tuple[str, ...], nproc: int | None = None) -> Cluster:
    """The cluster that `hardware:` names, cut to `nproc` processes (on a CPU: made of `nproc` ranks).

    Raises:
        UsageError: an unknown card, an unreadable item, or more processes than devices.
    """
    if hardware == "auto":
        return this_machine(nproc)
    items = (hardware,) if isinstance(hardware, str) else hardware
    shown = hardware if isinstance(hardware, str) else "[" + ", ".join(hardware) + "]"
    parts = [_parse_item(item, f"hardware: {shown}") for item in items]
    if not parts:
        raise UsageError(
            "hardware: []", "the list is empty", "name a card, such as `hardware: [RTX 3090]`, or `hardware: auto`"
        )
    kinds = {device.kind for _, device in parts}
    if len(kinds) > 1:
        raise UsageError(
            f"hardware: {shown}", "cards and CPU ranks in one cluster", "name cards only, or `hardware: 2xcpu`"
        )
    if kinds == {"cpu"}:
        return _cpu_cluster(nproc or sum(num for num, _ in parts), f"hardware: {shown}")
    devices = [device for num, device in parts for _ in range(num)]
    return _cut(devices, nproc, f"hardware: {shown}")


def this_machine(nproc: int | None = None) -> Cluster:
    """The cards of this machine, else its CPU: `nproc` ranks, by default two where there are two usable cores.

    Raises:
        UsageError: more processes than cards.
    """
    devices, remark = _nvidia_devices()
    if devices:
        return _cut(devices, nproc, remark)
    return _cpu_cluster(nproc or min(2, _usable_cores()), f"this machine's CPU ({remark})")


def found_on_this_machine() -> Cluster:
    """What is really here, whatever the recipe names; for preflight."""
    return this_machine(None)


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


def _usable_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_cluster(num_ranks: int, source: str) -> Cluster:
    """CPU ranks on this host, each with its share of the memory."""
    share_bytes = host_memory_bytes() // num_ranks
    ranks = [
        Device(name="cpu", kind="cpu", memory_bytes=share_bytes, bf16=True, index=index) for index in range(num_ranks)
    ]
    return Cluster(nodes=(Node(host="localhost", devices=tuple(ranks)),), source=source)


def _cut(devices: Sequence[Device], nproc: int | None, source: str) -> Cluster:
    """One node with the first `nproc` of these devices, numbered from 0."""
    if nproc is not None and nproc > len(devices):
        cards_word = "card" if len(devices) == 1 else "cards"
        raise UsageError(
            f"--nproc {nproc}",
            f"{source} has {len(devices)} {cards_word}",
            f"--nproc {len(devices)}, or leave --nproc out",
        )
    kept = [device.model_copy(update={"index": index}) for index, device in enumerate(devices[:nproc])]
    return Cluster(nodes=(Node(host="localhost", devices=tuple(kept)),), source=source)


def _parse_item(item: str, you_set: str) -> tuple[int, Device]:
    """One item such as `8xA800-80GB` or `RTX 3060 Ti 8GiB reserved=921MiB`: how many, of what."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX×*]\s*)?(.*?)((?:\s+\w+=\S*)*)\s*", item)
    assert match is not None, "every group may be empty"
    num, name = int(match[1] or 1), match[2]
    if num < 1 or not name:
        raise UsageError(
            you_set, f"`{item}` names no device", "write it as `8xA800-80GB`, `RTX 3090`, `2xcpu` or `auto`"
        )
    reserved_bytes = _reserved_bytes(match[3].split(), you_set)
    if name.lower() == "cpu":
        return num, Device(name="cpu", kind="cpu", memory_bytes=0, bf16=True, index=0)
    model, memory_gib = _split_name(name)
    known = _matching(model, memory_gib)
    if known is None:
        raise _unknown_card(name, model, you_set)
    return num, Device(
        name=known.name,
        kind="cuda",
        memory_bytes=round(known.memory_gib * GIB),
        reserved_bytes=reserved_bytes,
        bf16=known.bf16 is not None,
        index=0,
    )


def _reserved_bytes(options: Sequence[str], you_set: str) -> int:
    """`reserved=921MiB` in bytes; 0 when there is no option."""
    reserved_bytes = 0
    for option in options:
        match = re.fullmatch(r"reserved=(\d+(?:\.\d+)?)(MiB|GiB|MB|GB)", option, re.IGNORECASE)
        if match is None:
            raise UsageError(
                you_set, f"`{option}` is no option of a card", "the only option is such as `reserved=921MiB`"
            )
        reserved_bytes = round(float(match[1]) * _UNIT_BYTES[match[2].lower()])
    return reserved_bytes


def _split_name(name: str) -> tuple[str, float | None]:
    """`NVIDIA A800-SXM4-80GB` -> (`a800`, 80.0): the bare model, and the GiB where they are given."""
    text = name.lower()
    memory = re.search(r"(\d+(?:\.\d+)?)\s*-?(?:gib|gb|g)\b", text)
    if memory:
        text = text[: memory.start()] + " " + text[memory.end() :]
    words = [word for word in re.split(r"[\s_-]+", text) if word and not _NOISE.match(word)]
    return re.sub(r"^rtx", "", "".join(words)), float(memory[1]) if memory else None


def _matching(model: str, memory_gib: float | None) -> Card | None:
    """The card of that model; of several, the one with that memory (10 % off is the maker's GB or ECC). Else None."""
    found = [card(name) for name in card_names() if _split_name(name)[0] == model]
    if memory_gib is not None:
        found = [known for known in found if abs(known.memory_gib - memory_gib) <= 0.1 * memory_gib]
    return found[0] if len(found) == 1 else None


def _unknown_card(name: str, model: str, you_set: str) -> UsageError:
    """The error for a name that is no line of gpus.yaml, or several."""
    same = [known for known in card_names() if _split_name(known)[0] == model]
    if same:
        return UsageError(you_set, f"`{name}` is sold as {' and '.join(same)}", f"write `{same[-1]}`")
    by_model = {_split_name(known)[0]: known for known in reversed(card_names())}
    near = [by_model[close] for close in difflib.get_close_matches(model, by_model, n=2, cutoff=0.6)]
    to_type = (
        f"did you mean {' or '.join(f'`{known}`' for known in near)}?"
        if near
        else f"known cards: {', '.join(card_names())}"
    )
    return UsageError(you_set, f"no card is called `{name}`", to_type)


def _nvidia_devices() -> tuple[list[Device], str]:
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
