"""A small copy of a model, cut in two, against the same uncut, before any rank starts.

The forward pass of a stage is the model's own, begun with hidden states instead of token ids. Most models compute the same then; one that
scales its embeddings, adds positions to them or hands on more than hidden states does not, and says nothing.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from launcher.errors import PreflightError
from launcher.families import family
from launcher.plan import Plan, StagePlan
from launcher.worker.code_trial import small_sizes
from launcher.worker.data.tokens import IGNORED
from launcher.worker.pipeline.cutting import Stage, cut
from launcher.worker.pulse import first_line

_VOCABULARY, _LENGTH = 64, 8
_TOLERANCE = 1e-5


def try_cut(plan: Plan, model_dir: Path) -> None:
    """Compare loss and gradients of a small copy cut after its first layer with those of the whole.

    Raises:
        PreflightError: they differ, or it cannot be cut.
    """
    torch.manual_seed(0)
    ids = torch.randint(3, _VOCABULARY, (2, _LENGTH))
    mask = torch.ones_like(ids)
    mask[1, _LENGTH // 2 :] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    try:
        whole = small_copy(model_dir)
        wanted = whole(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=1, use_cache=False).loss
        wanted.backward()
    except Exception as error:  # whatever a class of transformers thinks of being small
        raise _refused(plan, f"cannot be tried ({type(error).__name__}: {first_line(error)})") from error
    stages = [
        Stage(copy.deepcopy(whole), StagePlan(**_PLACED, device=0, first=0, stop=1, embedding=True, head=False)),
        Stage(copy.deepcopy(whole), StagePlan(**_PLACED, device=1, first=1, stop=2, embedding=False, head=True)),
    ]
    for stage in stages:
        stage.zero_grad()
        cut(stage.whole, stage.planned, family(plan.shape.family))
    try:
        found = stages[1](stages[0](ids, attention_mask=mask), labels=labels, attention_mask=mask)
        found.backward()
    except Exception as error:  # a layer that hands on more than hidden states, for one
        raise _refused(plan, f"cannot be computed ({type(error).__name__}: {first_line(error)})") from error
    cut_apart = {name: part.grad for stage in stages for name, part in stage.model.named_parameters()}
    differ = [name for name, part in whole.named_parameters() if not _close(part.grad, cut_apart.get(name))]
    wanted, found = wanted.detach(), found.detach()
    if not _close(wanted, found) or differ:
        of = f", and another gradient of {differ[0]}" if differ else ""
        raise _refused(plan, f"has a loss of {float(found):.5g} instead of {float(wanted):.5g}{of}")


_PLACED: dict[str, Any] = {"recompute": False, "memory_bytes": 0, "seconds": 0.0, "forward_s": 0.0, "waits": 0.0}


def small_copy(model_dir: Path) -> Any:
    """Two layers, two heads and few words of a model folder's config, with random weights; nothing is dropped in it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    values = config.to_dict()
    # Kinds of layers, one for each; tokens that a small vocabulary has not.
    values |= {k: v[:2] for k, v in values.items() if isinstance(v, list) and len(v) == config.num_hidden_layers}
    values |= {name: None for name in values if name.endswith("_token_id")}
    values |= {**small_sizes(values), "vocab_size": _VOCABULARY}
    with tempfile.TemporaryDirectory(prefix="launch-trial-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values, default=str))
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _close(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is None and other is None
    return bool((one - other).abs().max() <= _TOLERANCE * one.abs().max().clamp(min=1.0))


def _refused(plan: Plan, because: str) -> PreflightError:
    return PreflightError(
        "strategy.schedule: pipelined",
        f"a small copy of {plan.shape.name}, cut in two, {because}",
        "set strategy.schedule=naive",
    )
