"""A run from outside: how it stands, what it told, how to come back to it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.plan import Plan
from launcher.show.lines import as_typed, duration, gib, line
from launcher.show.plan import summary
from launcher.story import Numbers
from launcher.watching import Rank, Status

# A rank without a sign of life for so long is shown with the seconds; beats come twice a second, and steps may take longer.
_SILENT_SECONDS = 10.0


def show_detached(screen: Console, pid: int, run: Path) -> None:
    """The run goes on without this terminal."""
    shown = as_typed(str(run))
    line(screen, "detached", f"process {pid} goes on without this terminal")
    line(screen, "  watch", f"launch attach {shown}   or: launch status {shown}")
    line(screen, "  logs", f"launch logs {shown} -f")
    line(screen, "  end", f"launch stop {shown} --save")


def show_left(screen: Console, run: Path) -> None:
    """Somebody stopped watching."""
    shown = as_typed(str(run))
    line(screen, "left", f"{shown} goes on; come back: launch attach {shown}; end it: launch stop {shown} --save")


def show_status(screen: Console, plan: Plan, status: Status, run: Path) -> None:
    """State, progress, ranks, the newest checkpoint, what to type."""
    shown = as_typed(str(run))
    line(screen, plan.name, summary(plan))
    since = f" for {duration(time.time() - status.since)}" if status.since is not None and status.owner else ""
    line(screen, "state", f"{status.state}{since}{f', {status.owner}' if status.owner else ''}")
    if status.max_steps:
        line(screen, "step", _progress(status))
    if status.owner is not None:
        for place, text in enumerate(_grouped(status.ranks)):
            line(screen, "" if place else "ranks", text)
    for text in status.said:
        line(screen, "", text)
    line(screen, "saved", status.checkpoint or "no checkpoint yet")
    if status.owner is not None:
        line(screen, "  watch", f"launch attach {shown}")
    elif status.state in ("killed", "failed", "interrupted"):
        line(screen, "  go on", f"launch resume {shown}")
    if status.owner is None:
        line(screen, "  report", f"launch report {shown}")


def _progress(status: Status) -> str:
    parts = [f"{status.step:,}/{status.max_steps:,}"]
    training, evaluation = status.losses
    if training is not None:
        parts.append(f"loss {training:.3f}")
    if evaluation is not None:
        parts.append(f"eval {evaluation:.3f}")
    if status.tokens_per_second is not None:
        parts.append(f"{status.tokens_per_second:,.0f} tok/s")
    if status.memory_bytes is not None:
        parts.append(f"{gib(status.memory_bytes)} GiB")
    if status.seconds_left is not None:
        parts.append(f"about {duration(status.seconds_left)} left")
    return "   ".join(parts)


def _grouped(ranks: tuple[Rank, ...]) -> list[str]:
    """`0–7 on node-a: train, step 412`, a line for all ranks of a host that say the same."""
    groups: dict[tuple[str, str], list[Rank]] = {}
    for rank in ranks:
        groups.setdefault((rank.host, rank.phase), []).append(rank)
    lines = []
    for (host, phase), members in groups.items():
        steps, silent = sorted({rank.step for rank in members}), max(rank.seconds for rank in members)
        at = f", step {steps[0]}" if len(steps) == 1 else f", steps {steps[0]} to {steps[-1]}"
        quiet = f", last sign of life {duration(silent)} ago" if silent > _SILENT_SECONDS else ""
        numbers = _ranges([rank.rank for rank in members])
        lines.append(f"{numbers} on {host}: {phase}{at if steps != [0] else ''}{quiet}")
    return lines


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> `0–2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def show_report(screen: Console, plan: Plan, report: dict[str, Any], numbers: Numbers) -> None:
    """What ran, how long each phase took, predicted against measured, what failed."""
    line(screen, plan.name, summary(plan))
    how = f" by {numbers.stopped_by}" if numbers.stopped_by else ""
    line(screen, "result", f"{report['result']}{how}, step {numbers.steps:,} of {numbers.max_steps:,}")
    if report.get("resumed_from"):
        line(screen, "", f"went on from {report['resumed_from']}")
    if numbers.loss_first is not None and numbers.loss_last is not None:
        line(screen, "loss", f"{numbers.loss_first:.3f} → {numbers.loss_last:.3f}")
    if numbers.eval_first is not None and numbers.eval_last is not None:
        best = f", best {numbers.eval_best:.3f}" if numbers.eval_best is not None else ""
        line(screen, "evaluation", f"{numbers.eval_first:.3f} → {numbers.eval_last:.3f}{best}")
    line(
        screen,
        "time",
        "   ".join(f"{name.replace('_', ' ')} {value:,.1f} s" for name, value in numbers.seconds.items()),
    )
    if numbers.tokens_per_second is not None:
        expected = report.get("tokens_per_second_predicted")
        line(screen, "tokens/s", f"{_predicted(expected, '{:,.0f}')}measured {numbers.tokens_per_second:,.0f}")
    if numbers.memory_bytes is not None:
        expected = report.get("memory_predicted_bytes")
        predicted = f"predicted {gib(expected)}, " if expected else ""
        line(screen, "memory", f"{predicted}measured {gib(numbers.memory_bytes)} GiB")
    saved = report.get("checkpoints") or []
    best_one = f"; best: {report['best_checkpoint']}" if report.get("best_checkpoint") else ""
    line(screen, "saved", f"{', '.join(saved)}{best_one}" if saved else "no checkpoint")


def _predicted(value: float | None, shape: str) -> str:
    return f"predicted {shape.format(value)}, " if value is not None else ""
