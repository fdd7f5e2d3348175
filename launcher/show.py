"""Plans, findings, events and failures in, what a person reads out. The only place where bytes become GiB.

In a terminal: colour and one moving line. Elsewhere: plain lines, no escape codes.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from launcher.manifest import Verdict
from launcher.plan import Alternative, Plan, budget_bytes, steps_per_epoch, total_steps
from launcher.preflight import Finding
from launcher.remotecode import RemoteCode, Trusted
from launcher.report import Failure, last_lines
from launcher.supervise import Outcome

GIB = 2**30
_BAR = 24
_LABEL = 12
_MOST_OTHERS = 6


def console(stderr: bool = False) -> Console:
    """The console to print on; obeys NO_COLOR, and wraps nothing that goes to a file or a pipe."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def line(screen: Console, label: str, text: str) -> None:
    """`label   text`, the label in a column of its own."""
    screen.print(f"[bold]{escape(label):<{_LABEL}}[/bold] {escape(text)}")


def gib(num_bytes: float) -> str:
    """Bytes as GiB with three figures, without the unit."""
    return f"{num_bytes / GIB:.2f}" if num_bytes < 10 * GIB else f"{num_bytes / GIB:.1f}"


def count(number: float) -> str:
    """6,243,584,000 -> 6.24 B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def summary(plan: Plan) -> str:
    """Model, adapter and devices in one line."""
    adapter = plan.recipe.adapter
    targets = plan.targets if isinstance(plan.targets, str) else ",".join(plan.targets)
    how = "full" if adapter.type == "full" else f"{adapter.type} r={adapter.r} on {targets}"
    names = list(dict.fromkeys(device.name for device in plan.cluster.devices))
    devices = (
        f"{plan.cluster.num_devices} × {names[0]}"
        if len(names) == 1
        else " + ".join(device.name for device in plan.cluster.devices)
    )
    transport = f" over {'nccl' if plan.kind == 'cuda' else 'gloo'}" if plan.num_processes > 1 else ""
    base = f"{plan.shape.name} {count(plan.shape.num_parameters)}, {plan.dtype}"
    stored = "" if plan.recipe.model.quantization == "none" else f" ({plan.recipe.model.quantization} base)"
    return (
        f"{base}{stored} · {how} ({count(plan.trainable_parameters)} trained) · {devices}, {plan.strategy}{transport}"
    )


def batch(plan: Plan) -> str:
    """How a step is made up, and how much memory it takes."""
    ranks = f"{plan.num_processes} rank{'s' if plan.num_processes > 1 else ''}"
    each = f"on {plan.cluster.num_devices} devices" if plan.strategy == "device_map" else "a device"
    return (
        f"micro batch {plan.micro_batch} × {ranks} × accumulation {plan.accumulation} = {plan.global_batch} rows a step · "
        f"{gib(plan.memory.total_bytes)} of {gib(budget_bytes(plan.strategy, plan.cluster))} GiB {each}"
    )


def show_plan(screen: Console, plan: Plan) -> None:
    """The whole plan: what, where every byte goes, and why each decision was made."""
    line(screen, plan.name, summary(plan))
    line(screen, "step", batch(plan))
    data = plan.recipe.data
    paths = data.path if isinstance(data.path, str) else ", ".join(data.path)
    line(
        screen,
        "data",
        f"{_shown(paths)} ({data.format}), at most {data.max_length:,} tokens, {data.overlong}, {plan.batching}",
    )
    train = plan.recipe.train
    length = f"{train.max_steps:,} steps" if train.max_steps else f"{train.epochs:g} epochs"
    line(screen, "train", f"{length}, lr {train.lr:g} {train.schedule}, {train.optimizer}, seed {train.seed}")
    if plan.deepspeed is not None:
        line(screen, "deepspeed", json.dumps(plan.deepspeed))
    line(screen, "memory", _memory_bar(plan))
    line(screen, "time", _step_time(plan))
    for place, other in enumerate(plan.alternatives[1 : 1 + _MOST_OTHERS]):
        line(screen, "instead" if place == 0 else "", _alternative(plan, other))
    for place, decision in enumerate(plan.decisions):
        line(screen, "why" if place == 0 else "", f"{decision.key} = {decision.value}: {decision.because}")
    line(screen, "model", f"shape from {_shown(plan.shape.source)}")
    if plan.code is not None:
        show_code(screen, plan.code)


def show_code(screen: Console, code: RemoteCode) -> None:
    """The model's own files that are executed, each with its checksum."""
    pinned = f"pinned by {code.pinned_by}" if code.pinned_by else "nothing pins it: launch trust RECIPE"
    line(screen, "code", f"comes with the model and is executed; sha256 {code.sha256}, {pinned}")
    for file in code.files:
        line(screen, "", f"{file.sha256}  {file.name}, {file.num_bytes:,} bytes")


def show_trust(screen: Console, trusted: Trusted) -> None:
    """What was pinned, what deserves a look in it, and what changed since it was pinned before."""
    show_code(screen, trusted.code)
    found = trusted.remarks
    for place, remark in enumerate(found):
        line(screen, "look at" if place == 0 else "", f"{remark.file}:{remark.line}  {remark.what}: {remark.why}")
    if not found:
        line(
            screen,
            "look at",
            "nothing stands out: no exec, no programs, no network, no files written (by syntax; read it all the same)",
        )
    for place, text in enumerate(trusted.changes):
        line(screen, "changed" if place == 0 else "", text)
    line(screen, "lock", f"wrote {_shown(str(trusted.lock.resolve()))}; other code is refused from now on")
    if not trusted.asked_for:
        line(
            screen, "", "the recipe does not allow it to be executed yet; if you trust it: model.trust_remote_code=true"
        )


def _step_time(plan: Plan) -> str:
    """Seconds of a step with every row at its longest, where they go, and how sure that is."""
    parts = "  ".join(
        f"{name} {value:.3g}" for name, value in plan.time.parts().items() if value >= plan.time.total_s / 200
    )
    return (
        f"{plan.time.total_s:.3g} s a step of {plan.time.tokens:,} tokens, {plan.time.tokens_per_second:,.0f} tokens/s"
        f"  ({parts}; {plan.time.basis})"
    )


def _alternative(plan: Plan, other: Alternative) -> str:
    """A way that was not taken, with its figures."""
    how = (
        f"{other.strategy}{', checkpointing' if other.gradient_checkpointing else ''}, micro batch {other.micro_batch}"
    )
    cost = f"{other.step_s / plan.time.total_s:.2f} × the time" if other.fits else "does not fit"
    return f"{how:<36} {gib(other.memory_bytes):>5} GiB  {cost}"


def _memory_bar(plan: Plan) -> str:
    """The fullest device and where its bytes go; under a device map all devices together."""
    devices = plan.cluster.devices
    if plan.strategy != "device_map":
        devices = (min(devices, key=lambda device: device.memory_bytes - device.reserved_bytes),)
    whole = sum(device.memory_bytes for device in devices)
    filled = min(_BAR, round(_BAR * plan.memory.total_bytes / whole))
    taken = min(_BAR - filled, round(_BAR * sum(device.reserved_bytes for device in devices) / whole))
    bar = "█" * filled + "▒" * taken + "░" * (_BAR - filled - taken)
    parts = "  ".join(f"{name} {gib(value)}" for name, value in plan.memory.parts().items() if value)
    return f"{' + '.join(device.name for device in devices)}  {gib(whole)} GiB  {bar}  {parts}"


def show_findings(screen: Console, findings: list[Finding]) -> None:
    """Preflight's findings, a line each, with what to type below those that stand in the way."""
    marks = {"ok": "[green]✓[/green]", "warning": "[yellow]![/yellow]", "error": "[red]✗[/red]"}
    for finding in findings:
        screen.print(f"{marks[finding.level]} {escape(finding.what)}: {escape(finding.found)}")
        if finding.to_type:
            screen.print(f"    {escape(finding.to_type)}")


def show_resume(screen: Console, chosen: Verdict | None, skipped: list[Verdict], run: Path) -> None:
    """Which checkpoint a run continues from and which were passed over."""
    for place, verdict in enumerate(skipped):
        line(screen, "resume" if place == 0 else "", f"{verdict.folder.name}: {verdict.problem}; left as it is")
    label = "" if skipped else "resume"
    if chosen is None or chosen.manifest is None:
        line(screen, label, f"no complete checkpoint in {_shown(str(run))}: starting from the beginning")
        return
    manifest = chosen.manifest
    size = f"{len(manifest.files)} files, {manifest.size_bytes / 2**20:,.0f} MiB"
    line(
        screen, label, f"{chosen.folder.name}: complete, verified ({size}) ← continues here: epoch {manifest.epoch:.2f}"
    )


class RunScreen:
    """Shows a run as it goes: call it with every event of the supervisor."""

    def __init__(self, screen: Console, plan: Plan) -> None:
        self.screen = screen
        self.plan = plan
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.state = self.saved = ""
        self.max_steps = 0
        self._last_plain = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"_{event['event']}", None)
        if handler is not None:
            handler(event)

    def close(self) -> None:
        """Leave the last state of the moving line on the screen."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _prepare(self, event: dict[str, Any]) -> None:
        if event.get("total") and self.screen.is_terminal:
            unit = "weight files" if event["what"] == "native" else "rows"
            counted = f"{event['state']} {event['done']:,} of {event['total']:,} {unit}"
            self.screen.print(f"{'':<{_LABEL}} {counted}", end="\r")

    def _prepared(self, event: dict[str, Any]) -> None:
        made = [
            f"{what} ✓ {'cached' if what in event['cached'] else 'made'}"
            for what in ("tokenizer", "model", "native", "data")
            if self._has(what, event)
        ]
        report = event["report"]
        share = report["supervised_tokens"] / max(1, report["tokens"])
        text = (
            f"{'   '.join(made)}   {report['train_rows']:,} rows + {report['eval_rows']:,} for evaluation, {report['tokens']:,} tokens "
            f"({share:.0%} supervised), {report['length_p50']} a row, at most {report['length_max']}"
        )
        cut = [
            f"{report[key]:,} {word}"
            for key, word in (("rows_truncated", "cut"), ("rows_dropped", "dropped"), ("rows_bad", "bad"))
            if report[key]
        ]
        where = f" ({', '.join(cut)} at {self.plan.recipe.data.max_length} tokens)" if cut else ""
        line(self.screen, "prepare", f"{text}{where}   {event['seconds']:.1f} s")
        steps = total_steps(self.plan, report["train_rows"])
        line(self.screen, "", f"{steps_per_epoch(self.plan, report['train_rows']):,} steps an epoch, {steps:,} in all")

    def _has(self, what: str, event: dict[str, Any]) -> bool:
        if what == "native":
            return self.plan.shape.native is not None
        return what == "data" or what in event["cached"] or self.plan.recipe.model.config is not None

    def _ready(self, event: dict[str, Any]) -> None:
        num = event["ranks"]
        line(self.screen, "start", f"{num} rank{'s' if num > 1 else ''} ready   {event['seconds']:.1f} s")

    def _train(self, event: dict[str, Any]) -> None:
        self.max_steps = event["max_steps"]
        if self.screen.is_terminal:
            columns = (
                TextColumn(f"[bold]{'train':<{_LABEL}}[/bold]"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.progress = Progress(*columns, console=self.screen)
            self.task = self.progress.add_task("", total=event["max_steps"], completed=event["step"], text="")
            self.progress.start()

    def _beat(self, event: dict[str, Any]) -> None:
        """Move the bar between logs; a beat names the step that is being worked on."""
        if self.progress is not None and self.task is not None and event.get("phase") == "train":
            done = max(event["step"] - 1, int(self.progress.tasks[0].completed))
            self.progress.update(self.task, completed=done)

    def _log(self, event: dict[str, Any]) -> None:
        self.state = (
            f"loss {event['loss']:.3f}   {event['tokens_per_second']:,.0f} tok/s   {gib(event['memory_bytes'])} GiB"
        )
        text = f"{self.state}{self.saved}"
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=event["step"], text=text)
        elif time.monotonic() - self._last_plain > 2 or event["step"] == self.max_steps:
            self._last_plain = time.monotonic()
            line(self.screen, "train", f"{event['step']}/{self.max_steps}   {text}")

    def _eval(self, event: dict[str, Any]) -> None:
        text = f"step {event['step']}   loss {event['loss']:.3f}"
        if self.progress is not None:
            self.progress.console.print(f"[bold]{'evaluate':<{_LABEL}}[/bold] {text}")
        else:
            line(self.screen, "evaluate", text)

    def _save(self, event: dict[str, Any]) -> None:
        self.saved = f"   saved step-{event['step']}"
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, text=f"{self.state}{self.saved}")

    def _stopping(self, event: dict[str, Any]) -> None:
        self.close()
        line(self.screen, "stopping", f"{event['signal']}: ending every rank")


def show_done(screen: Console, plan: Plan, outcome: Outcome, run: Path) -> None:
    """The last lines of a run that worked: what came of it and what to type next."""
    story, shown = outcome.story, _shown(str(run))
    parts = []
    if story.loss_first is not None and story.loss_last is not None:
        parts.append(f"loss {story.loss_first:.2f} → {story.loss_last:.2f}")
    if story.eval_first is not None and story.eval_last is not None:
        parts.append(f"eval {story.eval_first:.2f} → {story.eval_last:.2f}")
    if story.tokens_per_second is not None:
        parts.append(f"{story.tokens_per_second:,.0f} tok/s")
    parts.append(f"{sum(story.seconds.get(name, 0) for name in ('prepare', 'all')):.0f} s")
    if story.memory_bytes is not None:
        parts.append(f"memory predicted {gib(plan.memory.total_bytes)}, measured {gib(story.memory_bytes)} GiB")
    if story.stopped_early and plan.recipe.train.early_stopping is not None:
        rounds = plan.recipe.train.early_stopping.patience
        found = f"at step {story.steps} of {story.max_steps}: no better in {rounds} evaluations"
        line(screen, "stopped", f"{found}; best loss {story.eval_best:.3f}" if story.eval_best is not None else found)
    line(screen, "done", " · ".join(parts))
    epochs = plan.recipe.train.epochs
    screen.print()
    line(screen, "  watch", f"tensorboard --logdir {shown}/tensorboard")
    line(screen, "  chat", f"launch chat {shown}")
    longer = (
        f"train.max_steps={plan.recipe.train.max_steps * 2}"
        if plan.recipe.train.max_steps
        else f"train.epochs={epochs * 2:g}"
    )
    line(screen, "  go on", f"launch resume {shown} {longer}")
    line(screen, "  take away", f"launch export {shown}")


def show_failure(screen: Console, failure: Failure, run: Path, newest: str | None) -> None:
    """The first rank that failed: who, why, where, and what to type. Other ranks are only counted."""
    training = failure.phase in ("train", "evaluate", "save")
    at = f"at step {failure.step}" if training else f"while it was at: {failure.phase}"
    if failure.rank is not None:
        line(screen, "failed", f"rank {failure.rank} ({failure.host}, {failure.device}) {at}")
    elif failure.phase == "start":
        line(screen, "failed", f"the ranks did not start on {failure.host}")
    else:
        line(screen, "failed", f"all ranks ({failure.host}) {at}")
    line(screen, "  cause", failure.cause)
    if failure.parts:
        line(screen, "  remedy", failure.parts["to_type"].replace("resume RUN", f"resume {_shown(str(run))}"))
    elif failure.where:
        line(screen, "  where", failure.where)
    line(screen, "  log", _shown(failure.log))
    if failure.traceback and not failure.parts:
        screen.print(escape("\n".join(f"    {text}" for text in failure.traceback.rstrip().splitlines()[-20:])))
    elif not failure.parts:
        screen.print(escape("\n".join(f"    {text}" for text in last_lines(Path(failure.log)))))
    if failure.echoes:
        ranks = ", ".join(map(str, failure.echoes))
        line(screen, "  others", f"rank{'s' if len(failure.echoes) > 1 else ''} {ranks} ended after it, because of it")
    if newest:
        line(screen, "  safe", f"{newest} is complete")
        line(screen, "  go on", f"launch resume {_shown(str(run))}")


def _shown(path: str) -> str:
    """A path as a person would type it from here."""
    here = os.getcwd() + os.sep
    return path[len(here) :] if path.startswith(here) else path
