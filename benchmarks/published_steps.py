"""How far are planned step times from those that others have published for cards?      goal: within 15 %; calibrates launcher/steptime.py

    python benchmarks/published_steps.py [--out benchmarks/results/published_steps_<date>.md]

No card is needed: each published row is planned, as `launch plan` plans it, and held against what was measured. All rows are
of full training sharded over eight cards of one machine in bf16, from the tables of MosaicML's LLM Foundry
(github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md, commit 061f2c7): tokens a second and card. Its models have
an MLP of two matrices and tied embeddings; here three narrower ones with as many parameters. Its attention is flash attention,
its loss and norms are partly fused, which ours are not.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from page import Page

from launcher.cluster import resolve_cluster
from launcher.modelshape import shape_of_config
from launcher.plan.deciding import Deciding
from launcher.recipe import Recipe

# hidden size, layers, heads
MODELS = {"1b": (2048, 24, 16), "3b": (2560, 32, 20), "7b": (4096, 32, 32), "13b": (5120, 40, 40)}
# card, model, tokens a row, rows a micro batch, micro batches, checkpointing, published tokens a second and card
PUBLISHED = [
    ("A100-80GB", "1b", 2048, 14, 4, False, 20513),
    ("A100-80GB", "3b", 2048, 10, 2, False, 10811),
    ("A100-80GB", "7b", 2048, 6, 2, False, 4641),
    ("A100-80GB", "7b", 4096, 16, 2, True, 3684),
    ("A100-80GB", "13b", 2048, 2, 3, False, 2262),
    ("A100-80GB", "13b", 4096, 10, 3, True, 2060),
    ("H100-80GB", "1b", 2048, 14, 1, False, 45455),
    ("H100-80GB", "3b", 1024, 20, 6, False, 27046),
    ("H100-80GB", "7b", 2048, 6, 1, False, 10643),
    ("H100-80GB", "7b", 4096, 16, 2, True, 8611),
    ("H100-80GB", "13b", 2048, 2, 1, False, 4792),
    ("H100-80GB", "13b", 4096, 10, 3, True, 4717),
]
GOAL = 0.15


def main() -> None:
    """Plan every row, and write the page."""
    parser = argparse.ArgumentParser(description="Hold planned step times against published ones.")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    page = Page(
        "Planned step times against published ones",
        "How far are planned step times from those that others have published for cards?",
    )
    ratios: dict[str, list[float]] = {}
    rows = []
    for card, model, length, micro, accumulation, checkpointing, published in PUBLISHED:
        planned, basis = tokens_per_second(card, model, length, micro, accumulation, checkpointing)
        ratios.setdefault(f"{card}: {basis}", []).append(planned / published)
        what = f"{model}, {micro} × {length}, {accumulation} micro batches{', checkpointing' if checkpointing else ''}"
        rows.append([card, what, f"{planned:,.0f}", f"{published:,}", f"{planned / published:.2f}"])
    page.section("Result", f"Goal: the median of a card within {GOAL:.0%}.")
    page.table(
        ["card", "median", "from", "to"],
        [
            [card, f"{statistics.median(each):.2f}", f"{min(each):.2f}", f"{max(each):.2f}"]
            for card, each in ratios.items()
        ],
    )
    page.table(["card", "model and step", "planned, tokens/s and card", "published", "planned ÷ published"], rows)
    page.finish(options.out)


def tokens_per_second(
    card: str, model: str, length: int, micro: int, accumulation: int, checkpointing: bool
) -> tuple[float, str]:
    """Of one card of eight as the plan says, and what its time rests on."""
    hidden, layers, heads = MODELS[model]
    config: dict[str, Any] = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": 8 * hidden // 3, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 50368, "tie_word_embeddings": True,
    }  # fmt: skip
    recipe = Recipe.model_validate(
        {
            "model": {"config": config, "dtype": "bf16"},
            "data": {"path": "rows.jsonl", "max_length": length, "batching": "padded"},
            "adapter": {"type": "full"},
            "strategy": {"type": "fsdp"},
            "train": {
                "micro_batch": micro,
                "global_batch": 8 * micro * accumulation,
                "gradient_checkpointing": checkpointing,
            },
            "hardware": f"8x{card}",
        }
    )
    shape = shape_of_config(config, "llama", "the benchmark")
    plan = Deciding(recipe, resolve_cluster(recipe.hardware), shape).plan("published")  # whether it fits is not asked
    return plan.time.tokens_per_second / 8, plan.time.basis


if __name__ == "__main__":
    main()
