"""Steps of a pipeline: what the Trainer's own loop cannot do, on what is the Trainer's everywhere else.

Order of rows, optimizer, learning rate, when to log, evaluate, save and stop, and the layout of checkpoints are those of
`PlannedTrainer`. Every rank goes through the same rows; it trains the weights of its stage, and what it decides it decides from
numbers that all share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerState

from launcher.plan import Plan
from launcher.rundir import RunDir
from launcher.worker import checkpoint
from launcher.worker.data.batches import places_of
from launcher.worker.headloss import LossAtLabels
from launcher.worker.pipeline.cutting import Stage, build_stage, prove, stream_dtype
from launcher.worker.pipeline.saving import read_rng_state, write_part, write_rng_state
from launcher.worker.pipeline.schedule import Pipeline, micro_batches
from launcher.worker.prepared import Prepared
from launcher.worker.pulse import Pulse
from launcher.worker.training import PlannedTrainer

# Micro batches of an evaluation that are in flight, a stage: more would wait less and keep more hidden states.
_EVALUATED_AT_ONCE = 4


class LossScale:
    """fp16: the factor that keeps gradients of a small loss from vanishing. torch's GradScaler, with one mind over all ranks.

    Each rank sees overflows of its own stage alone; whether a step counts is decided from the norm over all of them.
    """

    START, GROWTH, BACKOFF, PATIENCE = 65536.0, 2.0, 0.5, 2000  # GradScaler's

    def __init__(self) -> None:
        self.value, self.good_steps = self.START, 0

    def update(self, finite: bool) -> None:
        """After a step: halve it after an overflow, double it after long without one."""
        if not finite:
            self.value, self.good_steps = self.value * self.BACKOFF, 0
            return
        self.good_steps += 1
        if self.good_steps == self.PATIENCE:
            self.value, self.good_steps = self.value * self.GROWTH, 0


def pipelined_trainer(
    plan: Plan, run: RunDir, prepared: Prepared, device: torch.device, rows: dict[str, Any], pulse: Pulse
) -> PipelinedTrainer:
    """The trainer of this rank's stage."""
    stage, names = build_stage(plan, run, prepared, device, len(rows["train"]), pulse.rank)
    return PipelinedTrainer(plan, run, prepared, {"stage": stage, "names": names, **rows}, pulse)


class PipelinedTrainer(PlannedTrainer):
    """Trains one stage of a plan; all ranks together train the model."""

    def __init__(self, plan: Plan, run: RunDir, prepared: Prepared, parts: dict[str, Any], pulse: Pulse) -> None:
        self.stage: Stage = parts["stage"]
        self.names: frozenset[str] = parts["names"]
        super().__init__(plan, run, prepared, {**parts, "model": self.stage.model}, pulse)
        self.pipeline = Pipeline(self.stage, self.args.device, stream_dtype(self.stage, plan), plan.shape.hidden_size)
        self.scale = LossScale() if plan.dtype == "fp16" else None
        # Stages that draw the same random numbers would drop the same values in every layer.
        torch.manual_seed(plan.recipe.train.seed * len(plan.stages) + pulse.rank)

    def _loss_at_labels(self, model: Any) -> LossAtLabels | None:
        return super()._loss_at_labels(model) if self.stage.planned.head else None

    @property
    def called(self) -> torch.nn.Module:
        return self.stage

    @property
    def recomputes(self) -> bool:
        return self.stage.planned.recompute

    def prove(self) -> None:
        prove(self.plan, self.stage, self.names)

    def train(self, resume_from_checkpoint: str | None = None, **_: Any) -> None:
        """Go through the steps of the plan, from the checkpoint on where there is one."""
        self._begin(resume_from_checkpoint)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        if self.args.eval_on_start:
            self.evaluate()
        per_epoch, global_batch = len(self.order), self.plan.global_batch
        while not self.control.should_training_stop:
            epoch, place = divmod(self.state.global_step, per_epoch)
            if place == 0 or self._steps is None:
                self.order.go_to(epoch)
                self._steps = self.order.steps()
            logs = self._step([self.train_dataset[number] for number in self._steps[place]])
            self.state.global_step += 1
            self.state.epoch = epoch + min(1.0, (place + 1) * global_batch / len(self.train_rows))
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            self._after_step(logs)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _begin(self, resume_from_checkpoint: str | None) -> None:
        """Optimizer, schedule and counters, new or as they were."""
        self.create_optimizer()
        self.create_scheduler(self.args.max_steps)
        self.state = TrainerState()
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_rng_state(resume_from_checkpoint)
            if self.scale is not None and (folder / "loss_scale.json").is_file():
                self.scale.value, self.scale.good_steps = json.loads((folder / "loss_scale.json").read_text())
        elif self.plan.recipe.checkpoint.init_from is not None:
            self._begin_with(Path(self.plan.recipe.checkpoint.init_from))
        self.state.max_steps = self.args.max_steps
        # What the Trainer looks for, should one rank go on from here.
        self.state.train_batch_size = self.args.train_batch_size
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler
        self._loss = torch.zeros((), device=self.args.device)
        self._logged_step = self.state.global_step
        self._steps: list[list[int]] | None = None
        self.control.should_training_stop = self.state.global_step >= self.state.max_steps
        self.stage.train()

    def _step(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """One optimizer step; gradient norm and learning rate of it."""
        assert self.plan.pipeline is not None
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
        self.metrics.own.begin()
        micro = micro_batches(
            rows, self.plan.micro_batch, len(self.plan.stages), self.prepared.pad_token_id, self.data_collator
        )
        self.metrics.counters.add(micro.batch)
        slots, length = micro.batch["input_ids"].shape
        self.pulse.batch = (slots // micro.num, length, places_of(rows))
        scale = 1.0 if self.scale is None else self.scale.value
        loss = self.pipeline.train(micro, self.plan.pipeline, scale)
        loss, norm = self._over_all_stages(loss, scale)
        self._loss += loss
        self.control = self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
        finite = self.scale is None or bool(norm.isfinite())
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        if finite:
            self.optimizer.step()
            self.control = self.callback_handler.on_optimizer_step(self.args, self.state, self.control)
            self.lr_scheduler.step()
        if self.scale is not None:
            self.scale.update(finite)
        self.optimizer.zero_grad()
        return {"grad_norm": norm, "learning_rate": learning_rate}

    def _over_all_stages(self, loss: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip by the norm of all stages' gradients together; the loss and that norm, on every rank."""
        trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        grads = [parameter.grad for parameter in trained]
        if scale != 1.0 and grads:
            torch._foreach_mul_(grads, 1 / scale)
        own = torch.nn.utils.get_total_norm(grads).to(loss)
        shared = torch.stack([loss, own**2])
        dist.all_reduce(shared)
        norm = shared[1].sqrt()
        if self.args.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(trained, self.args.max_grad_norm, norm)
        return shared[0], norm

    def _after_step(self, logs: dict[str, float]) -> None:
        """Log, evaluate and save where this step is one for it."""
        if self.control.should_log:
            mean = self._loss.item() / (self.state.global_step - self._logged_step)
            self._loss.zero_()
            self._logged_step = self.state.global_step
            self.log({"loss": mean, **{name: float(value) for name, value in logs.items()}})
        if self.control.should_evaluate:
            self.evaluate()
        if self.control.should_save:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _evaluation_sums(self) -> torch.Tensor:
        rows = self.eval_rows
        order = sorted(range(len(rows)), key=lambda row: -rows[row]["length"])
        size, pad = self.plan.micro_batch, self.prepared.pad_token_id
        at_once = size * _EVALUATED_AT_ONCE * len(self.plan.stages)
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.stage.eval()
        for start in range(0, len(order), at_once):
            chosen = [rows[row] for row in order[start : start + at_once]]
            micro = micro_batches(chosen, size, 1, pad, self.data_collator)
            loss = self.pipeline.evaluate(micro)
            if self.pipeline.is_last:
                total += torch.stack([loss.double(), torch.tensor(float(micro.num_items)).to(total)])
            self.pulse.beat()
        self.stage.train()
        return total

    def _write_files(self, folder: checkpoint.Staging) -> None:
        rank = self.pulse.rank
        checkpoint.write_optimizer(folder, self.optimizer, self.lr_scheduler, self.model, own_parameters=True)
        write_rng_state(folder, rank, self.args.device)
        write_part(folder, self.model, self.plan, self.requests.group)
        if rank == 0:
            folder.by_library(lambda aside: self.state.save_to_json(str(aside / "trainer_state.json")))
            if self.scale is not None:
                folder.text("loss_scale.json", json.dumps([self.scale.value, self.scale.good_steps]))

    def _load_rng_state(self, checkpoint_dir: str | None) -> None:
        num = len(self.plan.stages)
        if checkpoint_dir and not read_rng_state(Path(checkpoint_dir), self.pulse.rank, num, self.args.device):
            print(f"{checkpoint_dir} was not written by {num} stages: dropout draws other random numbers from here on")
            torch.manual_seed((self.args.seed + self.state.global_step) * num + self.pulse.rank)
