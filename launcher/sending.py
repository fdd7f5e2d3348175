"""Run directories that nodes do not see: which may be copied there, what goes along, and the processes that carry it (`mirror`)."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cluster import Node
from launcher.connecting import connecting_command
from launcher.plan import Plan
from launcher.processes import NodeCommand, start
from launcher.report import last_lines
from launcher.rundir import RunDir, cache_folder, read_json

# Under these one rank can write a whole checkpoint; under others each rank has a part of it that no other has.
_WRITTEN_BY_ONE = ("single", "ddp")


def why_not_copied(plan: Plan, node_rank: int) -> str:
    """Why a node that does not see the run directory cannot do with a copy; empty where it can."""
    if node_rank == 0:
        return "rank 0, which writes checkpoints and events, runs there"
    if plan.strategy not in _WRITTEN_BY_ONE:
        return f"under strategy {plan.strategy} its ranks write a part of every checkpoint that no other rank has"
    if plan.recipe.data.questions and plan.recipe.train.early_stopping is not None:
        return "its ranks answer data.questions with the best checkpoint, which lies in it"
    return ""


def parcel(plan: Plan, run: RunDir, lacks_data: bool) -> list[str]:
    """What a node without the run directory is sent, as `mirror` names it; prepared rows only where the recipe's data are not there."""
    files = (run.plan, run.recipe, run.deepspeed, run.prepared, run.mirrored)
    names = [f"run/{path.name}" for path in files if path.is_file()]
    if plan.resume_from is not None:
        names.append(f"run/{plan.resume_from}")
    if lacks_data:
        prepared = read_json(run.prepared) or {}
        model = prepared.get("model_dir")
        folders = dict.fromkeys(Path(prepared[key]) for key in ("data_dir", "tokenizer_dir") if key in prepared)
        names += [f"cache/{one.name}" for one in folders if one.parent == cache_folder() and str(one) != model]
    return names


def size_of(run: RunDir, names: Sequence[str]) -> int:
    """Bytes of all files of a parcel."""
    return sum(path.stat().st_size for name in names for path in _files(run, name))


def _files(run: RunDir, name: str) -> Iterator[Path]:
    root, _, rest = name.partition("/")
    path = (run.path if root == "run" else cache_folder()) / rest
    yield from (one for one in (path.rglob("*") if path.is_dir() else [path]) if one.is_file())


@dataclass
class Sending:
    """A parcel on its way: one process here that reads the files, one that reaches the node."""

    giver: subprocess.Popen[Any]
    taker: subprocess.Popen[Any]
    log: Path

    @classmethod
    def begun(cls, plan: Plan, run: RunDir, node: Node, names: Sequence[str]) -> Sending:
        """Start both."""
        where, cwd, log = str(run.path.absolute()), str(Path.cwd()), run.logs / f"{node.host}-sending.log"
        there = connecting_command(plan, node, "launcher.mirror", "take", where, f"{node.host} of {where}")
        here = NodeCommand("", (sys.executable, "-m", "launcher.mirror", "give", where, *names), cwd=cwd)
        with log.open("wb") as errors:
            giver = start(here, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
            taker = start(there, stdin=giver.stdout, stdout=subprocess.DEVNULL, stderr=errors)
        assert giver.stdout is not None
        giver.stdout.close()  # the taker's now
        return cls(giver, taker, log)

    @property
    def is_over(self) -> bool:
        """Whether it has arrived, or will not."""
        return self.giver.poll() is not None and self.taker.poll() is not None

    @property
    def problem(self) -> str:
        """Why it has not arrived; empty where it has."""
        if not (self.giver.returncode or self.taker.returncode):
            return ""
        words = [line.strip() for line in last_lines(self.log, 3) if line.strip()]
        return words[-1] if words else f"the copy was not taken (exit code {self.taker.returncode})"

    def end(self) -> None:
        """End what is left of it."""
        for process in (self.giver, self.taker):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
