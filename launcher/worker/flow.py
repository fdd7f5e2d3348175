"""What happens at which step: logging, evaluation, saving, the end. The same on every rank, by the step and by what ranks agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from launcher.worker.data.batches import StepOrder
from launcher.worker.pulse import Pulse

if TYPE_CHECKING:
    from launcher.worker.training import PlannedTrainer


class Epochs(TrainerCallback):
    """Tells the order of rows which epoch begins, or is gone on with."""

    def __init__(self, order: StepOrder, per_epoch: int) -> None:
        self.order = order
        self.per_epoch = per_epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.order.go_to(state.global_step // self.per_epoch)


class Flow(TrainerCallback):
    """Decides at every step whether to log, evaluate, save and stop."""

    def __init__(self, trainer: PlannedTrainer, per_epoch: int) -> None:
        plan, train = trainer.plan, trainer.plan.recipe.train
        self.log_every = train.log_every_steps
        self.eval_every = train.eval_every_steps if train.eval_every_steps != "auto" else per_epoch
        every = plan.recipe.checkpoint.every_steps
        self.save_every = every if every != "auto" else per_epoch
        self.has_eval = bool(len(trainer.eval_rows))
        self.early_stopping = train.early_stopping
        self.trainer = trainer
        self.requests = trainer.requests

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        control.should_save = last or step % self.save_every == 0
        control.should_evaluate = self.has_eval and (last or step % self.eval_every == 0)
        # A save ends a logging window, so that a resumed run logs the very windows of the uninterrupted one. Under early stopping an
        # evaluation may be followed by one.
        may_save = control.should_save or (control.should_evaluate and self.early_stopping is not None)
        control.should_log = may_save or step == 1 or step % self.log_every == 0
        control.should_training_stop = last
        asked = self.requests.agreed(failed=self.trainer.saver.has_failed)
        if asked.failed:  # in the background, on this rank or another
            self.trainer.finish_saving()
        if asked.save:
            control.should_save = control.should_log = True
            self.requests.tell(step, "save-now")
        if asked.stop and not last:
            control.should_save = control.should_log = control.should_training_stop = True
            # Who takes the machine away does not wait for an evaluation; only what stops early depends on it.
            control.should_evaluate = control.should_evaluate and self.early_stopping is not None
            self.requests.stopped_by = asked.stop

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.finish_saving(is_last=True)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if state.global_step == 0:
            return
        if not control.should_training_stop:  # it may have been asked for in the course of a long evaluation
            self.requests.stopped_by = self.requests.agreed().stop
            stops = self.requests.stopped_by is not None
            control.should_save, control.should_training_stop = control.should_save or stops, stops
        if self.early_stopping is None:
            return
        # Who stops early wants the best weights, not the last: each new best is saved, and rotation spares it.
        control.should_save = control.should_save or losses[-1] <= min(losses)
        if rounds_without_gain(losses, self.early_stopping.min_delta) >= self.early_stopping.patience:
            control.should_training_stop = control.should_save = True


def rounds_without_gain(losses: list[float], min_delta: float) -> int:
    """Evaluations since the loss last fell by more than `min_delta` below the best before it."""
    best, since = float("inf"), 0
    for loss in losses:
        if loss < best - min_delta:
            best, since = loss, 0
        else:
            since += 1
    return since


class Beat(TrainerCallback):
    """The heartbeat of every step. The first one of a process, in which kernels are chosen and compiled, is a phase of its own."""

    def __init__(self, pulse: Pulse) -> None:
        self.pulse = pulse
        self._phase = "first_step"

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pulse.beat(self._phase, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._phase = "train"
        self.pulse.beat("train")
