"""gpus.yaml: what a card can do, found by the names that people and nvidia-smi give it."""

from __future__ import annotations

import difflib
import re
from functools import cache
from pathlib import Path
from typing import Literal

from ruamel.yaml import YAML

from launcher.cluster.model import GIB, Device, Frozen
from launcher.errors import UsageError

# What nvidia-smi and people write around the part of a name that says which card it is.
_NOISE = re.compile(r"^(nvidia|geforce|tesla|rtx|sxm\d*|pcie|generation|hbm\d\w*|gpu)$")


class Card(Frozen):
    """One line of gpus.yaml: memory in GiB, dense TFLOP/s with fp32 accumulation, GB/s of memory and link."""

    name: str
    memory_gib: float
    bf16: float | None
    fp16: float
    fp32: float
    bandwidth_gb_s: float
    capability: str
    link: Literal["nvlink", "pcie"]
    link_gb_s: float
    source: str


@cache
def _lines() -> dict[str, str]:
    """The lines of gpus.yaml by name. YAML is slow here: all of it takes 25 ms, a line less than one."""
    lines = (Path(__file__).parent.parent / "gpus.yaml").read_text(encoding="utf-8").splitlines()
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
    model, _ = split_name(device.name)
    return matching(model, device.memory_bytes / GIB)


def same_card(one: Device, other: Device) -> bool:
    """Whether two devices are cards of one kind, under whatever names."""
    known = card_of(one)
    return one.name == other.name or (known is not None and known == card_of(other))


def split_name(name: str) -> tuple[str, float | None]:
    """`NVIDIA A800-SXM4-80GB` -> (`a800`, 80.0): the bare model, and the GiB where they are given."""
    text = name.lower()
    memory = re.search(r"(\d+(?:\.\d+)?)\s*-?(?:gib|gb|g)\b", text)
    if memory:
        text = text[: memory.start()] + " " + text[memory.end() :]
    words = [word for word in re.split(r"[\s_-]+", text) if word and not _NOISE.match(word)]
    return re.sub(r"^rtx", "", "".join(words)), float(memory[1]) if memory else None


def matching(model: str, memory_gib: float | None) -> Card | None:
    """The card of that model; of several, the one with that memory (10 % off is the maker's GB or ECC). Else None."""
    found = [card(name) for name in card_names() if split_name(name)[0] == model]
    if memory_gib is not None:
        found = [known for known in found if abs(known.memory_gib - memory_gib) <= 0.1 * memory_gib]
    return found[0] if len(found) == 1 else None


def unknown_card(name: str, you_set: str) -> UsageError:
    """The error for a name that is no line of gpus.yaml, or several."""
    model, memory_gib = split_name(name)
    same = [card(known) for known in card_names() if split_name(known)[0] == model]
    if same:
        found = f"`{name}` is sold as {' and '.join(known.name for known in same)}"
        larger = [known for known in same if memory_gib and known.memory_gib > memory_gib]
        if not memory_gib or not larger:
            return UsageError(you_set, found, f"write `{same[-1].name}`")
        less_gib = larger[0].memory_gib - memory_gib
        found = f"{found}, with {larger[0].memory_gib:g} GiB"
        to_type = f"write `{larger[0].name}`, or `{larger[0].name} reserved={less_gib:g}GiB` for one that has {memory_gib:g} GiB"
        return UsageError(you_set, found, to_type)
    by_model = {split_name(known)[0]: known for known in reversed(card_names())}
    near = [by_model[close] for close in difflib.get_close_matches(model, by_model, n=3, cutoff=0.6)]
    to_type = (
        f"did you mean {' or '.join(f'`{known}`' for known in near)}?"
        if near
        else f"known cards: {', '.join(card_names())}"
    )
    return UsageError(you_set, f"no card is called `{name}`", to_type)
