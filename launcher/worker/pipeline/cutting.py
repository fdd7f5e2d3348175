"""A plan's stage in, the part of the model that this rank computes out: its layers, filled from files, and nothing of the others.

The forward pass is the model's own. Layers of other stages, and the ends where they lie elsewhere, are replaced by modules that hand on
what they are given, so layers keep their index and every weight the name that it has in the whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from launcher.errors import PreflightError
from launcher.families import Family, family
from launcher.plan import Plan, StagePlan
from launcher.rundir import RunDir
from launcher.worker.byshard import Weights, is_empty
from launcher.worker.model import DTYPES
from launcher.worker.prepared import Prepared
from launcher.worker.sharding import unplaced_model


class Elsewhere(torch.nn.Module):
    """In the place of a module that another stage has."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """What came in."""
        return hidden


class Stage(torch.nn.Module):
    """What one rank computes.

    Args:
        model: cut (`cut`), with a PEFT adapter or without.
        planned: which layers and ends it has.
        dtype: of the computation, where weights are fp32 and autocast casts them; None where nothing is cast.
    """

    def __init__(self, model: Any, planned: StagePlan, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.planned = planned
        self.autocast_dtype = dtype
        self.num_items = 1.0

    @property
    def whole(self) -> Any:
        """The transformers model without what PEFT has put around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, given: torch.Tensor, labels: torch.Tensor | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        """A micro batch.

        Args:
            given: token ids of shape (rows, length) on the first stage, hidden states (rows, length, width) on the others.
            labels: on the last stage, of shape (rows, length).

        Returns:
            Hidden states (rows, length, width); on the last stage the loss, summed over supervised tokens and divided by `num_items`.
        """
        given_as = {"input_ids" if self.planned.embedding else "inputs_embeds": given}
        casting = contextlib.nullcontext()
        if self.autocast_dtype is not None:
            casting = torch.autocast(given.device.type, self.autocast_dtype)
        with casting:
            if not self.planned.head:
                hidden: torch.Tensor = self.whole.base_model(**given_as, **inputs, use_cache=False).last_hidden_state
                return hidden
            found = self.whole(**given_as, **inputs, labels=labels, num_items_in_batch=self.num_items, use_cache=False)
            loss: torch.Tensor = found.loss
            return loss


def cut(model: Any, planned: StagePlan, known: Family) -> None:
    """Replace everything that other stages have.

    Raises:
        PreflightError: the model has not the modules that its family should have.
    """
    try:
        layers = model.get_submodule(known.layers)
        for index in range(len(layers)):
            if not planned.first <= index < planned.stop:
                layers[index] = Elsewhere()
        for name, here in ends(planned, known):
            if not here:
                parent, _, own = name.rpartition(".")
                model.get_submodule(name)
                setattr(model.get_submodule(parent), own, Elsewhere())
    except AttributeError as error:
        raise PreflightError(
            f"strategy.schedule: pipelined, {type(model).__name__}",
            f"it cannot be cut into stages: {error}",
            "set strategy.schedule=naive",
        ) from None


def ends(planned: StagePlan, known: Family) -> Sequence[tuple[str, bool]]:
    """(module beside the layers, whether this stage has it)."""
    first = [known.embedding, *known.others]
    last = [known.norm, known.head]
    return [(name, planned.embedding) for name in first] + [(name, planned.head) for name in last]


def build_stage(
    plan: Plan, run: RunDir, prepared: Prepared, device: torch.device, num_rows: int, rank: int
) -> tuple[Stage, frozenset[str]]:
    """The stage of this rank, trained as the plan says, and the names of all weights of the whole model.

    Every rank makes the whole model, its base without memory, so that adapters start as they do on one device.
    """
    planned, known = plan.stages[rank], family(plan.shape.family)
    model, weights = unplaced_model(plan, run, prepared, num_rows)
    names = frozenset(name for name, _ in model.named_parameters())
    autocast = DTYPES[plan.dtype] if plan.dtype != "fp32" else None
    stage = Stage(model, planned, autocast)
    cut(stage.whole, planned, known)
    fill(model, weights, device)
    if planned.recompute:
        checkpoint_layers(stage.whole)
    return stage, names


def fill(model: torch.nn.Module, weights: Weights | None, device: torch.device) -> None:
    """Give the weights that are left memory on the device, and read those that are in files, a tensor at a time."""
    for name, parameter in model.named_parameters():
        if is_empty(parameter):
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        else:
            parameter.data = parameter.data.to(device)
        found = weights.find(name) if weights is not None else None
        if found is not None:
            tensors, own = found
            tensors.read(own, parameter.detach())
    model.to(device)  # buffers


def checkpoint_layers(model: Any) -> None:
    """Keep each layer's input only; as the Trainer asks for it, by the name that transformers 5.17 has."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def stream_dtype(stage: Stage, plan: Plan) -> torch.dtype:
    """What hidden states are between the layers, on every rank: embeddings are not cast, and sums take the wider of two. All ranks ask."""
    found: list[torch.dtype | None] = [None]
    if stage.planned.embedding:
        found = [torch.promote_types(stage.whole.get_input_embeddings().weight.dtype, DTYPES[plan.dtype])]
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def prove(plan: Plan, stage: Stage, names: frozenset[str]) -> None:
    """Look at what this rank has before the first step, and with the others whether they have everything once. All ranks call it.

    Args:
        names: of all weights of the whole model.

    Raises:
        PreflightError: it is not what was planned.
    """
    known = family(plan.shape.family)
    mine = dict(stage.model.named_parameters())
    wanted = {name for name in names if belongs(name, stage.planned, known)}
    whole: list[set[str]] = [set() for _ in plan.stages]
    dist.all_gather_object(whole, set(mine))
    everybody = [name for held in whole for name in held]
    found = None
    if mine.keys() != wanted:
        found = f"rank {dist.get_rank()} holds {_few(mine.keys() - wanted)} beside its layers and lacks {_few(wanted - mine.keys())}"
    elif len(everybody) != len(names) or set(everybody) != names:
        twice = {name for name in everybody if everybody.count(name) > 1}
        found = f"no stage has {_few(names - set(everybody))}, more than one has {_few(twice)}"
    elif any(is_empty(parameter) or parameter.is_meta for parameter in mine.values()):
        found = "some of its weights were never read"
    elif any(parameter.device.type != plan.kind for parameter in mine.values()):
        found = f"some of its weights do not lie on its {plan.kind} device"
    if found is not None:
        raise PreflightError("strategy.schedule: pipelined", found, "report this, please")


def belongs(name: str, planned: StagePlan, known: Family) -> bool:
    """Whether a weight, named as in the whole model with its adapter, is one of a stage's."""
    name = name.removeprefix("base_model.model.")
    if name.startswith(f"{known.layers}."):
        return planned.first <= int(name.removeprefix(f"{known.layers}.").partition(".")[0]) < planned.stop
    return any(here for module, here in ends(planned, known) if name.startswith(f"{module}."))


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "") if names else "nothing"
