"""The recipe's questions: answered before and after training, on every rank its share, and said by the report as chat says them."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher import manifest
from launcher.plan import Plan
from launcher.show import show_done
from launcher.story import Numbers, numbers
from launcher.worker import chat
from tests.worker.conftest import Job

QUESTIONS = ["Add 2 and 3", "Add 9 and 8 please", "What is a lake?"]
ASKED = f"data.questions={QUESTIONS}"


def chatted(job: Job, capsys: pytest.CaptureFixture[str]) -> str:
    """What `launch chat` says to the first question."""
    chat.main([str(job.folder), "--prompt", QUESTIONS[0], "--max-new-tokens", "128"])
    return capsys.readouterr().out.strip()


def test_two_ranks_answer_with_the_weights_that_chat_takes(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    # A rate at which the best step is soon behind, so that the last weights are others than the best.
    overshoot = ("train.lr=0.5", "train.warmup=4", "train.eval_every_steps=2", "train.early_stopping.patience=2")
    settings = (*overshoot, "train.max_steps=40", "train.gradient_checkpointing=true", "checkpoint.every_steps=100")
    assert job.start(ASKED, *settings) == [0, 0], job.logs()
    before, after = job.events("answers")
    best = manifest.best_first(job.run)[0][1]
    assert (before["when"], before["step"], after["when"]) == ("before", 0, "after")
    assert best.name == f"step-{after['step']}"
    assert after["step"] < job.events("end")[0]["step"]
    assert list(before["answers"]) == list(after["answers"]) == QUESTIONS
    assert before["answers"] != after["answers"]
    assert after["answers"][QUESTIONS[0]].strip() == chatted(job, capsys)
    board = EventAccumulator(str(job.run.tensorboard)).Reload()
    assert {"answers/before/text_summary", "answers/after/text_summary"} <= set(board.Tags()["tensors"])


def test_a_resumed_run_keeps_the_answers_of_its_first_start(job: Job) -> None:
    one = ("hardware=1xcpu", "data.eval=null", "train.lr=0.05")
    assert job.start(ASKED, *one, "train.max_steps=2") == [0], job.logs()
    first = numbers(job.run, {}).answers
    more = f"data.questions={[*QUESTIONS, 'And now?']}"
    assert job.start(more, *one, "train.max_steps=8", resume=True) == [0], job.logs()
    events = job.events("answers")
    assert [(event["when"], event["step"]) for event in events] == [("before", 0), ("after", 2), ("after", 8)]
    answers = numbers(job.run, {}).answers
    assert [answer.question for answer in answers] == [*QUESTIONS, "And now?"]
    assert [answer.before for answer in answers] == [*(answer.before for answer in first), None]
    assert [answer.after for answer in answers] == list(events[-1]["answers"].values())


def test_asking_changes_nothing_that_is_learned(finished: Job, job: Job) -> None:
    assert job.start(ASKED) == [0, 0], job.logs()
    assert job.losses() == finished.losses()


def test_the_last_lines_of_a_run_put_both_answers_side_by_side(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.run.create()
    plan: Plan = job.plan(ASKED, "hardware=1xcpu")
    told = {
        "before": dict(zip(QUESTIONS, ("5", "no\nidea " * 20, ""), strict=True)),
        "after": dict(zip(QUESTIONS, ("5", "17", "water"), strict=True)),
    }
    lines = [
        f'{{"event": "answers", "when": "{when}", "step": 0, "answers": {answers!r}}}'.replace("'", '"')
        for when, answers in told.items()
    ]
    job.run.events.write_text("\n".join(lines) + "\n")
    story: Numbers = numbers(job.run, {})
    show_done(Console(width=200, soft_wrap=True), plan, story, Path("RUN"))
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    start = next(place for place, line in enumerate(printed) if line.startswith("answers"))
    assert printed[start : start + 7] == [
        "answers      before → after, 1 of 3 the same; in full: RUN/report.json",
        "             Add 2 and 3",
        "               5 → the same",
        "             Add 9 and 8 please",
        "               no idea no idea no idea no idea no idea no idea no idea… → 17",
        "             What is a lake?",
        "               (nothing) → water",
    ]
