"""Memory of a device in parts: against what a small model really keeps, and against what strategies promise."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from launcher.memory import GIB, Memory, MemoryRequest, estimate, layer_bytes_per_token
from launcher.modelshape import shape_of_config, trainable_parameters
from launcher.recipe.schema import Adapter

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


def kept_bytes(config: dict[str, Any], adapter: Adapter, num_layers: int) -> int:
    """Bytes that autograd keeps in one forward pass of the real model, weights not counted."""
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rest = {key: value for key, value in config.items() if key != "model_type"} | {"num_hidden_layers": num_layers}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **rest), attn_implementation="sdpa"
    )
    model.config.use_cache = False
    if adapter.type != "full":
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=adapter.r, lora_dropout=adapter.dropout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a property that transformers 5 renames
            model = peft.get_peft_model(model, lora)
        model.enable_input_require_grads()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(5, 2048, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=ids, labels=ids)
    return sum(kept.values())


@pytest.mark.parametrize(
    ("model_type", "adapter"),
    [
        ("llama", Adapter(r=2)),
        ("llama", Adapter(r=2, dropout=0.1)),
        ("llama", Adapter(type="full")),
        ("qwen3", Adapter(type="full")),
        ("phi", Adapter(type="full")),
    ],
)
def test_a_layer_keeps_what_a_real_one_keeps(model_type, adapter):
    config = {"model_type": model_type, **SMALL, **({"head_dim": 32} if model_type == "qwen3" else {})}
    real = (kept_bytes(config, adapter, 3) - kept_bytes(config, adapter, 1)) / 2 / (2 * 64)
    wanted = request(config, adapter, weights_dtype_bytes=4, compute_dtype_bytes=4, kind="cpu")
    assert layer_bytes_per_token(wanted) == pytest.approx(real, rel=0.06)


def test_parts_of_s4_by_hand():
    """ChatGLM2-6B, LoRA r=8 in half precision, one row of 512 tokens."""
    memory = estimate(request(CHATGLM2, Adapter(), micro_batch=1, sequence_length=512, gradient_checkpointing=True))
    assert memory.weights_bytes == 6_243_584_000 * 2
    assert memory.adapter_bytes == memory.gradients_bytes == 1_949_696 * 4
    assert memory.optimizer_bytes == 1_949_696 * 8
    assert memory.logits_bytes == 512 * 65024 * 14
    # 28 layer inputs, and the fp32 input of the last norm; one layer computed again needs less than the logits' room.
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
    # Dequantizing the widest matrix takes its room in the compute dtype.
    assert estimate(wanted).buffers_bytes == 4096 * 27392 * 2


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


def test_only_written_out_attention_grows_with_the_square_of_the_length():
    def growth(config: dict[str, Any]) -> float:
        short, long = (
            layer_bytes_per_token(request(config, Adapter(), sequence_length=length)) for length in (64, 1024)
        )
        return long / short

    assert growth(FULL) == 1
    bloom = {"model_type": "bloom", "hidden_size": 128, "n_layer": 3, "n_head": 4, "vocab_size": 2048}
    assert growth(bloom) > 2


def test_a_process_costs_its_context_even_when_the_model_is_nothing():
    assert estimate(request(FULL, Adapter(), kind="cpu")).context_bytes == round(0.45 * GIB)
    assert estimate(request(FULL, Adapter(), kind="cuda")).context_bytes > 0.6 * GIB
