"""How much of a card does a step use?      goals: MFU ≥ 55 % without checkpointing, ≥ 3 × the seed's recipe in the same run

    python benchmarks/gpu_step.py [--steps 12] [--out benchmarks/results/gpu_step_<card>_<date>.md]

Needs one CUDA card with about 40 GB. A ChatGLM2-6B-shaped model with random weights, LoRA r=8, 640 rows a step of 20 to 200 tokens
(80 on average), each way in a process of its own, through transformers.Trainer's own step:

    seed    fp16, checkpointing, rows as they come, 40 padded to the longest, a mask, logits of every token
    ours    what the plan says for this card: its micro batch, bf16, `RankBatches`, no mask, logits in parts where labels are

MFU counts what has to be computed: 4 operations a parameter of the layers and a real token (forward, and the gradient that passes;
LoRA's own weights are few), 4 a parameter of the head and a supervised token, over what a bf16 product of 8192 x 8192 reaches in the
same process. Without a card the page says that it was not run.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_memory import card
from memory_honesty import catalogued
from page import Page

from launcher.memory import GIB

MODEL, ROWS, MICRO, MAX_LENGTH = "THUDM/chatglm2-6b", 640, 40, 200
GOAL_MFU, GOAL_RATIO, WARM_UP = 0.55, 3.0, 3
Rows = list[dict[str, Any]]


def main() -> None:
    """Measure both ways, and write the page."""
    parser = argparse.ArgumentParser(description="Measure a LoRA step of a 6B model on a card.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    parser.add_argument("--way", choices=("seed", "ours"), help=argparse.SUPPRESS)  # how the script starts a way
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(measure(options.way, options.steps)))
        return
    try:
        _, name = card()
    except SystemExit as reason:
        page = Page("A LoRA step of a 6B model on a card", "How much of a card does a LoRA step of a 6B model use?")
        page.section("Result", f"**Not run**: {reason}. Nothing below the goals of `gpu_step.py` is known yet.")
        page.finish(options.out)
        return
    found = {}
    for way in ("seed", "ours"):
        argv = [sys.executable, __file__, "--way", way, "--steps", str(options.steps)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{way} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        found[way] = json.loads(done.stdout.strip().splitlines()[-1])
    page = Page(f"A step on {name}", "How much of a card does a LoRA step of a 6B model use?")
    ratio = found["ours"]["tokens_per_second"] / found["seed"]["tokens_per_second"]
    mfu = found["ours"]["mfu"]
    goals = [
        ("MFU", f"{mfu:.0%}", f"≥ {GOAL_MFU:.0%}", "yes" if mfu >= GOAL_MFU else "no"),
        (
            "× the seed's recipe, real tokens/s",
            f"{ratio:.2f}",
            f"≥ {GOAL_RATIO}",
            "yes" if ratio >= GOAL_RATIO else "no",
        ),
    ]
    page.section("Result")
    page.table(["what", "measured", "goal", "met"], goals)
    page.table(["way", *found["ours"]], [(way, *map(_cell, values.values())) for way, values in found.items()])
    page.finish(options.out)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def rows(num: int) -> Rows:
    """Random ids in lengths like those of the reported run; two thirds of a row are its answer."""
    draw = random.Random(0)
    made = []
    for _ in range(num):
        length = min(MAX_LENGTH, max(20, round(draw.lognormvariate(4.25, 0.5))))
        ids = [draw.randrange(100, 60_000) for _ in range(length)]
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :], "length": length})
    return made


def plan_of(way: str, free_bytes: int) -> Any:
    """The plan of a way; ours keeps activations where they fit."""
    import oracle

    adapter, data = {"r": 8, "dropout": 0.1}, {"max_length": MAX_LENGTH}
    for checkpointing in (True,) if way == "seed" else (False, True):
        train = {"micro_batch": MICRO, "global_batch": ROWS, "max_steps": 2, "gradient_checkpointing": checkpointing}
        model = {"config": catalogued(MODEL), "dtype": "fp16" if way == "seed" else "bf16"}
        plan = oracle.planned({"model": model, "adapter": adapter, "train": train, "data": data})
        if plan.memory.total_bytes <= free_bytes:
            break
    return plan.model_copy(update={"logits": "whole", "batching": "padded"}) if way == "seed" else plan


def batches(plan: Any, steps: int) -> Iterator[list[Any]]:
    """Of every step its micro batches, on the host."""
    from launcher.worker.data.batches import RankBatches, StepOrder, collator
    from launcher.worker.headloss import at_labels

    all_rows = rows(ROWS * steps)
    order = StepOrder([row["length"] for row in all_rows], ROWS, 42, plan.batching)
    collate = collator(plan.batching, 0)
    collate = at_labels(collate, plan.unmasked) if plan.logits != "whole" else collate
    dealt = RankBatches(order, plan.micro_batch, plan.accumulation, 0, 1)
    for step in order.steps():
        yield [collate([all_rows[row] for row in batch]) for batch in dealt.divided(step)[0]]


def measure(way: str, num_steps: int) -> dict[str, Any]:
    """One way in this process."""
    import oracle
    import torch

    peak = matmul_flops()
    plan = plan_of(way, torch.cuda.mem_get_info()[0])
    with torch.device("cuda"):
        model = oracle.build(plan)
    steps = oracle.Steps(plan, oracle.trainer_of(plan, model, on_cpu=False), model)
    shape = plan.shape
    torch.cuda.reset_peak_memory_stats()
    tokens = useful = 0
    started = 0.0
    for number, micro_batches in enumerate(batches(plan, num_steps + WARM_UP)):
        if number == WARM_UP:
            torch.cuda.synchronize()
            started = time.perf_counter()
        num = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
        count = torch.tensor(num, device="cuda")
        for batch in micro_batches:
            on_card = {name: part.pin_memory().to("cuda", non_blocking=True) for name, part in batch.items()}
            steps.trainer.training_step(steps.model, on_card, count)
        steps.update()
        steps.model.zero_grad()
        if number >= WARM_UP:
            real = sum(_real(batch) for batch in micro_batches)
            tokens += real
            useful += 4 * (
                shape.num_layers * shape.layer_parameters * real + shape.hidden_size * shape.vocab_size * num
            )
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": tokens / seconds,
        "mfu": useful / seconds / peak,
        "matmul_tflops": peak / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "planned_gib": (plan.memory.total_bytes - plan.memory.context_bytes) / GIB,
        "checkpointing": plan.gradient_checkpointing,
    }


def _real(batch: Any) -> int:
    counted = batch["num_tokens"] if "num_tokens" in batch else batch["attention_mask"].sum()
    return int(counted)


def matmul_flops() -> float:
    """Operations a second of a large bf16 product."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        left @ right
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(50):
        left @ right
    torch.cuda.synchronize()
    return 50 * 2 * 8192**3 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
