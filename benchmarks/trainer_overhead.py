"""What does a step of our Trainer cost over a step of the plain transformers.Trainer?      goal: at most 2 %

    python benchmarks/trainer_overhead.py [--rounds 12] [--steps 40] [--out benchmarks/results/trainer_overhead_<hardware>_<date>.md]

Both train the same model from the same weights on the same batches in the same order, in turns inside the same processes (A B A, B A A, …):

    A  transformers.Trainer with the arguments of the plan; it logs nothing, writes nothing and counts nothing
    B  PlannedTrainer as in a run: order of rows, token counts, checks, heartbeat, TensorBoard and events.jsonl every 10 steps

With one process and with two ranks over gloo, one thread each, on a model whose step takes some ten milliseconds (the goal is
about this one) and on a tiny one, where the absolute cost of a step shows more clearly. The clock runs from the start of step
WARM_UP to the start of the last step, so neither building nor saving is part of it. A step's time is the lower quartile over all
rounds of that very step: logging steps stay logging steps, and others on this machine can only make a step slower. A second plain
Trainer in every round shows what noise is left. Where that is more than the goal, the ratio says nothing; so the time that passes
inside B's own parts (all callbacks, counting, logging with its collectives, some of which A has too) is taken as well: an upper bound
of what B adds, and what the goal is judged by. CPU time is that of all threads of all ranks. After every round the trained weights have
to be the same to the last bit. Takes six minutes.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from page import Page, environment, seconds
from ranks import with_script

from launcher.cluster import resolve_cluster
from launcher.command import node_commands, prepare_command
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan
from launcher.recipe import load_recipe
from launcher.rundir import RunDir
from launcher.supervise import write_run

# wall and cpu -> seconds of every step.
Turn = dict[str, list[float]]
GOAL = 0.02
WARM_UP = 5
RESULT = "overhead.json"
SHAPES = {
    "realistic": "{model_type: llama, hidden_size: 256, intermediate_size: 512, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 4, vocab_size: 1024, max_position_embeddings: 128, tie_word_embeddings: false}",
    "tiny": "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, "
    "num_key_value_heads: 2, vocab_size: 512, max_position_embeddings: 128, tie_word_embeddings: false}",
}
# How many times more steps a turn on this model has.
LONGER = {"realistic": 1, "tiny": 4}
_RECIPE = """\
model: {{config: {shape}}}
data: {{path: rows.json, format: context_target, max_length: {length}}}
adapter: {{type: lora, targets: all-linear}}
train: {{max_steps: {steps}, micro_batch: {rows}, global_batch: {global_rows}, lr: 1e-3}}
checkpoint: {{every_steps: 1000000, keep: 1}}
hardware: {ranks}xcpu
"""


def main() -> None:
    """Measure all four cases, and write the page."""
    parser = argparse.ArgumentParser(description="Measure what a step of our Trainer costs over a plain one.")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each (default 12)")
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed in a turn (default 40)")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    parser.add_argument("plan", nargs="?", type=Path, help=argparse.SUPPRESS)  # how the script starts its own ranks
    options = parser.parse_args()
    if options.plan is not None:
        be_a_rank(options.plan)
        return
    page = Page(
        "Overhead of a training step", "What does a step of PlannedTrainer cost over one of transformers.Trainer?"
    )
    with tempfile.TemporaryDirectory(prefix="launch-overhead-") as name:
        folder = Path(name)
        cases = [(shape, ranks, run_case(folder, shape, ranks, options)) for shape in SHAPES for ranks in (1, 2)]
    page.section(
        "Result",
        "Overhead: PlannedTrainer ÷ Trainer − 1, on sums of each step's lower quartile over the rounds. "
        "Noise: the same of the Trainer against itself, wall / CPU. "
        f"The goal is about the realistic model; the tiny one shows the absolute cost. {options.rounds} rounds.",
    )
    columns = ["model, ranks", "Trainer, steps/s", "PlannedTrainer, steps/s"]
    columns += ["overhead, wall / CPU", "noise, wall / CPU", "µs a step inside our parts", "share", "goal", "met"]
    page.table(columns, [summary(*case) for case in cases])
    page.section("Every turn", "Milliseconds a step, mean of a turn; CPU time is the sum over all ranks.")
    columns = ["model, ranks, what", "Trainer", "PlannedTrainer", "Trainer again"]
    page.table(columns, [row for case in cases for row in raw(*case)])
    page.finish(options.out)


def run_case(
    folder: Path, shape: str, ranks: int, options: argparse.Namespace, emulated_s: float = 0.0
) -> dict[str, Any]:
    """Prepare a run like any other, start its ranks with this script in place of the worker, and read what they measured."""
    steps = options.steps * (1 if emulated_s else LONGER[shape])
    plan, run = planned(folder, shape, ranks, WARM_UP + steps + 1)
    (run.path / "options.json").write_text(
        json.dumps({"rounds": options.rounds, "last": WARM_UP + steps, "emulated_s": emulated_s})
    )
    cache = environment() | {"LAUNCH_CACHE": str(folder / "cache")}
    (command,) = node_commands(plan, run)
    prepare = prepare_command(plan, run)
    ranks_argv = with_script(command, __file__)
    # Threads of one rank wait for each other by spinning, which on a machine in use drowns everything else.
    ranks_env = command.env | {"OMP_NUM_THREADS": "1"}
    for argv, variables in ((prepare.argv, prepare.env), (ranks_argv, ranks_env)):
        log = run.path / "output.txt"
        with log.open("wb") as output:
            ended = subprocess.run(
                argv, env=cache | variables, check=False, stdout=output, stderr=subprocess.STDOUT, timeout=600
            )
        if ended.returncode:
            raise SystemExit(
                f"{log.read_text(errors='replace')[-3000:]}\n{shape} × {ranks} ended with {ended.returncode}"
            )
    measured: dict[str, Any] = json.loads((run.path / RESULT).read_text())
    print(" ".join(f"{cell:>12}" for cell in summary(shape, ranks, measured)), file=sys.stderr)
    return measured


def planned(folder: Path, shape: str, ranks: int, steps: int) -> tuple[Plan, RunDir]:
    """A plan and its run directory; every row is longer than max_length, and no row is seen twice."""
    rows, length = (4, 96) if shape == "realistic" else (2, 32)
    words = random.Random(0)
    vocabulary = ["".join(words.choices("abcdefghijklmnop", k=5)) for _ in range(300)]
    # As many as all ranks need: the same file for up to two ranks is prepared once.
    texts = [" ".join(words.choices(vocabulary, k=length)) for _ in range(steps * rows * max(2, ranks))]
    (folder / "rows.json").write_text(json.dumps([{"context": "Go on:", "target": text} for text in texts]))
    recipe = folder / f"{shape}-{ranks}.yaml"
    values = {"shape": SHAPES[shape], "length": length, "steps": steps, "rows": rows, "ranks": ranks}
    recipe.write_text(_RECIPE.format(global_rows=rows * ranks, **values))
    loaded = load_recipe(recipe, ())
    cluster = resolve_cluster(loaded.recipe.hardware, None)
    plan = make_plan(loaded.name, loaded.recipe, cluster, shape_of(loaded.recipe.model, loaded.document.folder))
    run = RunDir(folder / recipe.stem)
    run.create()
    write_run(plan, run, resuming=False)
    return plan, run


def be_a_rank(plan_path: Path) -> None:
    """Both trainers in turns; rank 0 writes what all ranks measured."""
    import torch
    import torch.distributed as dist
    from datasets import Dataset, load_from_disk
    from transformers import Trainer

    from launcher.worker.adapters import with_adapter
    from launcher.worker.data.batches import RankBatches, StepOrder, collator
    from launcher.worker.model import load_model
    from launcher.worker.prepared import read_prepared
    from launcher.worker.pulse import Pulse
    from launcher.worker.training import PlannedTrainer, training_arguments

    run = RunDir(plan_path.parent)
    # The plain Trainer computes logits of every token, and so do both here: this is about all else.
    plan = Plan.model_validate_json(plan_path.read_text(encoding="utf-8")).model_copy(update={"logits": "whole"})
    options, prepared = json.loads((run.path / "options.json").read_text()), read_prepared(run)
    if plan.num_processes > 1:
        dist.init_process_group("gloo")
    else:  # as the worker does: accelerate would wrap a single rank of torchrun into DDP
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    rows = load_from_disk(f"{prepared.data_dir}/train")
    base = load_model(plan, prepared.model_dir, torch.device("cpu"), code=prepared.code)
    torch.manual_seed(plan.recipe.train.seed)
    base = with_adapter(base, plan, plan.recipe.train.max_steps or 0)
    steps = StepOrder(rows["length"][:], plan.global_batch, plan.recipe.train.seed, plan.batching)
    dealt = RankBatches(steps, plan.micro_batch, plan.accumulation, 0, plan.num_processes)
    order = [row for step in steps.steps() for (batch,) in dealt.divided(step) for row in batch if row < len(rows)]
    in_order = Dataset.from_dict(rows.select(order).to_dict())

    def plain(_: RunDir) -> Trainer:
        """The plain Trainer, with the rows already in the order that ours chooses."""
        arguments = training_arguments(plan, run, len(rows))
        arguments.train_sampling_strategy = "sequential"
        collate = collator(plan.batching, prepared.pad_token_id)
        return Trainer(model=copy.deepcopy(base), args=arguments, train_dataset=in_order, data_collator=collate)

    def ours(where: RunDir) -> Trainer:
        """The Trainer of a run, in a run directory of its own."""
        parts = {"model": copy.deepcopy(base), "train": rows, "eval": []}
        trainer = PlannedTrainer(plan, where, prepared, parts, Pulse(where))
        for holder, name in (
            (trainer.callback_handler, "call_event"),
            (trainer.metrics.counters, "add"),
            (trainer, "_maybe_log_save_evaluate"),
        ):
            setattr(holder, name, OWN.timed(getattr(holder, name)))
        return trainer

    turns: dict[str, list[Turn]] = {"plain": [], "ours": [], "again": []}
    sides: list[tuple[str, Callable[[RunDir], Any]]] = [("plain", plain), ("ours", ours), ("again", plain)]
    for number in range(options["rounds"] + 1):
        weights = set()
        first = number % len(sides)
        for name, make in sides[first:] + sides[:first]:
            turn, digest = take_turn(make, fresh(run, number), options["last"], options["emulated_s"])
            weights.add(digest)
            if number > 0:  # the first round warms everything up
                turns[name].append(turn)
        if len(weights) > 1:
            raise SystemExit(f"round {number}: the trainers ended with different weights")
    if dist.is_initialized():
        dist.destroy_process_group()
    if int(os.environ.get("RANK", "0")) == 0:
        (run.path / RESULT).write_text(json.dumps(turns))


def fresh(run: RunDir, number: int) -> RunDir:
    """An empty run directory with the plan of another one."""
    where = RunDir(run.path / f"turn-{number}")
    where.create()
    for source in (run.plan, run.recipe):
        shutil.copyfile(source, where.path / source.name)
    return where


class OwnTime:
    """Seconds inside some functions, a call within a call counted once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.depth = 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time added up."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds += time.perf_counter() - started

        return wrapper


OWN = OwnTime()


def take_turn(make: Callable[[RunDir], Any], where: RunDir, last: int, emulated_s: float = 0.0) -> tuple[Turn, str]:
    """Train once; seconds of every step on the wall and on the CPUs of all ranks, and a digest of the trained weights.

    Args:
        emulated_s: seconds that a step sleeps before it computes, as if a card did.
    """
    import torch
    import torch.distributed as dist
    from transformers import TrainerCallback

    readings: list[tuple[float, float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if WARM_UP <= state.global_step <= last:
                # Inside the very event that is being timed: what has passed of it is missing here and in the next reading alike.
                readings.append((time.perf_counter(), time.process_time(), OWN.seconds))

    trainer = make(where)
    trainer.add_callback(Clock())
    if emulated_s:
        compute = trainer.training_step

        def training_step(*given: Any, **named: Any) -> Any:
            time.sleep(emulated_s)
            return compute(*given, **named)

        trainer.training_step = training_step
    trainer.train()
    steps = torch.tensor(readings, dtype=torch.float64).diff(dim=0)
    wall, cpu = steps[:, 0].tolist(), steps[:, 1].contiguous()
    if dist.is_initialized():
        dist.all_reduce(cpu)
    digest = hashlib.sha256()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().numpy().tobytes())
    return {"wall": wall, "cpu": cpu.tolist(), "own": steps[:, 2].tolist()}, digest.hexdigest()


def step_seconds(turns: list[Turn], what: str) -> float:
    """Mean over the steps of a turn of each step's lower quartile over the rounds."""
    each = zip(*(turn[what] for turn in turns), strict=True)
    return statistics.mean(statistics.quantiles(times, n=4)[0] for times in each)


def summary(shape: str, ranks: int, turns: dict[str, list[Turn]]) -> list[str]:
    """The row of a case: speeds, ratios with their noise, and the time inside our parts."""
    times = {side: {what: step_seconds(turns[side], what) for what in ("wall", "cpu")} for side in turns}
    shares = {side: {what: times[side][what] / times["plain"][what] - 1 for what in ("wall", "cpu")} for side in turns}
    own = step_seconds(turns["ours"], "own")
    share = own / times["plain"]["wall"]
    cells = [f"{1 / times[side]['wall']:.2f}" for side in ("plain", "ours")]
    cells += [f"{shares[side]['wall']:+.2%} / {shares[side]['cpu']:+.2%}" for side in ("ours", "again")]
    cells += [f"{own * 1e6:.0f}", f"{share:.2%}"]
    met = "yes" if share <= GOAL else "**no**"
    return [f"{shape}, {ranks}", *cells, *([f"≤ {GOAL:.0%}", met] if shape == "realistic" else ["", ""])]


def raw(shape: str, ranks: int, turns: dict[str, list[Turn]]) -> list[list[str]]:
    """The rows of a case with the mean of every turn."""
    return [
        [
            f"{shape}, {ranks}, {what}",
            *(seconds((statistics.mean(turn[key]) * 1e3 for turn in turns[side]), 2) for side in turns),
        ]
        for what, key in (("wall", "wall"), ("CPU", "cpu"))
    ]


if __name__ == "__main__":
    main()
