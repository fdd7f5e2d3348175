"""How much host memory does it take until N ranks have their model? Goal: at most 1.3 × one copy of the weights, for N = 4.

    python benchmarks/loading_memory.py [--ranks 4] [--out benchmarks/results/loading_memory_<hardware>_<date>.md]

A Llama of about 0.22 B random weights (0.8 GiB in fp32) is prepared once. For each way to train torchrun starts N ranks that connect as in
a run, and build the model by the worker's own `build_model`. All the while the memory of each is looked at: PSS of /proc/PID/smaps_rollup,
in which a page that k ranks share counts 1/k for each (RSS counts it k times). Reported is the highest sum over the ranks, less the
sum just before the model is built, which is the libraries. Takes about three minutes. ZeRO needs the extra deepspeed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from page import Page, environment

from launcher import supervise
from launcher.cluster import resolve_cluster
from launcher.command import worker_environment
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan
from launcher.recipe import load_recipe
from launcher.rundir import RunDir

GOAL = 1.3
_RECIPE = """\
model:
  config: {{model_type: llama, hidden_size: 1024, intermediate_size: 2816, num_hidden_layers: 16, num_attention_heads: 16,
           num_key_value_heads: 16, vocab_size: 8192, max_position_embeddings: 128, tie_word_embeddings: false}}
data: {{path: rows.json, format: alpaca, max_length: 64}}
train: {{max_steps: 1, global_batch: {ranks}, micro_batch: 1}}
hardware: {ranks}xcpu
"""
_WAYS = [
    ("fsdp", "full"),
    ("fsdp", "lora"),
    ("zero3", "full"),
    ("zero3", "lora"),
    ("zero2", "lora"),
    ("zero1", "full"),
    ("ddp", "lora"),
    ("ddp", "full"),
]


def main() -> None:
    """Measure, and write the page; or be one rank."""
    parser = argparse.ArgumentParser(description="Measure the memory that loading takes.")
    parser.add_argument("--ranks", type=int, default=4, help="ranks on this machine (default 4)")
    parser.add_argument("--only", help="one strategy")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    page = Page("Memory of loading", f"How much host memory does it take until {options.ranks} ranks have their model?")
    with tempfile.TemporaryDirectory(prefix="launch-loading-") as name:
        folder = Path(name)
        os.environ["LAUNCH_CACHE"] = str(folder / "cache")
        rows = [{"instruction": f"What is {n} plus one?", "output": f"It is {n + 1}."} for n in range(64)]
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        (folder / "loading.yaml").write_text(_RECIPE.format(ranks=options.ranks), encoding="utf-8")
        found = [measured(folder, *way) for way in _WAYS if options.only in (None, way[0]) and can_run(way[0])]
    page.section(
        "Peak, all ranks together",
        "One copy is the weights' bytes in the precision they are trained in. Where parameters are not sharded the ranks look at the same "
        "pages of the file, one copy as long as nobody writes to them: all of it under an adapter, until the first optimizer step "
        "under full training. fsdp and zero3 hold shares of their own from the start.",
    )
    page.table(["strategy", "trained", "one copy", "peak", "× one copy", f"≤ {GOAL}", "at the end", "seconds"], found)
    page.finish(options.out)


def can_run(strategy: str) -> bool:
    return not strategy.startswith("zero") or importlib.util.find_spec("deepspeed") is not None


def measured(folder: Path, strategy: str, adapter: str) -> tuple[str, ...]:
    """A row of the table."""
    run, plan = prepared(folder, strategy, adapter)
    variables = environment() | worker_environment(plan) | {"LAUNCH_MEASURED_RUN": str(run.plan)}
    ranks = ["--standalone", f"--nproc-per-node={plan.num_processes}", str(Path(__file__).resolve())]
    command = [sys.executable, "-m", "torch.distributed.run", *ranks]
    signs = [run.path / f"{place}.json" for place in range(plan.num_processes)]
    peak, before = 0, 0
    with subprocess.Popen(command, env=variables, cwd=folder) as process:
        while process.poll() is None:
            told = [json.loads(sign.read_text()) for sign in signs if sign.is_file()]
            if len(told) < len(signs):
                time.sleep(0.05)
                continue
            now = sum(pss_bytes(one["pid"]) for one in told)
            if not (run.path / "go").exists():
                before = now
                (run.path / "go").touch()
            peak = max(peak, now)
            if all((run.path / f"{place}.done").exists() for place in range(plan.num_processes)):
                break
            time.sleep(0.01)
        end = sum(pss_bytes(one["pid"]) for one in told)
        peak = max(peak, end)
        (run.path / "stop").touch()
        if process.wait():
            raise SystemExit(f"{strategy} {adapter}: the ranks ended with {process.returncode}")
    copy = plan.shape.num_parameters * {"fp32": 4, "bf16": 2, "fp16": 2}[plan.weights_dtype]
    took = max(float((run.path / f"{place}.done").read_text()) for place in range(plan.num_processes))
    ratio = (peak - before) / copy
    print(f"{strategy:<6} {adapter:<5} {ratio:.2f} × one copy", file=sys.stderr)
    sizes = [f"{value / 2**30:.2f} GiB" for value in (copy, peak - before)]
    met = "yes" if ratio <= GOAL else "no"
    return strategy, adapter, *sizes, f"{ratio:.2f}", met, f"{(end - before) / copy:.2f}", f"{took:.1f}"


def prepared(folder: Path, strategy: str, adapter: str) -> tuple[RunDir, Plan]:
    """A run directory that is ready for its ranks."""
    loaded = load_recipe(folder / "loading.yaml", [f"strategy.type={strategy}", f"adapter.type={adapter}"])
    shape = shape_of(loaded.recipe.model, folder)
    plan = make_plan("loading", loaded.recipe, resolve_cluster(loaded.recipe.hardware), shape)
    run = RunDir(folder / f"{strategy}-{adapter}")
    run.create()
    supervise.write_run(plan, run, False)
    supervise.Supervisor(plan, run, lambda event: None).prepare_only()
    return run, plan


def pss_bytes(pid: int) -> int:
    """Memory of a process, shared pages by their share; 0 for one that has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def rank(plan_path: str) -> None:
    """What one rank does: everything up to its model, with a stop before it and behind it."""
    import torch
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401 - libraries count before, not as the model

    from launcher.worker.__main__ import _connect
    from launcher.worker.dtensors import local
    from launcher.worker.prepared import read_prepared
    from launcher.worker.sharding import build_model

    run = RunDir(Path(plan_path).parent)
    plan = Plan.model_validate_json(run.plan.read_text())
    place = os.environ["RANK"]
    _connect(plan, torch)
    if plan.recipe.adapter.type != "full":
        import peft  # noqa: F401
    (run.path / f".{place}.json").write_text(json.dumps({"pid": os.getpid()}))
    (run.path / f".{place}.json").rename(run.path / f"{place}.json")
    wait_for(run.path / "go")
    started = time.monotonic()
    model: Any = build_model(plan, run, read_prepared(run), torch.device("cpu"), 64)
    took = time.monotonic() - started
    for parameter in model.parameters():  # what is mapped from the file is no memory before it is looked at
        local(getattr(parameter, "ds_tensor", parameter)).sum()
    torch.distributed.barrier()
    (run.path / f"{place}.done").write_text(str(took))
    wait_for(run.path / "stop")
    torch.distributed.destroy_process_group()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


if __name__ == "__main__":
    if "LAUNCH_MEASURED_RUN" in os.environ:
        rank(os.environ["LAUNCH_MEASURED_RUN"])
    else:
        main()
