"""How long until something happens? Three questions, one page:

    1. CPU time of `launch --help`                                       goal: at most 0.15 s
    2. CPU time of `launch plan` for every shipped recipe                goal: at most 0.5 s, the worst one
    3. From the command to the first optimizer step: `launch RECIPE`     goal: no more than `accelerate launch`
       against `accelerate launch` of the same worker on the same plan

    python benchmarks/startup.py [--repeats 5] [--out benchmarks/results/startup_<hardware>_<date>.md]

CPU time is user + system of the command and of everything that it started. For 3 both commands start two ranks over gloo with the
same plan, prepared rows, worker and variables, in turns (A B, B A, …), with the cache of prepared things warm; `launch` also checks
the recipe, plans, and looks whether everything is prepared, which is what it costs. The first step's time is what the worker itself
writes into RUN/events.jsonl (it logs step 1). Takes two to four minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from page import Page, environment, seconds

from launcher.command import worker_environment
from launcher.plan import Plan
from launcher.recipe.shipped import shipped_folder
from launcher.rundir import RunDir, read_events

LAUNCH = Path(sys.executable).with_name("launch")
ACCELERATE = Path(sys.executable).with_name("accelerate")
GOAL_HELP, GOAL_PLAN, GOAL_RATIO = 0.15, 0.5, 1.0
_LONGEST_SECONDS = 180.0
_POLL_SECONDS = 0.01

# Small enough that the steps themselves cost nothing; evaluation before training would only blur the first step.
_RECIPE = """\
model:
  config: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 4, vocab_size: 512, max_position_embeddings: 128, tie_word_embeddings: false}
data: {path: rows.json, format: alpaca, max_length: 64}
adapter: {type: lora, targets: all-linear}
train: {max_steps: 2, global_batch: 4}
hardware: 2xcpu
"""


@dataclass(frozen=True)
class Used:
    """What a command has used."""

    wall: float
    cpu: float
    exit_code: int


@dataclass
class Start:
    """One start of training: seconds after the command at which each event was written, and CPU time until the first step."""

    at: dict[str, float]
    cpu: float

    @property
    def first_step(self) -> float:
        return self.at["log"]


@dataclass
class Side:
    """One of the two that are compared."""

    name: str
    starts: list[Start] = field(default_factory=list)

    def median(self, what: str) -> float:
        """Median seconds of an event, or of `cpu`; nan where this side has no such event."""
        values = [start.cpu if what == "cpu" else start.at.get(what) for start in self.starts]
        present = [value for value in values if value is not None]
        return statistics.median(present) if present else float("nan")


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description="Measure how fast `launch` starts.")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is measured (default 5)")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    page = Page("Start-up", "How long until `launch` answers, and until it trains?")
    with tempfile.TemporaryDirectory(prefix="launch-startup-") as folder:
        answers(page, Path(folder), options.repeats)
        first_step(page, Path(folder), options.repeats)
    page.finish(options.out)


def answers(page: Page, folder: Path, repeats: int) -> None:
    """`launch --help` and `launch plan`."""
    asked = [("launch --help", [LAUNCH, "--help"])]
    recipes = sorted(path for path in shipped_folder().glob("*.yaml"))
    asked += [(f"launch plan {path.stem}", [LAUNCH, "plan", path]) for path in recipes]
    rows, medians = [], []
    for name, command in asked:
        measure(command, folder)  # once for the page cache
        runs = [measure(command, folder) for _ in range(repeats)]
        cpu = statistics.median(run.cpu for run in runs)
        medians.append(cpu)
        wall = statistics.median(run.wall for run in runs)
        code = max(run.exit_code for run in runs)
        rows.append((f"`{name}`", f"{cpu:.3f}", f"{wall:.3f}", code, seconds(run.cpu for run in runs)))
    help_cpu, *plan_cpu = medians
    page.section("Answers", "CPU seconds of the whole command, medians.")
    page.table(
        ["what", "measured", "goal", "met"],
        [
            ("`launch --help`", f"{help_cpu:.3f}", f"≤ {GOAL_HELP}", said(help_cpu <= GOAL_HELP)),
            ("`launch plan`, worst recipe", f"{max(plan_cpu):.3f}", f"≤ {GOAL_PLAN}", said(max(plan_cpu) <= GOAL_PLAN)),
            ("`launch plan`, median recipe", f"{statistics.median(plan_cpu):.3f}", f"≤ {GOAL_PLAN}", ""),
        ],
    )
    page.table(["command", "CPU s", "wall s", "exit code", "every run, CPU s"], rows)


def first_step(page: Page, folder: Path, repeats: int) -> None:
    """From the command to the first optimizer step, beside `accelerate launch`."""
    recipe = folder / "startup.yaml"
    recipe.write_text(_RECIPE, encoding="utf-8")
    rows = [{"instruction": f"What is {n} plus one?", "output": f"It is {n + 1}, of course."} for n in range(200)]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    cache = {"LAUNCH_CACHE": str(folder / "cache")}
    pattern = RunDir(folder / "pattern")
    warm = measure([LAUNCH, recipe, "--run-dir", pattern.path], folder, cache)
    if warm.exit_code:
        raise SystemExit(f"the run that fills the cache ended with {warm.exit_code}; see above")
    variables = cache | worker_environment(Plan.model_validate_json(pattern.plan.read_text(encoding="utf-8")))
    ours, theirs = Side("launch"), Side("accelerate launch")
    for repeat in range(repeats):
        for side in (ours, theirs) if repeat % 2 == 0 else (theirs, ours):
            run = RunDir(folder / f"{side.name.split()[0]}-{repeat}")
            if side is ours:
                start = start_training([LAUNCH, recipe, "--run-dir", run.path], folder, cache, run)
            else:
                run.create()
                for name in ("plan.json", "recipe.yaml", "prepared.json"):
                    shutil.copyfile(pattern.path / name, run.path / name)
                start = start_training(accelerate(run), folder, variables, run)
            side.starts.append(start)
            print(f"{side.name:<18} first step: {start.first_step:6.2f} s, CPU {start.cpu:6.2f} s", file=sys.stderr)
    report_first_step(page, ours, theirs)


def accelerate(run: RunDir) -> list[Any]:
    """Two ranks of the same worker; port 0 takes a free one, and the rest are the defaults that it would warn about."""
    defaults = "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    options = ["--multi_gpu", "--num_processes", "2", *defaults.split()]
    return [ACCELERATE, "launch", *options, "-m", "launcher.worker", run.plan]


def report_first_step(page: Page, ours: Side, theirs: Side) -> None:
    """The section about the first step."""
    pairs = list(zip(ours.starts, theirs.starts, strict=True))
    wall = statistics.median(a.first_step / b.first_step for a, b in pairs)
    cpu = statistics.median(a.cpu / b.cpu for a, b in pairs)
    page.section(
        "First optimizer step",
        "Two ranks on this machine's cores, prepared before. Ratio: median over the pairs, `launch` ÷ `accelerate launch`.",
    )
    rows = [
        (name, f"{ours.median(key):.2f}", f"{theirs.median(key):.2f}", f"{ratio:.3f}", "≤ 1", said(ratio <= GOAL_RATIO))
        for name, key, ratio in (("wall s", "log", wall), ("CPU s, all processes", "cpu", cpu))
    ]
    page.table(["command to first step", "launch", "accelerate launch", "ratio", "goal", "met"], rows)
    what = {
        "start": "ranks are being started (planned and prepared)",
        "ready": "model built on all ranks",
        "train": "training loop entered",
        "log": "first step done",
    }
    steps = [
        (text, f"{ours.median(key):.2f}", f"{theirs.median(key):.2f}".replace("nan", "–")) for key, text in what.items()
    ]
    page.table(["seconds after the command, median", "launch", "accelerate launch"], steps)
    page.table(
        ["every run", "wall s", "CPU s"],
        [
            (
                side.name,
                seconds((start.first_step for start in side.starts), 2),
                seconds((start.cpu for start in side.starts), 2),
            )
            for side in (ours, theirs)
        ],
    )


def measure(command: list[Any], folder: Path, variables: dict[str, str] | None = None) -> Used:
    """Run a command to its end."""
    started = time.perf_counter()
    process = begin(command, folder, variables or {}, subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    return Used(wall, used.ru_utime + used.ru_stime, process.returncode)


def start_training(command: list[Any], folder: Path, variables: dict[str, str], run: RunDir) -> Start:
    """Start a command that trains in a run directory, wait for its first step, and stop it."""
    log = folder / f"{run.path.name}.txt"
    with log.open("wb") as output:
        started = time.time()
        process = begin(command, folder, variables, output)
    try:
        while True:
            events, _ = read_events(run)
            if any(event["event"] == "log" for event in events):
                break
            if process.poll() is not None or time.time() - started > _LONGEST_SECONDS:
                words = log.read_text(errors="replace")[-3000:]
                raise SystemExit(f"no first step of: {' '.join(map(str, command))}\n{words}")
            time.sleep(_POLL_SECONDS)
        cpu = cpu_seconds(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    at: dict[str, float] = {}
    for event in events:
        at.setdefault(event["event"], event["time"] - started)
    return Start(at, cpu)


def begin(command: list[Any], folder: Path, variables: dict[str, str], output: Any) -> subprocess.Popen[bytes]:
    """Start a command; what it prints goes to `output`, errors of a command without one to the terminal."""
    errors = subprocess.STDOUT if output is not subprocess.DEVNULL else None
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=environment() | variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
    )


def cpu_seconds(root: int) -> float:
    """User and system time of a process, of its descendants and of those of them that have ended."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            values = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended, and its parent has its time
            continue
        pid = int(path.parent.name)
        parents[pid] = int(values[1])
        ticks[pid] = sum(int(value) for value in values[11:15])
    family, size = {root}, 0
    while len(family) > size:
        size = len(family)
        family |= {pid for pid, parent in parents.items() if parent in family}
    return sum(ticks.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")


def said(met: bool) -> str:
    """Whether a goal is met, for a cell."""
    return "yes" if met else "**no**"


if __name__ == "__main__":
    main()
