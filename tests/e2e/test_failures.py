"""Whatever ends a rank, the person reads first which one, where, when and why. Real torchrun, real deaths."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import pytest
from datasets import load_from_disk

from launcher import manifest
from launcher.rundir import RunDir, read_json
from tests.e2e.conftest import Launcher, Sabotage, report_of

HOST = socket.gethostname()
BROKEN_MODEL = """\
def load_model(*args, **kwargs):
    import no_such_library
module.load_model = load_model
"""
# A tensor that is trained by name and never used, as an adapter on a layer that the forward pass leaves out.
UNUSED_TENSOR = """\
import torch
original = module.with_adapter
def with_adapter(*args, **kwargs):
    model = original(*args, **kwargs)
    model.base_model.register_parameter("never_used", torch.nn.Parameter(torch.ones(3)))
    return model
module.with_adapter = with_adapter
"""


def lines_of(text: str, num: int) -> list[tuple[str, str]]:
    """(label, text) of the first lines."""
    return [(line[:12].strip(), line[13:].strip()) for line in text.splitlines()[:num]]


def test_an_exception_in_one_rank_is_shown_before_everything_else(
    launch: Launcher, sabotage: Sabotage, recipe: Path, tmp_path: Path
) -> None:
    broken = sabotage.step(3, "raise ValueError('the seventh seal is broken')")
    done = launch(recipe, "--run-dir", "run", **broken)

    assert done.returncode == 1
    first, cause, where, log = lines_of(done.stderr, 4)
    assert first == ("failed", f"rank 1 ({HOST}, cpu) at step 3")
    assert cause == ("cause", "ValueError: the seventh seal is broken")
    assert where[0] == "where"
    assert re.search(r"sitecustomize.py:\d+ in training_step$", where[1])
    assert log == ("log", f"run/logs/{HOST}-rank1.log")
    assert "ValueError: the seventh seal is broken" in (tmp_path / log[1]).read_text()
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert done.stderr.splitlines()[-3:] == [
        "  others     rank 0 ended after it, because of it",
        "  safe       step-2 is complete",
        "  go on      launch resume run",
    ]
    for noise in ("error_file", "<N/A>", "ChildFailedError", "Connection closed"):
        assert noise not in done.stdout + done.stderr
    assert "Traceback" not in done.stdout

    report = report_of(tmp_path / "run")
    assert (report["result"], report["exit_code"]) == ("failed", 1)
    failure = report["failure"]
    assert (failure["rank"], failure["host"], failure["step"], failure["echoes"]) == (1, HOST, 3, [0])
    assert failure["cause"] == "ValueError: the seventh seal is broken"
    assert failure["traceback"].rstrip().endswith(failure["cause"])


@pytest.mark.parametrize(
    ("rank", "action", "exit_code", "cause"),
    [
        pytest.param(1, "os.kill(os.getpid(), 9)", 128 + signal.SIGKILL, "killed", id="killed"),
        pytest.param(1, "os._exit(7)", 7, "ended with exit code 7 and gave no reason", id="os._exit"),
        pytest.param(0, "ctypes.string_at(0)", 128 + signal.SIGSEGV, "crashed (SIGSEGV)", id="segfault"),
    ],
)
def test_a_rank_that_dies_without_a_word_is_named_and_not_the_one_that_noticed(
    rank: int,
    action: str,
    exit_code: int,
    cause: str,
    launch: Launcher,
    sabotage: Sabotage,
    recipe: Path,
    tmp_path: Path,
) -> None:
    broken = sabotage.step(3, f"import ctypes, os; {action}", rank)
    done = launch(recipe, "--run-dir", "run", **broken)

    assert done.returncode == exit_code
    failed, reason, *more = lines_of(done.stderr, 5)
    # The other rank writes down the step when it notices; torchrun may end it before, then the last heartbeat has to do.
    assert re.fullmatch(rf"rank {rank} \({re.escape(HOST)}, cpu\) at step [23]", failed[1])
    assert reason[0] == "cause"
    assert reason[1].startswith(cause)
    assert ("log", f"run/logs/{HOST}-rank{rank}.log") in more
    assert "Traceback" not in done.stdout
    assert "Connection closed" not in done.stderr
    if exit_code == 128 + signal.SIGKILL:  # as far as this machine counts what the kernel kills
        assert "by the kernel's OOM killer" not in done.stderr
        assert re.search(
            r"just before, this rank had \d\.\d\d GiB of host memory, and \d+\.\d\d GiB were left", done.stderr
        )
    if exit_code == 128 + signal.SIGSEGV:  # faulthandler says where
        assert "in training_step" in done.stderr
    failure = report_of(tmp_path / "run")["failure"]
    assert (failure["rank"], failure["exit_code"], failure["echoes"]) == (rank, exit_code, [1 - rank])


NO_MEMORY = """\
import torch
original = module.Trainer.compute_loss
def compute_loss(self, *args, **kwargs):
    if self.state.global_step == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.54 GiB")
    return original(self, *args, **kwargs)
module.Trainer.compute_loss = compute_loss
"""


def test_memory_of_a_card_that_runs_out_is_held_against_the_plan(
    launch: Launcher, sabotage: Sabotage, recipe: Path, tmp_path: Path
) -> None:
    done = launch(recipe, "--run-dir", "run", **sabotage.module("launcher.worker.training", NO_MEMORY))

    assert done.returncode == 1
    _, cause, planned, batch, rows, remedy = lines_of(done.stderr, 6)
    assert cause == ("cause", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.54 GiB")
    assert re.fullmatch(r"planned \d\.\d\d GiB of \d+\.\d\d GiB on cpu", planned[1])
    prepared = load_from_disk(f"{read_json(tmp_path / 'run' / 'prepared.json')['data_dir']}/train")
    lengths = dict(zip(prepared["where"], prepared["length"], strict=True))
    first, second = rows[1].removeprefix("its rows, the longest first: ").split(", ")
    assert lengths[first] >= lengths[second]
    assert batch[1].startswith(f"this batch had 2 × {lengths[first]} = ")
    assert remedy == ("remedy", "launch resume run train.gradient_checkpointing=true")
    failure = report_of(tmp_path / "run")["failure"]
    assert failure["memory"]["rss"] > 2**20
    assert failure["last_lines"][-1].startswith("torch.OutOfMemoryError")


def test_a_rank_that_fails_before_training(launch: Launcher, sabotage: Sabotage, recipe: Path, tmp_path: Path) -> None:
    done = launch(recipe, "--run-dir", "run", **sabotage.module("launcher.worker.model", BROKEN_MODEL))

    assert done.returncode == 1
    failed, cause = lines_of(done.stderr, 2)
    assert failed == ("failed", f"rank 1 ({HOST}, cpu) while it was at: load")
    assert cause == ("cause", "ModuleNotFoundError: No module named 'no_such_library'")
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "go on" not in done.stderr, "there is no checkpoint to go on from"
    assert report_of(tmp_path / "run")["failure"]["phase"] == "load"


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(launch: Launcher, recipe: Path, tmp_path: Path) -> None:
    too_fast = ["train.lr=1e30", "train.warmup=0", "train.schedule=constant"]
    done = launch(recipe, "--run-dir", "run", "hardware=1xcpu", "launch.backend=python", *too_fast)

    assert done.returncode == 1
    failed, cause, remedy = lines_of(done.stderr, 3)
    assert failed == ("failed", f"rank 0 ({HOST}, cpu) at step 2")
    assert cause[1].startswith("train.lr: 1e+30: the loss is nan at step 2, with a learning rate of 1e+30")
    assert remedy == ("remedy", "learn more slowly: launch resume run train.lr=1e+29")
    assert "others" not in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert manifest.folders(RunDir(tmp_path / "run")) == []


def test_a_trained_tensor_without_gradient_ends_the_run_at_its_first_step(
    launch: Launcher, sabotage: Sabotage, recipe: Path, tmp_path: Path
) -> None:
    broken = sabotage.module("launcher.worker.adapters", UNUSED_TENSOR, ranks=(0, 1))
    done = launch(recipe, "--run-dir", "run", **broken)

    assert done.returncode == 1
    failed, cause, remedy = lines_of(done.stderr, 3)
    assert re.search(r"rank [01] .* at step 1$", failed[1])
    assert re.search(r"adapter: 1 of 15 trainable tensors got no gradient: \S*never_used$", cause[1])
    assert remedy[1].startswith("train other modules (adapter.targets)")
    assert "Traceback" not in done.stderr + done.stdout
    assert report_of(tmp_path / "run")["steps"] == 0


def test_when_torchrun_is_killed_it_is_named_and_no_rank_is_left(
    launch: Launcher, recipe: Path, tmp_path: Path
) -> None:
    started = launch.start(recipe, "--run-dir", "run", "train.max_steps=100000")
    started.wait_for_event(tmp_path / "run", "save")
    node = read_json(RunDir(tmp_path / "run").node_heartbeat(0))
    os.kill(node["pid"], signal.SIGKILL)

    assert started.process.wait(20) == 128 + signal.SIGKILL
    failed, cause = lines_of(started.stderr, 2)
    assert re.fullmatch(r"all ranks \(.*\) at step \d+", failed[1])
    assert cause[1].startswith("torchrun killed (SIGKILL)")
    assert "Traceback" not in started.stdout + started.stderr
    assert not started.descendants()
