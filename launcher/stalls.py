"""Heartbeats in, a stall out: which rank stands still for longer than its phase may, which one the others wait for, and where each one is.

Silence is measured by this machine's clock, from one look to the next: clocks of other hosts do not matter, and a launcher that was itself
held up for an hour blames no rank for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from launcher.command import by_agents
from launcher.plan import Plan
from launcher.rundir import RunDir, read_json, write_json
from launcher.stacks import Stacks, answer_of, ask_ranks_here, described

# As `timeout` ends what took too long.
STALLED = 124
# The longest that each phase may go without a sign of life. They are meant never to be wrong, not to be quick: what they catch would
# else stand there for ever.
_PHASE_SECONDS = {
    "start": 1800.0,  # torch and transformers, read by all nodes at once from a cold network disk
    "import": 1800.0,
    "connect": 1800.0,  # until the slowest node has imported
    "load": 7200.0,  # 140 GB at 20 MB/s
    "first_step": 3600.0,  # kernels are chosen and compiled, DeepSpeed builds its operators
    # Until there is one to measure by:
    "train": 1800.0,
    "evaluate": 1800.0,
    "ask": 1800.0,
    "save": 7200.0,
}
# Of what was measured the limit is a multiple, and at least so long: a disk or network may be away for a minute and come back.
# NCCL's own limit of ten minutes is above it.
_TIMES_THE_LONGEST, _LEAST_SECONDS = 10.0, 300.0
_SECONDS_BETWEEN_LOOKS = 1.0
_RANKS_A_SECOND = 200  # that are looked at, on a network disk
_SECONDS_FOR_STACKS = 3.0


def limit_seconds(beat: dict[str, Any], given: float | Literal["auto"]) -> float:
    """How long a rank with this heartbeat may stand still.

    Args:
        given: launch.stall_seconds, which is for steps; a phase that takes longer than a step still may.
    """
    phase = beat.get("phase", "start")
    if phase == "done":
        return float("inf")
    least = _LEAST_SECONDS if given == "auto" else given
    if phase == "train" and given != "auto":
        return given
    longest = beat.get("longest")
    return max(least, _TIMES_THE_LONGEST * longest if longest is not None else _PHASE_SECONDS.get(phase, 1800.0))


@dataclass(frozen=True)
class Standing:
    """A rank when a run stands still.

    Args:
        beats: signs of life that it has given since its step or phase began: micro batches, rows of an evaluation.
        silent: seconds since the last.
    """

    rank: int
    host: str
    phase: str
    step: int
    beats: int
    silent: float
    limit: float
    stacks: Stacks

    @property
    def position(self) -> tuple[int, int]:
        return self.step, self.beats

    @property
    def where(self) -> str:
        """What it does, in a few words."""
        if self.stacks.is_stopped:
            return "stopped"
        if not self.stacks.main:
            return "no answer" if self.phase != "start" else "not started"
        inner = self.stacks.main[-1]
        ours = [frame for frame in self.stacks.main if "/launcher/" in frame.file]
        frame = ours[-1] if ours else inner
        place = f"{'/'.join(frame.file.split('/')[-2:])}:{frame.line} in {frame.function}"
        called = "" if frame is inner else f" → {inner.function} ({inner.file.split('/')[-1]}:{inner.line})"
        return f"{'waiting for others at' if self.stacks.waits else 'at'} {place}{called}"


class Watch:
    """Looks at the heartbeats of a run while it goes.

    Args:
        clock: seconds that only grow.
        look_after: called while ranks are waited for; nodes without the run directory are asked through it.
    """

    def __init__(
        self,
        run: RunDir,
        plan: Plan,
        clock: Callable[[], float] = time.monotonic,
        look_after: Callable[[], None] = lambda: None,
    ) -> None:
        self.run = run
        self.plan = plan
        self.clock = clock
        self.look_after = look_after
        self.between = max(_SECONDS_BETWEEN_LOOKS, plan.num_processes / _RANKS_A_SECOND)
        self._looked = clock()
        self._beats: dict[int, dict[str, Any]] = {}
        self._silent: dict[int, float] = dict.fromkeys(range(plan.num_processes), 0.0)

    def look(self) -> list[int]:
        """The ranks that stand still for longer than they may; none between two looks."""
        now = self.clock()
        if now - self._looked < self.between:
            return []
        passed, self._looked = min(now - self._looked, 2 * self.between), now
        for rank in self._silent:
            beat = read_json(self.run.heartbeat(rank)) or {}
            moved = any(beat.get(key) != self._beats.get(rank, {}).get(key) for key in ("pid", "time", "beats"))
            self._silent[rank] = 0.0 if moved else self._silent[rank] + passed
            self._beats[rank] = beat
        return [rank for rank, seconds in self._silent.items() if seconds > self._limit(rank)]

    def _limit(self, rank: int) -> float:
        return limit_seconds(self._beats.get(rank, {}), self.plan.recipe.launch.stall_seconds)

    def standing(self) -> list[Standing]:
        """Have every rank write down where it is, and read it."""
        self.run.stacks_asked.touch()
        if not by_agents(self.plan):  # else each node asks its own
            ask_ranks_here(self.run)
        deadline = time.monotonic() + _SECONDS_FOR_STACKS
        while True:
            self.look_after()
            is_last = time.monotonic() > deadline
            found = [self._standing(rank, is_last) for rank in self._silent]
            answered = all(one.stacks.main or one.stacks.is_stopped or one.phase in ("start", "done") for one in found)
            if answered or is_last:
                return found
            time.sleep(0.1)

    def _standing(self, rank: int, is_last: bool) -> Standing:
        beat = read_json(self.run.heartbeat(rank)) or {}
        return Standing(
            rank=rank,
            host=beat.get("host", ""),
            phase=beat.get("phase", "start"),
            step=beat.get("step", 0),
            beats=beat.get("beats", 0),
            silent=self._silent[rank],
            limit=self._limit(rank),
            stacks=answer_of(self.run, rank, is_last),
        )


def awaited(ranks: list[Standing]) -> list[Standing]:
    """The ranks that all others wait for; all of them where nothing tells one from another.

    Stopped ones; else those that do not wait for anybody, where others do; of these, those that have come least far.
    """
    left = [one for one in ranks if one.phase != "done"] or ranks
    for kind in (
        [one for one in left if one.stacks.is_stopped],
        [one for one in left if not one.stacks.main],
        [one for one in left if not one.stacks.waits],
        left,
    ):
        if kind:
            least = min(one.position for one in kind)
            return [one for one in kind if one.position == least]
    return []


def explain(ranks: list[Standing], given: float | Literal["auto"]) -> dict[str, Any]:
    """A stall in words, as it stands in errors/stall.json: rank, cause, remedy, and for every group of ranks where they are."""
    blamed = awaited(ranks)
    first = blamed[0]
    others = [one for one in ranks if one not in blamed and one.phase != "done"]
    what = f"at step {first.step}" if first.phase in _TRAINING else f"while it was at: {first.phase}"
    known = described(first.stacks.state)
    name = _names([one.rank for one in blamed])
    if not others and len(ranks) > 1:
        found = f"all ranks stand still {what}: none is behind the others"
        to_type = "look at the network between the hosts (launch doctor), then: launch resume RUN"
    else:
        found = known.get("found", f"{name} stands still" if len(blamed) == 1 else f"{name} stand still")
        slow = f"launch.stall_seconds={10 * first.limit:.0f}"
        to_type = known.get("to_type", f"mend what it waits for; if it may take so long: launch resume RUN {slow}")
    limit = f"launch.stall_seconds: {given:g}" if given == first.limit else f"the limit of {first.limit:.0f} s"
    longest = max(one.silent for one in ranks)
    return {
        **{key: getattr(first, key) for key in ("rank", "host", "phase", "step")},
        "time": time.time(),
        "cause": f"no sign of life for {longest:.0f} s, more than {limit}: {found}",
        "to_type": to_type,
        "traceback": first.stacks.text,
        "ranks": [one.rank for one in blamed],
        "waits": _groups(ranks),
        "standing": [{**asdict(one), "stacks": one.stacks.text, "state": one.stacks.state} for one in ranks],
    }


_TRAINING = ("first_step", "train", "evaluate", "save", "ask")


def write_stall(watch: Watch) -> dict[str, Any]:
    """Find out about a run that stands still and write errors/stall.json."""
    told = explain(watch.standing(), watch.plan.recipe.launch.stall_seconds)
    write_json(watch.run.stall, told)
    return told


def _groups(ranks: list[Standing]) -> list[str]:
    """`rank 1 is at …`, a line for all ranks of which the same is true."""
    groups: dict[str, list[int]] = {}
    for one in ranks:
        at = f"step {one.step}" if one.phase in _TRAINING else one.phase
        groups.setdefault(f"({at}): {one.where}", []).append(one.rank)
    return [f"{_names(numbers)} {where}" for where, numbers in groups.items()]


def _names(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0–2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"
