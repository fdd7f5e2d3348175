"""How far is the predicted time of a step from the measured one?      goal: within 25 %; calibrates the fraction in launcher/steptime.py

    python benchmarks/step_time.py [--steps 12] [--ranks 1 2] [--out benchmarks/results/step_time_<hardware>_<date>.md]

Real runs of `launch` on what this machine has, a CPU or CUDA cards, of models with random weights, in several sizes, with an
adapter and in full, with and without gradient checkpointing. Every row has the same number of tokens, so that what is planned is
what runs. A step's time is the median over the logged steps after the first three; every step is logged. Others on this
machine make steps slower: look at the load at the end of the page. On a CPU a rank has one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from page import Page, environment

LLAMA = (
    "{{model_type: llama, hidden_size: {h}, intermediate_size: {i}, num_hidden_layers: {n}, num_attention_heads: {a}, "
    "num_key_value_heads: {a}, vocab_size: {v}, max_position_embeddings: 4096, tie_word_embeddings: false}}"
)
# hidden size, MLP, layers, heads, vocabulary, tokens a row, micro batch
SIZES = {
    "cpu": {
        "128 × 4, 64 tokens": (128, 256, 4, 4, 512, 64, 8),
        "256 × 4, 128 tokens": (256, 512, 4, 8, 512, 128, 4),
        "512 × 8, 128 tokens": (512, 1024, 8, 16, 512, 128, 4),
        "1024 × 4, 256 tokens": (1024, 2048, 4, 16, 512, 256, 2),
    },
    "cuda": {
        "1024 × 12, 512 tokens": (1024, 4096, 12, 16, 32000, 512, 16),
        "2048 × 16, 512 tokens": (2048, 8192, 16, 16, 32000, 512, 16),
        "4096 × 32, 512 tokens": (4096, 11008, 32, 32, 32000, 512, 8),
        "4096 × 32, 2048 tokens": (4096, 11008, 32, 32, 32000, 2048, 2),
    },
}
WAYS = {
    "lora": ["adapter.targets=all-linear"],
    "lora, checkpointing": ["adapter.targets=all-linear", "train.gradient_checkpointing=true"],
    "full": ["adapter.type=full"],
}


def rows_file(folder: Path, tokens: int, num: int) -> Path:
    """Rows of random letters, all longer than they may be, so that all are cut to the same length."""
    draw = random.Random(0)
    path = folder / f"rows-{tokens}.jsonl"
    letters = "".join(map(chr, range(33, 127)))
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num):
            text = "".join(draw.choice(letters) for _ in range(2 * tokens))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def measure(
    folder: Path, size: tuple[int, ...], way: list[str], ranks: int, steps: int
) -> tuple[float, dict[str, Any]]:
    """Median seconds of a step, and the plan of the run."""
    h, i, n, a, v, tokens, micro = size
    data = rows_file(folder, tokens, 4 * micro * ranks)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{config: {LLAMA.format(h=h, i=i, n=n, a=a, v=v)}}}\n"
        f"data: {{path: {data}, format: text, max_length: {tokens}}}\n"
        f"train: {{max_steps: {steps}, global_batch: {micro * ranks}, micro_batch: {micro}, log_every_steps: 1, "
        "gradient_checkpointing: false}\n"
    )
    run = folder / "run"
    subprocess.run(["rm", "-rf", str(run)], check=True)
    command = [
        sys.executable,
        "-m",
        "launcher",
        str(recipe),
        f"launch.run_dir={run}",
        "checkpoint.every_steps=100000",
        *way,
    ]
    env = {**environment(), "LAUNCH_CACHE": str(folder / "cache")}
    subprocess.run([*command, "--nproc", str(ranks)], env=env, check=True, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    times = [event["time"] for event in events if event["event"] == "log"]
    gaps = [after - before for before, after in itertools.pairwise(times[2:])]
    return statistics.median(gaps), json.loads((run / "plan.json").read_text())


def main() -> None:
    """Measure all sizes and ways, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from launcher.cluster import this_machine

    kind = this_machine().kind
    page = Page("Time of a step: predicted and measured", __doc__.partition("\n")[0])
    rows, ratios, basis = [], [], ""
    with tempfile.TemporaryDirectory() as root:
        os.environ["OMP_NUM_THREADS"] = "1"
        for ranks in options.ranks:
            for name, size in SIZES[kind].items():
                for way, overrides in WAYS.items():
                    measured, plan = measure(Path(root), size, overrides, ranks, options.steps)
                    time = plan["time"]
                    predicted = sum(value for key, value in time.items() if key.endswith("_s"))
                    basis = time["basis"]
                    ratios.append(predicted / measured)
                    rows.append((name, way, ranks, f"{predicted:.4f}", f"{measured:.4f}", f"{ratios[-1]:.2f}"))
                    print(*rows[-1], file=sys.stderr, flush=True)
    page.section(
        "Result",
        f"Assumed: {basis}. Median ratio {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}.",
    )
    page.table(["model", "way", "ranks", "predicted s", "measured s", "predicted ÷ measured"], rows)
    page.finish(options.out)


if __name__ == "__main__":
    main()
