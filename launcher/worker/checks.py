"""What a run must show to go on: the world that was planned, gradients in its first step, and a loss that is a number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from launcher.errors import LaunchError, PreflightError
from launcher.plan import Plan
from launcher.worker import checkpoint, sharding
from launcher.worker.code_trial import Recomputation
from launcher.worker.dtensors import local

if TYPE_CHECKING:
    from launcher.worker.training import PlannedTrainer


class FirstBadStep:
    """The first step at which this rank's loss was no number: kept on its device, and read only when a log has shown that there is one."""

    _NEVER = torch.iinfo(torch.long).max

    def __init__(self) -> None:
        self._step: torch.Tensor | None = None

    def note(self, loss: torch.Tensor, step: int) -> None:
        """Of a micro batch of that step; nobody waits for the value."""
        if self._step is None:
            self._step = torch.full((), self._NEVER, dtype=torch.long, device=loss.device)
        self._step = torch.where(loss.detach().isfinite(), self._step, self._step.clamp(max=step))

    def read(self) -> int | None:
        """That step; None where there is none on this rank."""
        step = self._NEVER if self._step is None else int(self._step)
        return step if step != self._NEVER else None


class NoGradientError(LaunchError):
    """Training does not move, or moves to where no number is."""


class FirstStepCheck(TrainerCallback):
    """Stops a run whose first step shows that it does not do what was planned, and any run whose loss is no number."""

    def __init__(self, trainer: PlannedTrainer) -> None:
        self.trainer = trainer
        self.done = False
        self.recomputation: Recomputation | None = None
        # Hooks inside of a compiled layer would be compiled with it. Those are layers of transformers, which checkpoint.
        if trainer.recomputes and not trainer.plan.recipe.train.compile:
            again = next((stage.first for stage in trainer.plan.stages if stage.recompute), 0)
            self.recomputation = Recomputation(trainer.called, layer=0 if trainer.plan.pipeline else again)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.prove()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.done:
            return
        self.done = True
        if self.recomputation is not None:
            self.recomputation.stop()
            self.recomputation.require(self.trainer.plan.shape.name)
        trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if self.trainer.plan.deepspeed is not None:  # gradients are gone by now, their norm is kept
            _require_gradient(bool(self.trainer.model_wrapped.get_global_grad_norm()))
            return
        without = [name for name, parameter in trainable if parameter.grad is None]
        if without:
            found = f"{len(without)} of {len(trainable)} trainable tensors got no gradient: {', '.join(without[:8])}"
            raise NoGradientError(
                "adapter", found, "train other modules (adapter.targets), or set train.gradient_checkpointing=false"
            )
        grads = [local(parameter.grad) for _, parameter in trainable]
        _require_gradient(sharding.on_any_rank(any(bool(grad.count_nonzero()) for grad in grads), args.device))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            steps = [step for step in checkpoint.gathered(self.trainer.bad_step.read()) if step is not None]
            rate = (logs or {}).get("learning_rate", 0.0)
            found = f"the loss is {loss} at step {min(steps, default=state.global_step)}, with a learning rate of {rate:.3g}"
            frozen = ((name, p) for name, p in self.trainer.model.named_parameters() if not p.requires_grad)
            broken = next((name for name, p in frozen if p.is_floating_point() and not p.isfinite().all()), None)
            broken = next(filter(None, checkpoint.gathered(broken)), None)  # all ranks are here, and give one reason
            if broken is not None:
                raise NoGradientError(
                    f"model {self.trainer.plan.shape.name}",
                    f"{broken} holds values that are no numbers",
                    "copy its weights again",
                )
            lr = self.trainer.plan.recipe.train.lr
            raise NoGradientError(
                f"train.lr: {lr:g}", found, f"learn more slowly: launch resume RUN train.lr={lr / 10:g}"
            )


def _require_gradient(found: bool) -> None:
    if not found:
        raise NoGradientError(
            "adapter", "every gradient is exactly zero", "check data.max_length and the answers in your data"
        )


def check_world(plan: Plan, trainer: Trainer, rank: int) -> None:
    """Compare the world that the Trainer found with the plan, before the first step: several libraries fall back to single ranks silently.

    Raises:
        PreflightError: another number of ranks, or another rank than torchrun gave.
    """
    found, place = trainer.accelerator.num_processes, trainer.accelerator.process_index
    if found != plan.num_processes or trainer.args.world_size != plan.num_processes or place != rank:
        raise PreflightError(
            f"{plan.num_processes} ranks",
            f"the Trainer of rank {rank} sees itself as {place} of {found}",
            "start the run with: launch RECIPE",
        )
