"""Stopping a run, on the control side: what signals mean, how long ranks are waited for, and `launch stop`."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import stopping, supervise
from launcher.cluster import resolve_cluster
from launcher.errors import InterruptedRunError, UsageError
from launcher.modelshape import shape_of
from launcher.plan import make_plan
from launcher.recipe import load_recipe
from launcher.rundir import RunDir, write_json
from launcher.stopping import StopRequest, stop_run
from launcher.supervise import Supervisor

QUICKSTART = Path(supervise.__file__).parents[1] / "recipes" / "quickstart.yaml"


@pytest.fixture
def told() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def supervisor(tmp_path: Path, told: list[dict[str, Any]]) -> Supervisor:
    """One whose ranks train."""
    loaded = load_recipe(QUICKSTART, ["hardware=2xcpu"])
    shape = shape_of(loaded.recipe.model, QUICKSTART.parent)
    plan = make_plan("quickstart", loaded.recipe, resolve_cluster(loaded.recipe.hardware), shape)
    run = RunDir(tmp_path / "run")
    run.create()
    made = Supervisor(plan, run, told.append)
    made._trains = True
    return made


def ask(supervisor: Supervisor, save: int | None = None, now: int | None = None) -> None:
    request = StopRequest()
    request.save, request.now = save, now
    supervisor._end_if_asked(request, lambda: supervisor.tell({"event": "ended"}))


def test_signals_are_sorted_by_whether_there_is_time() -> None:
    with StopRequest().installed() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (request.save, request.now) == (signal.SIGTERM, None)
        os.kill(os.getpid(), signal.SIGUSR1)  # somebody is in a hurry
        assert (request.save, request.now) == (signal.SIGTERM, signal.SIGUSR1)
    with StopRequest().installed() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert (request.save, request.now) == (None, signal.SIGINT)


def test_ranks_that_train_are_asked_and_waited_for(supervisor: Supervisor, told: list[dict[str, Any]]) -> None:
    for _ in range(3):
        ask(supervisor, save=signal.SIGTERM)
    assert told == [{"event": "stopping", "why": "SIGTERM", "saves": True}], "said once"
    assert supervisor.run.stop_now.read_text() == "SIGTERM\n"
    with pytest.raises(InterruptedRunError, match="SIGINT"):
        ask(supervisor, save=signal.SIGTERM, now=signal.SIGINT)
    assert told[1:] == [{"event": "stopping", "why": "SIGINT", "saves": False}, {"event": "ended"}]


def test_ranks_that_do_not_train_have_nothing_to_save(supervisor: Supervisor, told: list[dict[str, Any]]) -> None:
    supervisor._trains = False
    with pytest.raises(
        InterruptedRunError, match="SIGUSR1: every process of this run has ended; no checkpoint was saved yet"
    ):
        ask(supervisor, save=signal.SIGUSR1)
    assert [event["event"] for event in told] == ["stopping", "ended"]


def test_ranks_that_show_no_sign_of_life_are_not_waited_for(supervisor: Supervisor, told: list[dict[str, Any]]) -> None:
    supervisor.run.stop_now.write_text("launch stop --save\n")
    ask(supervisor)
    assert supervisor._asked is not None
    supervisor._asked -= supervise._LONGEST_SILENCE_SECONDS + 1
    write_json(supervisor.run.heartbeat(1), {"rank": 1, "time": time.time()})
    ask(supervisor)
    write_json(supervisor.run.heartbeat(1), {"rank": 1, "time": supervisor._asked})
    with pytest.raises(InterruptedRunError, match="launch stop --save"):
        ask(supervisor)
    assert told[-1] == {"event": "ended"}


def test_a_run_of_another_machine_can_be_asked_to_save_but_not_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    with pytest.raises(UsageError, match="no launcher works there"):
        stop_run(run, "run", save=True)
    assert not run.stop_now.exists()
    owners = iter(["process 4711 on node-b"] * 3)
    monkeypatch.setattr(RunDir, "owner", lambda _: next(owners, None))
    monkeypatch.setattr(stopping.os, "kill", pytest.fail)
    with pytest.raises(UsageError, match="it is the run of process 4711 on node-b"):
        stop_run(run, "run", save=False)
    stop_run(run, "run", save=True)
    assert run.stop_now.read_text() == "launch stop --save\n"


def test_a_run_of_this_machine_is_ended_by_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    owners = iter([f"process 4711 on {socket.gethostname()}"] * 2)
    monkeypatch.setattr(RunDir, "owner", lambda _: next(owners, None))
    killed = []
    monkeypatch.setattr(stopping.os, "kill", lambda *what: killed.append(what))
    stop_run(run, "run", save=False)
    assert killed == [(4711, signal.SIGINT)]
