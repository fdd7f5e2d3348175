"""What ranks of `test_pipeline.py` do, each in a process of its own (`rank_server.py`)."""

from __future__ import annotations

import copy
import itertools
import json
import types
import weakref
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.families import family
from launcher.plan import StagePlan
from launcher.worker.data.batches import collator
from launcher.worker.data.tokens import IGNORED
from launcher.worker.pipeline import schedule
from launcher.worker.pipeline.cutting import Stage, checkpoint_layers, cut
from launcher.worker.pipeline.loop import PipelinedTrainer
from launcher.worker.pipeline.schedule import Micro, Pipeline, micro_batches

WIDTH, PAD = 16, 0
COLLATE, PACK = collator("padded", PAD), collator("packed", PAD)


def small_llama(lora: bool) -> Any:
    """Five layers in fp32, with LoRA and a trained head, or trained in full; the same on every rank."""
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2, vocab_size=40,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if not lora:
        return model
    adapter = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False)
    return peft.get_peft_model(model, adapter)


def this_stage(model: Any, bounds: list[int], recompute: bool = False) -> Stage:
    """A copy of the model, cut to the layers between two bounds."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    planned = StagePlan(
        device=rank, first=bounds[rank], stop=bounds[rank + 1], embedding=rank == 0, head=rank == last,
        recompute=recompute, memory_bytes=0, seconds=0.0, forward_s=0.0, waits=0.0,
    )  # fmt: skip
    stage = Stage(copy.deepcopy(model), planned)
    cut(stage.whole, planned, family("llama"))
    if recompute:
        checkpoint_layers(stage.whole)
    return stage


def rows_of(lengths: list[int], supervised: list[int]) -> list[dict[str, list[int]]]:
    """Rows of random ids, of which so many labels at the end count."""
    draw = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for length, counted in zip(lengths, supervised, strict=True):
        ids = torch.randint(1, 40, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * (length - counted) + ids[length - counted :]})
    return rows


# Steps of unlike shape; in the first one a single row has nearly all of the labels; the second is packed; the last one has less rows
# than there are stages to fill.
STEPS = [
    (COLLATE, rows_of([9, 5, 7, 3, 12, 6, 4, 8], [1, 1, 1, 1, 11, 1, 1, 1])),
    (PACK, rows_of([4, 4, 3, 4, 2, 4, 4, 5], [2, 3, 1, 3, 1, 2, 2, 3])),
    (COLLATE, rows_of([6, 3, 5], [4, 2, 3])),
]


def gradients(folder: str) -> None:
    """Every step of `STEPS` in every order, for LoRA and in full, against the uncut model; what was found goes to a file a rank."""
    found = []
    bounds = [0, 0, 2, 5] if dist.get_world_size() == 3 else [0, 3, 5]  # of three the first has the embedding alone
    for lora, order, recompute in itertools.product((True, False), ("1f1b", "gpipe"), (False, True)):
        if dist.get_world_size() == 3 and recompute:
            continue
        whole = small_llama(lora).train()
        stage = this_stage(whole, bounds, recompute).train()
        pipeline = Pipeline(stage, torch.device("cpu"), torch.float32, WIDTH)
        for number, (collate, rows) in enumerate(STEPS):
            whole.zero_grad()
            stage.zero_grad()
            micro = micro_batches(rows, 2, dist.get_world_size(), PAD, collate)
            scale = 1.0 if order == "1f1b" else 8.0
            loss, evaluated = pipeline.train(micro, order, scale), pipeline.evaluate(micro)
            wanted = unsplit(whole, rows, collate)
            found.append(
                {
                    "case": f"lora {lora}, {order}, recompute {recompute}, step {number}",
                    "loss": float(loss) - wanted if pipeline.is_last else 0.0,
                    "gradient": largest_difference(stage.model, whole, scale),
                    "evaluated": float(evaluated) / micro.num_items - wanted if pipeline.is_last else 0.0,
                    "mean_of_means": mean_of_means(whole, rows),
                }
            )
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(found))


def unsplit(model: Any, rows: list[dict[str, list[int]]], collate: Any) -> float:
    """The loss of a step on one device as the Trainer computes it, and its gradients."""
    batches = [collate(rows[start : start + 2]) for start in range(0, len(rows), 2)]
    num_items = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    losses = [model(**batch, num_items_in_batch=num_items).loss for batch in batches]
    for loss in losses:
        loss.backward()
    return sum(float(loss.detach()) for loss in losses)


def largest_difference(cut_model: torch.nn.Module, whole: torch.nn.Module, scale: float) -> float:
    """Of any gradient that this stage has, beside the largest value of the same in the whole model."""
    known = dict(whole.named_parameters())
    differences = []
    for name, parameter in cut_model.named_parameters():
        wanted = known[name].grad
        assert (parameter.grad is None) == (wanted is None), name
        if wanted is not None:
            differences.append(
                float((parameter.grad / scale - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3))
            )
    return max(differences, default=0.0)  # an embedding alone is not trained under LoRA


def mean_of_means(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """How far the gradient of the mean of micro batches' means, which torch's own scaling stands for, is from that over all tokens."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    means = [model(**COLLATE(rows[start : start + 2])).loss for start in range(0, len(rows), 2)]
    grads = torch.autograd.grad(sum(means) / len(means), trained)
    return max(
        float((grad - parameter.grad).norm() / parameter.grad.norm())
        for grad, parameter in zip(grads, trained, strict=True)
    )


def buffers(folder: str) -> None:
    """The most hidden states that are kept for receiving while sixteen micro batches go through, and those left behind."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    empty_like = torch.empty_like

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal most
        made = empty_like(*args, **kwargs)
        alive.add(made)
        most = max(most, len(alive))
        return made

    stage = this_stage(small_llama(lora=True), [0, 3, 5])
    pipeline = Pipeline(stage, torch.device("cpu"), torch.float32, WIDTH)
    rows = rows_of([4] * 16, [2] * 16)
    schedule.torch.empty_like, before = counted, empty_like
    try:
        pipeline.train(micro_batches(rows, 1, 2, PAD, COLLATE), "1f1b")
    finally:
        schedule.torch.empty_like = before
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps([most, len(alive)]))


def failing(folder: str) -> None:
    """A stage whose model raises: what comes out is what it raised."""

    class Broken(torch.nn.Module):
        num_items = 1

        def forward(self, given: torch.Tensor, **_: Any) -> torch.Tensor:
            raise MemoryError("as large as can be")

    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 3, dtype=torch.long)}
    pipeline = Pipeline(Broken(), torch.device("cpu"), torch.float32, WIDTH)
    try:
        pipeline.train(Micro(batch, 2, 4), "1f1b")
    except MemoryError as error:
        Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(str(error)))


def clipping(folder: str) -> None:
    """A step's gradients of 3 and 4 on two stages, whole and with one that overflowed: norms and clipped gradients of this rank."""
    rank, found = dist.get_rank(), []
    for mine in (3.0 + rank, float("inf") if rank == 1 else 3.0):
        model = torch.nn.Linear(1, 1, bias=False)
        model.weight.grad = torch.full((1, 1), 2 * mine)
        stub = types.SimpleNamespace(model=model, args=types.SimpleNamespace(max_grad_norm=1.0))
        loss = torch.tensor(0.5 * rank)
        loss, norm = PipelinedTrainer._over_all_stages(stub, loss, 2.0)
        found.append([float(loss), float(norm), float(model.weight.grad)])
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
