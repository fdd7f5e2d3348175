"""How far is the planner's memory from what a card really gives away?      goal: 8 %

    python benchmarks/gpu_memory.py [--out benchmarks/results/gpu_memory_<card>_<date>.md]

Needs one CUDA card. Every case is a process of its own: a model with random weights, the plan's adapter, the worker's Trainer
arguments, three steps on batches of the longest shape. Then

    allocated    torch's own peak of living tensors: what the formulas without the context are about
    reserved     what its allocator had taken for them, gaps included
    context      what the process held beside: CUDA context, libraries, workspaces
    needed       reserved + context: what `plan.memory` with its context predicts, and the goal is about

Cases that the plan says do not fit into the free memory of the card are left out, and named. The page also says what the two constants
of `launcher.memory` (context, share of the allocator) would be on this card.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from memory_honesty import FULL, GIB, LORA, WIDE, Way, catalogued, recipe_of
from page import Page

GOAL = 0.08
MODELS = {
    "Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B",
    "Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B",
    "ChatGLM2-6B (native)": "THUDM/chatglm2-6b",
    "Llama-2-7B": "meta-llama/Llama-2-7b-hf",
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
}
WAYS: dict[str, Way] = {
    "LoRA, 1 × 512": Way(LORA, False, 1, 512, "single", 1, "padded", 1),
    "LoRA all-linear, dropout, 4 × 512": Way(WIDE, False, 4, 512, "single", 1, "padded", 1),
    "LoRA, 4 × 1024 packed": Way(LORA, False, 4, 1024, "single", 1, "packed", 1),
    "LoRA all-linear, dropout, checkpointing, 4 × 2048": Way(WIDE, True, 4, 2048, "single", 1, "padded", 2),
    "full, 2 × 512": Way(FULL, False, 2, 512, "single", 1, "padded", 1),
    "full, checkpointing, 4 × 1024": Way(FULL, True, 4, 1024, "single", 1, "padded", 2),
}


def main() -> None:
    """Measure what fits, and write the page."""
    parser = argparse.ArgumentParser(description="Hold the planner's memory against a card.")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # how the script starts a case
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(json.loads(options.case))))
        return
    free, name = card()
    page = Page(f"Memory of the plan on {name}", f"How far is the memory of a plan from what {name} gives away?")
    rows, left_out, offs = [], [], []
    for model, path in MODELS.items():
        for what, way in WAYS.items():
            label, recipe = f"{model}, {what}", recipe_of(catalogued(path), way)
            done = subprocess.run(
                [sys.executable, __file__, "--case", json.dumps({"recipe": recipe, "free_bytes": free})],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                left_out.append(f"- {label}: failed: {(done.stderr.strip().splitlines() or ['no word'])[-1][:200]}")
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            if "needed" not in found:
                left_out.append(f"- {label}: {found['predicted'] / GIB:.1f} GiB planned, {free / GIB:.1f} GiB free")
                continue
            offs.append(abs(found["predicted"] / found["needed"] - 1))
            rows.append([label, *_cells(found)])
            print(" | ".join(rows[-1]), file=sys.stderr)
    met = sum(off <= GOAL for off in offs)
    page.section("Result", f"{met} of {len(offs)} within {GOAL:.0%}. GiB; off by: predicted ÷ needed − 1.")
    columns = ["model and way", "predicted", "needed", "off by", "of tensors: predicted", "allocated", "off by"]
    page.table([*columns, "context", "reserved beyond"], rows)
    page.section("Left out", "\n".join(left_out) or "Nothing.")
    page.finish(options.out)


def card() -> tuple[int, str]:
    """Free bytes and name of the first card.

    Raises:
        SystemExit: there is none.
    """
    code = "import torch; print(torch.cuda.mem_get_info()[0], torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"no CUDA card that torch can use: {done.stderr.strip().splitlines()[-1]}")
    free, _, name = done.stdout.strip().partition(" ")
    return int(free), name


def _cells(found: dict[str, int]) -> list[str]:
    """Predicted, needed, off by; the same of tensors alone; context, and the allocator's share beyond tensors."""
    gib = {key: f"{value / GIB:.2f}" for key, value in found.items()}
    cells = [gib["predicted"], gib["needed"], f"{found['predicted'] / found['needed'] - 1:+.1%}"]
    cells += [gib["tensors"], gib["allocated"], f"{found['tensors'] / found['allocated'] - 1:+.1%}"]
    return [*cells, gib["context"], f"{found['reserved'] / found['allocated'] - 1:+.1%}"]


def measure(case: dict[str, Any]) -> dict[str, int]:
    """One case in this process: bytes predicted and found; only predicted, where it does not fit."""
    import torch
    from oracle import Steps, build, planned, trainer_of

    plan = planned(case["recipe"])
    tensors = plan.memory.total_bytes - plan.memory.context_bytes
    predicted = {"predicted": plan.memory.total_bytes, "tensors": tensors}
    if plan.memory.total_bytes > case["free_bytes"]:
        return predicted
    with torch.device("cuda"):
        model = build(plan)
    steps = Steps(plan, trainer_of(plan, model, on_cpu=False), model)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        for _ in range(plan.accumulation):
            steps.forward_backward()
        steps.update()
        steps.model.zero_grad()
    torch.cuda.synchronize()
    free_now, _ = torch.cuda.mem_get_info()
    context = case["free_bytes"] - free_now - torch.cuda.memory_reserved()
    reserved = torch.cuda.max_memory_reserved()
    allocated = torch.cuda.max_memory_allocated()
    return {
        **predicted, "allocated": allocated, "reserved": reserved, "context": context, "needed": reserved + context
    }  # fmt: skip


if __name__ == "__main__":
    main()
