"""A run directory in, its trained model and tokenizer out, for chat and export: base, adapter of a checkpoint, prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher import manifest
from launcher.errors import UsageError
from launcher.families import family
from launcher.plan import ChatPlan, Plan, read_plan
from launcher.rundir import RunDir
from launcher.worker import spread
from launcher.worker.data.tokens import Prompter
from launcher.worker.devices import card
from launcher.worker.model import load_model
from launcher.worker.prepared import Prepared, read_prepared
from launcher.worker.staged import load_tokenizer


@dataclass(frozen=True)
class Trained:
    """What a run has trained."""

    plan: Plan
    prepared: Prepared
    model: Any
    tokenizer: Any
    checkpoint: Path

    @property
    def prompter(self) -> Prompter:
        return Prompter(self.tokenizer, self.prepared.template, self.prepared.eos_token_ids)


def load_trained(run: RunDir, step: str | None, quantized: bool, spread_so: ChatPlan | None = None) -> Trained:
    """Load a checkpoint of a run.

    Args:
        step: a number, `best`, `latest`; None is best where the recipe stops early, else latest.
        quantized: whether a quantised base stays so.
        spread_so: the devices that its layers lie on; None for one device.

    Raises:
        UsageError: there is no such valid checkpoint.
    """
    plan = read_plan(run)
    prepared = read_prepared(run)
    folder = chosen_checkpoint(run, plan, step)
    full = plan.recipe.adapter.type == "full"
    model_dir = str(folder) if full else prepared.model_dir
    placed: spread.Places = {"": torch.device("cuda" if torch.cuda.is_available() else "cpu")}
    if spread_so is not None:
        devices = [card(place) for place in range(len(spread_so.stages))]
        known = family(plan.shape.family)
        placed = spread.places(known, spread_so.stages, devices, model_dir, prepared.code, spread_so.in_host)
    model = load_model(plan, model_dir, placed, quantized, prepared.code)
    if not full:
        import peft

        model = peft.PeftModel.from_pretrained(model, str(folder))
    spread.connect(model, placed)
    model.eval()
    model.config.use_cache = True
    tokenizer = load_tokenizer(prepared.tokenizer_dir, prepared.code)
    return Trained(plan, prepared, model, tokenizer, folder)


def chosen_checkpoint(run: RunDir, plan: Plan, step: str | None) -> Path:
    """The folder of the checkpoint that somebody wants (`load_trained`).

    Raises:
        UsageError: there is no such valid checkpoint.
    """
    return find_checkpoint(run, step or ("best" if plan.recipe.train.early_stopping else "latest"))


def find_checkpoint(run: RunDir, which: str) -> Path:
    """The folder of a valid checkpoint: a step, `best` or `latest`.

    Raises:
        UsageError: there is none.
    """
    if which == "best":
        for _, folder in manifest.best_first(run):
            if manifest.verify(folder).problem is None:
                return folder
        which = "latest"
    if which == "latest":
        newest, skipped = manifest.newest_valid(run)
        if newest is not None:
            return newest.folder
        found = f"{skipped[0].folder.name}: {skipped[0].problem}" if skipped else "there is none yet"
        raise UsageError(f"checkpoint of {run.path}", found, f"train first: launch resume {run.path}")
    folder = run.checkpoints / f"step-{which}"
    problem = manifest.verify(folder).problem if folder.is_dir() else "there is no such checkpoint"
    if problem is not None:
        names = ", ".join(folder.name.removeprefix("step-") for folder in manifest.folders(run)) or "none"
        raise UsageError(f"--step {which}", problem, f"give one of: {names}")
    return folder
