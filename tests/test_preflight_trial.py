"""The trial of the devices: real processes over gloo that agree, hang, fail, are killed or add up wrong; none is left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from launcher.cluster import resolve_cluster
from launcher.preflight import Finding, trial
from launcher.preflight.trial import Trial, tried
from launcher.worker.trial import wrong_copies
from tests.e2e.conftest import Sabotage

CPUS = resolve_cluster("2xcpu")
CARDS = resolve_cluster(("RTX 4090", "RTX 4090"))


@pytest.fixture
def sabotage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sabotage:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Sabotage(tmp_path / "sabotage")


def all_reduce(findings: list[Finding]) -> Finding:
    (found,) = [finding for finding in findings if finding.what.startswith("all-reduce")]
    return found


def children() -> list[str]:
    """Command lines of this process's living children that are ranks of a trial."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            line = (folder / "cmdline").read_bytes().decode().replace("\0", " ")
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z" and "launcher.worker.trial" in line:
            found.append(line)
    return found


def test_two_ranks_agree() -> None:
    findings = list(tried(CPUS))
    assert [finding.level for finding in findings] == ["ok", "ok"]
    assert "ranks on a CPU have none" in findings[0].found
    assert all_reduce(findings).what == "all-reduce over gloo"
    assert "2 ranks agree" in all_reduce(findings).found
    assert not children()


HANG = "module.all_reduce = lambda *args, **kwargs: __import__('time').sleep(1000)"
KILL = "module.all_reduce = lambda *args, **kwargs: __import__('os').kill(__import__('os').getpid(), 9)"
RAISE = (
    "def broken(*args, **kwargs):\n    raise RuntimeError('no kernel image is available')\nmodule.all_reduce = broken"
)
NOTHING = "module.all_reduce = lambda *args, **kwargs: None"


@pytest.mark.parametrize(
    ("code", "ranks", "words"),
    [
        (HANG, (1,), "stood still for 2 s: rank 0 adds up, rank 1 adds up"),
        (KILL, (1,), "rank 1 ended with -9 where it adds up"),
        (RAISE, (1,), "rank 1 failed: no kernel image is available"),
        (NOTHING, (0, 1), "the sum is wrong on ranks 0, 1"),
    ],
    ids=["hangs", "killed", "fails", "wrong"],
)
def test_a_rank_that_does_not_do_its_part(
    code: str, ranks: tuple[int, ...], words: str, sabotage: Sabotage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "STANDSTILL_S", 2.0)
    env = sabotage.module("torch.distributed", code, ranks)
    monkeypatch.setenv("PYTHONPATH", f"{env['PYTHONPATH']}:{os.environ.get('PYTHONPATH', '')}")
    started = time.monotonic()
    found = all_reduce(list(tried(CPUS)))
    assert (found.level, found.found) == ("error", words)
    assert found.to_type
    assert time.monotonic() - started < 60
    assert not children(), "what was started is ended"


def test_copies_are_compared_for_every_ordered_pair(capfd: pytest.CaptureFixture[str]) -> None:
    devices = [torch.device("cpu")] * 3
    assert wrong_copies(devices) == []
    assert capfd.readouterr().out.count('"copy"') == 6
    copied: list[torch.device] = []

    def zeros_the_second_time(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copied.append(device)
        return torch.zeros_like(tensor) if len(copied) == 2 else tensor.clone()

    def one_bit_wrong(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[-1] ^= 1
        return tensor

    assert wrong_copies(devices, zeros_the_second_time) == [(0, 2)]
    assert len(wrong_copies(devices, one_bit_wrong)) == 6


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (Trial([], 2, "", 3.0), None, ["2 pairs copied 4 MiB and compared", "2 ranks agree"]),
        (Trial([(0, 1)], 2, "", 3.0), Trial([], 0, "", 3.0), ["card 0 → 1", "export NCCL_P2P_DISABLE=1 (tried"]),
        (
            Trial([], 0, "stood still for 20 s: rank 0 copies from card 0 to card 1", 20.0),
            Trial([], 0, "", 3.0),
            ["copies from card 0 to card 1", "export NCCL_P2P_DISABLE=1 (tried"],
        ),
        (
            Trial([], 2, "rank 0 failed: x", 1.0),
            Trial([], 0, "rank 0 failed: x", 1.0),
            ["NCCL_DEBUG=INFO launch RECIPE"],
        ),
        (
            Trial([], 2, "rank 0 failed: CUDA error: no kernel image is available", 1.0),
            Trial([], 0, "the same", 1.0),
            ["take a torch build for these cards"],
        ),
    ],
    ids=["fine", "wrong copy", "hanging copy", "nccl", "other cards"],
)
def test_what_is_said_about_cards(
    first: Trial, second: Trial | None, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no card here: what ranks on cards would answer is given, what is made of it is looked at."""
    trials = [first, second]
    asked = []

    def carry_out(cluster: object, more: object = None, copies: bool = True) -> Trial | None:
        asked.append((more, copies))
        return trials.pop(0)

    monkeypatch.setattr(trial, "found_on_this_machine", lambda: CARDS)
    monkeypatch.setattr(trial, "carry_out", carry_out)
    findings = list(tried(CARDS))
    text = "\n".join(f"{finding.found}\n{finding.to_type}" for finding in findings)
    for word in words:
        assert word in text
    assert asked == [(None, True), ({"NCCL_P2P_DISABLE": "1"}, False)][: 1 if first.passed else 2]
    assert all((finding.level == "ok") == (finding.to_type == "") for finding in findings)


def test_a_plan_for_cards_that_are_not_here_is_not_tried() -> None:
    (found,) = tried(resolve_cluster("8xA800-80GB"))
    assert (found.level, "was not tried" in found.found) == ("ok", True)
