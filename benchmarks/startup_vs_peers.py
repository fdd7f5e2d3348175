"""From the command to the end of the first optimizer step, against what people would pick instead?
goals: at most 0.5 × LLaMA-Factory and Axolotl, at most 0.8 × a bare Trainer script under torchrun, cold and warm

    python benchmarks/startup_vs_peers.py --data alpaca_en_demo.json --environments DIR [--rounds 3] [--only launch,grouped]
                                          [--kept FILE] [--out benchmarks/results/startup_vs_peers_….md]


One step of 80 rows of the task of `throughput_vs_peers.py` on two ranks. Cold: the files of the environment are out of the page cache, and
nothing is prepared: every round tokenises. Warm: the command once more. Systems take turns; the ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from page import Page, seconds
from peers.environments import python_of, versions
from peers.running import run
from peers.systems import ROWS_A_STEP, SYSTEMS, System
from peers.task import Task, make

NAMES = ("launch", "grouped", "llamafactory", "axolotl")
WORDS = {"grouped": "bare Trainer, torchrun", "llamafactory": "LLaMA-Factory", "axolotl": "Axolotl"}
GOALS = {"grouped": 0.8, "llamafactory": 0.5, "axolotl": 0.5}
Kept = list[dict[str, Any]]


def main() -> None:
    """Measure what is not kept yet, and write the page."""
    parser = argparse.ArgumentParser(
        description="Compare the time to the first step with what people would pick instead."
    )
    parser.add_argument("--data", type=Path, required=True, help="an Alpaca file")
    parser.add_argument(
        "--environments", type=Path, required=True, help="where the peers' environments are, or are built"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(NAMES), help="names, of: " + ", ".join(NAMES))
    parser.add_argument("--kept", type=Path, help="lines of JSON that were measured before, and are added to")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    kept: Kept = []
    if options.kept and options.kept.exists():
        kept = [json.loads(line) for line in options.kept.read_text().splitlines()]
    done = {(found["round"], found["system"]) for found in kept}
    for number in range(options.rounds):
        for name in options.only.split(","):
            if (number, name) in done:
                continue
            with tempfile.TemporaryDirectory(prefix="launch-start-") as folder:
                task = make(options.data.resolve(), Path(folder), "tiny", num_rows=ROWS_A_STEP)
                found = {"round": number, **measure(SYSTEMS[name], task, Path(folder), options)}
            kept.append(found)
            print(found, file=sys.stderr, flush=True)
            if options.kept:
                with options.kept.open("a") as file:
                    file.write(json.dumps(found) + "\n")
    write_page(kept, options)


def measure(system: System, task: Task, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first step, cold and then warm."""
    environments = options.environments.resolve()
    python = python_of(system.environment, environments) if system.environment else Path(sys.executable)
    evict(packages_of(python))
    found: dict[str, Any] = {"system": system.name}
    for state in ("cold", "warm"):
        ranks, started = run(system, task, folder / system.name, environments, 1)
        found[state] = (
            max(line["at"] for rank in ranks for line in rank if "tokens" in line and line["step"] == 0) - started
        )
    return found


def packages_of(python: Path) -> Path:
    """The folder of an environment's packages; where they are another's, that one's."""
    own = next((python.parent.parent / "lib").glob("python3*/site-packages"))
    if (own / "torch").exists():
        return own
    import torch

    return Path(torch.__file__).parent.parent


def evict(folder: Path) -> None:
    """Out of the page cache, so that the next one to read them waits for the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def write_page(kept: Kept, options: argparse.Namespace) -> None:
    """Ratios against each, and every raw number."""
    page = Page(
        "Time to the first step against what people would pick instead",
        "How long from the command to the first optimizer step?",
    )
    rounds = [
        {found["system"]: found for found in kept if found["round"] == number}
        for number in sorted({f["round"] for f in kept})
    ]
    rows = []
    for name, goal in GOALS.items():
        for state in ("cold", "warm"):
            both = [
                (found["launch"][state], found[name][state]) for found in rounds if "launch" in found and name in found
            ]
            if both:
                ratio = statistics.median(ours / theirs for ours, theirs in both)
                ours, theirs = (statistics.median(values) for values in zip(*both, strict=True))
                met = "yes" if ratio <= goal else "no"
                rows.append((WORDS[name], state, f"{ours:.1f}", f"{theirs:.1f}", f"{ratio:.2f}", f"≤ {goal}", met))
    page.section("Result", "Seconds of wall time, medians; ratio: median over the rounds.")
    page.table(["against", "page cache", "launch s", "its s", "ratio", "goal", "met"], rows)
    page.section("Every run")
    names = [name for name in NAMES if any(name in found for found in rounds)]
    raw = [
        (name, *(seconds((f[name][state] for f in rounds if name in f), 1) for state in ("cold", "warm")))
        for name in names
    ]
    page.table(["system", "cold s", "warm s"], raw)
    where = [
        (name, versions(python_of(str(SYSTEMS[name].environment), options.environments)))
        for name in names
        if SYSTEMS[name].environment
    ]
    page.section("Versions")
    page.table(["system", "versions"], where)
    page.finish(options.out)


if __name__ == "__main__":
    main()
