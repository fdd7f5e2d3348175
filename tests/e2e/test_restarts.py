"""A run whose rank is killed goes on by itself, and ends where the uninterrupted one does."""

from __future__ import annotations

from pathlib import Path

from launcher.rundir import RunDir, read_events
from tests.e2e.conftest import Launcher, Sabotage, report_of

ONCE = "import os; os.path.exists('killed') or (open('killed', 'w'), os.kill(os.getpid(), 9))"


def test_a_rank_that_is_killed_once_costs_the_steps_since_the_last_checkpoint(
    launch: Launcher, sabotage: Sabotage, recipe: Path, finished_run: Path, tmp_path: Path
) -> None:
    done = launch(recipe, "--run-dir", "run", "launch.max_restarts=2", **sabotage.step(4, ONCE))

    assert done.returncode == 0, done.stderr
    assert "restart      restart 1 of 2 from step-2 in 2 s" in done.stdout
    report, whole = report_of(tmp_path / "run"), report_of(finished_run)
    assert report["loss_last"] == whole["loss_last"]
    first, second = report["attempts"]
    assert (first["exit_code"], first["rank"], first["resumed_from"]) == (137, 1, None)
    assert first["cause"].startswith("killed")
    assert (second["exit_code"], second["step"], second["resumed_from"]) == (0, 4, "checkpoints/step-2")
    assert first["began"] < first["ended"] < second["began"] < second["ended"]
    assert report["failure"] is None
    assert set(report["phases"]) == {"prepare", "start", "load", "first_step", "steady", "save"}
    assert sum(report["phases"].values()) < second["ended"] - second["began"] + 1
    assert 0 < report["step_seconds"] <= report["phases"]["steady"] + 0.001
    assert report["step_seconds_predicted"] > 0
    steps = [event["step"] for event in read_events(RunDir(tmp_path / "run"))[0] if event["event"] == "log"]
    assert steps[-2:] == [3, 4]


def test_what_fails_twice_at_the_same_step_is_not_tried_a_third_time(
    launch: Launcher, sabotage: Sabotage, recipe: Path, tmp_path: Path
) -> None:
    broken = sabotage.step(2, "raise ValueError('again')")
    done = launch(recipe, "--run-dir", "run", "launch.max_restarts=5", **broken)

    assert done.returncode == 1
    assert "not started again: the same failure at step 2 for the second time" in done.stdout
    assert "ValueError: again" in done.stderr
    assert [attempt["exit_code"] for attempt in report_of(tmp_path / "run")["attempts"]] == [1, 1]
