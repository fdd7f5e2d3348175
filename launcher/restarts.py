"""A plan carried out, and again from its newest valid checkpoint after a failure that need not come again (`launch.max_restarts`).

Every attempt starts its nodes' commands anew: torchrun's own restarts meet keys that the attempt before has left in its store, and hang.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from launcher.errors import InterruptedRunError
from launcher.manifest import newest_valid
from launcher.plan import Plan, identity
from launcher.report import Failure
from launcher.rundir import RunDir, append_event
from launcher.stopping import StopRequest
from launcher.supervise import Outcome, Supervisor, continue_from, write_run

# Before the first restart, the second, …: a host that comes back takes minutes, a port or a card's memory a second.
_WAITS_SECONDS = (2.0, 10.0, 60.0, 300.0)
_POLL_SECONDS = 0.1


def carry_out(plan: Plan, run: RunDir, tell: Callable[[dict[str, Any]], None]) -> Outcome:
    """All attempts; how the last one ended.

    Raises:
        PreflightError, InterruptedRunError: see `Supervisor.carry_out`.
    """
    most, failures = plan.recipe.launch.max_restarts, list[Failure]()
    while True:
        outcome = Supervisor(plan, run, tell).carry_out()
        if outcome.failure is None or most == 0:
            return outcome
        why_not = why_no_restart(outcome.failure, failures, most)
        failures.append(outcome.failure)
        if why_not is not None:
            _say(run, tell, {"event": "not_restarted", "text": f"not started again: {why_not}"})
            return outcome
        chosen, _ = newest_valid(run, identity(plan))
        plan = continue_from(plan.model_copy(update={"resume_from": None}), chosen)
        wait = _WAITS_SECONDS[min(len(failures), len(_WAITS_SECONDS)) - 1]
        came_from = chosen.folder.name if chosen is not None else "the beginning"
        who = "all ranks" if outcome.failure.rank is None else f"rank {outcome.failure.rank}"
        text = f"{who} at step {outcome.failure.step}: {outcome.failure.cause}"
        again = f"restart {len(failures)} of {most} from {came_from} in {wait:g} s"
        _say(run, tell, {"event": "restarting", "why": text, "what": again, "text": f"{text}; {again}"})
        _wait(wait, run)
        write_run(plan, run, resuming=True)


def why_no_restart(failure: Failure, before: Sequence[Failure], most: int) -> str | None:
    """Why a run is not started again after this failure; None where it is.

    Args:
        before: the failures of this launch so far.
        most: launch.max_restarts.
    """
    if failure.parts.get("you_set"):
        return "the same settings would fail again"
    if "OutOfMemoryError" in failure.cause:
        return "the same batch would need as much memory again"
    if before and _same(failure) == _same(before[-1]):
        return f"the same failure at step {failure.step} for the second time"
    if len(before) >= most:
        return f"launch.max_restarts: {most} are used up"
    return None


def _same(failure: Failure) -> tuple[int, str, str]:
    """What two failures have in common that are one and the same; seconds and addresses differ."""
    return failure.step, failure.phase, re.sub(r"\d+", "", failure.cause)


def _say(run: RunDir, tell: Callable[[dict[str, Any]], None], event: dict[str, Any]) -> None:
    event = {**event, "time": time.time()}
    append_event(run, event)
    tell(event)


def _wait(seconds: float, run: RunDir) -> None:
    """Wait, unless somebody stops the run meanwhile.

    Raises:
        InterruptedRunError: somebody has.
    """
    deadline = time.monotonic() + seconds
    with StopRequest().installed() as stop:
        while time.monotonic() < deadline:
            if name := stop.why(run):
                found = "every process of this run has ended; it was waiting to be started again"
                raise InterruptedRunError(name, found, f"go on later with: launch resume {run.path}")
            time.sleep(_POLL_SECONDS)
