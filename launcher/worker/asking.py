"""Token ids of a prompt in, those of the model's answer out: for `launch chat`, and for the recipe's questions before and after training.

While training every rank answers its share of the questions and all of them meet again at the end: each one holds the whole
model (single, ddp), none waits idle, and all of them keep their heartbeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from launcher.worker.data.rows import Message
from launcher.worker.data.tokens import Prompter
from launcher.worker.prepared import Prepared
from launcher.worker.staged import load_tokenizer

if TYPE_CHECKING:
    from launcher.worker.training import PlannedTrainer

# An answer in the report is cut here; `launch chat` goes on for longer.
_MAX_NEW_TOKENS = 128


def generate_ids(
    model: Any, prompt: Sequence[int], prepared: Prepared, max_new_tokens: int, **options: Any
) -> list[int]:
    """The tokens with which a model continues a prompt, up to one that ends an answer.

    Args:
        options: of transformers' generate: sampling, a streamer.
    """
    ids = torch.tensor([prompt], device=model.device)
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=list(prepared.eos_token_ids),
        pad_token_id=prepared.pad_token_id,
        use_cache=True,  # switched off in the config of a model that trains
        **options,
    )
    answer: list[int] = made[0, len(prompt) :].tolist()
    return answer


class Asking(TrainerCallback):
    """Has the recipe's questions answered before the first step of a fresh run and after the last step of every attempt."""

    def __init__(self, trainer: PlannedTrainer) -> None:
        self.trainer = trainer
        self.questions = trainer.plan.recipe.data.questions
        self.system = trainer.plan.recipe.data.system

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._ask("before", 0)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.requests.stopped_by is None:  # else there is no time, and it goes on later
            self._ask("after", self.trainer.load_best())

    def _ask(self, when: str, step: int) -> None:
        """Answer, likeliest token first, and write the answers down."""
        prepared, pulse = self.trainer.prepared, self.trainer.pulse
        tokenizer = load_tokenizer(prepared.tokenizer_dir, prepared.code)
        prompter = Prompter(tokenizer, prepared.template, prepared.eos_token_ids)
        rank, num_ranks = self.trainer.args.process_index, self.trainer.args.world_size
        mine: dict[str, str] = {}
        self.trainer.model.eval()
        for question in self.questions[rank::num_ranks]:
            pulse.beat("ask")
            start: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
            prompt = prompter.prompt([*start, {"role": "user", "content": question}])
            with torch.no_grad(), self.trainer.accelerator.autocast():
                ids = generate_ids(self.trainer.model, prompt, prepared, _MAX_NEW_TOKENS, do_sample=False)
            mine[question] = tokenizer.decode(ids, skip_special_tokens=True)
        pulse.beat("ask")
        answers = _from_all_ranks(mine)
        self.trainer.metrics.answers(when, step, {question: answers[question] for question in self.questions})


def _from_all_ranks(mine: dict[str, str]) -> dict[str, str]:
    """The answers of every rank together, on every rank."""
    if not dist.is_initialized():
        return mine
    parts: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return {question: answer for part in parts for question, answer in part.items()}
