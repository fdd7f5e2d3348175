"""The loss of a causal LM from its head's logits where there are labels, and no more of them at once than have to be.

transformers computes logits of every token, in fp32 once more, their log-softmax, and a gradient as large: 12 bytes a token and word of the
vocabulary, padding, questions and all. Here the head is given the tokens that a label follows. Where the head is not trained it
also computes their loss, some tokens at a time, with the gradient of its input, so that logits are never kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from launcher.memory import tokens_at_once
from launcher.worker.data.batches import Batch
from launcher.worker.data.tokens import IGNORED

Collate = Callable[[list[dict[str, Any]]], Batch]

# In a batch: flat places of the tokens that a label follows, and the number of tokens that are no padding. Known before the batch goes to
# its device, which then waits for nobody.
PLACES, TOKENS = "label_places", "num_tokens"


def at_labels(collate: Collate, unmasked: bool) -> Collate:
    """The same micro batches, of shape (rows, length), with `PLACES`, of shape (supervised tokens,), and `TOKENS`.

    Args:
        unmasked: leave the attention mask out; rows have to be padded on the right, and the model to look to the left only.
    """

    def collated(rows: list[dict[str, Any]]) -> Batch:
        batch = collate(rows)
        num = torch.tensor(sum(len(row["input_ids"]) for row in rows))
        if unmasked:
            batch = {name: part for name, part in batch.items() if name != "attention_mask"}
        return {**batch, PLACES: _places(batch["labels"]), TOKENS: num}

    return collated


def _places(labels: torch.Tensor) -> torch.Tensor:
    followed = F.pad(labels[:, 1:] != IGNORED, (0, 1))
    return followed.flatten().nonzero().squeeze(1)


class LossAtLabels:
    """Stands between a model and its head while the model is given labels.

    The model's own forward pass stays what it is; it sees logits of shape (1, tokens, vocabulary), or their summed loss where `in_parts`,
    hands them to the loss function, which is this object's, and returns them.

    Args:
        model: a transformers causal LM, without what PEFT puts around it, whose `logits` go from the head to its loss function.
        in_parts: the head is not trained, and nothing is done to the logits before the loss.
    """

    def __init__(self, model: Any, in_parts: bool, kind: str) -> None:
        self.head = model.get_output_embeddings()
        trained = any(parameter.requires_grad for parameter in self.head.parameters())
        self.in_parts = in_parts and type(self.head) is torch.nn.Linear and not trained
        self.kind = kind
        self.summed = torch.zeros(())  # nats over the supervised tokens of the last micro batch
        self._at: tuple[torch.Tensor, torch.Tensor] | None = None
        self._model_forward, self._head_forward = model.forward, self.head.forward

        @functools.wraps(model.forward)  # the Trainer looks at its arguments
        def forward(*args: Any, **inputs: Any) -> Any:
            return self._forward(*args, **inputs)

        model.forward = forward
        self.head.forward = self._of_head
        model.loss_function = self._loss

    def _forward(self, *args: Any, **inputs: Any) -> Any:
        places, labels = inputs.pop(PLACES, None), inputs.get("labels")
        inputs.pop(TOKENS, None)
        if labels is None:
            return self._model_forward(*args, **inputs)
        places = _places(labels) if places is None else places
        self._at = places, labels.flatten()[places + 1]
        try:
            return self._model_forward(*args, **inputs)
        finally:
            self._at = None

    def _of_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """In the place of the head's forward pass: hidden states of shape (rows, length, width) in."""
        if self._at is None:
            logits: torch.Tensor = self._head_forward(hidden)
            return logits
        places, targets = (tensor.to(hidden.device) for tensor in self._at)
        chosen = hidden.flatten(0, 1).index_select(0, places)
        if not self.in_parts:
            return self._head_forward(chosen.unsqueeze(0))  # type: ignore[no-any-return]
        weight = self.head.weight
        size = tokens_at_once(len(weight), self.kind)
        device = weight.device  # under a device map it need not be where the hidden states are
        return SummedLoss.apply(chosen.to(device), targets.to(device), weight, self.head.bias, size)  # type: ignore[no-any-return]

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
    ) -> torch.Tensor:
        """What the model calls instead of transformers' `ForCausalLMLoss`: the sum over supervised tokens, by their number in the step."""
        assert self._at is not None
        targets = self._at[1].to(logits.device)
        summed = logits.view(()) if self.in_parts else F.cross_entropy(logits[0].float(), targets, reduction="sum")
        self.summed = summed.detach()
        num = len(targets) if num_items_in_batch is None else num_items_in_batch
        return summed / (num.to(summed.device) if isinstance(num, torch.Tensor) else num)


class SummedLoss(torch.autograd.Function):
    """Cross entropy of a linear head that is not trained, summed over tokens; the gradient of its input is computed beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        at_once: int,
    ) -> torch.Tensor:
        """Nats, summed, fp32, of shape (1, 1, 1) as if it were logits.

        Args:
            hidden: (tokens, width); targets: (tokens,); weight: (vocabulary, width).
            at_once: tokens whose logits are there together.
        """
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((1, 1, 1), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), at_once):
            part, wanted = hidden[start : start + at_once], targets[start : start + at_once]
            logits = F.linear(part, weight, bias)
            narrow, logits = logits.dtype, logits.float()
            logits -= logits.amax(dim=1, keepdim=True)
            total -= logits.gather(1, wanted[:, None]).sum()
            summed = logits.exp_().sum(dim=1)
            total += summed.log().sum()
            if gradient is not None:
                # (softmax - one at the target) × weight, the division by the sum last.
                mean = (logits.to(narrow) @ weight).float() / summed[:, None]
                gradient[start : start + at_once] = mean - weight[wanted]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].view(()).to(gradient.dtype), None, None, None, None
