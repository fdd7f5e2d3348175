"""How much of its schedule's theory does a pipeline reach?      goal: 97 % of the gain over naive, and the planned step time within 5 %

    python benchmarks/pipeline.py [--steps 5] [--kept FILE [--boxes BOX ...]] [--out benchmarks/results/pipeline_<hardware>_<date>.md]

With `--kept` what is measured is written down box by box, and not measured again: the machine has to be quiet for minutes only.

Boxes of cards are planned as `launch plan` plans them. Then the real ranks of the product run here, over gloo, with every layer
replaced by one that computes nothing and waits, forward and backward, as long as the plan says that layer takes on its card: processes
that wait do not share a processor, as cards do not (where that is allowed they come before others on this machine). The rest of a
step is the product's own: rows, batches, embedding and head (of width 16), torch's schedule, sends and receives, the norm over
all stages, optimizer, logging at every step, TensorBoard.

    naive      the same waits in one process under transformers.Trainer, each micro batch through all layers alone
    pipelined  one process a stage; the gain is naive ÷ pipelined, in theory and as measured

Beside it real layers on two processes of one thread each against one process of one thread: noisy, because threads share caches
and memory, and whatever else runs here. A step's time is the median over the logged steps after the second.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from kept import Kept
from page import Page, environment
from ranks import with_script

from launcher.cluster import resolve_cluster
from launcher.command import node_commands, prepare_command
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan
from launcher.recipe import load_recipe
from launcher.recipe.device_maps import load_device_map
from launcher.rundir import RunDir, read_events
from launcher.supervise import write_run

GAIN, STEP_TIME = 0.97, 0.05  # the goals
WAITS = "waits.json"
REAL = "real layers"
ORDERS = ("1f1b", "gpipe")
_PR_SET_TIMERSLACK = 29

# Cards, model, tokens a row, micro batches.
BOXES = {
    "2 even": ("2xRTX 3090", "mistralai/Mistral-7B-v0.1", 512, 8),
    "2 uneven": ("[RTX 3060 Ti 8GiB reserved=921MiB, RTX 3060 12GiB]", "THUDM/chatglm2-6b", 256, 8),
    "4 even": ("4xRTX 3090", "mistralai/Mistral-7B-v0.1", 1024, 16),
    "4 even, short": ("4xRTX 3090", "mistralai/Mistral-7B-v0.1", 512, 16),
    "4 uneven": ("[RTX 4090, RTX 3090, RTX 3060 12GiB, RTX 3060 Ti]", "mistralai/Mistral-7B-v0.1", 1024, 16),
}
_PLANNED = """\
model: {{path: {model}}}
data: {{path: rows.json, max_length: {tokens}}}
strategy: {{type: device_map, schedule: pipelined}}
train: {{global_batch: {rows}, micro_batch: 1}}
hardware: {cards}
"""
_EMULATED = """\
model: {{config: {{model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: {layers}, num_attention_heads: 1,
         num_key_value_heads: 1, vocab_size: 300, max_position_embeddings: 64, tie_word_embeddings: false}}}}
data: {{path: rows.jsonl, format: text, max_length: 16}}
adapter: {{type: full}}
train: {{max_steps: {steps}, global_batch: {rows}, micro_batch: 1, log_every_steps: 1, gradient_checkpointing: false}}
checkpoint: {{every_steps: 1000000}}
hardware: 1xcpu
"""
_REAL = """\
model: {{config: {{model_type: llama, hidden_size: 512, intermediate_size: 1408, num_hidden_layers: 8, num_attention_heads: 8,
         num_key_value_heads: 8, vocab_size: 2048, max_position_embeddings: 256, tie_word_embeddings: false}}}}
data: {{path: rows.jsonl, format: text, max_length: 256}}
adapter: {{type: lora, targets: all-linear}}
train: {{max_steps: {steps}, global_batch: 16, micro_batch: 2, log_every_steps: 1, gradient_checkpointing: false}}
checkpoint: {{every_steps: 1000000}}
hardware: 1xcpu
"""


def main() -> int:
    """Measure every box, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--boxes", nargs="*", default=list(BOXES))
    parser.add_argument("--kept", type=Path, help="append what is measured to this file, and leave out what is there")
    parser.add_argument("--no-real", action="store_true", help="leave the real layers out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("rank", nargs="*", help=argparse.SUPPRESS)  # how the script starts its own ranks
    options = parser.parse_args()
    if options.rank:
        return be_a_rank(options.rank[0])
    page, kept = Page("A pipeline against its schedule's theory", __doc__.partition("\n")[0]), Kept(options.kept)
    with tempfile.TemporaryDirectory() as folder:
        wanted = [f"{name}, {order}" for name in options.boxes for order in ORDERS]
        for label in wanted:
            if label not in kept:
                name, _, order = label.rpartition(", ")
                kept.add(label, measure(name, order, Path(folder), options.steps, kept))
        emulated = [kept[label] for label in wanted]
        page.section(
            "Result",
            f"Waits instead of layers. Goals: gain at least {GAIN:.0%} of the theory's, step time within {STEP_TIME:.0%} of the plan's. "
            "`c` marks stages whose layers are computed again.",
        )
        columns = [
            "box",
            "order",
            "micro batches",
            "layers",
            "naive s",
            "pipelined s",
            "planned s",
            "measured ÷ planned",
        ]
        page.table([*columns, "gain", "in theory", "of theory", "met"], emulated)
        if not options.no_real:
            page.section("Real layers", "Eight layers of width 512, 16 rows of 256 tokens, LoRA; one thread a process.")
            if REAL not in kept:
                kept.add(REAL, real(Path(folder), options.steps))
            page.table(["what", "step s", "gain", "theory of even stages"], kept[REAL])
        page.finish(options.out)
    return 0


def measure(name: str, order: str, folder: Path, steps: int, kept: Kept) -> tuple[object, ...]:
    """A row of the page: a box and an order. The naive run of the same waits is measured once."""
    cards, model, tokens, rows = BOXES[name]
    work = folder / f"{name}-{order}".replace(", ", "-").replace(" ", "-")
    work.mkdir()
    write_rows(work / "rows.jsonl", 4 * rows, tokens=16)
    recipe = work / "box.yaml"
    recipe.write_text(_PLANNED.format(model=model, tokens=tokens, rows=rows, cards=cards))
    plan = planned(recipe, f"strategy.pipeline={order}")
    waits = layer_waits(plan)
    emulated = work / "emulated.yaml"
    emulated.write_text(_EMULATED.format(layers=plan.shape.num_layers, rows=rows, steps=steps))
    of_waits = f"naive, {rows} × {sum(map(sum, waits)):.4f} s"
    if of_waits not in kept:
        kept.add(of_waits, run(work / "naive", emulated, waits, []))
    file, placed = work / "map.yaml", ", ".join(ranges(plan))
    file.write_text(f"devices: [{len(plan.stages)}xcpu]\nschedule: pipelined\nplacement: [{placed}]\n")
    override = ["strategy.type=device_map", f"strategy.device_map={file}", f"strategy.pipeline={order}"]
    naive, pipelined = kept[of_waits], run(work / order, emulated, waits, override)
    wanted = plan.time.total_s - plan.time.optimizer_s  # these cards compute layers, and a small optimizer for real
    if pipelined < wanted:
        raise SystemExit(
            f"{name}, {order}: {pipelined:.3f} s a step that waits {wanted:.3f} s: its layers did not wait"
        )
    theory = rows * sum(stage.seconds for stage in plan.stages) / wanted
    gain = naive / pipelined
    met = gain / theory >= GAIN and abs(pipelined / wanted - 1) <= STEP_TIME
    layers = "+".join(f"{stage.stop - stage.first}{'c' * stage.recompute}" for stage in plan.stages)
    row = (
        name, order, rows, layers, f"{naive:.3f}", f"{pipelined:.3f}", f"{wanted:.3f}", f"{pipelined / wanted:.3f}",
        f"{gain:.3f}", f"{theory:.3f}", f"{gain / theory:.1%}", "yes" if met else "no",
    )  # fmt: skip
    print(*row, file=sys.stderr, flush=True)
    return row


def write_rows(path: Path, num: int, tokens: int) -> None:
    """Rows of random letters, which no tokenizer makes short: all are cut to the longest length there may be."""
    draw = random.Random(0)
    letters = "".join(map(chr, range(33, 127)))
    texts = ["".join(draw.choices(letters, k=3 * tokens)) for _ in range(num)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def planned(recipe: Path, *overrides: str) -> Plan:
    """The plan of a box."""
    loaded = load_recipe(recipe, overrides)
    shape = shape_of(loaded.recipe.model, recipe.parent)
    return make_plan(recipe.stem, loaded.recipe, resolve_cluster(loaded.recipe.hardware), shape)


def ranges(plan: Plan) -> list[str]:
    """The layers of each stage as a device map has them."""
    return [f"{stage.first}-{stage.stop - 1}" for stage in plan.stages]


def layer_waits(plan: Plan) -> list[tuple[float, float]]:
    """Seconds of every layer, forward and backward: its share of its stage, ends and handing over included."""
    waits = []
    for stage in plan.stages:
        num = stage.stop - stage.first
        waits += [(stage.forward_s / num, (stage.seconds - stage.forward_s) / num)] * num
    return waits


def run(folder: Path, recipe: Path, waits: list[tuple[float, float]], overrides: list[str]) -> float:
    """Prepare a run like any other and start its ranks, with this script in place of the worker; median seconds of a step.

    Args:
        waits: of every layer; none where layers are to compute.
    """
    loaded = load_recipe(recipe, overrides)
    named = loaded.recipe.strategy.device_map
    device_map = load_device_map(named).device_map if named is not None else None
    cluster = resolve_cluster(loaded.recipe.hardware if device_map is None else device_map.devices)
    shape = shape_of(loaded.recipe.model, recipe.parent)
    plan, where = make_plan("emulated", loaded.recipe, cluster, shape, device_map=device_map), RunDir(folder)
    where.create()
    write_run(plan, where, resuming=False)
    (folder / WAITS).write_text(json.dumps(waits))
    (command,), prepare = node_commands(plan, where), prepare_command(plan, where)
    start = with_script(command, __file__)
    variables = {**environment(), "LAUNCH_CACHE": str(folder.parent / "cache")}
    for argv, env in ((prepare.argv, prepare.env), (start, {**command.env, "OMP_NUM_THREADS": "1"})):
        ended = subprocess.run(argv, env=variables | env, check=False, capture_output=True, text=True)
        if ended.returncode:
            logs = "\n".join(path.read_text()[-3000:] for path in where.logs.glob("*rank*.log"))
            raise SystemExit(f"{ended.stdout}\n{ended.stderr}\n{logs}\n{folder} ended with {ended.returncode}")
    times = [event["time"] for event in read_events(where)[0] if event["event"] == "log"]
    return statistics.median(after - before for before, after in itertools.pairwise(times[1:]))


def be_a_rank(plan_path: str) -> int:
    """The worker of the product, with layers that wait where the run has waits."""
    waits = json.loads(Path(plan_path).with_name(WAITS).read_text())
    if waits:
        # The kernel may wake a process 50 µs late where nobody asks for more, and later where others compute: a card does not.
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        plan = Plan.model_validate_json(Path(plan_path).read_text(encoding="utf-8"))
        firsts = [stage.first for stage in plan.stages] or [0]
        from launcher.worker import sharding
        from launcher.worker.pipeline import cutting

        for module, name in ((sharding, "build_model"), (cutting, "unplaced_model")):
            setattr(module, name, waiting_instead(getattr(module, name), waits, firsts))
    from launcher.worker.__main__ import main as worker

    return worker(plan_path)


def waiting_instead(
    build: Callable[..., Any], waits: list[tuple[float, float]], firsts: Collection[int]
) -> Callable[..., Any]:
    """The same function, and all layers of the model that it builds wait.

    Args:
        firsts: layers with which a stage begins.
    """
    import torch

    class Card:
        """Works off what it is asked for one after the other, as a card its queue: a layer begins when the one before it ends."""

        until = 0.0

        def work(self, seconds: float, begins: bool) -> None:
            self.until = (time.perf_counter() if begins else self.until) + seconds
            time.sleep(max(0.0, self.until - time.perf_counter()))

    card = Card()

    class Wait(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, gain: Any, layer: Any) -> Any:
            ctx.layer = layer
            card.work(layer.times[0], layer.is_first)
            return hidden.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            card.work(ctx.layer.times[1], ctx.layer.is_last)
            return grad.clone(), grad.sum().reshape(1), None

    class Waiting(torch.nn.Module):
        def __init__(self, times: tuple[float, float], is_first: bool, is_last: bool) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.zeros(1))  # so that there is something to train
            self.times, self.is_first, self.is_last = times, is_first, is_last

        def forward(self, hidden: Any, *_: Any, **__: Any) -> Any:
            return Wait.apply(hidden, self.gain, self)

    def built(*args: Any, **kwargs: Any) -> Any:
        found = build(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        for index, times in enumerate(waits):
            model.model.layers[index] = Waiting(times, index in firsts, index + 1 in firsts or index + 1 == len(waits))
        return found

    return built


def real(folder: Path, steps: int) -> list[tuple[object, ...]]:
    """Layers that compute: one process of one thread, then two."""
    work = folder / "real"
    work.mkdir()
    write_rows(work / "rows.jsonl", 64, tokens=256)
    recipe = work / "real.yaml"
    recipe.write_text(_REAL.format(steps=steps + 3))
    alone = run(work / "naive", recipe, [], [])
    rows: list[tuple[object, ...]] = [("one process of one thread", f"{alone:.3f}", "", "")]
    for order in ORDERS:
        override = [
            "strategy.type=device_map",
            "strategy.schedule=pipelined",
            f"strategy.pipeline={order}",
            "hardware=2xcpu",
        ]
        both = run(work / order, recipe, [], override)
        rows.append((f"two processes of one thread, {order}", f"{both:.3f}", f"{alone / both:.2f}", f"{2 * 8 / 9:.2f}"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
