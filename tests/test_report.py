"""Who failed first, from what ranks and torchrun leave in a run directory. The same with real ranks: tests/e2e/test_failures.py."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.cluster import resolve_cluster
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan
from launcher.recipe import find_recipe, load_recipe
from launcher.report import Failure, first_failure, last_lines
from launcher.rundir import RunDir, write_json

ECHO = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:43955"


@dataclass
class Scene:
    """A run directory after a failure: `rank` says how each one ended, `failure` is what is made of it."""

    run: RunDir
    plan: Plan

    def rank(
        self, rank: int, code: int | None = None, beat: float | None = 10.0, step: int = 3, **error: object
    ) -> None:
        """A rank that ended with `code`, was last seen at the time `beat`, and wrote `error` where it did."""
        identity = {"host": "host", "rank": rank, "phase": "train", "step": step}
        if beat is not None:
            write_json(self.run.heartbeat(rank), {**identity, "time": beat})
            self.run.rank_log("host", rank).touch()
        if error:
            told = {"device": "cpu", "type": "ValueError", "message": "", "traceback": "", "exit_code": 1, **error}
            write_json(self.run.error(rank), {**identity, **told})
        if code is not None:
            node = self.run.node_error(0)
            ranks = json.loads(node.read_text())["ranks"] if node.exists() else {}
            write_json(node, {"ranks": {**ranks, str(rank): {"exit_code": code, "time": 0, "pid": 1}}})

    def failure(self, node_code: int = 1) -> Failure:
        return first_failure(self.run, self.plan, node_code)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    loaded = load_recipe(find_recipe("quickstart"), ["hardware=2xcpu"])
    cluster = resolve_cluster(loaded.recipe.hardware)
    plan = make_plan("quickstart", loaded.recipe, cluster, shape_of(loaded.recipe.model, tmp_path))
    run = RunDir(tmp_path / "run")
    run.create()
    return Scene(run, plan)


def test_the_first_of_two_reasons_counts(scene: Scene) -> None:
    scene.rank(0, code=1, time=11.0, type="torch.cuda.OutOfMemoryError", message="later")
    scene.rank(1, code=1, time=10.5, type="torch.OutOfMemoryError", message="tried to allocate 2 GiB\nmore")
    found = scene.failure()
    assert (found.rank, found.cause) == (1, "torch.OutOfMemoryError: tried to allocate 2 GiB")
    assert found.echoes == (0,)


@pytest.mark.parametrize(
    "echo",
    [
        {"type": "RuntimeError", "message": ECHO},
        {"type": "torch.distributed.DistBackendError", "message": "NCCL communicator was aborted"},
        {"type": "torch.distributed.DistNetworkError", "message": "recvValue failed"},
    ],
    ids=lambda echo: echo["type"],
)
def test_what_a_rank_says_because_another_has_gone_is_no_reason(echo: dict[str, str], scene: Scene) -> None:
    scene.rank(0, code=1, time=10.1, **echo)
    scene.rank(1, code=1, time=10.5, message="the reason")  # hosts' clocks differ
    assert (scene.failure().rank, scene.failure().cause) == (1, "ValueError: the reason")


def test_where_all_ranks_only_noticed_a_lost_connection_that_is_said(scene: Scene) -> None:
    for rank in (0, 1):
        scene.rank(rank, code=1, time=10.0 + rank, type="RuntimeError", message=ECHO)
    found = scene.failure()
    assert (found.rank, found.cause) == (0, f"RuntimeError: {ECHO}")
    assert found.notes == ("the connection between ranks was lost, and no rank gave a reason",)
    assert "launch doctor" in found.remedy


def test_a_kill_is_the_kernels_where_it_was_counted_on_that_host(scene: Scene) -> None:
    scene.rank(0, code=-signal.SIGTERM, time=10.9, type="RuntimeError", message=ECHO)
    scene.rank(1, code=-signal.SIGKILL, beat=10.4)
    write_json(scene.run.oom_kills("another"), {"before": 0, "kills": 1})
    assert scene.failure().cause.startswith("killed (SIGKILL): by somebody, or by the kernel")
    write_json(scene.run.oom_kills("host"), {"before": 4, "kills": 0})
    assert scene.failure().cause.startswith("killed by somebody")
    write_json(scene.run.oom_kills("host"), {"before": 4, "kills": 1})
    assert scene.failure().cause.startswith("killed by the kernel's OOM killer")
    assert "--nproc" in scene.failure().remedy


def test_a_run_that_stood_still_is_told_as_it_was_written_down(scene: Scene) -> None:
    told = {
        "rank": 1,
        "host": "host",
        "phase": "train",
        "step": 3,
        "time": 1.0,
        "cause": "no sign of life",
        "to_type": "wait",
    }
    stack = 'Stack:\n  File "/home/me/rows.py", line 7, in locked'
    write_json(scene.run.stall, {**told, "traceback": stack, "waits": ["rank 0 waits for others"]})
    scene.rank(0, code=-signal.SIGTERM, time=10.9, type="RuntimeError", message=ECHO)
    found = scene.failure(124)
    assert (found.rank, found.exit_code, found.cause, found.where) == (
        1,
        124,
        "no sign of life",
        "me/rows.py:7 in locked",
    )
    assert found.waits == ("rank 0 waits for others",)


@pytest.mark.parametrize(
    ("code", "exit_code", "cause"),
    [
        (-signal.SIGKILL, 137, "killed (SIGKILL)"),
        (-signal.SIGSEGV, 139, "crashed (SIGSEGV)"),
        (-signal.SIGILL, 132, "killed by SIGILL"),
        (7, 7, "ended with exit code 7 and gave no reason"),
    ],
)
def test_a_rank_without_a_word_is_named_with_the_step_that_the_others_know(
    code: int, exit_code: int, cause: str, scene: Scene
) -> None:
    scene.rank(0, code=-signal.SIGTERM, step=5, time=10.9, type="RuntimeError", message=ECHO)
    scene.rank(1, code=code, step=3, beat=10.4)
    found = scene.failure()
    assert (found.rank, found.step, found.exit_code, found.echoes) == (1, 5, exit_code, (0,))
    assert found.cause.startswith(cause)


def test_an_abort_after_a_reason_is_an_echo(scene: Scene) -> None:
    scene.rank(0, code=-signal.SIGABRT, beat=9.9)
    scene.rank(1, code=1, time=10.0, message="the reason")
    assert (scene.failure().rank, scene.failure().exit_code) == (1, 1)


def test_an_abort_alone_is_the_reason(scene: Scene) -> None:
    scene.rank(0, code=-signal.SIGABRT)
    scene.rank(1, code=-signal.SIGTERM, time=10.1, type="RuntimeError", message=ECHO)
    assert (scene.failure().rank, scene.failure().exit_code) == (0, 134)


def test_who_was_seen_alive_after_a_reason_did_not_fail_first(scene: Scene) -> None:
    scene.rank(0, code=-signal.SIGKILL, beat=12.0)
    scene.rank(1, code=1, time=11.0, message="the reason")
    assert scene.failure().rank == 1


def test_a_reason_given_after_the_last_sign_of_a_killed_rank_may_be_its_echo(scene: Scene) -> None:
    scene.rank(0, code=-signal.SIGKILL, beat=10.0)
    scene.rank(1, code=1, time=11.0, message="unexpected end of stream")
    assert (scene.failure().rank, scene.failure().exit_code) == (0, 137)


def test_a_rank_that_somebody_ended_by_sigterm(scene: Scene) -> None:
    scene.rank(0, code=-signal.SIGTERM, time=10.1, type="RuntimeError", message=ECHO)
    scene.rank(1, code=-signal.SIGTERM)
    found = scene.failure()
    assert (found.rank, found.exit_code) == (1, 143)
    assert found.cause.startswith("ended (SIGTERM)")


def test_a_rank_that_came_to_nothing_is_explained_by_the_log_of_its_node(scene: Scene) -> None:
    log = scene.run.node_log(scene.plan.cluster.nodes[0].host)
    log.write_text(
        "Traceback (most recent call last):\n  File …\nModuleNotFoundError: No module named 'torch'\n[W] bye\n"
    )
    scene.rank(0, code=1, beat=None)
    found = scene.failure()
    assert (found.rank, found.phase, found.log) == (0, "start", str(log))
    assert found.cause == "ended with exit code 1: ModuleNotFoundError: No module named 'torch'"


def test_no_rank_is_blamed_for_a_torchrun_that_was_killed(scene: Scene) -> None:
    scene.rank(0, step=8)
    scene.rank(1, step=9, beat=11.0)
    found = scene.failure(-signal.SIGKILL)
    assert (found.rank, found.phase, found.step, found.exit_code) == (None, "train", 9, 137)
    assert found.cause.startswith("torchrun killed (SIGKILL)")


def test_torchrun_that_starts_no_rank(scene: Scene) -> None:
    log = scene.run.node_log(scene.plan.cluster.nodes[0].host)
    log.write_text("torch.distributed.DistNetworkError: The server socket has failed to listen. EADDRINUSE\n")
    found = scene.failure()
    assert (found.rank, found.phase) == (None, "start")
    assert found.cause.endswith("DistNetworkError: The server socket has failed to listen. EADDRINUSE")


@pytest.mark.parametrize(("code", "exit_code"), [(-signal.SIGSEGV, 139), (7, 7)])
def test_a_single_process_without_torchrun(code: int, exit_code: int, scene: Scene) -> None:
    scene.plan = scene.plan.model_copy(update={"backend": "python", "num_processes": 1})
    scene.rank(0)
    assert (scene.failure(code).rank, scene.failure(code).exit_code) == (0, exit_code)


@pytest.mark.parametrize(
    "message",
    [
        "[Errno 28] No space left on device",
        "checkpoint step-4 was not saved: rank 0: Error while serializing: I/O error: No space left on device (os error 28)",
        "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
        "[Errno 122] Disk quota exceeded",
    ],
)
def test_a_full_disk_is_called_so(message: str, scene: Scene) -> None:
    scene.rank(0, code=1, time=10.0, type="OSError", message=message)
    found = scene.failure()
    assert found.cause == f"run directory {scene.run.path}: no space left on the device (at: train)"
    assert found.parts["to_type"].startswith("make room there")


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"\n".join(b"line %d \xff" % number for number in range(10_000)))
    assert last_lines(log, 2) == ["line 9998 \ufffd", "line 9999 \ufffd"]
    assert last_lines(tmp_path / "nowhere") == []
