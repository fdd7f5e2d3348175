"""The loss at labels, in parts or not, without a mask, is the model's own, with every gradient, in each family trusted with it."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.families import family, family_of
from launcher.worker import headloss
from launcher.worker.data.batches import collator
from launcher.worker.data.tokens import IGNORED
from launcher.worker.headloss import PLACES, LossAtLabels, at_labels
from tests.test_modelshape import CONFIGS, TINY

SMALL = {name: config for name, config in CONFIGS.items() if config.get("vocab_size") == TINY["vocab_size"]}


def rows(vocabulary: int) -> list[dict[str, Any]]:
    """Four rows; of the last nothing is learned, the second is learned from its first token on."""
    draw = random.Random(0)
    made = []
    for length, learned_from in ((9, 4), (17, 0), (5, 1), (12, 12)):
        ids = [draw.randrange(3, vocabulary) for _ in range(length)]
        made.append({"input_ids": ids, "labels": [IGNORED] * learned_from + ids[learned_from:]})
    return made


def model_of(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    settings = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings)).to(dtype)
    model.config.use_cache = False
    with torch.no_grad():  # a fresh head says the same of every word
        model.get_output_embeddings().weight.mul_(10)
    return model


def loss_and_gradients(model: Any, batch: dict[str, torch.Tensor], num: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=num).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def compare(model: Any, in_parts: bool, batching: str = "padded", tolerance: float = 1e-5) -> None:
    batch = collator(batching, 0)(rows(model.config.vocab_size))
    with_places = at_labels(collator(batching, 0), unmasked=True)(rows(model.config.vocab_size))
    assert "attention_mask" not in with_places
    other = copy.deepcopy(model)
    LossAtLabels(other, in_parts, "cpu")
    for num in (None, torch.tensor(7.0)):
        expected, gradients = loss_and_gradients(model, batch, num)
        found, others = loss_and_gradients(other, with_places, num)
        assert found == pytest.approx(expected, rel=tolerance)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(
                others[name], gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max())
            ), name
    without, _ = loss_and_gradients(other, batch, num)  # who does not count places beforehand
    assert without == found
    with torch.no_grad():
        assert torch.equal(other(input_ids=batch["input_ids"]).logits, model(input_ids=batch["input_ids"]).logits)


@pytest.mark.parametrize("name", [name for name in SMALL if "as transformers says" not in name])
def test_a_family_of_the_table_has_its_own_loss_and_gradients(name: str) -> None:
    known = family_of(SMALL[name])
    assert known.loss_at_labels
    model = model_of(SMALL[name])
    compare(model, in_parts=False)
    model.get_output_embeddings().requires_grad_(False)
    if not known.changes_logits:
        compare(model, in_parts=True)


def test_a_family_that_changes_its_logits_is_marked_so() -> None:
    assert {name for name in SMALL if family_of(SMALL[name]).changes_logits} == {"gemma2", "gemma3_text"}
    model = model_of({**SMALL["gemma2"], "final_logit_softcapping": 2.0})
    model.get_output_embeddings().requires_grad_(False)
    with pytest.raises(AssertionError):
        compare(model, in_parts=True)
    assert not family("unknown").loss_at_labels


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_parts_of_a_few_tokens_add_up(monkeypatch: pytest.MonkeyPatch, batching: str) -> None:
    monkeypatch.setattr(headloss, "tokens_at_once", lambda *_: 5)
    model = model_of(SMALL["llama"])
    model.get_output_embeddings().requires_grad_(False)
    compare(model, True, batching)


def test_half_precision_and_autocast_lose_no_more_than_the_model_itself_does() -> None:
    model = model_of(SMALL["llama"])
    model.get_output_embeddings().requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        compare(model, True, tolerance=0.03)
    compare(model.to(torch.bfloat16), True, tolerance=0.03)


def test_a_micro_batch_that_teaches_nothing_has_a_loss_of_zero_and_gradients() -> None:
    model = model_of(SMALL["llama"])
    model.get_output_embeddings().requires_grad_(False)
    LossAtLabels(model, True, "cpu")
    batch = at_labels(collator("padded", 0), unmasked=True)(rows(50)[3:])
    assert len(batch[PLACES]) == 0
    loss, gradients = loss_and_gradients(model, batch, 7)
    assert loss == 0.0
    assert "model.layers.0.self_attn.q_proj.weight" in gradients
    assert not any(gradient.any() for gradient in gradients.values())


def test_a_head_that_is_trained_is_not_taken_in_parts() -> None:
    model = model_of(SMALL["llama"])
    LossAtLabels(model, True, "cpu")
    _, gradients = loss_and_gradients(model, collator("padded", 0)(rows(50)), None)
    assert gradients["lm_head.weight"].any()
