"""Starts what the plan says, follows it, stops it and answers with an exit code; nothing it started outlives it.

The supervisor is one thread that polls: the files ranks write, and the processes it started. Every process is ended by pid and start time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from launcher.command import by_agents, node_commands, prepare_command
from launcher.errors import InterruptedRunError, PreflightError
from launcher.handshake import handshake
from launcher.manifest import Verdict, folders, verify
from launcher.nodes import OneNode, SeveralNodes
from launcher.plan import Plan, identity, other_world, total_steps, what_changed
from launcher.preflight import environment
from launcher.processes import count_oom_kills, end, start
from launcher.report import Failure, first_failure, last_lines
from launcher.rundir import RunDir, append_event, read_events, read_json, write_atomic, write_json
from launcher.stalls import STALLED, Watch, write_stall
from launcher.stopping import StopRequest
from launcher.story import Numbers, attempt, numbers, write_report

Listener = Callable[[dict[str, Any]], None]
_POLL_SECONDS = 0.1
# Ranks that were asked to save and show no sign of life for so long will not.
_LONGEST_SILENCE_SECONDS = 600.0
_TOLD = ("time", "rank", "host", "step", "cause", "waits")  # of a stall, in events.jsonl


def write_run(plan: Plan, run: RunDir, resuming: bool) -> None:
    """Write down what is about to be carried out: recipe, plan, commands, environment.

    Raises:
        PreflightError: the directory holds a run already and nobody asked to go on with it.
    """
    shown = _shown(run.path)
    ours = (run.recipe, run.prepared, run.environment, run.commands, run.events, run.report)
    if not resuming and not run.plan.exists() and (there := [path.name for path in ours if path.exists()]):
        raise PreflightError(
            f"run directory {shown}",
            f"holds {', '.join(there)}, which would be written over",
            "name a folder of its own: launch.run_dir=DIR",
        )
    if run.plan.exists() and not resuming:
        raise PreflightError(
            f"run directory {shown}",
            "holds a run already",
            f"go on with it: launch resume {shown}, or name another one: launch.run_dir=DIR",
        )
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(plan.recipe.model_dump(mode="json", by_alias=True), text)
    write_atomic(run.recipe, text.getvalue())
    write_atomic(run.plan, plan.model_dump_json(indent=1, by_alias=True) + "\n")
    if plan.deepspeed is not None:
        write_json(run.deepspeed, plan.deepspeed)
    write_json(run.environment, environment(plan.cluster))
    with run.commands.open("a", encoding="utf-8") as file:
        # Where several nodes meet is found out when they are connected.
        commands = node_commands(plan, run) if not by_agents(plan) else ()
        for command in (prepare_command(plan, run), *commands):
            file.write(f"{command}\n")


@contextlib.contextmanager
def kept_where_refused(run: RunDir) -> Iterator[None]:
    """Put recipe, plan and prepared data of a run back when its resume is refused: the next one would stumble over what this one set."""
    files = (run.recipe, run.plan, run.prepared, run.environment)
    before = {path: path.read_text(encoding="utf-8") for path in files if path.is_file()}
    try:
        yield
    except PreflightError:
        for path, text in before.items():
            write_atomic(path, text)
        raise


def continue_from(plan: Plan, chosen: Verdict | None) -> Plan:
    """The plan that goes on from a checkpoint; the plan itself where there is none.

    Raises:
        PreflightError: what the checkpoint's weights, optimizer or order of rows depend on has changed.
    """
    if chosen is None or chosen.manifest is None:
        return plan
    before, now = chosen.manifest.identity, identity(plan)
    changed = [
        f"{key} was {before[key]!r}, now {now[key]!r}" for key in now if key in before and before[key] != now[key]
    ]
    if changed:
        raise PreflightError(
            f"resume from {chosen.folder.name}",
            "; ".join(changed),
            "leave these as they were, or start a new run: launch RECIPE",
        )
    world = chosen.manifest.world
    if (found := other_world(plan, world)) is not None:
        to_type = f"go on as before: strategy.type={world['strategy']} --nproc {world['num_processes']}"
        raise PreflightError(f"resume from {chosen.folder.name}", found, to_type)
    changed_world = what_changed(plan, world)
    decisions = plan.decisions if changed_world is None else (*plan.decisions, changed_world)
    return plan.model_copy(update={"resume_from": f"checkpoints/{chosen.folder.name}", "decisions": decisions})


@dataclass
class Outcome:
    """How a run ended."""

    exit_code: int
    story: Numbers
    failure: Failure | None = None


@dataclass
class Supervisor:
    """One attempt to carry out a plan in a run directory.

    Args:
        tell: called with every event, for the screen.
        seconds: how long each phase took.
    """

    plan: Plan
    run: RunDir
    tell: Listener
    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.time)
    _trains: bool = False
    _asked: float | None = None
    _stopped_by: str | None = None

    def carry_out(self) -> Outcome:
        """Prepare, start, follow to the end.

        Raises:
            PreflightError: prepare found data or a model that cannot be used.
            InterruptedRunError: somebody stopped it; everything is ended.
        """
        with StopRequest().installed() as stop:
            try:
                self._clear_signs_of_earlier_attempts()
                with self._nodes(stop) as node:
                    self._prepare(stop, node)
                    code = self._train(node, stop)
                if code == 0 and self._stopped_by is not None:
                    raise self._interrupted(self._stopped_by)
            except InterruptedRunError:
                self._report(InterruptedRunError.exit_code, None)
                raise
            except PreflightError as error:
                if self.plan.resume_from is None:  # a resume that is refused leaves the story as it was
                    self._report(error.exit_code, None)
                raise
        failure = None if code == 0 else first_failure(self.run, self.plan, code)
        return Outcome(
            failure.exit_code if failure else 0, self._report(failure.exit_code if failure else 0, failure), failure
        )

    def prepare_only(self) -> None:
        """Fill the cache for this plan; raises what `carry_out` raises."""
        with StopRequest().installed() as stop:
            self._prepare(stop, None)

    def _report(self, exit_code: int, failure: Failure | None) -> Numbers:
        story = numbers(self.run, self.seconds)
        with contextlib.suppress(OSError):  # on a full disk the person at least reads what happened
            append_event(self.run, attempt(self._began, self.plan, exit_code, story, failure))
            write_report(self.run, self.plan, exit_code, story, failure)
        return story

    def _say(self, event: dict[str, Any]) -> None:
        """Tell the listener. A terminal or pipe that is gone ends no run; rich makes a SystemExit of it."""
        with contextlib.suppress(OSError, SystemExit):
            self.tell(event)

    def _clear_signs_of_earlier_attempts(self) -> None:
        for path in (*self.run.errors.iterdir(), *self.run.heartbeats.glob("*.json")):
            path.unlink()
        for path in (self.run.save_now, self.run.stop_now, self.run.mirrored):
            path.unlink(missing_ok=True)

    def _prepare(self, stop: StopRequest, nodes: OneNode | SeveralNodes | None) -> None:
        started = time.monotonic()
        command = prepare_command(self.plan, self.run)
        log = self.run.logs / f"{command.host}-prepare.log"
        with log.open("ab") as errors:
            process = start(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        last: dict[str, Any] = {}
        rest = b""
        while True:
            code = process.poll()
            rest += process.stdout.read() or b""
            *lines, rest = rest.split(b"\n")
            for line in lines:
                event = _event(line)
                if event:
                    last = event
                    self._say(event)
            if code is not None:
                break
            self._end_if_asked(stop, lambda: end(process, []))
            if nodes is not None:
                nodes.look_after()
            time.sleep(_POLL_SECONDS / 4)
        process.stdout.close()
        self.seconds["prepare"] = time.monotonic() - started
        if last.get("event") == "error":
            error = PreflightError(last["you_set"], last["found"], last["to_type"])
            error.exit_code = last["exit_code"]
            raise error
        if code:
            lines_of_log = "\n".join(f"    {line}" for line in last_lines(log, 6))
            raise PreflightError("prepare", f"ended with {code}; its last words:\n{lines_of_log}", f"see {log}")
        prepared = read_json(self.run.prepared)
        if prepared is None:  # code of the model's own can end a process as if all were well
            found = "ended before it was done, and without a word"
            raise PreflightError("prepare", found, f"see {log}; look at the model's own code: launch trust RECIPE")
        self._check_resume()
        if nodes is not None:
            nodes.prepare(self._say)
        self._say({"event": "prepared", **prepared, "seconds": self.seconds["prepare"]})

    def _check_resume(self) -> None:
        """Whether the checkpoint to go on from fits the rows that were prepared, and has anything left to do.

        Raises:
            PreflightError: other rows than before, or no step left.
        """
        if self.plan.resume_from is None:
            return
        prepared = read_json(self.run.prepared)
        before = verify(self.run.path / self.plan.resume_from, every_byte=False).manifest  # read by whoever chose it
        if before is None:
            return
        if before.rows_key != prepared["rows_key"]:
            raise PreflightError(
                f"resume from {self.plan.resume_from}",
                "the training rows are others than before (data, evaluation split or seed)",
                "put the data back as it was, or start a new run: launch RECIPE",
            )
        steps = total_steps(self.plan, prepared["report"]["train_rows"])
        if before.step >= steps:
            train = self.plan.recipe.train
            longer = f"train.max_steps={2 * steps}" if train.max_steps else f"train.epochs={2 * train.epochs:g}"
            raise PreflightError(
                f"resume from {self.plan.resume_from}",
                f"all {steps} steps are done",
                f"train longer: launch resume {_shown(self.run.path)} {longer}",
            )

    @contextlib.contextmanager
    def _nodes(self, stop: StopRequest) -> Iterator[OneNode | SeveralNodes]:
        """Every node of the plan, ready to be prepared; none has a rank before it is told to go. Ended at the end."""
        if by_agents(self.plan):
            nodes: OneNode | SeveralNodes = SeveralNodes(
                self.plan, self.run, lambda: self._end_if_asked(stop, nodes.end)
            )
        else:
            nodes = OneNode(self.plan, self.run)
        try:
            if isinstance(nodes, SeveralNodes):
                handshake(nodes, self._say)
            yield nodes
        finally:
            nodes.end()

    def _train(self, nodes: OneNode | SeveralNodes, stop: StopRequest) -> int:
        """Let the ranks start and follow them; the exit code of the first node's command that ended."""
        started = time.monotonic()
        offset = self.run.events.stat().st_size if self.run.events.is_file() else 0
        append_event(self.run, {"event": "start", "time": time.time()})
        nodes.go()
        if self.plan.backend == "python":  # else each node counts for itself
            count_oom_kills(self.run)
        watch = Watch(self.run, self.plan, look_after=nodes.look_after)
        while (code := nodes.poll()) is None:
            offset = self._pass_on(offset, started)
            if watch.look():
                told = write_stall(watch)
                text = f"rank {told['rank']}: {told['cause']}"
                append_event(self.run, {"event": "stalled", "text": text, **{key: told[key] for key in _TOLD}})
                code = STALLED
                break
            self._say({"event": "beat", **(read_json(self.run.heartbeat(0)) or {})})
            self._end_if_asked(stop, nodes.end)
            time.sleep(_POLL_SECONDS)
        nodes.end()  # ranks that outlived it
        if self.plan.backend == "python":
            count_oom_kills(self.run)
        self._pass_on(offset, started)
        self.seconds["all"] = time.monotonic() - started
        return code

    def _pass_on(self, offset: int, started: float) -> int:
        """Tell the listener what the ranks wrote, and keep the times of the phases."""
        events, offset = read_events(self.run, offset)
        for event in events:
            since = time.monotonic() - started
            if event["event"] == "ready":
                self.seconds.setdefault("start", since)
            if event["event"] == "log":
                self.seconds.setdefault("first_step", since)
            self._trains = event["event"] == "train" or (self._trains and event["event"] not in ("end", "stopped"))
            if event["event"] == "stopped":
                self._stopped_by = event["why"]
            self._say({**event, "seconds": since})
        return offset

    def _end_if_asked(self, stop: StopRequest, end_all: Callable[[], None]) -> None:
        """Have the ranks save and end where a signal leaves time for it and there is something to save; else end everything.

        Raises:
            InterruptedRunError: everything has ended.
        """
        name = stop.why(self.run)
        if name is None:
            return
        if self._trains and stop.now is None:
            if self._asked is None:
                self._asked = time.time()
                self._say({"event": "stopping", "why": name, "saves": True})
                if stop.save is not None:
                    write_atomic(self.run.stop_now, f"{name}\n")
            seen = max([self._asked, *(float(beat.get("time", 0)) for beat in self._recorded())])
            if time.time() - seen < _LONGEST_SILENCE_SECONDS:
                return
        self._say({"event": "stopping", "why": name, "saves": False})
        end_all()
        raise self._interrupted(name)

    def _interrupted(self, why: str) -> InterruptedRunError:
        saved = [folder.name for folder in folders(self.run)]
        left = f"{saved[0]} is saved" if saved else "no checkpoint was saved yet"
        to_type = f"go on later with: launch resume {_shown(self.run.path)}"
        if not saved:
            to_type += "  (from the beginning; checkpoint.every_steps=N saves more often)"
        return InterruptedRunError(why, f"every process of this run has ended; {left}", to_type)

    def _recorded(self) -> list[dict[str, Any]]:
        """pid and start time of every rank that has shown a sign of life."""
        beats = [read_json(path) for path in self.run.heartbeats.glob("*.json")]
        return [beat for beat in beats if beat]


def _event(line: bytes) -> dict[str, Any]:
    """What prepare said in a line; empty for what a library or a model's own code printed in between."""
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        if isinstance(value, dict) and "event" in value:
            return value
    return {}


def _shown(path: Path) -> str:
    """A path as a person would type it from here."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
