"""The micro batches of a step in, their loss and every stage's gradients out, through torch.distributed.pipelining.

torch's stage and schedule are made anew for every step: shapes are frozen at the first one, steps have unlike shapes, and
making them costs 0.2 ms. They are told all shapes, so nothing is computed twice to find them out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from launcher.pipeline import Order
from launcher.worker.data.batches import Batch
from launcher.worker.data.tokens import IGNORED

SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


class LeanStage(PipelineStage):
    """torch's stage with buffers for the micro batches in flight; its own has them for all of a step, forward and backward."""

    def _prepare_forward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        found = super()._prepare_forward_infra(1, *args, **kwargs)
        self.args_recv_info = _OnDemand(self.args_recv_info[0], self.device)
        return found

    def _prepare_backward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        found = super()._prepare_backward_infra(1, *args, **kwargs)
        self.grad_recv_info = _OnDemand(self.grad_recv_info[0], self.device)
        self.chunks = num_microbatches
        return found

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Go backward with a micro batch; what it came in with is gone then."""
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self.args_recv_info.pop(bwd_chunk_id, None)
        self.grad_recv_info.pop(bwd_chunk_id, None)


class _OnDemand(dict[int, tuple[Any, ...]]):
    """Number of a micro batch -> where to receive it, with a buffer that is made when it is asked for."""

    def __init__(self, like: tuple[Any, ...], device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.like = tuple(copy.copy(info) for info in like)
        for info in self.like:
            if getattr(info, "buffer", None) is not None:
                trains = info.buffer.requires_grad
                info.buffer = info.buffer.detach().to("meta").requires_grad_(trains)

    def __missing__(self, number: int) -> tuple[Any, ...]:
        self[number] = tuple(copy.copy(info) for info in self.like)
        for info in self[number]:
            if getattr(info, "buffer", None) is not None:
                info.buffer = torch.empty_like(info.buffer, device=self.device, requires_grad=info.buffer.requires_grad)
        return self[number]


@dataclass(frozen=True)
class Micro:
    """A step's micro batches: tensors of shape (num × rows, length), one behind the other; `num_items` supervised tokens in all."""

    batch: Batch
    num: int
    num_items: int


def micro_batches(
    rows: Sequence[dict[str, Any]], size: int, least: int, pad_token_id: int, collate: Callable[[list[Any]], Batch]
) -> Micro:
    """Cut the rows of a step into micro batches of one shape.

    Rows of which nothing is learned fill up the last one, and make up those that a pipeline wants more: one for every stage. All are
    padded to the longest.

    Args:
        size: rows of a micro batch.
        least: micro batches.
        collate: makes tensors of the rows of a micro batch.
    """
    num = max(least, -(-len(rows) // size))
    filler = {"input_ids": [pad_token_id], "labels": [IGNORED]}
    filled = [*rows, *[filler] * (num * size - len(rows))]
    batches = [collate(filled[start : start + size]) for start in range(0, len(filled), size)]
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    padded = [_padded(batch, longest, pad_token_id) for batch in batches]
    batch = {name: torch.cat([batch[name] for batch in padded]) for name in padded[0]}
    # As the Trainer counts: the first label of a row is predicted by nothing.
    return Micro(batch, num, int((batch["labels"][:, 1:] != IGNORED).sum()))


def _padded(batch: Batch, length: int, pad_token_id: int) -> Batch:
    """Right-padded to a length. Of a pack the padding is a row of its own, whose positions start anew."""
    missing = length - batch["input_ids"].shape[1]
    fill = {"input_ids": pad_token_id, "labels": IGNORED, "attention_mask": 0}
    padded = {
        name: torch.nn.functional.pad(part, (0, missing), value=fill[name])
        for name, part in batch.items()
        if name in fill
    }
    if "position_ids" in batch:
        positions = torch.arange(missing).expand(len(batch["position_ids"]), -1)
        padded["position_ids"] = torch.cat([batch["position_ids"], positions], dim=1)
    return padded


class Pipeline:
    """Carries steps out on this rank's stage.

    Args:
        module: of this stage: what came in, `labels` on the last one and other tensors in, hidden states or the loss out, divided by
            its `num_items`.
        stream: precision of the hidden states that are handed on; width: how many a token has.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device, stream: torch.dtype, width: int) -> None:
        self.module = module
        self.device = device
        self.stream = stream
        self.width = width
        self.rank, self.num_stages = dist.get_rank(), dist.get_world_size()

    @property
    def is_last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.rank == self.num_stages - 1

    def train(self, micro: Micro, order: Order, scale: float = 1.0) -> torch.Tensor:
        """Add a step's gradients, times `scale`, to those that are there; its loss on the last rank, 0 on the others."""
        return self._run(micro, order, scale, training=True)

    def evaluate(self, micro: Micro) -> torch.Tensor:
        """The sum of the loss over all supervised tokens, on the last rank."""
        with torch.no_grad():
            return self._run(micro, "gpipe", 1.0, training=False)

    def _run(self, micro: Micro, order: Order, scale: float, training: bool) -> torch.Tensor:
        # A larger loss by a smaller divisor: whatever is done to it behind the stage would keep the graphs of all micro batches alive.
        self.module.num_items = max(1, micro.num_items) / scale if training else 1
        tensors = {name: part.to(self.device, non_blocking=True) for name, part in micro.batch.items()}
        ids, labels = tensors.pop("input_ids"), tensors.pop("labels")
        rows = len(ids) // micro.num
        handed = torch.empty(rows, ids.shape[1], self.width, dtype=self.stream, device="meta", requires_grad=True)
        stage = LeanStage(
            self.module,
            self.rank,
            self.num_stages,
            self.device,
            input_args=ids[:rows].to("meta") if self.rank == 0 else handed,
            output_args=torch.empty((), device="meta", requires_grad=True) if self.is_last else handed,
        )
        # Not the mean over micro batches: each loss is a share of the sum over all supervised tokens already.
        schedule = SCHEDULES[order](stage, micro.num, loss_fn=lambda loss, _: loss, scale_grads=False)
        losses: list[torch.Tensor] = []
        given = {**tensors, **({"labels": labels} if self.is_last else {})}
        go = schedule.step if training else schedule.eval
        try:
            go(*((ids,) if self.rank == 0 else ()), target=labels, losses=losses, return_outputs=False, **given)
        except RuntimeError as error:
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None  # torch wraps what the model raised into a text about tensors
        found = sum(losses, start=torch.zeros((), device=self.device)) / scale
        return found.detach()
