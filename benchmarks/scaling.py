"""What does the launcher itself cost a step as ranks grow?      goal: at most 3 % of the step at 8 ranks

    python benchmarks/scaling.py [--rounds 3] [--steps 12] [--step-seconds 0.4] [--out benchmarks/results/scaling_<hardware>_<date>.md]

1, 2, 4 and 8 ranks over gloo train a tiny model by `PlannedTrainer` and by the plain Trainer in turns (`trainer_overhead.py` says what is
measured how). Each step sleeps first, as long as a card would compute, so that eight ranks compete for the cores of this machine with
their Python alone. What is judged is the time inside our own parts: callbacks, counters, the agreement of all ranks after each step
(with what a rank waits there for the others), logging with its collectives: an upper bound of what we add.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from page import Page
from trainer_overhead import run_case, step_seconds

GOAL = 0.03
RANKS = (1, 2, 4, 8)


def main() -> None:
    """Measure every number of ranks, and write the page."""
    parser = argparse.ArgumentParser(description="Measure the launcher's own cost of a step as ranks grow.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--step-seconds", type=float, default=0.4, help="emulated computation of a step")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    page = Page("Cost of a step as ranks grow", "What does the launcher itself add to a step, on more and more ranks?")
    rows, raw = [], []
    with tempfile.TemporaryDirectory(prefix="launch-scaling-") as folder:
        for ranks in RANKS:
            turns = run_case(Path(folder), "tiny", ranks, options, options.step_seconds)
            plain, ours, own = (
                step_seconds(turns[side], what) for side, what in (("plain", "wall"), ("ours", "wall"), ("ours", "own"))
            )
            goal = (f"≤ {GOAL:.0%}", "yes" if own / plain <= GOAL else "**no**") if ranks == RANKS[-1] else ("", "")
            rows.append(
                (ranks, f"{plain * 1e3:.1f}", f"{ours * 1e3:.1f}", f"{own * 1e3:.2f}", f"{own / plain:.2%}", *goal)
            )
            raw += [
                (
                    f"{ranks}, {side}",
                    " ".join(f"{1e3 * sum(turn['wall']) / len(turn['wall']):.1f}" for turn in turns[side]),
                )
                for side in turns
            ]
    page.section(
        "Result",
        f"{options.step_seconds} s of each step are emulated. Lower quartiles of each step, mean of the steps.",
    )
    columns = ["ranks", "Trainer, ms a step", "ours, ms a step", "inside our parts, ms", "share", "goal", "met"]
    page.table(columns, rows)
    page.section("Every turn", "Milliseconds a step, mean of a turn.")
    page.table(["ranks, what", "turns"], raw)
    page.finish(options.out)


if __name__ == "__main__":
    main()
