"""A run as it goes: findings, events of prepare and of the ranks, the end.

In a terminal colour and one moving line, elsewhere plain lines.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from launcher.manifest import Verdict
from launcher.plan import Plan, steps_per_epoch, time_of_rows, total_steps
from launcher.preflight import Finding
from launcher.report import Failure, last_lines
from launcher.rundir import RunDir
from launcher.show.lines import LABEL, as_typed, count, duration, gib, line
from launcher.story import Answer, Numbers, predicted_speed

_BEGINNING = 56  # letters of an answer


def show_findings(screen: Console, findings: Iterable[Finding]) -> list[Finding]:
    """Preflight's findings as they come, a line each, with what to type below those that stand in the way."""
    shown = []
    marks = {"ok": "[green]✓[/green]", "warning": "[yellow]![/yellow]", "error": "[red]✗[/red]"}
    for finding in findings:
        screen.print(f"{marks[finding.level]} {escape(finding.what)}: {escape(finding.found)}")
        if finding.to_type:
            screen.print(f"    {escape(finding.to_type)}")
        shown.append(finding)
    return shown


def show_resume(screen: Console, chosen: Verdict | None, skipped: list[Verdict], run: Path) -> None:
    """Which checkpoint a run continues from and which were passed over."""
    for place, verdict in enumerate(skipped):
        line(screen, "resume" if place == 0 else "", f"{verdict.folder.name}: {verdict.problem}; left as it is")
    label = "" if skipped else "resume"
    if chosen is None or chosen.manifest is None:
        line(screen, label, f"no complete checkpoint in {as_typed(str(run))}: starting from the beginning")
        return
    manifest = chosen.manifest
    size = f"{len(manifest.files)} files, {manifest.size_bytes / 2**20:,.0f} MiB"
    line(
        screen, label, f"{chosen.folder.name}: complete, verified ({size}) ← continues here: epoch {manifest.epoch:.2f}"
    )


def show_changes(screen: Console, plan: Plan) -> None:
    """What a resumed run has other than before: ranks, strategy, micro batch."""
    for decision in plan.decisions:
        if decision.key == "resume":
            line(screen, "", f"{decision.value}; {decision.because}")


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

    def _nodes(self, event: dict[str, Any]) -> None:
        rows = event["nodes"]
        host, address = (max(len(row[key]) for row in rows) for key in ("host", "address"))
        for place, row in enumerate(rows):
            cells = f"{row['host']:<{host}}   {row['slots']} × {row['device']}   {row['address']:<{address}} on {row['interface']}"
            clock = (
                f"clock {row['clock']:+.1f} s{': set it, or times in the logs mislead' if row['clock_is_off'] else ''}"
            )
            directory = "staged" if row["has_copy"] else "shared"
            same = f"torch {row['torch']}, same code, run directory {directory}"
            line(self.screen, "" if place else "nodes", f"{cells}   {same}   {clock}")

    def _sending(self, event: dict[str, Any]) -> None:
        line(self.screen, "", f"{event['host']} is sent {event['bytes'] / 2**20:,.1f} MiB: a copy of the run directory")

    def _prepare(self, event: dict[str, Any]) -> None:
        if event["what"] == "deepspeed" and "total" not in event and event["state"] != "cached":
            line(self.screen, "deepspeed", event["state"])
        if event.get("total") and self.screen.is_terminal:
            unit = {"native": "weight files", "deepspeed": "files"}.get(event["what"], "rows")
            counted = f"{event['state']} {event['done']:,} of {event['total']:,} {unit}"
            self.screen.print(f"{'':<{LABEL}} {counted}", end="\r")

    def _prepared(self, event: dict[str, Any]) -> None:
        made = [
            f"{what} ✓ {'cached' if what in event['cached'] else 'made'}"
            for what in ("tokenizer", "model", "native", "data")
            if self._has(what, event)
        ]
        report = event["report"]
        share = report["supervised_tokens"] / max(1, report["tokens"])
        of_stream = " tried of a stream" if self.plan.recipe.data.streaming else ""
        rows = f"{report['train_rows']:,} rows{of_stream} + {report['eval_rows']:,} for evaluation"
        text = (
            f"{'   '.join(made)}   {rows}, {report['tokens']:,} tokens "
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
        about = duration(steps * time_of_rows(self.plan, report["length_mean"]).total_s)
        an_epoch = f"{steps_per_epoch(self.plan, report['train_rows']):,} steps an epoch, "
        line(
            self.screen,
            "",
            f"{'' if of_stream else an_epoch}{steps:,} {'steps ' if of_stream else ''}in all; about {about} of training",
        )

    def _has(self, what: str, event: dict[str, Any]) -> bool:
        if what == "native":
            return self.plan.shape.native is not None
        return what == "data" or what in event["cached"] or self.plan.recipe.model.config is not None

    def _ready(self, event: dict[str, Any]) -> None:
        num = event["ranks"]
        line(self.screen, "start", f"{num} rank{'s' if num > 1 else ''} ready   {event['seconds']:.1f} s")

    def _begun(self, event: dict[str, Any]) -> None:
        line(self.screen, "begins", f"with {as_typed(event['folder'])}: {event['what']}")

    def _train(self, event: dict[str, Any]) -> None:
        self.max_steps = event["max_steps"]
        if self.screen.is_terminal:
            columns = (
                TextColumn(f"[bold]{'train':<{LABEL}}[/bold]"),
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
        self._beside("evaluate", f"step {event['step']}   loss {event['loss']:.3f}")

    def _save(self, event: dict[str, Any]) -> None:
        self.saved = f"   saved step-{event['step']}"
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, text=f"{self.state}{self.saved}")

    def _asked(self, event: dict[str, Any]) -> None:
        self._beside("saving", f"step-{event['step']}, as asked ({event['why']})")

    def _straggler(self, event: dict[str, Any]) -> None:
        self._beside("slow", event["text"])

    def _not_saved(self, event: dict[str, Any]) -> None:
        self._beside(
            "not saved", f"at step {event['step']}: {event['why']}; training goes on (checkpoint.on_failure: warn)"
        )

    def _restarting(self, event: dict[str, Any]) -> None:
        self.close()
        line(self.screen, "failed", event["why"])
        line(self.screen, "restart", event["what"])

    def _not_restarted(self, event: dict[str, Any]) -> None:
        self.close()
        line(self.screen, "failed", event["text"])

    def _stopping(self, event: dict[str, Any]) -> None:
        if event["saves"]:
            self._beside("stopping", f"{event['why']}: every rank saves when this step is done, then ends")
            return
        self.close()
        line(self.screen, "stopping", f"{event['why']}: ending every rank")

    def _beside(self, label: str, text: str) -> None:
        """A line above the one that moves."""
        if self.progress is not None:
            self.progress.console.print(f"[bold]{label:<{LABEL}}[/bold] {escape(text)}")
        else:
            line(self.screen, label, text)


def show_done(screen: Console, plan: Plan, story: Numbers, run: Path) -> None:
    """The last lines of a run that worked: what came of it and what to type next."""
    shown = as_typed(str(run))
    parts = []
    if story.loss_first is not None and story.loss_last is not None:
        parts.append(f"loss {story.loss_first:.2f} → {story.loss_last:.2f}")
    if story.eval_first is not None and story.eval_last is not None:
        parts.append(f"eval {story.eval_first:.2f} → {story.eval_last:.2f}")
    if story.tokens_per_second is not None:
        speed = predicted_speed(plan, RunDir(run))
        expected = f" (predicted {speed:,.0f})" if speed is not None else ""
        parts.append(f"{story.tokens_per_second:,.0f} tok/s{expected}")
    parts.append(f"{sum(story.seconds.get(name, 0) for name in ('prepare', 'all')):.0f} s")
    if story.memory_bytes is not None:
        parts.append(f"memory predicted {gib(plan.fullest_bytes)}, measured {gib(story.memory_bytes)} GiB")
    if story.stopped_early and plan.recipe.train.early_stopping is not None:
        rounds = plan.recipe.train.early_stopping.patience
        found = f"at step {story.steps} of {story.max_steps}: no better in {rounds} evaluations"
        line(screen, "stopped", f"{found}; best loss {story.eval_best:.3f}" if story.eval_best is not None else found)
    if story.ranks_first is not None:
        line(screen, "ranks", f"{story.ranks_first:,} → {story.ranks_last:,} in all modules, taken away by AdaLoRA")
    if story.answers:
        _show_answers(screen, story.answers, f"{shown}/report.json")
    line(screen, "done", " · ".join(parts))
    if plan.rehearsal is not None:  # nobody talks to a small model with random weights
        return
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


def show_rehearsal(screen: Console, plan: Plan) -> None:
    """What is rehearsed, and what is not as in the real run."""
    assert plan.rehearsal is not None
    model = f"{plan.shape.num_layers} layers and {count(plan.shape.num_parameters)} parameters from random weights"
    ranks = f"{plan.num_processes} rank{'s' if plan.num_processes > 1 else ''} on this machine's CPU"
    line(screen, "rehearsal", f"{plan.strategy} with {ranks}; {model}")
    for place, note in enumerate(plan.rehearsal.notes):
        line(screen, "" if place else "differs", note)


def show_rehearsed(screen: Console, plan: Plan, seconds: float, run: Path) -> None:
    """What has been shown to work."""
    done = ("data", "model", "step", "checkpoint", "resume", "export")
    line(screen, "rehearsed", f"{'   '.join(f'{what} ✓' for what in done)}   {seconds:.0f} s")
    line(screen, "", f"all of it is in {as_typed(str(run))}, which nothing needs any more")


def _show_answers(screen: Console, answers: Sequence[Answer], where: str) -> None:
    """Every question with its answers before and after training, the beginning of each."""
    same = sum(answer.before == answer.after for answer in answers)
    line(screen, "answers", f"before → after, {same} of {len(answers)} the same; in full: {where}")
    for answer in answers:
        before, after = _beginning(answer.before), _beginning(answer.after)
        line(screen, "", _beginning(answer.question))
        line(screen, "", f"  {before} → {'the same' if answer.before == answer.after else after}")


def _beginning(text: str | None) -> str:
    """The start of a text on one line; `–` for what was not asked, `(nothing)` for an empty answer."""
    if text is None:
        return "–"
    flat = " ".join(text.split())
    return (flat if len(flat) <= _BEGINNING else f"{flat[:_BEGINNING].rstrip()}…") or "(nothing)"


def show_stopped(screen: Console, run: Path, saved: Sequence[Path]) -> None:
    """What `launch stop` leaves: the newest of the checkpoints, and how to go on."""
    found = f"{saved[0].name} is saved" if saved else "no checkpoint was saved yet"
    line(screen, "stopped", f"every process of this run has ended; {found}")
    line(screen, "  go on", f"launch resume {as_typed(str(run))}")


def show_submitted(screen: Console, job: str, run: Path) -> None:
    """The job that will carry a run out."""
    line(screen, "submitted", f"job {job}; its run is in {as_typed(str(run))}")
    line(screen, "  watch", f"squeue --job {job}; launch logs {as_typed(str(run))} -f")
    line(screen, "  end", f"scancel --signal=TERM --batch {job} (ranks save first)")


def show_failure(screen: Console, failure: Failure, run: Path, newest: str | None) -> None:
    """The first rank that failed: who, why, where, and what to type. Other ranks are only counted."""
    training = failure.phase in ("first_step", "train", "evaluate", "save", "ask")
    at = f"at step {failure.step}" if training else f"while it was at: {failure.phase}"
    if failure.rank is not None:
        line(screen, "failed", f"rank {failure.rank} ({failure.host}, {failure.device}) {at}")
    elif failure.phase == "start":
        line(screen, "failed", f"the ranks did not start on {failure.host}")
    else:
        line(screen, "failed", f"all ranks ({failure.host}) {at}")
    line(screen, "  cause", failure.cause)
    for note in failure.notes:
        line(screen, "", note)
    if failure.parts:
        line(screen, "  remedy", failure.parts["to_type"].replace("resume RUN", f"resume {as_typed(str(run))}"))
    elif failure.remedy:
        line(screen, "  remedy", failure.remedy.replace("resume RUN", f"resume {as_typed(str(run))}"))
    if failure.where and not failure.parts:
        line(screen, "  where", failure.where)
    for place, where in enumerate(failure.waits):
        line(screen, "" if place else "  ranks", where)
    if failure.waits:
        line(screen, "  stacks", f"{as_typed(str(run))}/errors/stacks-*.txt")
    line(screen, "  log", as_typed(failure.log))
    if failure.traceback and not failure.parts:
        screen.print(escape("\n".join(f"    {text}" for text in failure.traceback.rstrip().splitlines()[-20:])))
    elif not failure.parts:
        screen.print(escape("\n".join(f"    {text}" for text in last_lines(Path(failure.log)))))
    if failure.echoes:
        ranks = ", ".join(map(str, failure.echoes))
        line(screen, "  others", f"rank{'s' if len(failure.echoes) > 1 else ''} {ranks} ended after it, because of it")
    if newest:
        line(screen, "  safe", f"{newest} is complete")
        line(screen, "  go on", f"launch resume {as_typed(str(run))}")
