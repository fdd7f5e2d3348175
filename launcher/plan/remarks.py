"""What a plan says beside its decisions: on what it rests that nobody set, and what of the recipe is not as it looks."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.cluster import Cluster
from launcher.modelshape import ModelShape
from launcher.plan.model import Decision
from launcher.recipe import Recipe
from launcher.recipe.device_maps import DeviceMap


def remarks(recipe: Recipe, cluster: Cluster, shape: ModelShape, device_map: DeviceMap | None) -> Iterator[Decision]:
    """Decisions that were taken for the plan, not by it."""
    if recipe.hardware == "auto" and device_map is None:
        yield Decision(key="hardware", value=cluster.named, because=cluster.source)
    if shape.family == "unknown":
        because = f"families.yaml does not know {shape.model_type or 'it'}: it is counted as if it were a Llama, which may be wrong"
        yield Decision(key="model.family", value="unknown", because=because)
    if shape.remote_code and recipe.model.path is not None and not recipe.model.trust_remote_code:
        because = (
            "code comes with the weights and will be needed: fetch it with launch prepare, look at it with launch trust"
        )
        yield Decision(key="model.trust_remote_code", value="false", because=because)
    length, known = recipe.data.max_length, shape.positions
    if known is not None and length > known:
        because = f"{shape.name} knows {known:,} positions, and was not trained on more: data.max_length={known}"
        yield Decision(key="data.max_length", value=f"{length:,}", because=because)
