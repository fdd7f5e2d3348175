"""When a run counts as standing still, and who is said to hold it up. The same with real ranks: tests/e2e/test_stalls.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.cluster import resolve_cluster
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan
from launcher.recipe import find_recipe, load_recipe
from launcher.rundir import RunDir, read_json, write_json
from launcher.stacks import Frame, Stacks, answer_of, ask_ranks_here
from launcher.stalls import Standing, Watch, awaited, explain, limit_seconds

ANSWER = """\
Thread 0x00007fc8a25a96c0 (most recent call first):
  File "/here/launcher/worker/pulse.py", line 83 in _keep

Current thread 0x00007fc8d2c09b80 (most recent call first):
  File "/venv/torch/distributed/distributed_c10d.py", line 4287 in all_gather
  File "/here/launcher/worker/metrics.py", line 245 in gathered
  File "/here/launcher/worker/__main__.py", line 47 in main
"""
IN_CODE = ANSWER.replace("/venv/torch/distributed/distributed_c10d.py", "/home/me/rows.py").replace(
    "all_gather", "locked"
)
IN_BACKWARD = ANSWER.replace("/venv/torch/distributed/distributed_c10d.py", "/venv/torch/autograd/graph.py").replace(
    "all_gather", "_engine_run_backward"
)
IN_THREAD = """\
Thread 0x00007fc8a25a96c0 (most recent call first):
  File "/venv/torch/distributed/distributed_c10d.py", line 4287 in all_gather
  File "/here/launcher/worker/checkpoint/saving.py", line 245 in commit

Current thread 0x00007fc8d2c09b80 (most recent call first):
  File "/lib/python3.11/threading.py", line 331 in wait
  File "/lib/python3.11/concurrent/futures/_base.py", line 451 in result
  File "/here/launcher/worker/__main__.py", line 47 in main
"""
WAITS = Stacks((Frame("/venv/torch/distributed/c.py", 4, "all_reduce"),), waits=True, state="S")
WORKS = Stacks((Frame("/home/me/rows.py", 7, "locked"),), state="S")
STOPPED = Stacks(state="T")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    loaded = load_recipe(find_recipe("quickstart"), ["hardware=2xcpu", "launch.stall_seconds=10"])
    shape = shape_of(loaded.recipe.model, tmp_path_factory.mktemp("no-model"))
    return make_plan("quickstart", loaded.recipe, resolve_cluster(loaded.recipe.hardware), shape)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


@pytest.mark.parametrize(
    ("beat", "given", "expected"),
    [
        ({}, "auto", 1800),
        ({"phase": "load"}, "auto", 7200),
        ({"phase": "load"}, 10.0, 7200),
        ({"phase": "load"}, 9000.0, 9000),
        ({"phase": "first_step", "longest": None}, "auto", 3600),
        ({"phase": "train", "longest": 2.0}, "auto", 300),
        ({"phase": "train", "longest": 60.0}, "auto", 600),
        ({"phase": "train", "longest": 60.0}, 10.0, 10),
        ({"phase": "save", "longest": None}, 10.0, 7200),
        ({"phase": "save", "longest": 5.0}, 10.0, 50),
        ({"phase": "save", "longest": 5.0}, "auto", 300),
        ({"phase": "done", "longest": 5.0}, 10.0, float("inf")),
    ],
)
def test_how_long_a_rank_may_stand_still(beat: dict[str, object], given: float, expected: float) -> None:
    assert limit_seconds(beat, given) == expected


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def beat(run: RunDir, rank: int, **values: object) -> None:
    told = {"pid": 1, "started": 1, "host": "a", "rank": rank, "phase": "train", "step": 3, "beats": 1, "time": 5.0}
    write_json(run.heartbeat(rank), {**told, **values})


def test_a_rank_is_late_when_it_was_seen_unchanged_for_longer_than_its_limit(run: RunDir, plan: Plan) -> None:
    clock = Clock()
    watch = Watch(run, plan, clock)

    def after(seconds: float) -> list[int]:
        """Who is late after so many looks, one a second."""
        late: list[int] = []
        for _ in range(round(seconds)):
            clock.now += 1.0
            late = watch.look()
        return late

    beat(run, 0)
    beat(run, 1, phase="load")
    assert after(10) == []
    beat(run, 0, beats=2, time=2.0)  # a host whose clock goes back is as alive as any
    assert after(11) == []
    assert after(2) == [0], "rank 1 loads, which may take longer"
    beat(run, 0, step=4, beats=0)
    assert after(1) == []
    # A launcher that was stopped for an hour has seen nothing for an hour, and blames nobody.
    clock.now += 3600
    assert watch.look() == []


def standing(rank: int, stacks: Stacks, step: int = 5, beats: int = 0, phase: str = "train") -> Standing:
    return Standing(rank, "a", phase, step, beats, 12.0, 10.0, stacks)


@pytest.mark.parametrize(
    ("ranks", "blamed"),
    [
        pytest.param([standing(0, WAITS), standing(1, STOPPED), standing(2, WORKS, 4)], [1], id="stopped"),
        pytest.param([standing(0, WAITS), standing(1, WORKS), standing(2, WAITS)], [1], id="deadlock"),
        pytest.param([standing(0, WAITS), standing(1, Stacks()), standing(2, WAITS)], [1], id="no answer"),
        pytest.param([standing(0, WAITS), standing(1, WAITS, 4), standing(2, WAITS)], [1], id="behind"),
        pytest.param([standing(0, WAITS, beats=2), standing(1, WAITS, beats=1)], [1], id="a micro batch behind"),
        pytest.param([standing(0, WAITS), standing(1, WAITS)], [0, 1], id="all wait"),
        pytest.param([standing(0, Stacks(), phase="done"), standing(1, WAITS)], [1], id="one is done"),
    ],
)
def test_who_holds_the_others_up(ranks: list[Standing], blamed: list[int]) -> None:
    assert [one.rank for one in awaited(ranks)] == blamed


def test_a_stall_in_words() -> None:
    told = explain([standing(rank, WAITS) for rank in range(7)] + [standing(7, WORKS)], 10.0)
    assert told["rank"] == 7
    assert told["cause"] == "no sign of life for 12 s, more than launch.stall_seconds: 10: rank 7 stands still"
    assert told["waits"] == [
        "ranks 0–6 (step 5) waits for others at distributed/c.py:4 in all_reduce",
        "rank 7 (step 5) is at me/rows.py:7 in locked",
    ]
    assert "launch resume RUN launch.stall_seconds=100" in told["to_type"]

    told = explain([standing(rank, WAITS) for rank in (0, 1)], "auto")
    assert told["cause"].endswith("the limit of 10 s: all ranks stand still at step 5: none is behind the others")


@pytest.mark.parametrize(
    ("answer", "where", "waits"),
    [(ANSWER, "all_gather", True), (IN_CODE, "locked", False), (IN_BACKWARD, "_engine_run_backward", True), (IN_THREAD, "wait", True)],
    ids=["meets", "works", "backward", "thread"],
)  # fmt: skip
def test_what_a_rank_has_answered(answer: str, where: str, waits: bool, run: RunDir) -> None:
    older = ANSWER.replace("all_gather", "older")
    run.stacks(0).write_text(older + answer)
    found = answer_of(run, 0)
    assert (found.main[-1].function, found.waits) == (where, waits)
    assert found.text.splitlines()[1] == '  File "/here/launcher/worker/__main__.py", line 47, in main'
    # An answer that is being written has no main thread yet.
    run.stacks(0).write_text(answer[: answer.index("Current")])
    assert answer_of(run, 0).main == ()
    assert len(answer_of(run, 0, is_last=True).main) >= 1


RANK = """
import pathlib, sys, threading
from launcher.rundir import RunDir
from launcher.worker.pulse import Pulse
pulse = Pulse(RunDir(pathlib.Path(sys.argv[1])))
pulse.keep()
pulse.beat("train", 3)
pulse.beat("train", 4)  # too soon to be written at once
lock = threading.Lock()
lock.acquire()
lock.acquire()
"""


def test_a_rank_that_hangs_has_said_where_and_answers_once(run: RunDir) -> None:
    process = subprocess.Popen([sys.executable, "-c", RANK, str(run.path)], env={**os.environ, "RANK": "0"})
    try:
        deadline = time.monotonic() + 30
        while (read_json(run.heartbeat(0)) or {}).get("step") != 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for _ in range(2):
            ask_ranks_here(run)
        while not (found := answer_of(run, 0, is_last=True)).main:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)
        assert run.stacks(0).read_text().count("Current thread") == 1
        assert found.state == "S"
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert 'File "<string>", line 11 in <module>' in run.stacks(0).read_text()
