"""Is anything ever lost? Runs are killed, failed and damaged at random, then resumed: the end has to be that of a run nothing happened to.

    python benchmarks/chaos.py [--trials 200] [--seed 1] [--kept FILE [--minutes 10]] [--out benchmarks/results/chaos_<hardware>_<date>.md]

With `--kept` every trial is written down as it ends, and the same command goes on behind it: all at once takes an hour. A trial is
drawn by seed and number alone, `--only NUMBER` repeats it. Each starts `launch` on a tiny model with two CPU ranks, 20 steps and a
checkpoint every two, in the foreground or the background, by DDP or FSDP, and draws one of:

  inside    at the n-th open, write, flush, rename, mkdir or rmtree of a save, in a rank that is drawn: the rank is killed, or all
            at once, or the system answers with an error (no space, I/O error, read-only), once or from then on
  outside   at a random moment SIGKILL to a rank, to torchrun, to the launcher, or to everything at once
  asked     at a random moment SIGTERM or SIGUSR1 to the launcher, to a rank, or to everything at once
  damage    after a SIGKILL the newest checkpoint gets a flipped bit, is cut, loses a file or its manifest, or gets that of another run

Then every checkpoint that is there has to be whole (but the damaged one), `launch resume` has to end with 0, and the losses of all steps
and the bytes of the last weights have to be those of the undisturbed run. All share one cache of prepared data.
"""

from __future__ import annotations

import argparse
import collections
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kept import Kept
from page import Page, environment

_ROOT = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, _ROOT)

from launcher import manifest  # noqa: E402
from launcher.rundir import RunDir, read_events, read_json  # noqa: E402
from tests.e2e.conftest import Sabotage, is_alive  # noqa: E402
from tests.faults import KILL, KILL_ALL, Fault  # noqa: E402

STEPS, EVERY = 20, 2
_RECIPE = f"""\
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 2, vocab_size: 300, max_position_embeddings: 64, tie_word_embeddings: false, attention_dropout: 0.1}}
data: {{path: rows.json, max_length: 48}}
adapter: {{type: lora, r: 4, targets: all-linear, dropout: 0.1}}
train: {{max_steps: {STEPS}, lr: 5e-3, global_batch: 16, micro_batch: 2, log_every_steps: 1}}
checkpoint: {{every_steps: {EVERY}}}
hardware: 2xcpu
"""
# How many of each there are in a whole run, about.
_OPERATIONS = {"open": 80, "write": 400, "fsync": 100, "rename": 18, "mkdir": 50, "rmtree": 50}
_DAMAGES = ("flipped bit", "cut file", "missing file", "missing manifest", "torn manifest", "manifest of another run")


@dataclass(frozen=True)
class Trial:
    """What was drawn, and what came of it.

    Args:
        what: kind of the injection and its details.
        hit: whether the run ended because of it, not by itself before.
        resumed_from: the step it went on from, None for the beginning.
        wrong: what was other than it has to be; empty for a trial that went well.
        seconds: that the trial took.
    """

    kind: str
    what: str
    hit: bool
    resumed_from: int | None
    wrong: str
    seconds: float


class Chaos:
    """Runs the trials in a folder of their own."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        self.draw = random.Random(seed)
        self.env = {**environment(), "PYTHONPATH": _ROOT, "LAUNCH_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        rows = [{"instruction": f"Say {number}", "output": f"It is {number * 7} now."} for number in range(40)]
        (folder / "rows.json").write_text(json.dumps(rows))
        (folder / "chaos.yaml").write_text(_RECIPE)
        self.whole = {}
        for strategy in ("ddp", "fsdp"):
            started = time.monotonic()
            code = self.start(folder / strategy, strategy, "false", {}).wait()
            if code:
                raise SystemExit(f"the undisturbed run under {strategy} ends with {code}")
            self.seconds = time.monotonic() - started
            self.whole[strategy] = RunDir(folder / strategy)
            times = {event["event"]: event["time"] for event in read_events(self.whole[strategy])[0]}
            self.trained = times["end"] - times["train"]

    def start(
        self, run: Path, strategy: str, later: str, env: dict[str, str], resume: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start `launch`; what it prints goes to RUN.log."""
        asked = ["resume", str(run)] if resume else ["chaos.yaml", "--run-dir", str(run)]
        asked += [f"strategy.type={strategy}", f"checkpoint.async={later}"]
        command = [sys.executable, "-m", "launcher.cli", *asked]
        with run.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env={**self.env, **env}, stdout=log, stderr=log)

    def trial(self, number: int) -> Trial:
        """One run, what happens to it, and its resume."""
        run, started = RunDir(self.folder / f"trial-{number}"), time.monotonic()
        self.draw = random.Random(f"{self.seed}, {number}")
        strategy, later = self.draw.choice(("ddp", "ddp", "fsdp")), self.draw.choice(("false", "true"))
        kind = self.draw.choice(("inside", "inside", "outside", "outside", "asked", "damage"))
        env, what = self.inside() if kind == "inside" else ({}, "")
        process = self.start(run.path, strategy, later, env)
        if kind == "asked":
            what = self.outside(run, process, [signal.SIGTERM, signal.SIGUSR1])
        elif kind in ("outside", "damage"):
            what = self.outside(run, process, [signal.SIGKILL])
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            told, wrong = f"{strategy}, async {later}: {what}", "the launcher did not end in 120 s"
            return Trial(kind, told, True, None, wrong, time.monotonic() - started)
        wait_for_the_dead(run)
        hit = process.returncode != 0
        wrong = (
            ""
            if all(manifest.verify(folder).problem is None for folder in manifest.folders(run))
            else "a torn checkpoint"
        )
        damaged = self.damage(run) if kind == "damage" else ""
        newest, _ = manifest.newest_valid(run)
        wrong = wrong or self.resumed(run, strategy, later, hit)
        told = f"{strategy}, async {later}: {what}{f'; {damaged}' if damaged else ''}"
        shutil.rmtree(run.path, ignore_errors=True)
        return Trial(kind, told, hit, newest.step if newest else None, wrong, time.monotonic() - started)

    def inside(self) -> tuple[dict[str, str], str]:
        """A fault in the middle of a save."""
        kind, rank = self.draw.choice(list(_OPERATIONS)), self.draw.choice((0, 0, 1))
        number = self.draw.randint(1, _OPERATIONS[kind] // (1 if rank == 0 else 3))
        error = self.draw.choice((errno.ENOSPC, errno.EIO, errno.EROFS))
        action, lasting = self.draw.choice(
            ((KILL, False), (KILL_ALL, False), (f"error({error})", False), (f"error({error})", True))
        )
        fault = Fault(kind, number, action, lasting)
        env = Sabotage(self.folder / "sabotage").module(
            "launcher.worker.training", f"exec({fault.code!r}, {{}})", (rank,)
        )
        env["PYTHONPATH"] += os.pathsep + _ROOT
        name = {KILL: "killed", KILL_ALL: "all killed"}.get(action, errno.errorcode[error])
        return env, f"rank {rank}, {kind} {number}: {name}{' from then on' if lasting else ''}"

    def outside(self, run: RunDir, process: subprocess.Popen[bytes], numbers: list[signal.Signals]) -> str:
        """A signal to one of the processes, or to all: at a random moment, mostly while they train."""
        number, trains = self.draw.choice(numbers), self.draw.random() < 0.8
        moment = self.draw.uniform(0, self.trained) if trains else self.draw.uniform(0, self.seconds)
        while trains and process.poll() is None and not has_begun(run):
            time.sleep(0.01)
        victim = self.draw.choice(
            ("rank", "torchrun", "launcher", "all") if number == signal.SIGKILL else ("rank", "launcher", "all")
        )
        time.sleep(moment)
        family = descendants(process.pid)
        chosen = {
            "launcher": [process.pid],
            "all": [*reversed(family), process.pid],
            "torchrun": family[:1],
            "rank": family[2:],
        }[victim]
        for pid in [self.draw.choice(chosen)] if victim == "rank" and chosen else chosen:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        return f"{number.name} to {victim} {moment:.1f} s after {'the first step began' if trains else 'the start'}"

    def damage(self, run: RunDir) -> str:
        """Something happens to the newest checkpoint while nobody looks."""
        there = manifest.folders(run)
        if not there:
            return "there was no checkpoint to damage"
        how, left = self.draw.choice(_DAMAGES), there[0] / manifest.FILE_NAME
        file = self.draw.choice(sorted(path for path in there[0].iterdir() if path != left))
        content = bytearray(file.read_bytes())
        if how == "flipped bit":
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
            file.write_bytes(content)
        elif how == "cut file":
            file.write_bytes(content[: self.draw.randrange(len(content))])
        elif how == "missing file":
            file.unlink()
        elif how == "missing manifest":
            left.unlink()
        elif how == "torn manifest":
            left.write_bytes(left.read_bytes()[: self.draw.randrange(left.stat().st_size)])
        else:
            others = [folder for whole in self.whole.values() for folder in manifest.folders(whole)]
            shutil.copyfile(self.draw.choice(others) / manifest.FILE_NAME, left)
        return f"{how}: {there[0].name}{'' if 'manifest' in how else '/' + file.name}"

    def resumed(self, run: RunDir, strategy: str, later: str, hit: bool) -> str:
        """Go on; what is other than in the undisturbed run."""
        whole = self.whole[strategy]
        newest, _ = manifest.newest_valid(run)
        if hit or newest is None or newest.step < STEPS:
            there = run.plan.exists()
            if not there:  # the launcher was killed before it had written down what it was about to do
                shutil.rmtree(run.path, ignore_errors=True)
            code = self.start(run.path, strategy, later, {}, resume=there).wait()
            if code and not (newest is not None and newest.step == STEPS):  # there is nothing left to do
                return f"the resume ended with {code}: {tail(run)}"
        losses, expected = (
            {e["step"]: e["loss"] for e in read_events(each)[0] if e["event"] == "log"} for each in (run, whole)
        )
        # A rank that is killed may take the line of its last step with it; a step that is trained again has the loss it had.
        if any(losses[step] != expected[step] for step in losses) or STEPS not in losses:
            return f"other losses: {[step for step in losses if losses[step] != expected[step]]}"
        last = [each.checkpoints / f"step-{STEPS}" / "adapter_model.safetensors" for each in (run, whole)]
        return "" if last[0].read_bytes() == last[1].read_bytes() else "other weights at the end"


def descendants(pid: int) -> list[int]:
    """torchrun, what its ranks are copies of, the ranks; parents first."""
    stats = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stats[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
    found, family = [pid], []
    while found:
        found = sorted(child for child, stat in stats.items() if int(stat[1]) in found and stat[0] != "Z")
        family += found
    return family


def has_begun(run: RunDir) -> bool:
    """Whether a run trains."""
    return any(event["event"] == "train" for event in read_events(run)[0])


def wait_for_the_dead(run: RunDir) -> None:
    """Until the ranks that wrote a heartbeat are gone: a launcher that was killed does not wait for them."""
    beats = [read_json(path) for path in run.heartbeats.glob("*.json")]
    for _ in range(200):
        if not any(is_alive((beat["pid"], beat["started"])) for beat in beats if beat):
            return
        time.sleep(0.05)


def tail(run: RunDir) -> str:
    """The last words of a launcher."""
    lines = run.path.with_suffix(".log").read_text(errors="replace").splitlines()
    return " / ".join(lines[-4:])


def main() -> None:
    """Run the trials, and write the page."""
    parser = argparse.ArgumentParser(description="Kill, fail and damage runs at random, and resume them.")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="*", help="these trials, by number")
    parser.add_argument("--kept", type=Path, help="append each trial to this file, and leave out those that are there")
    parser.add_argument("--minutes", type=float, help="begin no trial later than this")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    page = Page("Chaos", (__doc__ or "").partition("\n")[0])
    kept = Kept(options.kept)
    numbers = range(options.trials) if options.only is None else options.only
    if not carried_out(kept, numbers, options.seed, options.minutes):
        sys.exit(f"{len(kept.results)} of {len(numbers)} trials are done")
    trials = [Trial(**kept[f"{options.seed}, {number}"]) for number in numbers]
    lost = [trial for trial in trials if trial.wrong]
    page.section(
        f"{len(trials)} injections, {len(lost)} with a loss",
        "What the kinds are stands at the head of the script. Some come when the run has ended by itself, or hit what it can do without: "
        "`hit` counts those that ended the run. A run that was hit before its first checkpoint begins anew.",
    )
    kinds = collections.Counter(trial.kind for trial in trials)
    page.table(
        ["kind", "injections", "hit", "resumed from a checkpoint", "lost"],
        [
            (
                kind,
                number,
                sum(trial.hit for trial in trials if trial.kind == kind),
                sum(trial.hit and trial.resumed_from is not None for trial in trials if trial.kind == kind),
                sum(bool(trial.wrong) for trial in trials if trial.kind == kind),
            )
            for kind, number in sorted(kinds.items())
        ],
    )
    if lost:
        page.section("Lost")
        page.table(["kind", "what", "wrong"], [(trial.kind, trial.what, trial.wrong) for trial in lost])
    page.section("All of them")
    page.table(["kind", "what", "hit", "resumed from", "seconds"], [_told(trial) for trial in trials])
    page.finish(options.out)
    sys.exit(bool(lost))


def carried_out(kept: Kept, numbers: Sequence[int], seed: int, minutes: float | None) -> bool:
    """Run what is not kept yet; whether all of it is there now."""
    missing = [number for number in numbers if f"{seed}, {number}" not in kept]
    if not missing:
        return True
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder), seed)
        for number in missing:
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                return False
            found = chaos.trial(number)
            kept.add(f"{seed}, {number}", asdict(found))
            told = f"{number} {found.kind}: {found.what} -> {found.resumed_from} {found.wrong or 'ok'}, {found.seconds:.0f} s"
            print(told, file=sys.stderr, flush=True)
    return True


def _told(trial: Trial) -> tuple[str, ...]:
    start = "the beginning" if trial.resumed_from is None else f"step {trial.resumed_from}"
    return trial.kind, trial.what, "yes" if trial.hit else "no", start if trial.hit else "–", f"{trial.seconds:.0f}"


if __name__ == "__main__":
    main()
