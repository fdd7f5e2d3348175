"""The checkpoints of a run, a line each."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.manifest import FILE_NAME, Verdict
from launcher.preflight.finding import size
from launcher.show.lines import as_typed, duration, line


def show_checkpoints(screen: Console, run: Path, verdicts: Iterable[Verdict], every_byte: bool) -> None:
    """Newest first: step, size, age, evaluation loss, strategy and ranks, whether it is whole or why not.

    Args:
        every_byte: whether `verdicts` come from reading everything, or from sizes alone.
    """
    whole = 0
    for verdict in verdicts:
        whole += verdict.problem is None
        line(
            screen,
            verdict.folder.name,
            f"{_columns(verdict)}{verdict.problem or ('verified' if every_byte else 'whole')}",
        )
    shown = as_typed(str(run))
    if not whole:
        line(screen, "", f"no checkpoint of {shown} can be used; launch resume {shown} starts from the beginning")
    elif not every_byte:
        line(screen, "", f"whole: all files have their sizes; to read every byte: launch checkpoints {shown} --verify")


def _columns(verdict: Verdict) -> str:
    """`1.2 GiB      3 min ago   eval 2.314   zero2 × 4   `; empty where nothing is known of it."""
    if verdict.manifest is None:
        return ""
    loss, world = verdict.manifest.eval_loss, verdict.manifest.world
    age = duration(time.time() - (verdict.folder / FILE_NAME).stat().st_mtime)
    shown = f"eval {loss:.3f}" if loss is not None else "eval –"
    return f"{size(verdict.manifest.size_bytes):>7}   {age:>8} ago   {shown:<11}   {_ranks(world):<10}   "


def _ranks(world: dict[str, Any]) -> str:
    return f"{world['strategy']} × {world['num_processes']}"
