"""Faults at every kind of step of a save: the newest valid checkpoint is found, and the run goes on from it as if nothing had been."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest

from launcher import manifest
from tests.faults import KILL, Fault
from tests.worker.conftest import Job

SETTINGS = ("train.max_steps=6", "checkpoint.every_steps=2", "checkpoint.keep=1", "data.eval=null")
EIO = f"error({errno.EIO})"


@pytest.fixture(scope="module")
def whole(rank_server, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that nothing happens to, in the background as in the foreground."""
    done = Job(rank_server, tiny_recipe, tmp_path_factory.mktemp("whole") / "run")
    assert done.start(*SETTINGS) == [0, 0], done.logs()
    return done


@pytest.mark.parametrize(
    ("rank", "fault", "later"),
    [
        pytest.param(1, Fault("write", 70, KILL), False, id="killed in the middle of a file"),
        pytest.param(0, Fault("rename", 2, KILL), True, id="killed before the second commit"),
        pytest.param(0, Fault("rmtree", 12, KILL), False, id="killed while the older one goes"),
        pytest.param(1, Fault("fsync", 3, EIO), True, id="an error in the background"),
    ],
)
def test_a_run_goes_on_from_what_is_whole(job: Job, whole: Job, rank: int, fault: Fault, later: bool) -> None:
    settings = (*SETTINGS, f"checkpoint.async={str(later).lower()}")
    codes = job.start(*settings, fault=fault.code, struck=[rank])
    assert codes[rank] == (-signal.SIGKILL if fault.action == KILL else 1), job.logs()
    assert all(codes)
    assert all(manifest.verify(folder).problem is None for folder in manifest.folders(job.run))

    assert job.start(*settings, resume=True) == [0, 0], job.logs()
    assert job.losses() == whole.losses()
    assert [path.name for path in job.run.checkpoints.iterdir()] == ["step-6"], "nothing half done is left"
    one, other = (manifest.verify(each.run.checkpoints / "step-6").manifest for each in (job, whole))
    assert one is not None
    assert other is not None
    files = [name for name in other.files if name.endswith(".safetensors")]
    assert {name: one.files[name] for name in files} == {name: other.files[name] for name in files}


def test_an_error_beside_training_keeps_no_rank_waiting_for_sharded_weights(job: Job) -> None:
    # Several files of whole weights, put together in the background out of what both ranks have.
    sizes = ("adapter.type=full", "model.config.intermediate_size=4097", "checkpoint.max_shard_size=1MB")
    settings = (*SETTINGS, *sizes, "strategy.type=fsdp", "checkpoint.async=true")
    assert job.start(*settings, fault=Fault("write", 68, EIO).code, struck=[1]) == [1, 1], job.logs()
    assert [manifest.verify(folder).problem for folder in manifest.folders(job.run)] in ([], [None])
    assert job.start(*settings, resume=True) == [0, 0], job.logs()
    assert [path.name for path in job.run.checkpoints.iterdir()] == ["step-6"]
