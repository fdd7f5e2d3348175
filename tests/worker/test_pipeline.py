"""Pipelined stages on real gloo ranks: the same gradients and curve as one rank, checkpoints that any of them goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker.conftest import Job
from tests.worker.test_sharding import SAME

PIPELINED = ("strategy.type=device_map", "strategy.schedule=pipelined", "hardware=2xcpu")


def test_try(job: Job, tmp_path: Path) -> None:
    one = Job(job.server, job.recipe, tmp_path / "one")
    assert one.start(*SAME, "hardware=1xcpu") == [0], one.logs()
    codes = job.start(*SAME, *PIPELINED)
    assert set(codes) == {0}, job.logs()
    print(job.losses(), one.losses())
    assert list(job.losses().values()) == pytest.approx(list(one.losses().values()), abs=2e-6)
