"""Counts of every rank in, TensorBoard and events.jsonl out. One writer: rank 0.

Tokens are counted as tensors on the device and read once per log, so that counting makes no step wait.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from launcher.families import family
from launcher.plan import Plan
from launcher.rundir import RunDir, append_event, read_json
from launcher.worker.data.tokens import IGNORED
from launcher.worker.devices import peak_memory_bytes, stage_devices
from launcher.worker.headloss import TOKENS
from launcher.worker.prepared import Prepared
from launcher.worker.stragglers import OwnTime, Straggler, Stragglers

_ROOM_BYTES = 2**20
_MOST_UNTOLD = 100


class Counters:
    """Tokens that this rank has worked on since the last reading, and the memory of the devices that it uses.

    Args:
        device: where the counts are kept.
    """

    def __init__(self, device: torch.device, used: Sequence[torch.device], pad_token_id: int | None = None) -> None:
        self.device = device
        self.used = used
        self.pad_token_id = pad_token_id
        self.reset()

    def reset(self) -> None:
        self.real = torch.zeros((), dtype=torch.long, device=self.device)
        self.supervised = torch.zeros((), dtype=torch.long, device=self.device)
        self.slots = 0
        self.since = time.perf_counter()

    def add(self, inputs: dict[str, torch.Tensor]) -> None:
        """Count a micro batch of shape (rows, length)."""
        mask = inputs.get("attention_mask")
        ids, counted = inputs["input_ids"], inputs.get(TOKENS)
        if counted is None and mask is None and self.pad_token_id is not None:
            mask = ids != self.pad_token_id
        self.slots += ids.numel()
        self.real += counted if counted is not None else ids.numel() if mask is None else mask.sum()
        self.supervised += (inputs["labels"] != IGNORED).sum()

    def read(self) -> list[float]:
        """[real tokens, supervised tokens, slots with padding, seconds, peak bytes of each device] since the last reading."""
        seconds = time.perf_counter() - self.since
        values = [
            float(self.real),
            float(self.supervised),
            float(self.slots),
            seconds,
            *(float(peak_memory_bytes(device)) for device in self.used),
        ]
        self.reset()
        return values


class Metrics(TrainerCallback):
    """Writes what the Trainer logs, with the speed and memory of every rank beside it."""

    def __init__(self, run: RunDir, plan: Plan, prepared: Prepared, device: torch.device) -> None:
        self.run = run
        self.plan = plan
        self.prepared = prepared
        # The collator gives such a model no mask, and its padding is no token of any row.
        no_mask = family(plan.shape.family).own_mask
        used = tuple(dict.fromkeys(stage_devices(plan))) if plan.num_processes == 1 and plan.stages else (device,)
        self.counters = Counters(device, used, prepared.pad_token_id if no_mask else None)
        self.own = OwnTime(plan, None, device)
        self.stragglers = Stragglers(unlike=plan.pipeline is not None)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.writer: SummaryWriter | None = None
        self._out_of_room = False
        self._untold: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counters.reset()
        if self.rank == 0:
            # What a resumed run logs again replaces what the interrupted one logged after its checkpoint.
            self.writer = SummaryWriter(
                str(self.run.tensorboard), purge_step=state.global_step + 1 if state.global_step else None
            )
            if state.global_step == 0:
                self.writer.add_text("recipe", _code(self.run.recipe.read_text(encoding="utf-8")))
                self.writer.add_text("plan", _code(self.run.plan.read_text(encoding="utf-8")))
            append_event(
                self.run,
                {"event": "train", "time": time.time(), "step": state.global_step, "max_steps": state.max_steps},
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        ranks = gathered([self.own.read(), *self.counters.read()], self.counters.device)
        self.own.mark()
        if self.writer is None:
            return
        own, ranks = [row[0] for row in ranks], [row[1:] for row in ranks]
        step, seconds = state.global_step, max(row[3] for row in ranks)
        # All stages of a pipeline work on the same rows.
        copies = len(self.plan.stages) if self.plan.pipeline else 1
        real, supervised, slots = (sum(row[place] for row in ranks) / copies for place in range(3))
        values = {
            "train/loss": logs["loss"],
            "train/learning_rate": logs["learning_rate"],
            "train/grad_norm": logs.get("grad_norm", 0.0),
            "train/epoch": state.epoch,
            "speed/tokens_per_second": real / seconds,
            "speed/padding_share": 1 - real / slots if slots else 0.0,
            "data/supervised_share": supervised / real if real else 0.0,
        }
        for rank, row in enumerate(ranks):
            values[f"speed_per_rank/tokens_per_second_{rank}"] = row[0] / row[3]
            if self.own.measures:
                values[f"speed_per_rank/own_seconds_a_step_{rank}"] = own[rank]
        peaks = [peak for row in ranks for peak in row[4:]]
        for place, peak in enumerate(peaks):
            values[f"memory_per_{'device' if self.plan.stages else 'rank'}/peak_gib_{place}"] = peak / 2**30
        event = {
            "event": "log",
            "time": time.time(),
            "step": step,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": round(real / seconds, 1),
            "padding_share": round(values["speed/padding_share"], 4),
            # As the plan counts it: of the fullest rank, which in a naive device map has several devices.
            "memory_bytes": sum(peaks) if self.plan.schedule == "naive" else max(peaks),
            "device_memory_bytes": peaks,
        }
        self._write(values, step, event)
        for straggler in self.stragglers.look(step, own):
            self._tell_of(straggler, step)

    def _tell_of(self, straggler: Straggler, step: int) -> None:
        rank, host = straggler.rank, (read_json(self.run.heartbeat(straggler.rank)) or {}).get("host", "?")
        text = f"rank {rank} ({host}) is {straggler.behind:.0%} behind the median in its own work, since step {straggler.since}"
        told = {
            "rank": rank,
            "host": host,
            "behind": round(straggler.behind, 3),
            "since": straggler.since,
            "text": text,
        }
        self._write(
            {f"stragglers/behind_{rank}": straggler.behind},
            step,
            {"event": "straggler", "time": time.time(), "step": step, **told},
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.own.end_step()  # the ranks have just met

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        # The time of an evaluation is no training time.
        self.counters.since = time.perf_counter()
        self.own.mark()
        if self.writer is not None and metrics:
            loss, step = metrics["eval_loss"], state.global_step
            self._write({"eval/loss": loss}, step, {"event": "eval", "time": time.time(), "step": step, "loss": loss})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counters.since = time.perf_counter()  # the time of a save is no training time either
        self.own.mark()

    def begun_with(self, folder: str, what: str) -> None:
        """What was taken from the checkpoint that the recipe begins with."""
        if self.rank == 0:
            append_event(self.run, {"event": "begun", "time": time.time(), "folder": folder, "what": what})

    def not_saved(self, step: int, why: str) -> None:
        """A checkpoint could not be written, and training goes on without it."""
        self._write({}, step, {"event": "not_saved", "time": time.time(), "step": step, "why": why})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.writer is not None:
            with suppress(OSError):
                self._hparams(state)
                self.writer.close()
            append_event(self.run, {"event": "end", "time": time.time(), "step": state.global_step})

    def scalars(self, values: dict[str, float], step: int) -> None:
        """More values of somebody else's, on rank 0."""
        self._write(values, step)

    def _write(self, values: dict[str, float], step: int, event: dict[str, Any] | None = None) -> None:
        """Scalars and an event, on rank 0. A full disk ends no training: it gets the events later, the scalars not."""
        if self.writer is None:
            return
        self._untold += [event] if event is not None else []
        if self._out_of_room and shutil.disk_usage(self.run.path).free > _ROOM_BYTES:
            # TensorBoard's writer has ended with the error; the values of this step are its first ones.
            self.writer, self._out_of_room = SummaryWriter(str(self.run.tensorboard)), False
        try:
            if not self._out_of_room:
                for name, value in values.items():
                    self.writer.add_scalar(name, value, step)
                self.writer.flush()
            while self._untold:
                append_event(self.run, self._untold[0])
                del self._untold[0]
        except OSError as error:
            self._out_of_room = True
            del self._untold[:-_MOST_UNTOLD]
            with suppress(OSError):  # the log may lie on the same disk
                print(f"tensorboard lacks step {step}: {error}", flush=True)

    def answers(self, when: str, step: int, answers: dict[str, str]) -> None:
        """What the model answers `before` or `after` training, on rank 0. Every rank calls it: asking is no training time."""
        self.counters.since = time.perf_counter()
        if self.writer is not None:
            shown = "\n\n".join(f"**{question}**\n\n{_code(answer)}" for question, answer in answers.items())
            self.writer.add_text(f"answers/{when}", shown, step)
            self.writer.flush()
            append_event(
                self.run, {"event": "answers", "time": time.time(), "step": step, "when": when, "answers": answers}
            )

    def ranks(self, step: int, ranks: list[int]) -> None:
        """AdaLoRA's ranks, one a module."""
        values = {"ranks": sum(ranks), "smallest": min(ranks), "largest": max(ranks)}
        self.scalars({f"adalora/{name}": float(value) for name, value in values.items()}, step)
        if self.writer is not None:
            append_event(self.run, {"event": "ranks", "time": time.time(), "step": step, **values})

    def _hparams(self, state: Any) -> None:
        """The settings beside the result, for TensorBoard's table of runs."""
        recipe = self.plan.recipe
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        evals = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        settings = {
            "lr": recipe.train.lr,
            "global_batch": recipe.train.global_batch,
            "epochs": recipe.train.epochs,
            "seed": recipe.train.seed,
            "adapter": recipe.adapter.type,
            "r": recipe.adapter.r,
            "alpha": recipe.adapter.alpha,
            "dropout": recipe.adapter.dropout,
            "dtype": self.plan.dtype,
            "strategy": self.plan.strategy,
            "num_processes": self.plan.num_processes,
        }
        results = {
            "hparam/loss": losses[-1] if losses else float("nan"),
            "hparam/eval_loss": evals[-1] if evals else float("nan"),
        }
        assert self.writer is not None
        self.writer.add_hparams(settings, results, run_name=".")


def gathered(values: list[float], device: torch.device) -> list[list[float]]:
    """The same numbers of every rank, in rank order."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    if not dist.is_initialized():
        return [mine.tolist()]
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return [part.tolist() for part in parts]


def _code(text: str) -> str:
    """Text that TensorBoard shows as it is: markdown's indented block."""
    return "\n".join("    " + line for line in text.splitlines())
