"""A plan in, out what a person could change of its recipe: ladders of overrides, each rung needing less than the one before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.plan.model import Plan
from launcher.recipe import Recipe

_SHORTEST_ROW = 64  # nobody halves data.max_length below this to save memory
# What a change costs beside time: nothing where the same is learned, coarser numbers, something else that is learned.
SAME, COARSER, OTHER = 0, 1, 2
_PRICES = {
    "model.quantization": COARSER,
    "train.optimizer": COARSER,
    "data.max_length": OTHER,
    "adapter.type": OTHER,
}
# Offload is a matter of DeepSpeed's stages; the first keeps whole gradients and is left out. What needs least comes last.
_OFFLOADS = (("zero2", "optimizer"), ("zero3", "optimizer"), ("zero3", "parameters"))


@dataclass(frozen=True)
class Change:
    """Keys of a recipe, dotted, and the values that they get together."""

    values: tuple[tuple[str, Any], ...]

    @property
    def keys(self) -> frozenset[str]:
        """The keys that it sets."""
        return frozenset(key for key, _ in self.values)

    @property
    def typed(self) -> str:
        """As overrides on a command line; the placement stands in the device map's file."""
        if self == AUTO_PLACEMENT:
            return "placement: auto in the device map"
        return " ".join(f"{key}={str(value).lower()}" for key, value in self.values)

    @property
    def price(self) -> int:
        """SAME, COARSER or OTHER; weights that are quantised no more are no coarser."""
        return max(SAME if value == "none" else _PRICES.get(key, SAME) for key, value in self.values)

    def made(self, recipe: Recipe) -> Recipe:
        """The recipe with these values."""
        for key, value in self.values if self != AUTO_PLACEMENT else ():
            section, _, field = key.partition(".")
            recipe = recipe.model_copy(
                update={section: getattr(recipe, section).model_copy(update={field: value})},
            )
        return recipe


Ladder = Sequence[Change]
AUTO_PLACEMENT = Change((("placement", "auto"),))


def ladders(plan: Plan) -> list[Ladder]:
    """All that could be changed; a ladder has one kind of change, the mildest first."""
    return [ladder for ladder in (*_of_training(plan), *_of_weights(plan), *_of_strategy(plan)) if ladder]


def _one(key: str, value: Any) -> Change:
    return Change(((key, value),))


def _of_training(plan: Plan) -> Iterator[Ladder]:
    """Fewer activations, a smaller optimizer."""
    recipe = plan.recipe
    if not plan.gradient_checkpointing:
        yield [_one("train.gradient_checkpointing", True)]
    rows = plan.micro_batch * plan.accumulation
    smaller = [half for half in _halves(plan.micro_batch, 1) if rows % half == 0]
    yield [_one("train.micro_batch", half) for half in smaller]
    if plan.micro_batch > 1 and recipe.train.micro_batch != "auto":
        yield [_one("train.micro_batch", "auto")]
    yield [_one("data.max_length", length) for length in _halves(recipe.data.max_length, _SHORTEST_ROW)]
    if recipe.train.optimizer == "adamw" and not plan.strategy.startswith("zero"):
        yield [_one("train.optimizer", "adamw_8bit")]


def _of_weights(plan: Plan) -> Iterator[Ladder]:
    """Fewer trained weights, smaller frozen ones; and whole ones, which can be shared out where quantised ones cannot."""
    recipe = plan.recipe
    if recipe.adapter.type == "full":
        yield [_one("adapter.type", "lora")]
    if recipe.model.quantization == "none":
        yield [_one("model.quantization", "int8")]
        yield [_one("model.quantization", "nf4")]
    else:
        yield [_one("model.quantization", "none")]


def _of_strategy(plan: Plan) -> Iterator[Ladder]:
    """Weights, gradients and optimizer state shared out, or in host memory; the whole model over the devices of one host."""
    recipe, cluster = plan.recipe, plan.cluster
    if plan.device_map is not None and plan.device_map.ranges() is not None:
        yield [AUTO_PLACEMENT]
    if cluster.num_devices > 1:
        # `auto` has tried those that share state out.
        asked = recipe.strategy.type
        for name in ("fsdp", "zero2", "zero3") if asked not in ("auto", "device_map") else ():
            if name != plan.strategy:
                yield [_one("strategy.type", name)]
        if plan.strategy != "device_map" and cluster.num_nodes == 1:
            yield [_one("strategy.type", "device_map")]
    if cluster.kind == "cpu" or recipe.strategy.offload != "none" or plan.strategy == "device_map":
        return  # ranks on a CPU have no other memory than the host's
    yield [
        _one("strategy.offload", what)
        if recipe.strategy.type == stage
        else Change((("strategy.type", stage), ("strategy.offload", what)))
        for stage, what in _OFFLOADS
    ]


def _halves(number: int, least: int) -> Iterator[int]:
    """Half of a number, half of that, …, none below `least`."""
    while (number := number // 2) >= least:
        yield number
