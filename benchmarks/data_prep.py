"""How long until 50,000 rows are token ids, and how long when they are already?      goal: a second run looks at them for at most 1 s

    python benchmarks/data_prep.py --data alpaca_en_demo.json [--rows 50000] [--out benchmarks/results/data_prep_<hardware>_<date>.md]

Rows of an Alpaca file, each repeated with a number in its question until there are enough, through prepare as every run starts it: first
with nothing in the cache, then again. The processes that tokenise are as many as there are cores; one alone is measured, too. Seconds
until it says that the data are made, or were there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from page import Page, environment
from peers.task import make

from launcher.cluster import resolve_cluster
from launcher.command import prepare_command
from launcher.modelshape import shape_of
from launcher.plan import make_plan
from launcher.recipe import load_recipe
from launcher.rundir import RunDir
from launcher.supervise import write_run

GOAL_SECOND = 1.0
_RECIPE = """\
model: {{path: {model}}}
data: {{path: rows.json, format: alpaca, max_length: 512}}
train: {{max_steps: 2, global_batch: 8}}
hardware: 1xcpu
"""


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description="Measure the preparation of data.")
    parser.add_argument("--data", type=Path, required=True, help="an Alpaca file")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    page = Page("Preparation of data", "How long until the rows are token ids, and how long when they are already?")
    with tempfile.TemporaryDirectory(prefix="launch-data-") as name:
        folder = Path(name)
        write_rows(options.data, folder / "rows.json", options.rows)
        (folder / "prep.yaml").write_text(
            _RECIPE.format(model=make(options.data.resolve(), folder, "tiny").model), encoding="utf-8"
        )
        size = (folder / "rows.json").stat().st_size
        cores = len(os.sched_getaffinity(0))
        found = {}
        for what, processes in ((f"{cores} processes", cores), ("one process", 1)):
            os.environ["LAUNCH_CACHE"] = str(folder / f"cache-{processes}")
            found[f"nothing cached, {what}"] = prepare(folder, processes)
            if processes == cores:
                found["again"] = prepare(folder, processes)
    page.section("Result", f"{options.rows:,} rows, {size / 1e6:.1f} MB.")
    rows = [(what, f"{all_:.1f}", f"{data:.2f}", f"{options.rows / data:,.0f}") for what, (all_, data) in found.items()]
    page.table(["run", "all of prepare, wall s", "until the data are there, s", "rows/s"], rows)
    second = found["again"][1]
    page.table(
        ["what", "measured", "goal", "met"],
        [
            (
                "until a second run has its data, s",
                f"{second:.2f}",
                f"≤ {GOAL_SECOND}",
                "yes" if second <= GOAL_SECOND else "no",
            )
        ],
    )
    page.finish(options.out)


def write_rows(data: Path, into: Path, num: int) -> None:
    """As many rows as asked for, no two alike."""
    rows = [row for row in json.loads(data.read_text(encoding="utf-8")) if row["output"]]
    made = [
        {**rows[at % len(rows)], "instruction": f"{rows[at % len(rows)]['instruction']} ({at})"} for at in range(num)
    ]
    into.write_text(json.dumps(made), encoding="utf-8")


def prepare(folder: Path, processes: int) -> tuple[float, float]:
    """Seconds of all of it, and from its beginning until the data are there (with the look at the model and its tokenizer)."""
    loaded = load_recipe(folder / "prep.yaml", ())
    plan = make_plan(
        "prep", loaded.recipe, resolve_cluster(loaded.recipe.hardware), shape_of(loaded.recipe.model, folder)
    )
    run = RunDir(folder / "run")
    run.create()
    write_run(plan, run, resuming=run.plan.exists())
    command = prepare_command(plan, run)
    # The cores that a process may use decide how many tokenise.
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:processes]))
    started, data = time.monotonic(), 0.0
    argv = ["taskset", "-c", cores, *command.argv]
    with subprocess.Popen(
        argv, env=environment() | command.env, cwd=folder, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event.get("what") == "data" and event["state"] in ("made", "cached"):
                data = time.monotonic() - started
    if process.returncode or not data:
        raise SystemExit(f"prepare ended with {process.returncode}")
    return time.monotonic() - started, data


if __name__ == "__main__":
    main()
