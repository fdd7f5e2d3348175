"""transformers.Trainer, configured by the Plan, and the few overrides it needs.

Overridden: which rows a rank gets (resumable, even), evaluation (weighted by tokens), saving and loading (our checkpoints). Everything
else, the loop, accumulation, token-normalised loss, clipping, mixed precision, DDP, is the library's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from launcher.families import family
from launcher.plan import Plan, steps_per_epoch, total_steps
from launcher.rundir import STREAM_FILE, RunDir
from launcher.worker import adapters, checkpoint, sharding, spread, zero
from launcher.worker.asking import Asking
from launcher.worker.byshard import weights_in
from launcher.worker.checkpoint import partitions
from launcher.worker.checkpoint.foreign import NotReadableError, moments_to_begin_with
from launcher.worker.checks import FirstBadStep, FirstStepCheck, check_world
from launcher.worker.data.batches import Batch, RankBatches, StepOrder, WholeSteps, collator
from launcher.worker.data.tokens import IGNORED
from launcher.worker.data.windows import WindowOrder, Windows
from launcher.worker.flow import Beat, Epochs, Flow
from launcher.worker.headloss import PLACES, LossAtLabels, at_labels
from launcher.worker.loading import find_checkpoint
from launcher.worker.masks import tell_of_packs
from launcher.worker.metrics import Metrics
from launcher.worker.prepared import Prepared
from launcher.worker.pulse import Pulse
from launcher.worker.requests import Requests
from launcher.worker.stragglers import OwnTime
from launcher.worker.weights import PARAMETERS_SHARDED, write_weights

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
_ADALORA_FILE = "adalora.safetensors"


def training_arguments(plan: Plan, run: RunDir, num_rows: int) -> TrainingArguments:
    """What the Trainer is told. Logging, evaluation and saving are decided by `Flow`, not by its own strategies."""
    train, steps = plan.recipe.train, total_steps(plan, num_rows)
    warmup = round(train.warmup * steps) if train.warmup < 1 else int(train.warmup)
    checkpointing: dict[str, Any] = {}
    if plan.gradient_checkpointing and plan.strategy != "device_map":  # there it is a matter of each stage
        # bitsandbytes' int8 layers hold their inputs where the other kind of checkpointing cannot let go of them.
        kwargs = {"use_reentrant": plan.recipe.model.quantization == "int8"}
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    return TrainingArguments(
        output_dir=str(run.path),
        max_steps=steps,
        per_device_train_batch_size=plan.micro_batch,
        per_device_eval_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=train.lr,
        lr_scheduler_type=train.schedule if train.schedule != "constant" else "constant_with_warmup",
        warmup_steps=warmup,
        optim=_OPTIMIZERS[train.optimizer],
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm or 0.0,
        bf16=plan.dtype == "bf16",
        fp16=plan.dtype == "fp16",
        use_cpu=plan.kind == "cpu",
        seed=train.seed,
        data_seed=train.seed,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=plan.kind == "cuda",
        remove_unused_columns=False,
        eval_on_start=plan.recipe.data.eval is not None and plan.resume_from is None,
        deepspeed=str(run.deepspeed) if plan.deepspeed is not None else None,
        **checkpointing,
    )


class PlannedTrainer(Trainer):
    """The Trainer of a plan."""

    def __init__(self, plan: Plan, run: RunDir, prepared: Prepared, parts: dict[str, Any], pulse: Pulse) -> None:
        self.plan = plan
        self.run = run
        self.prepared = prepared
        self.pulse = pulse
        self.train_rows, self.eval_rows = parts["train"], parts["eval"]
        tell_of_packs(plan.batching == "packed")
        flash = plan.attention == "flash_attention_2"
        collate = collator(plan.batching, prepared.pad_token_id, family(plan.shape.family).own_mask, flash)
        self.at_labels = self._loss_at_labels(parts["model"])
        if self.at_labels is not None and plan.pipeline is None:
            collate = at_labels(collate, plan.unmasked)
        arguments = training_arguments(plan, run, len(self.train_rows))
        streams = isinstance(self.train_rows, Windows)
        rows = self.train_rows if streams else WholeSteps(self.train_rows, plan.global_batch, plan.accumulation)
        super().__init__(model=parts["model"], args=arguments, train_dataset=rows, data_collator=collate)
        if plan.strategy == "fsdp":
            # Precision and no more: a model that accelerate has prepared it does not wrap in DDP.
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
        self.order = (
            WindowOrder(self.train_rows, plan)
            if streams
            else StepOrder(self.train_rows["length"][:], plan.global_batch, plan.recipe.train.seed, plan.batching)
        )
        self.metrics = Metrics(run, plan, prepared, self.args.device)
        self.metrics.own = OwnTime(plan, self.called, self.args.device)
        check_world(plan, self, pulse.rank)
        self.requests = Requests(run)
        self.bad_step = FirstBadStep()
        self.saver = checkpoint.Saver(run, plan)
        per_epoch = steps_per_epoch(plan, len(self.train_rows))
        for callback in (
            Epochs(self.order, len(self.order)),
            Flow(self, per_epoch),
            FirstStepCheck(self),
            *([Asking(self)] if plan.recipe.data.questions else []),  # before the metrics, which close at the end
            self.metrics,
            Beat(pulse),
        ):
            self.add_callback(callback)
        if plan.recipe.adapter.type == "adalora":
            self.add_callback(adapters.AdaLoraRanks())
            self.add_callback(RankLog(self.metrics))

    def _loss_at_labels(self, model: Any) -> LossAtLabels | None:
        """What computes the loss, where that is not the model as it is."""
        if self.plan.logits == "whole":
            return None
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        return LossAtLabels(whole, self.plan.logits == "parts", self.plan.kind)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's micro batches. accelerate is not asked to deal them out: it wants all of one size, and knows nothing of tokens."""
        plan, args = self.plan, self.args
        dealt = RankBatches(
            self.order, plan.micro_batch, plan.accumulation, args.process_index, args.world_size, plan.shares
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=dealt,
            collate_fn=self.data_collator,
            pin_memory=args.dataloader_pin_memory,
        )

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Any:
        """Supervised tokens of a step over all ranks. The Trainer's own copies them from memory that is not pinned, for which the host
        would wait until the card has done all that it was asked for before."""
        if not self.model_accepts_loss_kwargs:
            return super()._get_num_items_in_batch(batch_samples, device)
        num = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batch_samples]).sum()
        num = num.pin_memory() if self.args.dataloader_pin_memory else num
        num = num.to(device, non_blocking=True)
        return self.accelerator.gather(num).sum() if self.args.world_size > 1 else num

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """On the device; out of pinned memory nobody waits for the copy."""
        device = self.args.device
        moved = {name: part.to(device, non_blocking=True) for name, part in inputs.items() if hasattr(part, "to")}
        return {**inputs, **moved}  # the length of a pack's longest row stays a number

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        self.metrics.own.begin()
        inputs = self._prepare_inputs(inputs)
        self.metrics.counters.add(inputs)
        taken = self.train_dataset.taken
        self.pulse.batch = (*inputs["input_ids"].shape, taken.popleft() if taken else [])
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.metrics.own.mark()
        self.bad_step.note(loss, self.state.global_step + 1)
        self.pulse.beat()
        return loss

    @property
    def called(self) -> Any:
        """The module whose forward pass is a training step's."""
        return self.model

    @property
    def recomputes(self) -> bool:
        """Whether layers of this rank are computed again in the backward pass."""
        return self.plan.gradient_checkpointing

    def prove(self) -> None:
        """Look at what trains on this rank, before the first step: see `sharding.prove`."""
        sharding.prove(self.plan, self.model, self.model_wrapped)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss in nats per supervised token over all evaluation rows, the same on any number of ranks."""
        self.pulse.beat("evaluate")
        total = self._evaluation_sums()
        if dist.is_initialized():
            dist.all_reduce(total)
        metrics = {"eval_loss": float(total[0] / total[1].clamp(min=1))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.pulse.beat("train")
        return metrics

    def _evaluation_sums(self) -> torch.Tensor:
        """[loss summed over the supervised tokens that this rank has evaluated, how many these are]."""
        rows = self.eval_rows
        order = sorted(range(len(rows)), key=lambda row: -rows[row]["length"])
        size, rank, num_ranks = self.plan.micro_batch, self.args.process_index, self.args.world_size
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            # Where weights are sharded every forward pass is a meeting of all ranks: those without rows left come with the shortest one,
            # which does not count.
            for start in range(0, len(order), size * num_ranks):
                mine = order[start + rank * size :][:size]
                batch = self._prepare_inputs(self.data_collator([rows[row] for row in mine or order[-1:]]))
                if not mine:
                    batch = {name: part for name, part in batch.items() if name != PLACES}
                    batch["labels"].fill_(IGNORED)
                total += torch.stack(self._summed_loss(batch)).to(total)
                self.pulse.beat()
        # Without a backward pass the last weights that were gathered stay whole, or on their way.
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
        elif self.plan.strategy == "zero3":
            self.model_wrapped.empty_partition_cache()
        return total

    def _summed_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss over the supervised tokens of a batch, without what an adapter adds to it; and how many these are."""
        labels = batch["labels"][:, 1:]
        num = (labels != IGNORED).sum()
        if self.at_labels is not None:
            self.model(**batch)
            return self.at_labels.summed.to(num.device), num
        logits = self.model(**{name: part for name, part in batch.items() if name != "labels"}).logits[:, :-1].float()
        labels = labels.to(logits.device)  # under a device map the head need not lie where the rows go
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss.to(num.device), num

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.pulse.beat("save")
        started = time.perf_counter()
        self.finish_saving()
        evals = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        at = checkpoint.Position(
            self.state.global_step, float(self.state.epoch or 0), self.prepared.rows_key, evals[-1] if evals else None
        )
        with self._where_saving_fails(self.control.should_training_stop):
            self.saver.save(at, self._write_all)
        self.metrics.scalars({"speed/seconds_saving": time.perf_counter() - started}, self.state.global_step)
        self.pulse.beat("train")

    def finish_saving(self, is_last: bool = False) -> None:
        """Wait for the checkpoint that is being written in the background."""
        self.pulse.beat("save")
        with self._where_saving_fails(is_last):
            self.saver.finish()

    @contextmanager
    def _where_saving_fails(self, is_last: bool) -> Iterator[None]:
        """Do what the recipe says; the last checkpoint has to be there."""
        try:
            yield
        except checkpoint.NotSavedError as error:
            if self.plan.recipe.checkpoint.on_failure == "stop" or is_last:
                raise
            self.metrics.not_saved(self.state.global_step, str(error))

    def _write_all(self, folder: checkpoint.Staging) -> None:
        """This rank's files of a checkpoint, and the place of a stream of rows."""
        self._write_files(folder)
        if isinstance(self.train_rows, Windows) and self.pulse.rank == 0:
            folder.text(STREAM_FILE, json.dumps(self.train_rows.as_json(self.state.global_step)))

    def _write_files(self, folder: checkpoint.Staging) -> None:
        """This rank's files of a checkpoint."""
        if self.plan.deepspeed is not None:
            partitions.write_state(folder, self.model_wrapped, self.model, self.lr_scheduler.last_epoch)
        else:
            checkpoint.write_optimizer(folder, self.optimizer, self.lr_scheduler, self.model)
        write_weights(folder, self.model, self.plan)
        folder.by_library(lambda aside: self._save_rng_state(str(aside)))
        folder.by_library(lambda aside: spread.write_rng(aside, self.metrics.counters.used))
        if self.args.process_index == 0:
            folder.by_library(lambda aside: self.state.save_to_json(str(aside / "trainer_state.json")))
            folder.by_library(lambda aside: self._save_scaler(str(aside)))
            if self.plan.recipe.adapter.type == "adalora":
                folder.tensors(_ADALORA_FILE, adapters.adalora_state(self.model))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """The Trainer's own, which for DeepSpeed would look for DeepSpeed's files: weights are read before it, the rest after it."""
        if resume_from_checkpoint is not None and self.plan.strategy in ("zero1", "zero2"):
            self._load_from_checkpoint(resume_from_checkpoint)
        given = resume_from_checkpoint if self.plan.deepspeed is None else None
        ready = super()._prepare_for_training(max_steps, train_dataloader, given)
        if resume_from_checkpoint is not None and given is None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        if resume_from_checkpoint is None and self.plan.recipe.checkpoint.init_from is not None:
            self._begin_with(Path(self.plan.recipe.checkpoint.init_from))
        return ready

    def _begin_with(self, folder: Path) -> None:
        """Moments of a checkpoint whose weights are in the model already, where they can be read; said in either case."""
        slices, told = None, "weights and moments"
        parameters = dict(zero.trained(self.model))
        decayed = set(self.get_decay_parameter_names(self.model))
        order = sorted(parameters, key=lambda name: name not in decayed)  # as the Trainer puts them into its groups
        try:
            shapes = {name: tuple(getattr(each, "ds_shape", each.shape)) for name, each in parameters.items()}
            slices = moments_to_begin_with(folder, shapes, order)
            if self.plan.recipe.train.optimizer != "adamw":
                raise NotReadableError(f"{self.plan.recipe.train.optimizer} keeps them in 8 bits")
        except NotReadableError as error:
            slices, told = None, f"weights; the optimizer begins anew: {error}"
        if self.plan.deepspeed is not None and any(folder.glob("*.safetensors")):
            partitions.put_back(slices, self.model_wrapped, self.model, weights_in(self.model, folder, folder))
        elif slices is not None:
            checkpoint.put_back(slices, self.optimizer, self.model)
        self.metrics.begun_with(str(folder), told)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        is_first = resume_from_checkpoint == str(self.run.path / str(self.plan.resume_from))
        if self.plan.strategy in PARAMETERS_SHARDED or (is_first and self.plan.recipe.adapter.type == "full"):
            return  # they were read from it when the model was made
        if self.plan.recipe.adapter.type == "adalora":
            adapters.load_adalora_state(self.model, load_file(Path(resume_from_checkpoint) / _ADALORA_FILE))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def load_best(self) -> int:
        """Under early stopping put the weights of the best checkpoint in place, as chat and export take them; the step they are of."""
        step = int(self.state.global_step)
        if self.plan.recipe.train.early_stopping is None:
            return step
        best = find_checkpoint(self.run, "best")
        if best.name != f"step-{step}":
            self._load_from_checkpoint(str(best))
        return int(best.name.removeprefix("step-"))

    def _load_rng_state(self, checkpoint_dir: str | None) -> None:
        """Random states of this rank; on another number of ranks there are none for it, and dropout draws others than before."""
        if checkpoint_dir is None:
            return
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if (Path(checkpoint_dir) / name).is_file():
            super()._load_rng_state(checkpoint_dir)
            spread.read_rng(Path(checkpoint_dir), self.metrics.counters.used)
        else:
            print(
                f"{checkpoint_dir} was written by another number of ranks: dropout draws other random numbers from here on"
            )
            torch.manual_seed(self.args.seed + self.state.global_step)

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is None:
            return
        if self.plan.deepspeed is not None:
            folder = Path(checkpoint_dir)
            weights = weights_in(self.model, folder, folder)
            last_epoch = partitions.read_state(folder, self.model_wrapped, self.model, weights)
        else:
            last_epoch = checkpoint.read_optimizer(Path(checkpoint_dir), self.optimizer, self.model)
        checkpoint.set_schedule(self.lr_scheduler, self.optimizer, last_epoch)


class RankLog(TrainerCallback):
    """AdaLoRA's ranks in TensorBoard and events.jsonl."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.metrics.ranks(state.global_step, list(adapters.active_ranks(model).values()))
