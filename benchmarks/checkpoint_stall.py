"""How long does training stand still for a checkpoint? Goal: in the background at most a tenth of the time in the foreground.

    python benchmarks/checkpoint_stall.py [--kept FILE [--only STRATEGY]] [--out benchmarks/results/checkpoint_stall_<hardware>_<date>.md]

A Llama of 0.1 B random weights is trained in full, in fp32, by two CPU ranks through `launch` itself, with `checkpoint.async` false and
true. A checkpoint is weights and two moments, 1.2 GiB. The stall is what the ranks' main thread spends in saving, as TensorBoard shows it
(`speed/seconds_saving`); beside it the time of the steps that begin while a checkpoint is being written, and of those that do not. The last
save of a run is left out, because its end waits for it. Takes about ten minutes; with `--kept` strategies are written down one by one
and not measured again. ZeRO needs the extra deepspeed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from kept import Kept
from page import Page, environment, seconds

from launcher.rundir import RunDir, read_events

GOAL = 0.1
EVERY = 5
SAVES = 6
_RECIPE = f"""\
model:
  config: {{model_type: llama, hidden_size: 768, intermediate_size: 2048, num_hidden_layers: 12, num_attention_heads: 12,
           num_key_value_heads: 12, vocab_size: 8192, max_position_embeddings: 128, tie_word_embeddings: false}}
data: {{path: rows.json, max_length: 48}}
adapter: {{type: full}}
train: {{max_steps: {EVERY * SAVES}, lr: 1e-4, global_batch: 2, micro_batch: 1, log_every_steps: 1, gradient_checkpointing: false}}
checkpoint: {{every_steps: {EVERY}, keep: 1}}
hardware: 2xcpu
"""
_STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")


@dataclass(frozen=True)
class Measured:
    """One run.

    Args:
        stalls: seconds of each save but the last.
        alone, beside: seconds of steps while nothing and while a checkpoint is being written.
        size_bytes: of one checkpoint.
        losses: of all steps, to show that it is the same training.
    """

    stalls: list[float]
    alone: list[float]
    beside: list[float]
    size_bytes: int
    losses: list[float]


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description="Measure how long training stands still for a checkpoint.")
    parser.add_argument("--only", help="one strategy")
    parser.add_argument("--kept", type=Path, help="append what is measured to this file, and leave out what is there")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    page = Page("Standing still for a checkpoint", (__doc__ or "").partition("\n")[0])
    kept = Kept(options.kept)
    with tempfile.TemporaryDirectory(prefix="stall-") as folder:
        for strategy in strategies(options.only):
            if strategy not in kept:
                kept.add(strategy, [asdict(each) for each in measured(strategy, Path(folder))])
    there = [strategy for strategy in _STRATEGIES if strategy in kept]
    rows = [(strategy, *(Measured(**each) for each in kept[strategy])) for strategy in there]
    page.section(
        "Seconds of the main thread in a save",
        "In the background it copies what belongs to the checkpoint, of sharded weights its own share. Median of the saves but the last. "
        "The first one takes longer: the system hands out the memory for the copies, which is kept.",
    )
    page.table(
        [
            "strategy",
            "checkpoint",
            "foreground",
            "background",
            "share",
            f"≤ {GOAL:.0%}",
            "foreground, each",
            "background, each",
        ],
        [stall_row(name, sync, later) for name, sync, later in rows],
    )
    page.section(
        "Steps meanwhile",
        "Seconds of a step, medians: those that begin while a checkpoint is written in the background, and the others. Two ranks and two "
        "writing threads share two cores here, so a step beside a save is slower; where training runs on GPUs the cores are free. "
        "`same` says whether both runs computed the same losses.",
    )
    page.table(
        ["strategy", "step alone", "step beside a save", "same"],
        [
            (
                name,
                f"{statistics.median(later.alone):.2f}",
                f"{statistics.median(later.beside or [0]):.2f}",
                _same(sync, later),
            )
            for name, sync, later in rows
        ],
    )
    page.finish(options.out)


def strategies(only: str | None) -> list[str]:
    """What is installed and asked for."""
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    return [each for each in _STRATEGIES if only in (None, each) and (has_deepspeed or not each.startswith("zero"))]


def measured(strategy: str, folder: Path) -> list[Measured]:
    """Both runs of a strategy: in the foreground, in the background."""
    return [
        run(folder / f"{strategy}-{how}", f"strategy.type={strategy}", f"checkpoint.async={how}")
        for how in ("false", "true")
    ]


def run(folder: Path, *overrides: str) -> Measured:
    """Train; the run directory goes when it is read."""
    folder.mkdir()
    rows = [{"instruction": f"Say {number} " + "again " * 20, "output": f"{number} " * 8} for number in range(200)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "stall.yaml").write_text(_RECIPE)
    command = [sys.executable, "-m", "launcher.cli", "stall.yaml", "--run-dir", "run", *overrides]
    env = {**environment(), "LAUNCH_CACHE": str(folder.parent / "cache")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{overrides}: {done.stderr}")
    found = read(RunDir(folder / "run"))
    shutil.rmtree(folder)
    return found


def read(run: RunDir) -> Measured:
    """Stalls and times of steps, from TensorBoard and the events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.tensorboard)).Reload()
    stalls = [event.value for event in board.Scalars("speed/seconds_saving")][:-1]
    events = read_events(run)[0]
    logs = [event for event in events if event["event"] == "log"]
    committed = {event["step"]: event["time"] for event in events if event["event"] == "save"}
    alone, beside = [], []
    # The step after a save has the save in front of it, and the first one everything that happens once.
    for before, after in itertools.pairwise(logs[1:]):
        save = before["step"] // EVERY * EVERY
        if before["step"] != save and save + EVERY <= logs[-1]["step"]:
            is_beside = save > 0 and committed[save] > before["time"]
            (beside if is_beside else alone).append(after["time"] - before["time"])
    newest = run.checkpoints / f"step-{logs[-1]['step']}"
    size = sum(path.stat().st_size for path in newest.iterdir())
    return Measured(stalls, alone, beside, size, [event["loss"] for event in logs])


def stall_row(name: str, sync: Measured, later: Measured) -> tuple[object, ...]:
    """A line of the first table."""
    one, other = statistics.median(sync.stalls), statistics.median(later.stalls)
    share = other / one
    return (
        name,
        f"{sync.size_bytes / 2**30:.2f} GiB",
        f"{one:.2f}",
        f"{other:.3f}",
        f"{share:.1%}",
        "yes" if share <= GOAL else "no",
        seconds(sync.stalls, 2),
        seconds(later.stalls),
    )


def _same(sync: Measured, later: Measured) -> str:
    return "yes" if sync.losses == later.losses else "no"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
