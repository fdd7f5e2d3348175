"""Committing a checkpoint, on one rank in this process: what is there before, during and after, and what a failure leaves."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launcher import manifest
from launcher.plan import Plan
from launcher.rundir import RunDir, read_events
from launcher.worker.checkpoint import NotSavedError, Position, Saver, Staging, save_checkpoint, saving
from tests.worker.conftest import Job


@pytest.fixture
def plan(job: Job) -> Plan:
    return job.plan("hardware=1xcpu", "checkpoint.keep=2")


@pytest.fixture
def run(job: Job) -> RunDir:
    job.run.create()
    return job.run


def at(step: int, eval_loss: float | None = None) -> Position:
    return Position(step, step / 4, "rows", eval_loss)


def write(folder: Staging) -> None:
    folder.tensors("weights.safetensors", {"w": torch.arange(4.0)})
    folder.text("state.json", "{}")


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_only_a_committed_folder_has_the_name(run: RunDir, plan: Plan) -> None:
    seen = []

    def look(folder: Staging) -> None:
        write(folder)
        seen.extend(names(run))

    assert save_checkpoint(run, plan, at(4, 2.5), look) == run.checkpoints / "step-4"
    assert seen == [".staging-step-4"]
    assert names(run) == ["step-4"]
    verdict = manifest.verify(run.checkpoints / "step-4")
    assert verdict.problem is None
    assert verdict.manifest is not None
    assert list(verdict.manifest.files) == ["state.json", "weights.safetensors"]
    assert (verdict.manifest.eval_loss, verdict.manifest.world["num_processes"]) == (2.5, 1)
    assert [event["step"] for event in read_events(run)[0]] == [4]


def test_files_that_were_written_past_us_and_joined_count_too(run: RunDir, plan: Plan) -> None:
    def parts(folder: Staging) -> None:
        write(folder)
        for part in ("part-1", "part-2"):
            (folder / part).write_text(part)
            (folder / part).chmod(0o600)

    def join(folder: Path) -> None:
        (folder / "whole").write_text("".join(path.read_text() for path in sorted(folder.glob("part-*"))))
        for path in folder.glob("part-*"):
            path.unlink()

    verdict = manifest.verify(save_checkpoint(run, plan, at(4), parts, join))
    assert verdict.problem is None
    assert verdict.manifest is not None
    assert list(verdict.manifest.files) == ["state.json", "weights.safetensors", "whole"]


def test_what_earlier_attempts_left_half_done_goes_and_the_best_stays(run: RunDir, plan: Plan) -> None:
    for name in (".staging-step-2", ".staging-step-4", ".deleting-step-1"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "weights").write_text("half")
    for step, loss in ((4, 2.0), (8, 3.0), (12, 3.0), (16, 3.0)):
        save_checkpoint(run, plan, at(step, loss), write)
    assert names(run) == ["step-12", "step-16", "step-4"]


@pytest.mark.parametrize("fails", ["open", "write", "fsync", "rename", "manifest", "mkdir"])
def test_a_failure_leaves_the_older_ones_and_nothing_else(
    run: RunDir, plan: Plan, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    save_checkpoint(run, plan, at(4), write)
    before = {path.name: path.read_bytes() for path in (run.checkpoints / "step-4").iterdir()}

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {
        "open": "launcher.worker.checkpoint.files.HashedFile.__init__",
        "write": "launcher.worker.checkpoint.files.HashedFile.write",
        "fsync": "os.fsync",
        "rename": "pathlib.Path.rename",
        "manifest": "launcher.worker.checkpoint.saving.write_bytes",
        "mkdir": "pathlib.Path.mkdir",
    }[fails]
    with monkeypatch.context() as patch:
        patch.setattr(target, broken)
        with pytest.raises(NotSavedError, match=r"checkpoint step-8 was not saved: rank 0: .*No space left on device"):
            save_checkpoint(run, plan, at(8), write)
    assert names(run) == ["step-4"]
    assert {path.name: path.read_bytes() for path in (run.checkpoints / "step-4").iterdir()} == before
    save_checkpoint(run, plan, at(8), write)
    assert names(run) == ["step-4", "step-8"]


def test_where_there_is_no_room_nothing_is_begun(run: RunDir, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def room(free: int) -> None:
        monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    room(2**20)  # the plan expects more of the first one
    with pytest.raises(NotSavedError, match=r"No space left on device: 1,048,576 bytes free, 16,\d+,\d+ needed"):
        save_checkpoint(run, plan, at(4), pytest.fail)
    room(2**30)
    save_checkpoint(run, plan, at(4), write)
    verdict = manifest.verify(run.checkpoints / "step-4")
    assert verdict.manifest is not None
    size = verdict.manifest.size_bytes
    room(size)  # the next one is as large as the one before
    save_checkpoint(run, plan, at(8), write)
    room(size - 1)
    with pytest.raises(NotSavedError, match="No space left on device"):
        save_checkpoint(run, plan, at(12), pytest.fail)
    assert names(run) == ["step-4", "step-8"]


def test_a_disk_that_runs_full_in_the_middle_of_a_file(
    job: Job, plan: Plan, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(mounted("size=512k") / "run")
    run.create()
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    save_checkpoint(run, plan, at(4), write)
    with pytest.raises(NotSavedError, match="No space left on device"):
        save_checkpoint(run, plan, at(8), lambda folder: folder.tensors("w", {"w": torch.ones(2**18)}))
    assert names(run) == ["step-4"]
    save_checkpoint(run, plan, at(8), write)
    assert manifest.newest_valid(run)[0].step == 8


def test_checkpoints_in_the_background_are_those_of_the_foreground(finished: Job, job: Job) -> None:
    assert job.start("checkpoint.async=true") == [0, 0], job.logs()
    assert job.losses() == finished.losses()
    assert [event["step"] for event in job.events("save")] == [4, 8]
    for name in ("step-4", "step-8"):
        one, other = (manifest.verify(each.run.checkpoints / name).manifest for each in (finished, job))
        same = [file for file in one.files if file.endswith(".safetensors") or file.startswith("rng_state")]
        assert len(same) == 5
        assert {file: one.files[file] for file in same} == {file: other.files[file] for file in same}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Keeps everybody from writing a file until it is set."""
    opened, original = threading.Event(), saving.Staging.write

    def wait_and_write(folder: Staging) -> None:
        assert opened.wait(10)
        original(folder)

    monkeypatch.setattr(saving.Staging, "write", wait_and_write)
    yield opened
    opened.set()


@pytest.fixture
def saver(job: Job, run: RunDir) -> Saver:
    return Saver(run, job.plan("hardware=1xcpu", "checkpoint.async=true"))


def test_training_goes_on_while_a_checkpoint_is_written(run: RunDir, saver: Saver, gate: threading.Event) -> None:
    weights = {"w": torch.ones(3)}
    saver.save(at(4), lambda folder: folder.tensors("weights.safetensors", weights))
    weights["w"].zero_()  # the next step
    assert names(run) == [".staging-step-4"]
    assert not saver.has_failed
    gate.set()
    saver.finish()
    assert names(run) == ["step-4"]
    file = saving.Path(run.checkpoints / "step-4" / "weights.safetensors")
    assert file.read_bytes().endswith(torch.ones(3).numpy().tobytes())
    saver.finish()  # there is nothing to wait for any more


def test_a_failure_in_the_background_is_known_and_never_commits(
    run: RunDir,
    saver: Saver,
    gate: threading.Event,
    wait_until: Callable[[Callable[[], bool]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saver.save(at(4), write)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
        gate.set()
        wait_until(lambda: saver.has_failed)
    with pytest.raises(NotSavedError, match=r"step-4 was not saved: rank 0: .*Input/output error"):
        saver.finish()
    assert not saver.has_failed
    assert names(run) == []
    saver.save(at(8), write)
    saver.finish()
    assert names(run) == ["step-8"]


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    def wait(what: Callable[[], bool]) -> None:
        for _ in range(1000):
            if what():
                return
            threading.Event().wait(0.01)
        pytest.fail("waited in vain")

    return wait
