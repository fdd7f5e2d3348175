"""What torchrun or DeepSpeed's launcher starts on every rank: one path, RUN/plan.json, in; a trained model in RUN/checkpoints out.

Exit codes: 0, the code of a LaunchError, else 1; what happened is in RUN/errors/<rank>.json before this process ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from launcher.errors import PreflightError
from launcher.plan import Plan
from launcher.rundir import STREAM_FILE, WAIT, RunDir, append_event, read_json
from launcher.worker import nvme, signals
from launcher.worker.prepared import Prepared, read_prepared
from launcher.worker.pulse import Pulse, die_with_parent, log_to, own_node, wait_for_go


def main(plan_path: str, parent: int | None = None) -> int:
    """Run this rank; its exit code.

    Args:
        parent: pid of who started it; None for the node's launcher, whose pid is written down, and for the supervisor.
    """
    run = RunDir(Path(plan_path).resolve().parent)
    node = (read_json(run.node_heartbeat(own_node())) or {}).get("pid")
    if parent is None and "RANK" in os.environ:
        parent = node  # importing this file took half a second, in which it may have ended
    die_with_parent(parent)
    signals.listen({os.getppid(), node})
    pulse = Pulse(run)
    log_to(run.rank_log(socket.gethostname(), pulse.rank))
    faulthandler.enable()
    pulse.keep()
    pulse.beat("import")
    plan = Plan.model_validate_json(run.plan.read_text(encoding="utf-8"))
    device_name = _device_name(plan, pulse.rank)
    try:
        with nvme.own_folder(plan, pulse.rank, pulse.local_rank):
            train(plan, run, pulse)
    except Exception as error:  # noqa: BLE001 - everything ends here: it is written down, reported first and turned into an exit code
        traceback.print_exc()
        return pulse.failed(error, device_name)
    finally:
        _leave_process_group()
    pulse.beat("done")
    return 0


def train(plan: Plan, run: RunDir, pulse: Pulse) -> None:
    """Build the model, train it and commit the last checkpoint."""
    from launcher.worker.quiet import leave_out_what_is_unused, quiet_libraries

    quiet_libraries()
    leave_out_what_is_unused(plan)
    import torch

    from launcher.worker.data.leak import refuse_leaks
    from launcher.worker.devices import memory_now, own_device
    from launcher.worker.sharding import build_model, compile_layers
    from launcher.worker.training import PlannedTrainer

    pulse.beat("connect")
    device = own_device(plan, pulse.local_rank)
    if plan.kind == "cuda":
        torch.accelerator.set_device_index(device)
    pulse.device_memory = lambda: memory_now(device)
    _connect(plan, torch)
    pulse.beat("load")
    prepared = read_prepared(run, own_node())
    rows = _rows(prepared.data_dir)
    if plan.recipe.data.streaming:
        rows["train"] = _stream(plan, run, prepared)
    if plan.pipeline is not None:
        from launcher.worker.pipeline.loop import pipelined_trainer

        trainer: PlannedTrainer = pipelined_trainer(plan, run, prepared, device, rows, pulse)
    else:
        model = build_model(plan, run, prepared, device, len(rows["train"]))
        first_again = plan.stages[0].recompute if plan.stages else plan.gradient_checkpointing
        if first_again and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        if plan.attention != "sdpa":
            refuse_leaks(plan, Path(prepared.model_dir), prepared.code, device)  # prepare has no card to try it on
            model.set_attn_implementation(plan.attention)
        if plan.recipe.train.compile:
            compile_layers(model)
        trainer = PlannedTrainer(plan, run, prepared, {"model": model, **rows}, pulse)
    if pulse.rank == 0:
        append_event(run, {"event": "ready", "time": time.time(), "ranks": plan.num_processes})
    trainer.train(resume_from_checkpoint=str(run.path / plan.resume_from) if plan.resume_from else None)
    if trainer.requests.stopped_by is not None and pulse.rank == 0:
        stopped = {"why": trainer.requests.stopped_by, "step": trainer.state.global_step}
        append_event(run, {"event": "stopped", "time": time.time(), **stopped})


def _connect(plan: Plan, torch: Any) -> None:
    """Join the process group that the launcher's variables describe.

    Raises:
        PreflightError: this rank was started as one of another number than planned.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != plan.num_processes:
        raise PreflightError(
            f"{plan.num_processes} ranks",
            f"this one was started as one of {world_size}",
            "start the run with: launch RECIPE",
        )
    if world_size == 1 and plan.deepspeed is None and plan.pipeline is None:
        # accelerate wraps even a single rank of a launcher into DDP, which keeps all gradients a second time.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    if world_size > 1 or plan.pipeline is not None:
        # What stands still is found by the supervisor, which says who is waited for; whom torch would name only waits.
        limit = timedelta(days=1)
        torch.distributed.init_process_group("nccl" if plan.kind == "cuda" else "gloo", timeout=limit)
    if plan.deepspeed is not None:
        from launcher.worker.zero import connect

        connect()


def _device_name(plan: Plan, rank: int) -> str:
    """What a rank computes on, in words."""
    devices = plan.cluster.devices
    if plan.stages and plan.num_processes == 1:
        return " + ".join(devices[stage.device].name for stage in plan.stages)
    return devices[plan.device_of(rank)].name


def _rows(data_dir: str) -> dict[str, Any]:
    """The tokenised rows, mapped from disk: ranks share one copy in the page cache. Without evaluation rows `eval` is empty."""
    from datasets import load_from_disk

    folders = {name: Path(data_dir) / name for name in ("train", "eval")}
    return {name: load_from_disk(str(folder)) if folder.is_dir() else [] for name, folder in folders.items()}


def _stream(plan: Plan, run: RunDir, prepared: Prepared) -> Any:
    """The rows of a stream, from where the checkpoint says that is gone on with."""
    from launcher.worker.data.tokens import Prompter
    from launcher.worker.data.windows import Windows
    from launcher.worker.staged import load_tokenizer

    tokenizer = load_tokenizer(prepared.tokenizer_dir, prepared.code)
    prompter = Prompter(tokenizer, prepared.template, prepared.eos_token_ids)
    start = read_json(run.path / plan.resume_from / STREAM_FILE) if plan.resume_from else None
    return Windows(plan, prompter, start)


def _leave_process_group() -> None:
    """Without this, processes that end together often abort in gloo's threads."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[2:] == [WAIT]:  # started by the supervisor itself, without torchrun
        wait_for_go()
    code = main(sys.argv[1])
    with contextlib.suppress(OSError):  # the log's disk is full
        sys.stdout.flush()
        sys.stderr.flush()
    # All that matters is on disk. An orderly end of torch and transformers takes a second or two, and everybody would wait for it.
    os._exit(code)
