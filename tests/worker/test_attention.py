"""Attention on cards whose kernels do not share keys."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.worker.attention import REPEATED, repeat_keys


@pytest.fixture
def grouped() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


@pytest.mark.parametrize("padded", [False, True])
def test_repeated_keys_change_nothing_but_the_kernel(
    grouped: Any, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Any, key: Any, *args: Any, **more: Any) -> Any:
        seen.append((query.shape[1] == key.shape[1], more.get("enable_gqa", False)))
        return real(query, key, *args, **more)

    ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    other = copy.deepcopy(grouped)
    repeat_keys(other)
    answers = []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for model in (grouped, other):
        seen.clear()
        logits = model(input_ids=ids, attention_mask=mask if padded else None).logits[mask.bool()]
        logits.square().mean().backward()
        answers.append([logits, *(parameter.grad for parameter in model.parameters())])
        assert len(seen) == 2
        assert all(not shared for _, shared in seen) or (model is grouped and not padded)
        assert all(alike for alike, _ in seen) or (model is grouped and not padded)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-6)


def test_a_saved_model_does_not_name_it(grouped: Any) -> None:
    repeat_keys(grouped)
    assert grouped.config._attn_implementation == REPEATED
    assert REPEATED not in grouped.config.to_json_string()
