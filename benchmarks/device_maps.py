"""Is a model placed better by memory and speed than by accelerate's `infer_auto_device_map`?      fits or not, and predicted step time

    python benchmarks/device_maps.py [--out benchmarks/results/device_maps_<hardware>_<date>.md]

Nothing is computed on any card: five boxes of cards are described, four models are built on the meta device, and accelerate is
asked where it would put their modules ("auto" and "balanced" are the same code there; transformers 5 has its own copy of it
with a larger margin, which is what `from_pretrained(device_map="auto")` calls). It is told the free memory that it would find: the
card's, less what others hold, less a CUDA context.

All placements are judged by the same model of memory and of time, the planner's: LoRA on the attention, a step of 16 rows of 512
tokens, weights in bf16 or nf4, AdamW. Each gets the micro batch and the checkpointing (on or off; ours also by device) with which it
is fastest, and no margin: it fits where every card's fullest moment is within its budget. Theirs run as accelerate runs them, one
card after the other; ours both so and as a pipeline. Layers in host memory get no gradient under accelerate, so such a placement
cannot train.

How good the two models are: memory_honesty, pipeline and step_time among the results; no card has confirmed them.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from page import Page

from launcher.cluster import Cluster, resolve_cluster
from launcher.memory import CUDA_CONTEXT_BYTES, GIB
from launcher.modelshape import shape_of
from launcher.modelshape.files import catalogue_config
from launcher.native import Refusal, native_config
from launcher.placement import Schedule
from launcher.plan.deciding import Deciding
from launcher.plan.searching import Candidate, Option, Question
from launcher.recipe import Recipe
from launcher.recipe.device_maps import DeviceMap

BOXES = {
    "3060 Ti (display) + 3060": ("RTX 3060 Ti 8GiB reserved=921MiB", "RTX 3060 12GiB"),
    "4090 + 3090": ("RTX 4090", "RTX 3090"),
    "4090 + 3090 + 3060": ("RTX 4090", "RTX 3090", "RTX 3060 12GiB"),
    "4 × 3090": ("4xRTX 3090",),
    "8 × A800": ("8xA800-80GB",),
}
# Name in the catalogue, quantization.
MODELS = {
    "ChatGLM2-6B": ("THUDM/chatglm2-6b", "none"),
    "Qwen2.5-7B": ("Qwen/Qwen2.5-7B-Instruct", "none"),
    "Llama-2-13B": ("meta-llama/Llama-2-13b-hf", "none"),
    "Llama-2-70B, nf4": ("meta-llama/Llama-2-70b-hf", "nf4"),
}
ROWS, TOKENS = 16, 512
SIZES = (16, 8, 4, 2, 1)
COLUMNS = ("ours, pipelined", "ours, naive", "accelerate auto, balanced", "accelerate sequential", "transformers auto")
_HOST_BYTES = 64 * GIB
_ENDLESS_BYTES = 10**15
_EMBEDDING, _LAYER, _HEAD = "model.embed_tokens", "model.layers.{}", "lm_head"  # of all four, as native classes


@dataclass(frozen=True)
class Given:
    """A placement that somebody has made: devices in the order of the layers, (first, last) layer of each; an end may hold none."""

    devices: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]


class _WrittenDown(DeviceMap):
    """A device map with ranges that may be empty at its ends."""

    given: tuple[tuple[int, int], ...]

    def ranges(self) -> tuple[tuple[int, int], ...]:
        return self.given


def main() -> None:
    """Compare, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # accelerate says at every call that the cards are not here
    warnings.simplefilter("ignore")
    page = Page("Placements against accelerate's", (__doc__ or "").partition("\n")[0])
    page.section("How", *(__doc__ or "").split("\n\n")[2:])
    seconds, table, maps = [], [], []
    for box, cards in BOXES.items():
        for name, (path, quantization) in MODELS.items():
            found = list(compared(asked(path, quantization, cards), path))
            seconds.append([step_s for step_s, _, _ in found])
            table.append([f"{box}: {name}", *(f"{step_s:.2f}" if step_s else why for step_s, why, _ in found)])
            maps.append([f"{box}: {name}", *(layers for _, _, layers in found)])
    page.section("Seconds of a step, or why it does not train", summary(seconds))
    page.table(["box: model", *COLUMNS], table)
    page.section(
        "Layers of each card",
        "In the order of the cards as the box names them, × rows of a micro batch, `c` where layers are computed again; behind `→` "
        "the cards' own numbers where ours begins with another one.",
    )
    page.table(["box: model", *COLUMNS], maps)
    page.finish(options.out)


def asked(path: str, quantization: str, cards: Sequence[str]) -> Question:
    """The planner's question for a model on a box."""
    recipe = Recipe.model_validate(
        {
            "model": {"path": path, "quantization": quantization},
            "data": {"path": "rows.json", "max_length": TOKENS},
            "strategy": {"type": "device_map"},
            "train": {"global_batch": ROWS},
            "hardware": list(cards),
        }
    )
    cluster = resolve_cluster(recipe.hardware)
    plan = Deciding(recipe, cluster, shape_of(recipe.model, Path())).plan("compared")  # fit or not
    return Question(recipe, cluster, plan.shape, plan.dtype, plan.batching, plan.trainable_parameters)


def summary(seconds: Sequence[Sequence[float | None]]) -> str:
    """How many cases each of the columns trains, and how many times as long theirs take as ours."""
    fits = ", ".join(f"{name} {sum(case[at] is not None for case in seconds)}" for at, name in enumerate(COLUMNS))
    ratios = []
    for at, name in enumerate(COLUMNS[2:], 2):
        for ours, our_name in enumerate(("pipelined", "naive")):
            both = [(case[at] or 0) / (case[ours] or 1) for case in seconds if case[at] and case[ours]]
            ratios.append(f"{name} {min(both):.2f} to {max(both):.2f} × as long as ours {our_name}")
    return f"Of {len(seconds)} cases these can train: {fits}. Where both do: {'; '.join(ratios)}."


def compared(question: Question, path: str) -> Iterator[tuple[float | None, str, str]]:
    """(seconds or None, why not, layers) of ours, pipelined and naive, and of each of theirs."""
    for schedule in ("pipelined", "naive"):
        best = fastest(question, schedule)
        yield (best.time.total_s, "", told(question, best)) if best else (None, "does not fit", "")
    model = on_meta(path)
    for how in ("balanced", "sequential", "transformers"):
        device_map = their_map(model, how, budgets(question.cluster), question.recipe.model.quantization == "nf4")
        given = as_stages(device_map, question.shape.num_layers)
        if given is None:
            yield None, "host memory", f"{spilled(device_map, question.shape.num_layers)} layers in host memory"
            continue
        best = fastest(question, "naive", given)
        yield best and best.time.total_s, "" if best else lacking(question, given), told(question, best, given)


def fastest(question: Question, schedule: Schedule, given: Given | None = None) -> Candidate | None:
    """The fastest micro batch and checkpointing that fits with this placement, or with the best one; None where none does."""
    priced = []
    for size in SIZES:
        for again in (None, False, True) if given is None else (False, True):
            option = Option("device_map", again, size, schedule)
            priced.append(with_placement(question, given, size).price(option))
    fitting = [candidate for candidate in priced if candidate.fits]
    return min(fitting, key=lambda candidate: candidate.time.total_s, default=None)


def with_placement(question: Question, given: Given | None, size: int) -> Question:
    """The question for a micro batch that is set, so that cards may be filled to the last byte."""
    train = question.recipe.train.model_copy(update={"micro_batch": size})
    question = replace(question, recipe=question.recipe.model_copy(update={"train": train}))
    if given is None:
        return question
    devices = question.cluster.devices
    node = question.cluster.nodes[0].model_copy(update={"devices": tuple(devices[i] for i in given.devices)})
    cluster = question.cluster.model_copy(update={"nodes": (node,)})
    return replace(question, cluster=cluster, device_map=_WrittenDown(devices=("written down",), given=given.ranges))


def budgets(cluster: Cluster) -> list[int]:
    """Free bytes of each card once a process is there."""
    return [device.memory_bytes - device.reserved_bytes - CUDA_CONTEXT_BYTES for device in cluster.devices]


def lacking(question: Question, given: Given) -> str:
    """The card that is over its budget by most, with what is least: one row, layers computed again."""
    asked = with_placement(question, given, 1)
    free = [device.memory_bytes - device.reserved_bytes for device in asked.cluster.devices]
    (node,) = asked.cluster.nodes
    endless = [device.model_copy(update={"reserved_bytes": -_ENDLESS_BYTES}) for device in node.devices]
    cluster = asked.cluster.model_copy(update={"nodes": (node.model_copy(update={"devices": tuple(endless)}),)})
    stages = replace(asked, cluster=cluster).price(Option("device_map", True, 1, "naive")).stages
    over = max(stages, key=lambda stage: stage.memory_bytes - free[stage.device])
    name = asked.cluster.devices[over.device].name
    return f"{name} needs {over.memory_bytes / GIB:.1f} of {free[over.device] / GIB:.1f} GiB"


def told(question: Question, best: Candidate | None, given: Given | None = None) -> str:
    """The layers of each card, and how it trains."""
    if best is None:
        assert given is not None
        return "+".join(str(last + 1 - first) for first, last in given.ranges)
    layers = "+".join(f"{stage.stop - stage.first}{'c' * stage.recompute}" for stage in best.stages)
    order = [stage.device for stage in best.stages]
    # Cards that are alike change places without meaning.
    names = [question.cluster.devices[device].name for device in order]
    moved = given is None and names != [question.cluster.devices[device].name for device in sorted(order)]
    return (
        f"{layers} × {best.option.micro_batch}{' → ' + '-'.join(str(device + 1) for device in order) if moved else ''}"
    )


def on_meta(path: str) -> Any:
    """The model without a byte."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = catalogue_config(path)
    assert config is not None
    native = native_config(config)
    assert not isinstance(native, Refusal)
    known = dict(config if native is None else native.config)
    made = AutoConfig.for_model(
        **{key: value for key, value in known.items() if key not in ("torch_dtype", "auto_map")}
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)


def their_map(model: Any, how: str, free: Sequence[int], nf4: bool) -> dict[str, Any]:
    """Module -> device as they place it; `how` is balanced or sequential for accelerate, or transformers."""
    limits: dict[Any, Any] = {**dict(enumerate(free)), "cpu": _HOST_BYTES}
    if how == "transformers":
        return _by_transformers(model, limits, nf4)
    from accelerate.utils import CustomDtype, get_balanced_memory, infer_auto_device_map

    sizes: dict[str, Any] = {}
    if (
        nf4
    ):  # as transformers called it before it had a copy: 4 bits for the linear layers, and a tenth left for quantising
        whole = {name: value.dtype for name, value in model.named_parameters() if not is_quantised(name)}
        sizes = {"dtype": CustomDtype.INT4, "special_dtypes": whole}
    unsplit = list(model._no_split_modules)
    if how == "balanced":
        limits = get_balanced_memory(model, limits, no_split_module_classes=unsplit, **sizes)
    if nf4:
        limits = {device: 0.9 * limit for device, limit in limits.items()}
    return dict(infer_auto_device_map(model, limits, no_split_module_classes=unsplit, **sizes))


def is_quantised(parameter: str) -> bool:
    """Whether bitsandbytes would make 4 bits of it: the linear layers of the layers."""
    return parameter.startswith(_LAYER.format("")) and "norm" not in parameter


def _by_transformers(model: Any, limits: dict[Any, Any], nf4: bool) -> dict[str, Any]:
    """What `from_pretrained(device_map="auto")` of transformers 5 comes to."""
    from transformers.integrations.accelerate import _get_device_map

    quantizer = _Bits4() if nf4 else None
    return dict(_get_device_map(model, "auto", limits, quantizer))  # type: ignore[arg-type]


class _Bits4:
    """What placing asks transformers' quantizer for bitsandbytes' 4 bits, without the card that it wants."""

    def param_element_size(self, model: Any, name: str, param: Any) -> float:
        """Bytes of a value."""
        return 0.5 if is_quantised(name) else float(param.element_size())

    def adjust_max_memory(self, limits: dict[Any, float]) -> dict[Any, float]:
        """As transformers' own."""
        return {device: 0.9 * limit for device, limit in limits.items()}

    def validate_environment(self, device_map: Any) -> None:
        """Nothing: it would refuse what lies in host memory, which is said by us."""


def device_of(device_map: Mapping[str, Any], module: str) -> Any:
    """Where a module lies: itself, or what it is part of."""
    parts = module.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
    return device_map[next(name for name in names if name in device_map)]


def as_stages(device_map: Mapping[str, Any], num_layers: int) -> Given | None:
    """The same as stages; None where something lies in host memory."""
    places = [device_of(device_map, _LAYER.format(layer)) for layer in range(num_layers)]
    ends = device_of(device_map, _EMBEDDING), device_of(device_map, _HEAD)
    if any(isinstance(place, str) for place in (*places, *ends)):
        return None
    used = list(dict.fromkeys((ends[0], *places, ends[1])))
    assert used == sorted(used), "a card's layers follow one another"
    ranges, start = [], 0
    for device in used:
        ranges.append((start, start + places.count(device) - 1))
        start += places.count(device)
    return Given(tuple(used), tuple(ranges))


def spilled(device_map: Mapping[str, Any], num_layers: int) -> int:
    """How many layers lie in host memory or on a disk."""
    return sum(isinstance(device_of(device_map, _LAYER.format(layer)), str) for layer in range(num_layers))


if __name__ == "__main__":
    main()
