"""The same steps on real tensors: what every rank of a gloo world keeps, seen by the same ledger, and by the kernel.

    torchrun --nproc-per-node N ranks.py CASES.json OUT.json

Each case is a recipe; its model gets random weights. single and ddp go through the Trainer and accelerate; fsdp and ZeRO, which
accelerate replaces by DDP without a word where there is no accelerator, are set up by hand.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from launcher.memory import Memory
from launcher.plan import Plan
from oracle import build, longest_batch, loss_at_labels, planned, shard, trainer_of, watch
from oracle.ledger import Ledger

_DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def main() -> None:
    """Measure all cases of a file; rank 0 writes the largest of all ranks for each."""
    warnings.simplefilter("ignore")
    cases = json.loads(Path(sys.argv[1]).read_text())
    world = int(os.environ["WORLD_SIZE"])
    plans = [planned(recipe, world, "cpu") for recipe in cases]
    if world > 1:
        dist.init_process_group("gloo")
    if any(plan.strategy in ("single", "fsdp") for plan in plans):
        for name in _DISTRIBUTED:  # accelerate shall see one process and leave the model alone: the worker does so too
            os.environ.pop(name, None)
    results = []
    for plan in plans:
        memory, grown = _measure(plan)
        found: list[Any] = [None] * world
        if world > 1:
            dist.all_gather_object(found, (memory, grown))
        else:
            found = [(memory, grown)]
        fullest = max(found, key=lambda pair: pair[0].total_bytes)
        results.append({"memory": fullest[0].model_dump(), "grown_bytes": max(pair[1] for pair in found)})
    if world == 1 or dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    if world > 1:
        dist.destroy_process_group()


def _measure(plan: Plan) -> tuple[Memory, int]:
    """Parts by the ledger, and by how much the process grew, of which its own libraries' buffers are a part."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    torch.manual_seed(0)
    model = build(plan)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    if plan.strategy.startswith("zero"):
        memory = _watch_deepspeed(plan, model)
    else:
        trainer = trainer_of(plan, model)
        if plan.strategy == "fsdp":
            shard(model, dist.init_device_mesh("cpu", (plan.num_processes,)), plan)
        memory = watch(plan, model, trainer)
        trainer.accelerator.free_memory()
    return memory, _status("VmHWM") - before


def _status(name: str) -> int:
    """A line of this process's status, in bytes."""
    return int(re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[0]) * 1024


def _watch_deepspeed(plan: Plan, model: Any) -> Memory:
    """Two steps of a DeepSpeed engine. Which storage is what is its own secret: the total counts, under `weights`."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled first, for a minute
    stage = int(plan.strategy.removeprefix("zero"))
    bucket = deepspeed_bucket(plan)
    config = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": plan.recipe.train.max_grad_norm,
        "bf16": {"enabled": plan.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": 0,
        },
    }  # fmt: skip
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_at_labels(plan, model, plan.kind)
    ledger = Ledger()
    ledger.claim("weights", (*model.parameters(), *model.buffers()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    with ledger, ledger.counting("weights"):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for _ in range(2):
            loss = engine(**longest_batch(plan)).loss
            engine.backward(loss)
            del loss
            engine.step()
    engine.destroy()
    return ledger.memory()


def deepspeed_bucket(plan: Plan) -> int:
    """Elements of a bucket, as transformers chooses it where the config says `auto`."""
    return plan.shape.hidden_size**2


if __name__ == "__main__":
    main()
