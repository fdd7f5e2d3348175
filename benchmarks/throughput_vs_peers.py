"""How fast does it train, against what people would pick instead?
goals: at least 3 × the seed's recipe in real tokens a second, at least 1.2 × the best of the others

    python benchmarks/throughput_vs_peers.py --data alpaca_en_demo.json --environments DIR [--shape tiny|mid] [--epochs 2] [--rounds 1]
                                             [--only seed,launch] [--kept FILE] [--out benchmarks/results/throughput_vs_peers_….md]

The same tiny Llama with random weights, the same rows, LoRA r=8 on all linear layers in fp32, two ranks over gloo with a thread each, 80
rows a step (`peers/systems.py`). TRL, LLaMA-Factory and Axolotl run unmodified in environments of their own, which are built below
--environments where they are not there yet (8 GB). A probe that Python imports by itself (`peers/probe`) wraps transformers.Trainer
in all of them: real tokens are those that are no padding; validation on the same 100 rows stops the clock. Rates are of what comes
after the third step.

Needs the machine for itself, about a minute a system; --kept FILE keeps what each measured, so that it can be done in pieces. Numbers of
different rounds are compared only within a round: the machine drifts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from page import Page
from peers.environments import python_of, versions
from peers.running import run
from peers.systems import ROWS_A_STEP, SYSTEMS, System
from peers.task import Task, make

GOAL_SEED, GOAL_BEST = 3.0, 1.2
WARM_UP = 3  # steps
Measured = dict[str, Any]


def main() -> None:
    """Measure what is not kept yet, and write the page."""
    parser = argparse.ArgumentParser(description="Compare training speed with what people would pick instead.")
    parser.add_argument("--data", type=Path, required=True, help="an Alpaca file")
    parser.add_argument(
        "--environments", type=Path, required=True, help="where the peers' environments are, or are built"
    )
    parser.add_argument("--shape", choices=("tiny", "mid"), default="tiny")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default=",".join(SYSTEMS), help="names, of: " + ", ".join(SYSTEMS))
    parser.add_argument("--kept", type=Path, help="lines of JSON that were measured before, and are added to")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    kept = (
        [json.loads(line) for line in options.kept.read_text().splitlines()]
        if options.kept and options.kept.exists()
        else []
    )
    kept = [found for found in kept if found["shape"] == options.shape]
    with tempfile.TemporaryDirectory(prefix="launch-peers-") as name:
        task = make(options.data.resolve(), Path(name), options.shape)
        done = {(found["round"], found["system"]) for found in kept}
        for number in range(options.rounds):
            for system in options.only.split(","):
                if (number, system) in done:
                    continue
                found = {"round": number, "shape": options.shape, **measure(SYSTEMS[system], task, Path(name), options)}
                kept.append(found)
                if options.kept:
                    with options.kept.open("a") as file:
                        file.write(json.dumps(found) + "\n")
        write_page(kept, task, options)


def measure(system: System, task: Task, folder: Path, options: argparse.Namespace) -> Measured:
    """Run a system once."""
    ranks, started = run(system, task, folder / system.name, options.environments.resolve(), options.epochs)
    found = {"system": system.name, **summed(ranks, started)}
    print(found, file=sys.stderr, flush=True)
    return found


def summed(ranks: list[list[dict[str, Any]]], started: float) -> Measured:
    """Rates over both ranks, and the curve of the validation loss."""
    batches = [[line for line in rank if "tokens" in line] for rank in ranks]
    counted = [[line for line in rank if line["step"] >= WARM_UP] for rank in batches]
    began = counted[0][0]["began"]
    seconds = counted[0][-1]["at"] - began  # on the clock of rank 0, which stands still while it validates
    # CPU time from the end of the first counted batch on: that batch has no beginning of its own.
    cpu = sum(rank[-1]["cpu"] - rank[0]["cpu"] for rank in counted)
    tokens = sum(line["tokens"] for rank in counted for line in rank)
    cpu_tokens = sum(line["tokens"] for rank in counted for line in rank[1:])
    first = min(rank[0]["began"] for rank in batches)
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": cpu_tokens / cpu,
        "padding": 1 - tokens / sum(line["slots"] for rank in counted for line in rank),
        "spread": max(_tokens(rank) for rank in counted) / min(_tokens(rank) for rank in counted),
        "steps": batches[0][-1]["step"] + 1,
        "first_step_s": first - started,
        "curve": [(line["step"], line["at"] - first, line["eval_loss"]) for line in ranks[0] if "eval_loss" in line],
    }


def _tokens(rank: list[dict[str, Any]]) -> int:
    return sum(line["tokens"] for line in rank)


def seconds_to(curve: list[tuple[int, float, float]], loss: float) -> float | None:
    """Training seconds until the validation loss has fallen so far, between two measurements on a straight line; None if it never did."""
    for (_, before, higher), (_, at, lower) in itertools.pairwise(curve):
        if lower <= loss:
            return before + (at - before) * ((higher - loss) / (higher - lower) if higher > loss else 0.0)
    return None


def write_page(kept: list[Measured], task: Task, options: argparse.Namespace) -> None:
    """The comparison and every raw number."""
    page = Page(
        "Training speed against what people would pick instead",
        "How many real tokens a second, and how soon the same loss?",
    )
    rounds = {
        number: {f["system"]: f for f in kept if f["round"] == number} for number in sorted({f["round"] for f in kept})
    }
    page.section(
        "Result",
        f"Model `{options.shape}`, {task.num_rows} rows of {task.num_tokens / task.num_rows:.0f} tokens on average, "
        f"{ROWS_A_STEP} rows a step, {options.epochs} epochs. Ratios are medians of those within a round ({len(rounds)} of them). "
        "The loss that all have to reach is the last one of whoever ends highest in a round; seconds to it count from the first step on.",
        "Where other work shares the machine (see the load below) seconds on the wall say more about that work than about a system, and "
        "CPU seconds are what to compare.",
    )
    rows = []
    for system in SYSTEMS.values():
        of_it = [(found[system.name], found) for found in rounds.values() if system.name in found and "seed" in found]
        if of_it:
            rows.append(_row(system, of_it))
    page.table(
        [
            "system",
            "tokens/s × seed",
            "tokens / CPU s × seed",
            "padding",
            "s to the same loss",
            "last loss",
            "first step after s",
        ],
        rows,
    )
    _goals(page, rounds)
    page.section("Every run")
    columns = [
        "system, round",
        "tokens/s",
        "tokens / CPU s",
        "steps",
        "tokens, fuller ÷ emptier rank",
        "validation loss by step (seconds)",
    ]
    page.table(columns, [_raw(found) for found in kept])
    page.section("How each was set up", "All of them: LoRA r=8, alpha 16, learning rate 2e-3, constant, AdamW, fp32.")
    where = {
        s.name: versions(python_of(s.environment, options.environments)) for s in SYSTEMS.values() if s.environment
    }
    page.table(
        ["system", "what", "versions"], [(s.name, s.what, where.get(s.name, "as below")) for s in SYSTEMS.values()]
    )
    page.finish(options.out)


def _row(system: System, of_it: list[tuple[Measured, dict[str, Measured]]]) -> tuple[str, ...]:
    def ratio(name: str) -> str:
        return f"{statistics.median(found[name] / beside['seed'][name] for found, beside in of_it):.2f}"

    highest = [max(each["curve"][-1][2] for each in beside.values()) for _, beside in of_it]
    to_loss = [seconds_to(found["curve"], loss) for (found, _), loss in zip(of_it, highest, strict=True)]
    reached = [value for value in to_loss if value is not None]
    return (
        system.name,
        ratio("tokens_per_second"),
        ratio("tokens_per_cpu_second"),
        f"{statistics.median(found['padding'] for found, _ in of_it):.2f}",
        f"{statistics.median(reached):.1f}" if reached else "never",
        f"{statistics.median(found['curve'][-1][2] for found, _ in of_it):.3f}",
        f"{statistics.median(found['first_step_s'] for found, _ in of_it):.1f}",
    )


def _goals(page: Page, rounds: dict[int, dict[str, Measured]]) -> None:
    """Both goals by CPU time, which others on this machine disturb less, with the same by the clock on the wall beside it."""
    rows = []
    for what, goal, against in (
        ("× the seed's recipe", GOAL_SEED, ("seed",)),
        ("× the best of the others", GOAL_BEST, tuple(name for name in SYSTEMS if name not in ("launch", "seed"))),
    ):
        ratios = {}
        for rate in ("tokens_per_cpu_second", "tokens_per_second"):
            found = [
                each["launch"][rate] / max(each[name][rate] for name in against if name in each)
                for each in rounds.values()
                if "launch" in each and any(name in each for name in against)
            ]
            ratios[rate] = found
        if ratios["tokens_per_cpu_second"]:
            by_cpu, by_wall = (statistics.median(values) for values in ratios.values())
            met = "yes" if by_cpu >= goal else "no"
            rows.append((what, f"{by_cpu:.2f}", f"{by_wall:.2f}", f"≥ {goal}", met))
    page.table(["real tokens", "by CPU s", "by wall s", "goal", "met (CPU s)"], rows)


def _raw(found: Measured) -> tuple[str, ...]:
    curve = " ".join(f"{step}: {loss:.3f} ({at:.1f})" for step, at, loss in found["curve"])
    return (
        f"{found['system']}, {found['round']}",
        f"{found['tokens_per_second']:.0f}",
        f"{found['tokens_per_cpu_second']:.0f}",
        str(found["steps"]),
        f"{found['spread']:.3f}",
        curve,
    )


if __name__ == "__main__":
    main()
