"""Are ranks that do the same job as full as each other?      goal: fullest ÷ emptiest rank at most 1.05

    python benchmarks/memory_balance.py --data alpaca_en_demo.json [--layers 28] [--epochs 4] [--out benchmarks/results/memory_balance_….md]

Four ranks, 40 rows each and step, as in the run of which 33, 52, 75 and 30 of 80 GB were reported. Both ways go through the same rows:

    the seed's recipe   rows as they come, every rank pads its 40 to its own longest; a mask; logits of every token
    ours                `RankBatches` of the plan, logits where labels are, no mask

Every micro batch of every rank is held against the oracle (`benchmarks/oracle`): the real ChatGLM2-6B classes with LoRA and gradient
checkpointing, transformers.Trainer's own step, forward and backward, on tensors without data; a dispatch mode sees every tensor that lives.
Lengths are rounded up to 16 tokens, labels to 256, and each shape is looked at once. Nothing is computed, so no GPU is needed; what an
allocator loses between tensors of changing sizes, which was part of the reported figures, is not in it.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import torch
from memory_honesty import catalogued
from oracle.ledger import Ledger
from page import Page
from peers.task import encoded_rows

from launcher.memory import GIB
from launcher.plan import Plan
from launcher.worker.data.batches import RankBatches, StepOrder
from launcher.worker.headloss import PLACES

RANKS, ROWS, GOAL = 4, 40, 1.05
MODEL = "THUDM/chatglm2-6b"
# (tokens, tokens that are learned) of a row
Row = tuple[int, int]


def main() -> None:
    """Go through the rows in both ways, and write the page."""
    parser = argparse.ArgumentParser(description="Compare the peak memory of ranks.")
    parser.add_argument("--data", type=Path, required=True, help="an Alpaca file")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    rows = lengths_of(options.data)
    plan = planned(options.layers)
    whole = plan.model_copy(update={"logits": "whole", "batching": "padded"})
    found = {
        "the seed's recipe": peaks(whole, list(as_they_come(rows, options.epochs))),
        "ours": peaks(plan, list(as_planned(rows, plan, options.epochs))),
    }
    page = Page("Memory of ranks that do the same job", "Is one rank fuller than another?")
    page.section(
        "Result",
        f"{RANKS} ranks × {ROWS} rows, {len(rows)} rows a epoch of {statistics.mean(r[0] for r in rows):.0f} tokens on average, "
        f"{options.epochs} epochs, {options.layers} layers. GiB beside what lies there for good is in the ratio, too.",
    )
    table = []
    for name, steps in found.items():
        run = [max(step[rank] for step in steps) for rank in range(RANKS)]
        first = [max(step[rank] for step in steps[:3]) for rank in range(RANKS)]
        each = sorted(max(step) / min(step) for step in steps)
        cells = [" ".join(f"{value / GIB:.1f}" for value in values) for values in (first, run)]
        ratios = [max(run) / min(run), each[len(each) // 2], each[-1]]
        table.append((name, *cells, *(f"{ratio:.3f}" for ratio in ratios), "yes" if ratios[0] <= GOAL else "no"))
    columns = ["way", "peaks after 3 steps", "of the run", "fullest ÷ emptiest of the run", "median step", "worst step"]
    page.table([*columns, f"≤ {GOAL}"], table)
    page.section("Every step", "GiB of the four ranks.")
    for name, steps in found.items():
        page.lines += [f"{name}: " + " · ".join(" ".join(f"{value / GIB:.2f}" for value in step) for step in steps), ""]
    page.finish(options.out)


def lengths_of(data: Path) -> list[Row]:
    """What the rows of the task come to; rows of which nothing is left to learn are not there."""
    return [(len(ids), len(ids) - learned_from) for _, _, ids, learned_from in encoded_rows(data)[1]]


def planned(layers: int) -> Plan:
    """LoRA on the real classes, checkpointed as the reported run was."""
    train = {"micro_batch": ROWS, "global_batch": ROWS, "max_steps": 2, "gradient_checkpointing": True}
    config = {**catalogued(MODEL), "num_hidden_layers": layers, "num_layers": layers}
    recipe = {"model": {"config": config}, "adapter": {"r": 8}, "train": train, "data": {"max_length": 512}}
    return oracle.planned(recipe)


def as_they_come(rows: list[Row], epochs: int) -> Iterator[list[list[Row]]]:
    """Of every step the rows of each rank: shuffled, dealt out one micro batch after another."""
    for epoch in range(epochs):
        order = random.Random(epoch).sample(rows, len(rows))
        for start in range(0, len(order) - RANKS * ROWS + 1, RANKS * ROWS):
            yield [order[start + rank * ROWS :][:ROWS] for rank in range(RANKS)]


def as_planned(rows: list[Row], plan: Plan, epochs: int) -> Iterator[list[list[Row]]]:
    """The same by the product's own order."""
    order = StepOrder([length for length, _ in rows], RANKS * ROWS, 42, plan.batching)
    for epoch in range(epochs):
        order.go_to(epoch)
        ranks = [RankBatches(order, ROWS, 1, rank, RANKS) for rank in range(RANKS)]
        for step in list(zip(*ranks, strict=True))[: len(rows) // (RANKS * ROWS)]:
            yield [[rows[row] for row in batch] for batch in step]


def peaks(plan: Plan, steps: list[list[list[Row]]]) -> list[list[int]]:
    """Bytes of each rank at its fullest, of every step."""
    seen: dict[tuple[int, int, int], int] = {}
    found = []
    with oracle._on_fake_tensors(plan) as (model, trainer):
        inside = oracle.Steps(plan, trainer, model)
        weights = sum(tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers()))
        for step in steps:
            shapes = [shape_of(batch) for batch in step]
            for shape in set(shapes) - seen.keys():
                seen[shape] = weights + peak(plan, inside, shape)
                print(shape, f"{seen[shape] / GIB:.2f} GiB", file=sys.stderr, flush=True)
            found.append([seen[shape] for shape in shapes])
    return found


def shape_of(batch: list[Row]) -> tuple[int, int, int]:
    """Rows, length and labels, rounded up."""
    longest, labels = max(length for length, _ in batch), sum(learned for _, learned in batch)
    return len(batch), 16 * math.ceil(longest / 16), 256 * math.ceil(labels / 256)


def peak(plan: Plan, steps: Any, shape: tuple[int, int, int]) -> int:
    """Bytes beside the weights at the fullest moment of a micro batch."""
    rows, length, labels = shape
    ids = torch.ones((rows, length), dtype=torch.long)
    batch = {"input_ids": ids, "labels": torch.ones_like(ids)}
    if plan.unmasked:
        batch[PLACES] = torch.arange(min(labels, rows * (length - 1)))
    else:
        batch["attention_mask"] = torch.ones_like(ids)
    ledger = Ledger()
    with ledger:
        steps.trainer.training_step(steps.model, batch, torch.tensor(labels))
        steps.model.zero_grad()
    return sum(ledger.peak().values())


if __name__ == "__main__":
    main()
