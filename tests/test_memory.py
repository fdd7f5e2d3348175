"""Memory of a device in parts: against what a small model really keeps, and against what strategies promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.oracle import Ledger, flops, observe, planned
from launcher.memory import GIB, Memory, MemoryRequest, estimate, kept_bytes, update_bytes
from launcher.modelshape import shape_of, shape_of_config, trainable_parameters
from launcher.recipe.schema import Adapter, Model

SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 2048, "pad_token_id": 0,
}  # fmt: skip
CHATGLM2 = {
    "model_type": "chatglm", "num_layers": 28, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_attention_heads": 32,
    "kv_channels": 128, "multi_query_attention": True, "multi_query_group_num": 2, "padded_vocab_size": 65024,
    "add_qkv_bias": True,
}  # fmt: skip


def request(config: dict[str, Any], adapter: Adapter, **changes: Any) -> MemoryRequest:
    shape = shape_of_config(config, "test", "test")
    defaults: dict[str, Any] = {"micro_batch": 2, "sequence_length": 64}
    return MemoryRequest(
        shape=shape,
        trainable_parameters=trainable_parameters(shape, adapter),
        full=adapter.type == "full",
        adapter=adapter,
        **{**defaults, **changes},
    )


LLAMA_2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
FOUR_LAYERS = {"num_hidden_layers": 4}  # as wide as the real one; what the ends and one layer need counts for more
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "num_local_experts": 8, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
BLOOM: dict[str, Any] = {"model_type": "bloom", "hidden_size": 4096, "n_layer": 4, "n_head": 32, "vocab_size": 250880}
DROPOUT = {"targets": "all-linear", "dropout": 0.1}
FULL_TRAINING = {"type": "full"}


def recipe(config: dict[str, Any], adapter: dict[str, Any], train: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": {"config": config, "dtype": "auto"}, "adapter": adapter, "train": train, **more}


@pytest.mark.parametrize(
    ("config", "adapter", "rows", "length", "checkpointing", "devices"),
    [
        (LLAMA_2_7B, {}, 1, 512, False, "cuda"),
        (LLAMA_2_7B | FOUR_LAYERS, DROPOUT, 1, 8192, True, "cuda"),
        (LLAMA_2_7B | FOUR_LAYERS, FULL_TRAINING, 4, 1024, False, "cuda"),
        (QWEN_7B | FOUR_LAYERS, DROPOUT, 4, 2048, False, "cuda"),
        (QWEN_7B | FOUR_LAYERS, {}, 4, 2048, True, "cuda"),
        (QWEN_7B | FOUR_LAYERS, {"type": "dora"}, 4, 1024, False, "cuda"),
        (QWEN_7B | FOUR_LAYERS, {"type": "dora", "targets": "all-linear"}, 2, 1024, True, "cuda"),
        ({"model_type": "llama", **SMALL}, DROPOUT, 2, 64, False, "cpu"),
        ({"model_type": "qwen3", **SMALL, "head_dim": 32}, FULL_TRAINING, 8, 128, False, "cpu"),
        ({"model_type": "gemma", **SMALL, "head_dim": 32, "tie_word_embeddings": True}, {}, 2, 64, True, "cpu"),
        ({"model_type": "phi", **SMALL}, FULL_TRAINING, 8, 128, True, "cpu"),
    ],
)  # fmt: skip
def test_the_estimate_is_what_the_oracle_sees(config, adapter, rows, length, checkpointing, devices):
    train = {"micro_batch": rows, "global_batch": rows, "max_steps": 2, "gradient_checkpointing": checkpointing}
    plan = planned(recipe(config, adapter, train, data={"max_length": length}), kind=devices)
    seen = observe(plan)
    estimated = plan.memory.total_bytes - plan.memory.context_bytes
    assert estimated == pytest.approx(seen.total_bytes, rel=0.03)
    assert plan.memory.weights_bytes == pytest.approx(seen.weights_bytes, rel=1e-3)
    assert plan.memory.optimizer_bytes == pytest.approx(seen.optimizer_bytes, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "adapter"), [(QWEN_7B, DROPOUT), (QWEN_7B, FULL_TRAINING), (MIXTRAL, FULL_TRAINING)]
)  # fmt: skip
def test_sharded_over_eight_cards_too(config, adapter):
    train = {"micro_batch": 2, "global_batch": 16, "max_steps": 2, "gradient_checkpointing": True}
    asked = recipe(config | FOUR_LAYERS, adapter, train, data={"max_length": 2048}, strategy={"type": "fsdp"})
    plan = planned(asked, num_devices=8)
    seen = observe(plan)
    assert plan.memory.total_bytes - plan.memory.context_bytes == pytest.approx(seen.total_bytes, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cards_without_flash_attention_keep_keys_for_every_head(checkpointing):
    train = {"micro_batch": 2, "global_batch": 2, "max_steps": 2, "gradient_checkpointing": checkpointing}
    asked = recipe(QWEN_7B | FOUR_LAYERS, {}, train, data={"max_length": 1024, "batching": "padded"})
    asked["model"]["dtype"] = "fp16"
    old, new = planned(asked), planned(asked | {"model": asked["model"] | {"dtype": "bf16"}})
    assert not old.cluster.has_flash(old.dtype)
    assert old.memory.total_bytes > new.memory.total_bytes
    seen = observe(old)
    assert old.memory.total_bytes - old.memory.context_bytes == pytest.approx(seen.total_bytes, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("config", "quantization"),
    [(LLAMA_2_7B | FOUR_LAYERS, "int8"), (LLAMA_2_7B | FOUR_LAYERS, "nf4"), (BLOOM, "int8")],
    ids=["llama-int8", "llama-nf4", "bloom-int8"],
)  # fmt: skip
def test_quantized_layers_keep_what_the_oracle_sees_them_keep(config, quantization, checkpointing):
    """bitsandbytes' int8 layers hold their inputs, outside of what checkpointing could let go: it has to be the reentrant one."""
    pytest.importorskip("bitsandbytes", reason="quantised bases need the extra bitsandbytes")
    train = {"micro_batch": 2, "global_batch": 2, "max_steps": 2, "gradient_checkpointing": checkpointing}
    asked = recipe(config, {}, train, data={"max_length": 1024})
    asked["model"]["quantization"] = quantization
    plan = planned(asked)
    seen = observe(plan)
    assert plan.memory.total_bytes - plan.memory.context_bytes == pytest.approx(seen.total_bytes, rel=0.03)
    assert plan.memory.weights_bytes == pytest.approx(seen.weights_bytes, rel=1e-3)


def test_the_oracle_sees_what_is_there_and_counts_it_once():
    """A tensor, its view, one that died, and one that shrank, by hand."""
    import torch

    ledger = Ledger()
    weight = torch.zeros(1000)
    ledger.claim("weights", [weight])
    with ledger:
        first = torch.ones(500)
        view = first[:10]
        second = first + 1
        del second
        with ledger.counting("buffers"):
            third = weight * 2
    parts = ledger.peak()
    assert parts["weights"] == 4000
    assert (parts["activations"], parts["buffers"]) == (2000, 4000)
    assert view.numel() == 10
    assert third.numel() == 1000


def test_flops_by_hand():
    """Twice the weights a token, forward; once more for gradients of activations and, below LoRA, hardly more."""
    train = {"micro_batch": 1, "global_batch": 1, "max_steps": 2, "gradient_checkpointing": False}
    plan = planned(recipe(LLAMA_2_7B, {}, train, data={"max_length": 512}))
    weights = plan.shape.num_parameters - plan.shape.embedding_parameters
    attention = 32 * (4 + 10) * 512 * 512 * 4096  # two products forward, five backward, of 2 × length² × width
    assert flops(plan) == pytest.approx(4 * weights * 512 + attention, rel=0.02)


def test_parts_of_s4_by_hand():
    """ChatGLM2-6B, LoRA r=8 in half precision, one row of 512 tokens."""
    memory = estimate(request(CHATGLM2, Adapter(), micro_batch=1, sequence_length=512, gradient_checkpointing=True))
    assert memory.weights_bytes == 6_243_584_000 * 2
    assert memory.adapter_bytes == memory.gradients_bytes == 1_949_696 * 4  # gradients: of the micro batch before
    assert memory.optimizer_bytes == 1_949_696 * 8
    assert memory.logits_bytes == 512 * 65024 * 12  # log-softmax and two gradients, fp32
    # 28 layer inputs, and the fp32 input of the last norm; one layer computed again would need less than the logits.
    assert memory.activations_bytes == 28 * 512 * 4096 * 2 + 512 * 4096 * 4
    assert memory.buffers_bytes == 0
    assert memory.total_bytes == sum(memory.parts().values())
    assert list(memory.parts()) == [
        "weights", "adapter", "gradients", "optimizer", "activations", "logits", "buffers", "context"
    ]  # fmt: skip
    assert Memory.model_validate_json(memory.model_dump_json()) == memory


def test_s4_fits_its_card_only_when_quantized():
    card_bytes = 12 * GIB
    changes: dict[str, Any] = {"micro_batch": 1, "sequence_length": 512, "gradient_checkpointing": True}
    total = {
        kind: estimate(request(CHATGLM2, Adapter(), quantization=kind, **changes)).total_bytes
        for kind in ("none", "int8", "nf4")
    }
    assert total["nf4"] < 6 * GIB < total["int8"] < card_bytes < total["none"]


@pytest.mark.parametrize(("quantization", "bytes_each"), [("int8", 1.0), ("nf4", 0.516)])
def test_quantized_linear_layers_and_the_rest_as_it_is(quantization, bytes_each):
    wanted = request(CHATGLM2, Adapter(), quantization=quantization)
    linear = 28 * (4096 * 4608 + 4096 * 4096 + 4096 * 27392 + 13696 * 4096)
    rest = (6_243_584_000 - linear) * 2
    assert estimate(wanted).weights_bytes == pytest.approx(linear * bytes_each + rest, rel=2e-3)
    # Dequantizing the widest matrix takes its room in the compute dtype; autocast keeps a copy of the adapter.
    assert estimate(wanted).buffers_bytes == 4096 * 27392 * 2 + wanted.trainable_parameters * 2


FULL = {"model_type": "llama", **SMALL}


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer"),
    [("ddp", 1, 1, 8), ("zero1", 1, 1, 12 / 8), ("zero2", 1, 1 / 8, 12 / 8), ("zero3", 1 / 8, 1 / 8, 12 / 8),
     ("fsdp", 1 / 8, 1 / 8, 8 / 8)],
)  # fmt: skip
def test_what_each_strategy_shards(strategy, weights, gradients, optimizer):
    wanted = request(FULL, Adapter(type="full"), strategy=strategy, num_processes=8)
    memory, num = estimate(wanted), wanted.shape.num_parameters
    assert memory.weights_bytes == pytest.approx(num * 2 * weights, abs=1)
    assert memory.gradients_bytes == pytest.approx(num * 2 * gradients, abs=1)
    assert memory.optimizer_bytes == pytest.approx(num * optimizer, abs=1)
    assert memory.buffers_bytes > 0


def test_ddp_reduces_what_is_trained_in_buckets_of_its_own():
    adapter = Adapter()
    alone, together = (request(FULL, adapter, strategy="ddp", num_processes=num) for num in (1, 4))
    assert estimate(together).buffers_bytes - estimate(alone).buffers_bytes == alone.trainable_parameters * 4


def test_offload_leaves_the_device():
    wanted: dict[str, Any] = {"strategy": "zero3", "num_processes": 2}
    assert estimate(request(FULL, Adapter(type="full"), **wanted, offload="optimizer")).optimizer_bytes == 0
    both = estimate(request(FULL, Adapter(type="full"), **wanted, offload="parameters"))
    assert (both.optimizer_bytes, both.weights_bytes) == (0, 0)


def test_eight_bit_states_are_about_a_quarter():
    eight, full = (
        estimate(request(FULL, Adapter(), optimizer=name)).optimizer_bytes for name in ("adamw_8bit", "adamw")
    )
    assert eight / full == pytest.approx(0.25, abs=0.01)


def test_checkpointing_saves_activations_and_rows_cost_in_proportion():
    plain, saved = (estimate(request(CHATGLM2, Adapter(), gradient_checkpointing=mode)) for mode in (False, True))
    assert plain.activations_bytes > 5 * saved.activations_bytes
    double = estimate(request(CHATGLM2, Adapter(), micro_batch=4))
    assert (double.activations_bytes, double.logits_bytes) == (2 * plain.activations_bytes, 2 * plain.logits_bytes)


def test_scores_and_masks_grow_with_the_square_of_the_length():
    def growth(config: dict[str, Any], rows: int) -> float:
        """What a token of a layer costs at 1024 tokens, over what it costs at 64."""
        short, long = (
            kept_bytes(request(config, Adapter(), micro_batch=rows, sequence_length=length)) / length
            for length in (64, 1024)
        )
        return long / short

    bloom = {"model_type": "bloom", "hidden_size": 128, "n_layer": 3, "n_head": 4, "vocab_size": 2048}
    assert growth(FULL, 1) == 1
    assert 1 < growth(FULL, 2) < growth(bloom, 1)


def test_only_gradients_of_an_earlier_micro_batch_are_there_when_the_loss_is():
    """LoRA's fullest moment is that of the logits; on the first micro batch nothing has a gradient yet."""
    alone, more = (estimate(request(CHATGLM2, Adapter(), accumulation=number)) for number in (1, 2))
    assert (alone.gradients_bytes, more.gradients_bytes) == (0, more.adapter_bytes)


def test_a_process_costs_its_context_even_when_the_model_is_nothing():
    assert estimate(request(FULL, Adapter(), kind="cpu")).context_bytes == round(0.45 * GIB)
    assert estimate(request(FULL, Adapter(), kind="cuda")).context_bytes > 0.6 * GIB


def test_zero3_copies_gradients_of_a_billion_parameters_at_a_time():
    """DeepSpeed's sub_group_size; 70 B on 8 ranks have 8.8 of them, in groups that are full with the matrix that exceeds 10⁹."""
    shape = shape_of(Model(path="meta-llama/Llama-3.1-70B"), Path("/"))
    wanted = request({"model_type": "llama", **SMALL}, Adapter(type="full"), strategy="zero3", num_processes=8)
    large = wanted.model_copy(update={"shape": shape, "trainable_parameters": shape.num_parameters})
    assert 6e9 < update_bytes(large) < 6.3e9
    assert update_bytes(wanted) == 6 * (wanted.trainable_parameters // 8), "in half precision, flat, then in fp32"
