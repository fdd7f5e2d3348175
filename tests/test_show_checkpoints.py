"""`launch checkpoints RUN`: what is there, how old, of whom, and whether it can be used."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import cli
from launcher.manifest import Manifest, describe_file
from launcher.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with three checkpoints: a good one, one with a flipped bit, one that was cut."""
    monkeypatch.chdir(tmp_path)
    where = RunDir(tmp_path / "run")
    where.create()
    where.plan.write_text("{}")
    for step, loss in ((4, 2.5), (8, 2.25), (12, None)):
        folder = where.checkpoints / f"step-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(bytes(3 * 2**20))
        left = Manifest(
            step=step, epoch=1.0, rows_key="k", identity={}, world={"strategy": "zero2", "num_processes": 4},
            eval_loss=loss, files={"weights": describe_file(folder / "weights")},
        )  # fmt: skip
        (folder / "manifest.json").write_text(left.sealed().model_dump_json())
        os.utime(folder / "manifest.json", (time.time() - 600,) * 2)
    (where.checkpoints / "step-4" / "weights").write_bytes(bytes(3 * 2**20 - 1) + b"!")
    os.truncate(where.checkpoints / "step-12" / "weights", 5)
    return where.path


@pytest.fixture
def shown(run: Path) -> Callable[..., list[str]]:
    def lines(*flags: str) -> list[str]:
        done = CliRunner().invoke(cli, ["checkpoints", "run", *flags])
        assert done.exit_code == 0, done.output
        return done.output.splitlines()

    return lines


def test_the_list_without_reading_every_byte(shown: Callable[..., list[str]]) -> None:
    assert shown() == [
        "step-12        3 MiB     10 min ago   eval –        zero2 × 4    weights has 5 of 3,145,728 bytes",
        "step-8         3 MiB     10 min ago   eval 2.250    zero2 × 4    whole",
        "step-4         3 MiB     10 min ago   eval 2.500    zero2 × 4    whole",
        "             whole: all files have their sizes; to read every byte: launch checkpoints run --verify",
    ]


def test_every_byte(shown: Callable[..., list[str]]) -> None:
    verdicts = [line.rpartition("zero2 × 4    ")[2] for line in shown("--verify")]
    assert verdicts == [
        "weights has 5 of 3,145,728 bytes",
        "verified",
        "weights has other bytes than its manifest says",
    ]


def test_nothing_that_can_be_used(run: Path, shown: Callable[..., list[str]]) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    assert shown() == [
        *(f"step-{step:<8}it has no manifest: the save did not finish" for step in (12, 8, 4)),
        "             no checkpoint of run can be used; launch resume run starts from the beginning",
    ]
