"""(Recipe, Cluster, ModelShape) in, one frozen Plan out: everything that was `auto` decided, each decision with its reason.

Pure: no file is read and no device is touched. The plan goes to RUN/plan.json as it is, and the workers read nothing else.
`model` is what a plan is, `deciding` how it is made, `searching` what is fastest, `packing` whether rows are packed, `deepspeed`
DeepSpeed's JSON of it, `remedies` what to type when it does not fit, `continuing` what of a checkpoint has to be the same, `chatting`
where a trained model lies to talk to it.
"""

from __future__ import annotations

from typing import Any

from launcher.cluster import Cluster
from launcher.modelshape import ModelShape
from launcher.plan.chatting import CONTEXT_TOKENS, ChatPlan, chat_plan
from launcher.plan.continuing import checkpoint_bytes, identity, other_world, what_changed
from launcher.plan.deciding import Deciding
from launcher.plan.deepspeed import deepspeed_json, read_given, swap_buffers_bytes
from launcher.plan.model import (
    DTYPE_BYTES,
    Alternative,
    Decision,
    Plan,
    Rehearsal,
    StagePlan,
    budget_bytes,
    lacking_bytes,
    read_plan,
    steps_per_epoch,
    total_steps,
)
from launcher.plan.remedies import does_not_fit
from launcher.plan.searching import time_of_rows
from launcher.recipe import Recipe
from launcher.recipe.device_maps import DeviceMap
from launcher.remotecode import RemoteCode

__all__ = [
    "CONTEXT_TOKENS",
    "DTYPE_BYTES",
    "Alternative",
    "ChatPlan",
    "Decision",
    "Plan",
    "Rehearsal",
    "StagePlan",
    "budget_bytes",
    "chat_plan",
    "checkpoint_bytes",
    "identity",
    "lacking_bytes",
    "make_plan",
    "other_world",
    "read_given",
    "read_plan",
    "steps_per_epoch",
    "swap_buffers_bytes",
    "time_of_rows",
    "total_steps",
    "what_changed",
]


def make_plan(
    name: str,
    recipe: Recipe,
    cluster: Cluster,
    shape: ModelShape,
    code: RemoteCode | None = None,
    device_map: DeviceMap | None = None,
    deepspeed: dict[str, Any] | None = None,
) -> Plan:
    """Decide everything.

    Args:
        deepspeed: what the recipe's own JSON for DeepSpeed says.
        code: the model's own code, where the recipe trusts it and it is here.
        device_map: what strategy.device_map names; without one the cluster's devices are all there is to know.

    Raises:
        RecipeError: the recipe asks for what this model or these devices cannot do.
        DoesNotFitError: it needs more memory than a device has; its last part lists changes that were planned and do fit.
    """
    plan = Deciding(recipe, cluster, shape, device_map).plan(name)
    if lacking_bytes(plan) > 0:
        raise does_not_fit(plan)
    config = deepspeed_json(plan, deepspeed) if plan.strategy.startswith("zero") else None
    return plan.model_copy(update={"code": code, "deepspeed": config})
