"""The story of a run in numbers, from the files of its directory; report.json.

Reads only what ranks and supervisor wrote; asks no process and no device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import manifest
from launcher.plan import Plan, time_of_rows
from launcher.report import Failure
from launcher.rundir import RunDir, read_events, read_json, write_json

_PHASES = {"first_step": "first_step", "steady": "train", "evaluate": "evaluate", "save": "save", "ask": "ask"}
_IN_ORDER = ("prepare", "start", "load", *_PHASES)


@dataclass(frozen=True)
class Answer:
    """What the model says to one of the recipe's questions; None where it was not asked then."""

    question: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Numbers:
    """The story of a run in numbers; None where it did not get so far.

    Args:
        seconds: by phase: prepare, start (until all ranks are ready), first_step, train.
        loss_first, loss_last: training loss of the first and the last logged window.
        eval_first, eval_last, eval_best: nats per supervised token.
        memory_bytes: the largest peak of any rank.
        ranks_first, ranks_last: AdaLoRA: the sum of all modules' ranks.
        answers: to the recipe's questions, before the first step and after the last.
        stopped_early: whether training ended by itself before max_steps.
        not_saved: steps at which a checkpoint could not be written and the run went on.
        stopped_by: what made it save and end before: a signal, `launch stop --save`.
    """

    steps: int
    max_steps: int
    stopped_early: bool
    stopped_by: str | None
    not_saved: tuple[int, ...]
    loss_first: float | None
    loss_last: float | None
    eval_first: float | None
    eval_last: float | None
    eval_best: float | None
    tokens_per_second: float | None
    memory_bytes: int | None
    ranks_first: int | None
    ranks_last: int | None
    answers: tuple[Answer, ...]
    seconds: dict[str, float]


def numbers(run: RunDir, seconds: dict[str, float]) -> Numbers:
    """Read events.jsonl."""
    events, _ = read_events(run)
    logs = [event for event in events if event["event"] == "log"]
    evals = [event["loss"] for event in events if event["event"] == "eval"]
    ranks = [event["ranks"] for event in events if event["event"] == "ranks"]
    starts = [event for event in events if event["event"] == "train"]
    max_steps = starts[-1]["max_steps"] if starts else 0
    speeds = sorted(event["tokens_per_second"] for event in logs[1:] or logs)
    return Numbers(
        steps=max((event["step"] for event in events if event["event"] in ("log", "save", "end")), default=0),
        max_steps=max_steps,
        stopped_by=events[-1]["why"] if events and events[-1]["event"] == "stopped" else None,
        not_saved=tuple(event["step"] for event in events if event["event"] == "not_saved"),
        stopped_early=bool(events) and events[-1]["event"] == "end" and events[-1]["step"] < max_steps,
        loss_first=logs[0]["loss"] if logs else None,
        loss_last=logs[-1]["loss"] if logs else None,
        eval_first=evals[0] if evals else None,
        eval_last=evals[-1] if evals else None,
        eval_best=min(evals) if evals else None,
        tokens_per_second=speeds[len(speeds) // 2] if speeds else None,
        memory_bytes=int(max(event["memory_bytes"] for event in logs)) if logs else None,
        ranks_first=ranks[0] if ranks else None,
        ranks_last=ranks[-1] if ranks else None,
        answers=_answers([event for event in events if event["event"] == "answers"]),
        seconds={name: round(value, 2) for name, value in seconds.items()},
    )


def predicted_speed(plan: Plan, run: RunDir) -> float | None:
    """Tokens a second that the plan expects of rows as long as they are; None before they have been counted."""
    counted = (read_json(run.prepared) or {}).get("report") or {}
    length = counted.get("length_mean")
    return round(time_of_rows(plan, float(length)).tokens_per_second, 1) if length else None


def phases(run: RunDir, seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of each phase of the last attempt, of the rank that spent most in it.

    prepare; start, until ranks have imported and met; load; first_step; steady, all further steps; evaluate, save and ask, where they came.
    """
    spent: dict[str, float] = {}
    for path in run.heartbeats.glob("[0-9]*.json"):
        for phase, value in ((read_json(path) or {}).get("seconds") or {}).items():
            spent[phase] = max(spent.get(phase, 0.0), value)
    found = {"prepare": seconds.get("prepare"), "load": spent.get("load")}
    if "start" in seconds:  # until all ranks were ready, of which loading is a part
        found["start"] = max(0.0, seconds["start"] - spent.get("load", 0.0))
    found |= {name: spent.get(phase) for name, phase in _PHASES.items()}
    return {name: round(value, 3) for name in _IN_ORDER if (value := found.get(name)) is not None}


def _steps(run: RunDir, plan: Plan) -> dict[str, float | None]:
    """Seconds of a step, predicted for rows as long as they are, and measured without the first one of the last attempt."""
    beats = [beat for path in run.heartbeats.glob("[0-9]*.json") if (beat := read_json(path))]
    begun = [event["step"] for event in read_events(run)[0] if event["event"] == "train"]
    measured = None
    if beats and begun and (num := max(beat["step"] for beat in beats) - begun[-1] - 1) > 0:
        measured = round(max((beat.get("seconds") or {}).get("train", 0.0) for beat in beats) / num, 4)
    length = ((read_json(run.prepared) or {}).get("report") or {}).get("length_mean")
    predicted = round(time_of_rows(plan, float(length)).total_s, 4) if length else None
    return {"step_seconds": measured, "step_seconds_predicted": predicted}


def _attempts(run: RunDir) -> list[dict[str, Any]]:
    """All attempts of a run, those of earlier launches too."""
    events, _ = read_events(run)
    ended = [event for event in events if event["event"] == "attempt"]
    return [{**{key: one[key] for key in one if key not in ("event", "time")}, "ended": one["time"]} for one in ended]


def _stragglers(run: RunDir) -> list[dict[str, Any]]:
    """Ranks that stayed behind the others, in the order in which it was noticed."""
    events, _ = read_events(run)
    keys = ("rank", "host", "behind", "since", "step")
    return [{key: event[key] for key in keys} for event in events if event["event"] == "straggler"]


def _answers(events: Sequence[dict[str, Any]]) -> tuple[Answer, ...]:
    """The questions that were asked last, with the first answer before training and the last one after it, over all attempts."""
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    for event in events:
        if event["when"] == "before":
            before = {**event["answers"], **before}
        else:
            after = {**after, **event["answers"]}
    asked = events[-1]["answers"] if events else ()
    return tuple(Answer(question, before.get(question), after.get(question)) for question in asked)


def attempt(began: float, plan: Plan, exit_code: int, story: Numbers, failure: Failure | None) -> dict[str, Any]:
    """How an attempt ended, for events.jsonl.

    Args:
        began: seconds since the epoch.
    """
    return {
        "event": "attempt",
        "time": time.time(),
        "began": began,
        "exit_code": exit_code,
        "resumed_from": plan.resume_from,
        "step": failure.step if failure else story.steps,
        "rank": failure.rank if failure else None,
        "cause": failure.cause if failure else story.stopped_by,
    }


def write_report(run: RunDir, plan: Plan, exit_code: int, story: Numbers, failure: Failure | None) -> None:
    """Write report.json."""
    prepared = read_json(run.prepared) or {}
    checkpoints: Sequence[Path] = manifest.folders(run)
    best = manifest.best_first(run)
    write_json(
        run.report,
        {
            "name": plan.name,
            "exit_code": exit_code,
            "result": "done" if exit_code == 0 else "interrupted" if exit_code == InterruptedCode else "failed",
            **asdict(story),
            "phases": phases(run, story.seconds),
            "memory_predicted_bytes": plan.fullest_bytes,
            "tokens_per_second_predicted": predicted_speed(plan, run),
            **_steps(run, plan),
            "data": prepared.get("report"),
            "checkpoints": [folder.name for folder in checkpoints],
            "best_checkpoint": best[0][1].name if best else None,
            "resumed_from": plan.resume_from,
            "attempts": _attempts(run),
            "stragglers": _stragglers(run),
            "failure": asdict(failure) if failure else None,
        },
    )


InterruptedCode = 130
