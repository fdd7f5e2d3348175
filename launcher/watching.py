"""Files of a run in, how it stands now out: what `status`, `logs`, `attach` and `report` show. Asks no process but who holds the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from launcher import manifest
from launcher.errors import UsageError
from launcher.report import Failure
from launcher.rundir import RunDir, read_events, read_json
from launcher.story import Answer, Numbers

_POLL_SECONDS = 0.2
Event = dict[str, Any]


@dataclass(frozen=True)
class Rank:
    """A rank's last sign of life.

    Args:
        seconds: since it was given.
    """

    rank: int
    host: str
    phase: str
    step: int
    seconds: float


@dataclass(frozen=True)
class Status:
    """How a run stands.

    Args:
        state: preparing, running, done, interrupted, failed; killed: its launcher ended without a word; not started.
        owner: who works there, None where nobody does.
        since: start of the last attempt, seconds since the epoch; None before any.
        step, max_steps: done, and to do in all; 0 before training.
        losses: newest training and evaluation loss.
        tokens_per_second, memory_bytes: of the last logged window; memory is the largest peak of a rank.
        seconds_left: at the pace of the last logged windows; None where that is not known, or it does not run.
        ranks: the last sign of life of each, of this attempt.
        checkpoint: name of the newest whose files have their sizes.
        said: what is worth a line of its own, such as ranks that lag behind.
    """

    state: str
    owner: str | None
    since: float | None
    step: int
    max_steps: int
    losses: tuple[float | None, float | None]
    tokens_per_second: float | None
    memory_bytes: int | None
    seconds_left: float | None
    ranks: tuple[Rank, ...]
    checkpoint: str | None
    said: tuple[str, ...]


def status(run: RunDir) -> Status:
    """How a run stands, by its files."""
    owner, events = run.owner(), of_last_attempt(read_events(run)[0])
    logs = [event for event in events if event["event"] == "log"]
    evals = [event["loss"] for event in events if event["event"] == "eval"]
    last = logs[-1] if logs else {}
    begun = next((event for event in reversed(events) if event["event"] == "train"), {})
    step, max_steps = (last or begun).get("step", 0), int(begun.get("max_steps", 0))
    newest = manifest.newest_whole(run)
    return Status(
        state=_state(run, owner, events),
        owner=owner,
        since=events[0]["time"] if events else None,
        step=step,
        max_steps=max_steps,
        losses=(last.get("loss"), evals[-1] if evals else None),
        tokens_per_second=last.get("tokens_per_second"),
        memory_bytes=last.get("memory_bytes"),
        seconds_left=_seconds_left(begun, logs, max_steps) if owner else None,
        ranks=_ranks(run),
        checkpoint=newest.name if newest else None,
        said=tuple(event["text"] for event in events if "text" in event),
    )


def of_last_attempt(events: list[Event]) -> list[Event]:
    """The events since ranks were started the last time."""
    starts = [place for place, event in enumerate(events) if event["event"] == "start"]
    return events[starts[-1] :] if starts else []


def _state(run: RunDir, owner: str | None, events: list[Event]) -> str:
    report = read_json(run.report)
    if owner is not None:
        ended = any(event["event"] in ("end", "stopped") for event in events)
        return "running" if events and not ended and not _newer(run, report, events) else "preparing or ending"
    if report is not None and _newer(run, report, events):
        return str(report["result"])
    return "killed" if events else "not started"


def _newer(run: RunDir, report: Any, events: list[Event]) -> bool:
    """Whether the report tells of the last attempt, or of one that ended before ranks were started."""
    return report is not None and (not events or run.report.stat().st_mtime >= events[0]["time"])


def _seconds_left(begun: Event, logs: list[Event], max_steps: int) -> float | None:
    """By the time between the newest two logs, which evaluations and checkpoints are part of only where they fell into it."""
    marks = [begun, *logs][-2:]
    if len(marks) < 2 or marks[1].get("step", 0) <= marks[0].get("step", 0):
        return None
    before, last = marks
    a_step = (last["time"] - before["time"]) / (last["step"] - before["step"])
    return max(0.0, float(last["time"] + a_step * (max_steps - last["step"]) - time.time()))


def _ranks(run: RunDir) -> tuple[Rank, ...]:
    beats = [beat for path in run.heartbeats.glob("[0-9]*.json") if (beat := read_json(path))]
    now = time.time()
    ranks = [
        Rank(beat["rank"], beat["host"], beat["phase"], beat["step"], max(0.0, now - beat["time"])) for beat in beats
    ]
    return tuple(sorted(ranks, key=lambda rank: rank.rank))


def story(run: RunDir) -> tuple[Numbers, Failure | None, int] | None:
    """What report.json tells: numbers, the first failure, the exit code. None where there is no report."""
    told = read_json(run.report)
    if told is None:
        return None
    values = {field.name: told[field.name] for field in fields(Numbers) if field.name in told}
    values["answers"] = tuple(Answer(**answer) for answer in told["answers"])
    failure = told["failure"]
    return Numbers(**values), Failure(**failure) if failure else None, int(told["exit_code"])


def logs(run: RunDir, rank: int | None, shown: str) -> list[Path]:
    """The log files of a run: those of one rank, else the launcher's, prepare's, the node's and all ranks', in that order.

    Raises:
        UsageError: there are none.
    """
    found = sorted(run.logs.glob("*.log" if rank is None else f"*-rank{rank}.log"), key=_place)
    if not found:
        what = f"logs {shown}" if rank is None else f"logs {shown} --rank {rank}"
        there = ", ".join(str(beat.rank) for beat in _ranks(run)) or "none yet"
        raise UsageError(what, f"no such log; ranks: {there}", f"see how it stands: launch status {shown}")
    return found


def _place(path: Path) -> tuple[int, int, str]:
    name = path.stem
    _, _, number = name.rpartition("-rank")
    if number.isdigit() and number != name:
        return 3, int(number), name
    return {"launcher": 0}.get(name, 1 if name.endswith("-prepare") else 2), 0, name


def lines_of(run: RunDir, rank: int | None, shown: str, follow: bool) -> Iterator[tuple[str, str]]:
    """(log's name, line) of every line there is, file by file, and with `follow` of those to come until nobody works on the run."""
    read: dict[Path, int] = {}
    while True:
        works = run.owner() is not None
        for path in logs(run, rank, shown):
            for text in _new_lines(path, read, whole=follow and works):
                yield path.stem, text
        if not follow or not works:
            return
        time.sleep(_POLL_SECONDS)


def _new_lines(path: Path, read: dict[Path, int], whole: bool) -> Iterator[str]:
    """The lines from where reading stopped; with `whole` not the last one while it has no end."""
    with path.open("rb") as file:
        file.seek(read.get(path, 0))
        for line in file:
            if whole and not line.endswith(b"\n"):
                return
            read[path] = read.get(path, 0) + len(line)
            yield line.decode(errors="replace").rstrip("\n")


def follow(run: RunDir, tell: Callable[[Event], None]) -> None:
    """Tell a listener the events of the run's last attempt, from its start until nobody works on it, as its launcher told its own."""
    offset, since = 0, time.time()
    while True:
        works = run.owner() is not None
        events, offset = read_events(run, offset)
        if any(event["event"] == "start" for event in events):
            events = of_last_attempt(events)
            since = events[0]["time"]
        for event in events:
            tell({**event, "seconds": event.get("time", since) - since})
        if not works:
            return
        tell({"event": "beat", **(read_json(run.heartbeat(0)) or {})})
        time.sleep(_POLL_SECONDS)
