"""Whether the devices of this machine reach one another: starts `launcher.worker.trial` on each and turns what it says into Findings.

The trial ends by itself in seconds; where no rank gets any further for 20 s it is ended, and the rank that stayed behind is named.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.cluster import Cluster, found_on_this_machine
from launcher.command import rank_environment
from launcher.preflight.finding import Finding

# Without any rank getting further. Starting takes longest: torch from a cold disk, a driver that was not loaded for these cards.
STANDSTILL_S, START_S = 20.0, 120.0
_POLL_S = 0.05
_DOING = {
    "import": "imports torch",
    "device": "starts its device",
    "copied": "has copied",
    "connect": "waits for the others",
    "all-reduce": "adds up",
    "done": "is done",
    "failed": "failed",
}
_NO_P2P = {"NCCL_P2P_DISABLE": "1"}


@dataclass
class Rank:
    """One process of a trial and all that it has said."""

    process: subprocess.Popen[bytes]
    out: Path
    said: list[dict[str, Any]] = field(default_factory=list)

    def listen(self) -> bool:
        """Read what is new; whether anything is."""
        whole = self.out.read_bytes().split(b"\n")[:-1]
        new = whole[len(self.said) :]
        for line in new:
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                self.said.append(value if isinstance(value, dict) else {})
                continue
            self.said.append({})  # something that a library printed
        return bool(new)

    @property
    def states(self) -> list[dict[str, Any]]:
        return [said for said in self.said if "state" in said]

    @property
    def last(self) -> dict[str, Any]:
        return self.states[-1] if self.states else {"state": "import"}

    @property
    def ended_well(self) -> bool:
        return str(self.last["state"]) == "done"

    @property
    def failed_at(self) -> float:
        """When it failed; 0 for one that was killed, because the others fail after it."""
        self.listen()
        return float(self.last.get("time", 0))

    def doing(self) -> str:
        """What it said last, in words."""
        if self.last["state"] == "copy":
            source, target = self.last["pair"]
            return f"copies from card {source} to card {target}"
        return _DOING[self.last["state"]]


@dataclass(frozen=True)
class Trial:
    """How a trial went: pairs whose copies differ and how many were tried, what went wrong besides, and the seconds it took."""

    wrong: list[tuple[int, int]]
    num_pairs: int
    problem: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all was right."""
        return not self.wrong and not self.problem


def tried(cluster: Cluster | None = None) -> Iterator[Finding]:
    """Findings of a trial on the devices of a plan, or on all that are here."""
    found = found_on_this_machine()
    cluster = cluster or found
    if importlib.util.find_spec("torch") is None:
        yield Finding(
            "warning", "all-reduce", "was not tried: torch is not installed", "pip install torch, and try again"
        )
        return
    if cluster.num_nodes > 1 or (cluster.kind == "cuda" and found.num_devices < cluster.num_devices):
        yield Finding("ok", "all-reduce", f"was not tried: {cluster.source} is not here")
        return
    if cluster.kind == "cuda" and found.kind == "cpu":
        yield Finding("ok", "all-reduce", "was not tried: there is no card here")
        return
    trial = carry_out(cluster)
    cure = ""
    if cluster.kind == "cuda" and cluster.num_devices > 1 and not trial.passed:
        again = carry_out(cluster, _NO_P2P, copies=False)
        cure = "export NCCL_P2P_DISABLE=1 (tried: the all-reduce is right then)" if not again.problem else ""
    yield from _copies(cluster, trial, cure)
    yield _all_reduce(cluster, trial, cure)


def carry_out(cluster: Cluster, more: Mapping[str, str] | None = None, copies: bool = True) -> Trial:
    """Start a rank on each device, follow them to the end, and leave none.

    Args:
        more: further variables of the ranks.
        copies: whether cards are copied between.
    """
    num_ranks, started = cluster.num_devices, time.monotonic()
    env = {**os.environ, **rank_environment(cluster.devices, num_ranks), **(more or {}), "WORLD_SIZE": str(num_ranks)}
    with tempfile.TemporaryDirectory(prefix="launch-trial-") as name, contextlib.ExitStack() as running:
        folder, ranks = Path(name), []
        argv = [sys.executable, "-m", "launcher.worker.trial", cluster.kind, str(folder / "store")]
        argv += [] if copies else ["--no-copies"]
        for rank in range(num_ranks):
            out = folder / f"rank{rank}.out"
            with out.open("wb") as stdout, out.with_suffix(".err").open("wb") as stderr:
                process = subprocess.Popen(
                    argv,
                    env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                )
            running.callback(_end, process)
            ranks.append(Rank(process, out))
        problem = _follow(ranks)
    told = next((said for rank in ranks for said in rank.states if said["state"] == "copied"), {})
    wrong = [(source, target) for source, target in told.get("wrong", ())]
    return Trial(wrong, told.get("num_pairs", 0), problem, time.monotonic() - started)


def _follow(ranks: list[Rank]) -> str:
    """Wait until all have ended or stand still; what went wrong, empty for nothing."""
    heard = time.monotonic()
    while True:
        alive = [rank.process.poll() is None for rank in ranks]
        if [rank for rank in ranks if rank.listen()]:
            heard = time.monotonic()
        failed = [number for number, rank in enumerate(ranks) if rank.process.poll() and not rank.ended_well]
        if failed:
            first = min(failed, key=lambda number: ranks[number].failed_at)
            return f"rank {first} {_last_words(ranks[first])}"
        if not any(alive):
            wrong = [number for number, rank in enumerate(ranks) if not rank.last.get("right")]
            return f"the sum is wrong on rank{'s' if len(wrong) > 1 else ''} {_numbers(wrong)}" if wrong else ""
        starting = any(rank.last["state"] in ("import", "device") for rank in ranks)
        limit = START_S if starting else STANDSTILL_S
        if time.monotonic() - heard > limit:
            doing = [f"rank {number} {rank.doing()}" for number, rank in enumerate(ranks) if not rank.ended_well]
            return f"stood still for {limit:.0f} s: {', '.join(doing)}"
        time.sleep(_POLL_S)


def _last_words(rank: Rank) -> str:
    rank.listen()
    if rank.last["state"] == "failed":
        return f"failed: {rank.last['error'][:200]}"
    lines = rank.out.with_suffix(".err").read_text(errors="replace").strip().splitlines()
    return f"ended with {rank.process.returncode} where it {rank.doing()}{f': {lines[-1][:200]}' if lines else ''}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of a trial is worth an orderly end."""
    if process.poll() is None:
        process.kill()
    process.wait()


def _copies(cluster: Cluster, trial: Trial, cure: str) -> Iterator[Finding]:
    what = "copies between cards"
    if cluster.kind == "cpu":
        yield Finding("ok", what, "none to try: ranks on a CPU have none")
    elif cluster.num_devices == 1:
        yield Finding("ok", what, "none to try: there is one card")
    elif trial.wrong:
        pairs = ", ".join(f"{source} → {target}" for source, target in trial.wrong)
        found = f"{len(trial.wrong)} of {trial.num_pairs} pairs arrive other than they were sent: card {pairs}"
        off = "switch the IOMMU or PCI access control off (kernel parameter iommu=pt)"
        yield Finding("error", what, found, f"{cure}; or {off}" if cure else off)
    elif trial.num_pairs:
        yield Finding("ok", what, f"{trial.num_pairs} pairs copied 4 MiB and compared")


def _all_reduce(cluster: Cluster, trial: Trial, cure: str) -> Finding:
    num_ranks = cluster.num_devices
    transport = "nccl" if cluster.kind == "cuda" else "gloo"
    what = f"all-reduce over {transport}"
    if not trial.problem:
        return Finding("ok", what, f"{num_ranks} rank{'s agree' if num_ranks > 1 else ' works'}, {trial.seconds:.1f} s")
    if cure:
        return Finding("error", what, trial.problem, cure)
    if "no kernel image" in trial.problem:
        return Finding(
            "error", what, trial.problem, "take a torch build for these cards: an older CUDA for older cards"
        )
    if cluster.kind == "cuda":
        return Finding("error", what, trial.problem, "see what NCCL says: NCCL_DEBUG=INFO launch RECIPE, then RUN/logs")
    return Finding(
        "error", what, trial.problem, "the loopback device must be up: ip link set lo up; then: launch doctor"
    )


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
