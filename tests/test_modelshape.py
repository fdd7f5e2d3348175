"""Shapes against real models on the meta device, adapters against PEFT, and every way a model folder can be broken."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import PreflightError, UsageError
from launcher.families import family, family_of
from launcher.modelshape import (
    ModelShape,
    catalogue_names,
    module_names,
    read_config,
    shape_of,
    shape_of_config,
    trainable_parameters,
    unmatched_targets,
)
from launcher.recipe.schema import Adapter, Model

HERE = Path()
TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "pad_token_id": 0,
}  # fmt: skip
OLD: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **TINY},
    "llama with biases": {"model_type": "llama", **TINY, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **TINY},
    "mixtral": {"model_type": "mixtral", **TINY, "num_local_experts": 4},
    "qwen2 tied": {"model_type": "qwen2", **TINY, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **TINY, "head_dim": 32},
    "mixtral as transformers says": {"model_type": "mixtral", **TINY},
    "qwen2_moe": {"model_type": "qwen2_moe", **TINY, "num_experts": 4, "moe_intermediate_size": 48,
                  "shared_expert_intermediate_size": 96},
    "qwen3_moe": {"model_type": "qwen3_moe", **TINY, "num_experts": 4, "moe_intermediate_size": 48, "head_dim": 32,
                  "num_experts_per_tok": 2},
    "phi": {"model_type": "phi", **TINY, "qk_layernorm": True},
    "phi3": {"model_type": "phi3", **TINY},
    "gemma": {"model_type": "gemma", **TINY, "head_dim": 32},
    "gemma2": {"model_type": "gemma2", **TINY, "head_dim": 32},
    "gemma3_text": {"model_type": "gemma3_text", **TINY, "head_dim": 32},
    "glm": {"model_type": "glm", **TINY, "head_dim": 16},
    "glm4": {"model_type": "glm4", **TINY, "head_dim": 16},
    "bloom": {"model_type": "bloom", **OLD},
    "falcon": {"model_type": "falcon", **OLD},
    "falcon old": {"model_type": "falcon", **OLD, "multi_query": False, "parallel_attn": False, "bias": True},
    "falcon-rw": {"model_type": "falcon", **OLD, "multi_query": False, "parallel_attn": False, "bias": True,
                  "alibi": True},
    "falcon2": {"model_type": "falcon", **OLD, "new_decoder_architecture": True, "num_kv_heads": 2,
                "num_ln_in_parallel_attn": 1},
    "falcon new": {"model_type": "falcon", **OLD, "new_decoder_architecture": True, "num_kv_heads": 2},
    "Llama-3.1-8B": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "bloom-7b1": {"model_type": "bloom", "n_embed": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
    "gemma-2-9b": {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
                   "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000},
}  # fmt: skip
ADAPTERS = {
    "lora": Adapter(r=4),
    "all-linear": Adapter(r=4, targets="all-linear"),
    "dora": Adapter(r=4, type="dora"),
    "adalora": Adapter(type="adalora"),
    "saved": Adapter(r=4, type="rslora", modules_to_save=("embed_tokens", "lm_head", "norm")),
    "head": Adapter(r=4, targets=("lm_head", "embed_tokens", "q_proj")),
    "both": Adapter(r=4, targets=("lm_head", "q_proj"), modules_to_save=("lm_head",)),
}


def real_model(config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rest = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_exact_to_the_tensor(name):
    """From the sparse config and from the full one that transformers writes; every module where the family says."""
    model, config = real_model(CONFIGS[name]), CONFIGS[name]
    parameters = {key: value.numel() for key, value in model.named_parameters()}
    modules = {key for key, _ in model.named_modules()}
    for written in (config, json.loads(model.config.to_json_string(use_diff=False))):
        shape = shape_of_config(written, name, "test")
        assert shape.num_parameters == sum(parameters.values())
        known = family(shape.family)
        first = {key: size for key, size in parameters.items() if key.startswith(f"{known.layers}.0.")}
        assert shape.layer_parameters == sum(first.values())
        for linear, (in_features, out_features) in shape.linears.items():
            weight = model.get_submodule(f"{known.layers}.0.{linear}").weight
            assert tuple(weight.shape) == (out_features, in_features)
        beside = set(known.pinned)
        assert beside <= modules
        leaves = {key for key in modules if key and not any(other.startswith(f"{key}.") for other in modules)}
        assert {key for key in leaves if not key.startswith(known.layers)} == beside


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["llama", "qwen2 tied", "phi", "glm4"])
def test_trained_parameters_are_those_of_peft(name, adapter):
    import peft
    import torch

    wanted, model = ADAPTERS[adapter], real_model(CONFIGS[name])
    targets = list(family_of(CONFIGS[name]).lora_targets) if wanted.targets == "auto" else wanted.targets
    common: dict[str, Any] = {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": "CAUSAL_LM",
    }
    if wanted.type == "adalora":
        config: Any = peft.AdaLoraConfig(init_r=12, target_r=8, total_step=100, tinit=1, tfinal=1, **common)
    else:
        saved = list(wanted.modules_to_save) or None
        config = peft.LoraConfig(r=4, use_dora=wanted.type == "dora", modules_to_save=saved, **common)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # PEFT warns about a tied head, which is what is counted here
        trained = sum(value.numel() for value in peft.get_peft_model(model, config).parameters() if value.requires_grad)
    assert trained_of(name, wanted) == trained


def trained_of(name: str, adapter: Adapter) -> int:
    return trainable_parameters(shape_of_config(CONFIGS[name], name, "test"), adapter)


def test_full_trains_everything():
    shape = shape_of_config(CONFIGS["llama"], "llama", "test")
    assert trainable_parameters(shape, Adapter(type="full")) == shape.num_parameters == 220480


# The parameters of the transformers class built at that size on the meta device (5.17 and 5.23), which are those that the
# authors publish where they do. With code of their own: by the formulas, for Baichuan-13B as its authors publish.
# A name is (parameters, family that computes it, whether its own code is needed).
PUBLIC = {
    "THUDM/chatglm-6b": (6_173_286_400, "chatglm", True),
    "THUDM/chatglm2-6b": (6_243_584_000, "glm", False),
    "THUDM/chatglm3-6b": (6_243_584_000, "glm", False),
    "THUDM/glm-4-9b-hf": (9_399_951_360, "glm", False),
    "THUDM/GLM-4-9B-0414": (9_400_279_040, "glm4", False),
    "baichuan-inc/Baichuan-7B": (7_000_559_616, "llama", False),
    "baichuan-inc/Baichuan2-7B-Base": (7_505_973_248, "llama", False),
    "baichuan-inc/Baichuan-13B-Base": (13_264_901_120, "baichuan", True),
    "baichuan-inc/Baichuan2-13B-Base": (13_896_668_160, "baichuan", True),
    "bigscience/bloom-560m": (559_214_592, "bloom", False),
    "bigscience/bloom-7b1": (7_069_016_064, "bloom", False),
    "bigscience/bloom": (176_247_271_424, "bloom", False),
    "tiiuae/falcon-rw-1b": (1_311_625_216, "falcon", False),
    "tiiuae/falcon-7b": (6_921_720_704, "falcon", False),
    "tiiuae/falcon-40b": (41_303_293_952, "falcon", False),
    "internlm/internlm-7b": (7_321_948_160, "llama", False),
    "Qwen/Qwen-1_8B": (1_836_828_672, "qwen2", False),
    "Qwen/Qwen-7B": (7_721_324_544, "qwen2", False),
    "Qwen/Qwen-14B": (14_167_290_880, "qwen2", False),
    "meta-llama/Llama-2-7b-hf": (6_738_415_616, "llama", False),
    "meta-llama/Llama-2-13b-hf": (13_015_864_320, "llama", False),
    "meta-llama/Llama-2-70b-hf": (68_976_648_192, "llama", False),
    "meta-llama/Llama-3.1-8B": (8_030_261_248, "llama", False),
    "meta-llama/Llama-3.1-70B": (70_553_706_496, "llama", False),
    "meta-llama/Llama-3.2-1B": (1_235_814_400, "llama", False),
    "01-ai/Yi-6B": (6_061_035_520, "llama", False),
    "01-ai/Yi-34B": (34_388_917_248, "llama", False),
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, "mistral", False),
    "mistralai/Mistral-7B-v0.3": (7_248_023_552, "mistral", False),
    "mistralai/Mixtral-8x7B-v0.1": (46_702_792_704, "mixtral", False),
    "microsoft/phi-1_5": (1_418_270_720, "phi", False),
    "microsoft/phi-2": (2_779_683_840, "phi", False),
    "microsoft/Phi-3-mini-4k-instruct": (3_821_079_552, "phi3", False),
    "microsoft/phi-4": (14_659_507_200, "phi3", False),
    "google/gemma-2b": (2_506_172_416, "gemma", False),
    "google/gemma-7b": (8_537_680_896, "gemma", False),
    "google/gemma-2-2b": (2_614_341_888, "gemma2", False),
    "google/gemma-2-9b": (9_241_705_984, "gemma2", False),
    "google/gemma-3-1b-it": (999_885_952, "gemma3_text", False),
    "Qwen/Qwen1.5-MoE-A2.7B": (14_315_784_192, "qwen2_moe", False),
    "Qwen/Qwen2.5-0.5B": (494_032_768, "qwen2", False),
    "Qwen/Qwen2.5-1.5B": (1_543_714_304, "qwen2", False),
    "Qwen/Qwen2.5-7B-Instruct": (7_615_616_512, "qwen2", False),
    "Qwen/Qwen2.5-14B-Instruct": (14_770_033_664, "qwen2", False),
    "Qwen/Qwen2.5-72B-Instruct": (72_706_203_648, "qwen2", False),
    "Qwen/Qwen3-0.6B": (596_049_920, "qwen3", False),
    "Qwen/Qwen3-4B": (4_022_468_096, "qwen3", False),
    "Qwen/Qwen3-8B": (8_190_735_360, "qwen3", False),
    "Qwen/Qwen3-32B": (32_762_123_264, "qwen3", False),
    "Qwen/Qwen3-30B-A3B": (30_532_122_624, "qwen3_moe", False),
}  # fmt: skip


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def test_the_catalogue_holds_the_public_sizes(empty_hub):
    shapes = {name: shape_of(Model(path=name), HERE) for name in catalogue_names()}
    found = {name: (shape.num_parameters, shape.family, shape.remote_code) for name, shape in shapes.items()}
    assert {name: found[name] for name in PUBLIC} == PUBLIC
    # The rest are those again under another name: trained for chat, or without.
    assert {found[name] for name in found.keys() - PUBLIC.keys()} <= set(PUBLIC.values())
    assert shapes["THUDM/chatglm2-6b"].source == "the shipped catalogue"


def chatglm2_with_its_own_code() -> ModelShape:
    config = read_config("THUDM/chatglm2-6b")
    assert config is not None
    return shape_of_config(config, "chatglm2", "test")


def test_adalora_on_chatglm2_trains_what_the_seed_counted(empty_hub):
    assert trainable_parameters(chatglm2_with_its_own_code(), Adapter(type="adalora", r=8)) == 2_924_880


def test_names_that_match_nothing(empty_hub):
    shape = chatglm2_with_its_own_code()
    assert unmatched_targets(shape, ("query", "query_key_value", "value", "mlp.dense_4h_to_h")) == ["query", "value"]
    assert unmatched_targets(shape, "auto") == []
    assert module_names(shape)[:2] == ["query_key_value", "dense"]
    assert "output_layer" in module_names(shape)


WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NATIVE_TWINS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chatglm2": (
        {"model_type": "chatglm", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "kv_channels": 32,
         "ffn_hidden_size": 176, "padded_vocab_size": 1000, "multi_query_attention": True, "multi_query_group_num": 2,
         "add_qkv_bias": True},
        {"model_type": "glm", **TINY, "head_dim": 32},
    ),
    "baichuan": (
        {"model_type": "baichuan", **WIDE, "intermediate_size": 176, "vocab_size": 1000},
        {"model_type": "llama", **TINY, "num_key_value_heads": 4},
    ),
    "internlm": (
        {"model_type": "internlm", **WIDE, "intermediate_size": 176, "vocab_size": 1000, "bias": True},
        {"model_type": "llama", **TINY, "num_key_value_heads": 4, "attention_bias": True},
    ),
    "qwen": (
        {"model_type": "qwen", **WIDE, "intermediate_size": 352, "kv_channels": 16, "vocab_size": 1000},
        {"model_type": "qwen2", **TINY, "num_key_value_heads": 4},
    ),
    "xverse": (
        {"model_type": "xverse", **WIDE, "intermediate_size": 176, "vocab_size": 1000},
        {"model_type": "llama", **TINY, "num_key_value_heads": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE_TWINS)
def test_remote_families_have_the_parameters_of_the_native_class_they_convert_to(name):
    """Weights of these families load into the native class without a remainder (shared/facts/chatglm.md, section 3)."""
    remote, native = NATIVE_TWINS[name]
    shape = shape_of_config(remote, name, "test")
    assert (shape.family, shape.remote_code) == (name, True)
    assert shape.num_parameters == sum(value.numel() for value in real_model(native).parameters())


def test_an_unknown_family_is_counted_like_a_llama_and_says_so():
    shape = shape_of_config({"model_type": "novel", **TINY, "auto_map": {}}, "novel", "config.json")
    assert (shape.family, shape.remote_code, shape.num_parameters) == ("unknown", True, 220480)
    assert "as if it were a Llama" in shape.source
    assert trainable_parameters(shape, Adapter(r=1)) == trainable_parameters(shape, Adapter(r=1, targets="all-linear"))


@pytest.mark.parametrize("kind", ["baichuan", "qwen", "llama"])
def test_a_folder_of_pickles_is_counted_from_its_config_and_none_is_opened(tmp_path, kind):
    config = {**NATIVE_TWINS[kind][0], "seq_length": 128} if kind in NATIVE_TWINS else CONFIGS[kind]
    if kind == "baichuan":
        config = {**config, "architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for part in (1, 2):
        (tmp_path / f"pytorch_model-0000{part}-of-00002.bin").write_bytes(b"not even a pickle")
    index = {"weight_map": {"lm_head.weight": "pytorch_model-00002-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    shape = shape_of(Model(path=str(tmp_path)), HERE)
    wanted = NATIVE_TWINS[kind][1] if kind in NATIVE_TWINS else config
    assert shape.num_parameters == sum(value.numel() for value in real_model(wanted).parameters())
    assert (shape.stored_bytes, shape.source) == (0, str(tmp_path))


@pytest.mark.parametrize(
    ("config", "found", "to_type"),
    [
        ({"model_type": "RefinedWebModel"}, "as it did before transformers had a class for falcon", "fetch today's"),
        ({"model_type": "gemma3", "text_config": {}}, "texts and images", "gemma-3-1b-it"),
        ({**CONFIGS["qwen2_moe"], "mlp_only_layers": [0]}, "with and without experts", "Qwen3-30B-A3B"),
        ({**CONFIGS["qwen3_moe"], "decoder_sparse_step": 2}, "with and without experts", "Qwen3-30B-A3B"),
        ({"model_type": "bert", **TINY}, r"that of an encoder \(bert\)", "Qwen/Qwen2.5-0.5B"),
        ({"model_type": "t5", **TINY}, r"an encoder and a decoder \(t5\)", "Qwen/Qwen2.5-0.5B"),
        ({"model_type": "novel", **TINY, "is_encoder_decoder": True}, "an encoder and a decoder", "Qwen/Qwen2.5-0.5B"),
        (TINY, r"says no model_type \(None\)", "model_type: llama"),
        ({**CONFIGS["llama"], "model_type": 7}, r"says no model_type \(7\)", "model_type: llama"),
        ({**CONFIGS["llama"], "quantization_config": {"quant_method": "gptq"}}, r"stored quantised \(gptq\)", "=nf4"),
        (
            {"model_type": "deepseek_v3", **TINY, "n_routed_experts": 256},
            r"has experts \(n_routed_experts\)",
            "Qwen3-30B",
        ),
        ({**CONFIGS["llama"], "num_key_value_heads": 3}, "4 heads in 3 groups of keys", "divides the heads"),
    ],
    ids=[
        "former",
        "images",
        "dense",
        "step",
        "encoder",
        "t5",
        "both",
        "typeless",
        "number",
        "gptq",
        "experts",
        "groups",
    ],
)
def test_another_kind_of_model_is_named(config, found, to_type):
    with pytest.raises(UsageError, match=found) as caught:
        shape_of(Model(config=config), HERE)
    assert to_type in caught.value.to_type


@pytest.fixture
def folder(tmp_path) -> Path:
    """What save_pretrained leaves of a tiny model, in two shards."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 2
    return tmp_path / "model"


def test_a_folder_is_read_to_the_byte(folder):
    shape = shape_of(Model(path="model"), folder.parent)
    assert (shape.num_parameters, shape.stored_bytes, shape.stored_bytes // 2) == (220480, 440960, 220480)
    assert shape.source == f"{folder} (config.json and safetensors headers)"
    assert ModelShape.model_validate_json(shape.model_dump_json()) == shape
    assert read_config("model", None, folder.parent) == json.loads((folder / "config.json").read_text())


def test_a_shard_cut_short_is_named(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(PreflightError, match=f"{shard.name} is cut short: its header says") as caught:
        shape_of(Model(path=str(folder)), HERE)
    assert caught.value.to_type == f"copy or download {shard.name} again"


def safetensors(file: Path, header: Any, num_bytes: int = 0) -> None:
    """A file with that header, and so many zeros behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))


def one(**changed: Any) -> dict[str, Any]:
    """The header of one sound tensor with these keys changed; those that are `...` left out."""
    entry = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4], **changed}
    return {"a": {key: value for key, value in entry.items() if value is not ...}}


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (b"[]", "not a safetensors file"), (b"nope", "not a safetensors file"), (b"\xe4", "not a safetensors file"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "not a safetensors file"), ({"a": 5}, "a is no mapping"),
        (one(dtype=...), r"a has no dtype \(None\)"), (one(dtype=7), r"a has no dtype \(7\)"),
        (one(shape=...), r"a has no shape \(None\)"), (one(shape=["2"]), r"a has no shape"),
        (one(shape=[-2]), r"a has no shape \(\[-2\]\)"), (one(shape=[2.5]), "a has no shape"),
        (one(shape=[True, 2]), "a has no shape"), (one(data_offsets=["0", "4"]), "a has no data_offsets"),
        (one(data_offsets=[0]), "a has no data_offsets"), (one(data_offsets=[4, 0]), r"a is BF16 of \[2\] in -4 bytes"),
        (one(shape=[1000, 1000]), r"a is BF16 of \[1000, 1000\] in 4 bytes"),
        ({**one(), "b": one()["a"]}, "b does not begin where the tensor before it ends"),
        (one(data_offsets=[2, 6]), "a does not begin where the tensor before it ends"),
        (one(shape=[10], data_offsets=[0, 20]), "is cut short: its header says"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_file_that_is_no_safetensors(tmp_path, header, found):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    safetensors(tmp_path / "model.safetensors", header, num_bytes=6)
    with pytest.raises(PreflightError, match=found) as caught:
        shape_of(Model(path=str(tmp_path)), HERE)
    assert caught.value.to_type == "copy or download model.safetensors again"


@pytest.mark.parametrize("content", [b"", b"\xff" * 20])
def test_a_file_shorter_than_its_header(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(PreflightError, match="is cut short in its header"):
        shape_of(Model(path=str(tmp_path)), HERE)


def test_what_only_looks_like_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    weights = tmp_path / "model.safetensors"
    weights.symlink_to(tmp_path / "gone")
    with pytest.raises(PreflightError, match="is a link to nothing"):
        shape_of(Model(path=str(tmp_path)), HERE)
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(PreflightError, match="is no file"):
        shape_of(Model(path=str(tmp_path)), HERE)


def test_the_weights_of_another_model_are_refused_and_what_is_too_much_is_said(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    wanted = shape_of_config(CONFIGS["llama"], "llama", "")
    for missing, found in ((1, "hold 156,479 parameters, its config.json describes 220,480"), (0, None)):
        stored = wanted.num_parameters - wanted.head_parameters - missing
        safetensors(
            tmp_path / "model.safetensors",
            {"a": {"dtype": "F8_E4M3", "shape": [stored], "data_offsets": [0, stored]}},
            stored,
        )
        if found:
            with pytest.raises(PreflightError, match=found) as caught:
                shape_of(Model(path=str(tmp_path)), HERE)
            assert "of one model" in caught.value.to_type
        else:  # no head: perhaps it is the embedding
            assert "which hold 156,480 parameters where" in shape_of(Model(path=str(tmp_path)), HERE).source
    more = {"a": {"dtype": "U8", "shape": [250_000], "data_offsets": [0, 250_000]}}
    safetensors(tmp_path / "model.safetensors", more, 250_000)
    shape = shape_of(Model(path=str(tmp_path)), HERE)
    assert (shape.num_parameters, shape.stored_bytes) == (220_480, 250_000)
    assert "which hold 250,000 parameters where the config describes 220,480" in shape.source


@pytest.mark.parametrize(
    ("more", "positions"),
    [
        ({}, None), ({"max_position_embeddings": 4096}, 4096), ({"seq_length": 8192}, 8192),
        ({"max_position_embeddings": 2048, "alibi": True}, None),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        ({"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 131072),
        ({"max_position_embeddings": 163840, "rope_parameters": {
            "rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}}, 163840),
        ({"max_position_embeddings": 131072, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": "two"}}, 4096),
        ({"max_position_embeddings": "many"}, None),
    ],
)  # fmt: skip
def test_how_many_positions_a_model_knows(more, positions):
    assert shape_of_config({**CONFIGS["llama"], **more}, "llama", "").positions == positions


def test_a_missing_shard_is_named(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(PreflightError, match=f"names {shard.name}, which the folder lacks"):
        shape_of(Model(path=str(folder)), HERE)


def test_an_index_that_is_no_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weights": {}}')
    with pytest.raises(PreflightError, match=r"index\.json cannot be read: KeyError"):
        shape_of(Model(path=str(folder)), HERE)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read"),
        ("[]", "holds no JSON object"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "cannot be read"),
    ],
    ids=["none", "broken", "list", "deep"],
)
def test_a_folder_with_a_broken_config(tmp_path, content, found):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(PreflightError, match=found):
        shape_of(Model(path=str(tmp_path)), HERE)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"]
)
def test_a_missing_dimension_is_named(key):
    config = {name: value for name, value in CONFIGS["llama"].items() if name != key}
    with pytest.raises(UsageError, match=f"lacks {key}"):
        shape_of(Model(config=config), HERE)
    with pytest.raises(UsageError, match=f"lacks {key} .it says 'many'"):
        shape_of(Model(config={**config, key: "many"}), HERE)


def test_a_hub_id_that_nobody_has(empty_hub):
    with pytest.raises(UsageError, match="launch prepare RECIPE"):
        shape_of(Model(path="acme/rocket-7b"), HERE)
    assert read_config("acme/rocket-7b") is None


@pytest.mark.parametrize(
    ("path", "meant"),
    [("qwen/qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B"), ("Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
     ("Qwen/Qwen2.5-7B-Instuct", "Qwen/Qwen2.5-7B-Instruct")],
)  # fmt: skip
def test_a_hub_id_that_is_nearly_one_of_the_catalogue(path, meant, empty_hub):
    with pytest.raises(UsageError) as caught:
        shape_of(Model(path=path), HERE)
    assert caught.value.to_type.startswith(f"did you mean model.path={meant}? Else type")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "models/a/b", "a" * 97])
def test_a_folder_that_is_not_there(path, empty_hub):
    with pytest.raises(UsageError, match="there is no folder"):
        shape_of(Model(path=path), HERE)


@pytest.mark.parametrize("path", ["a" * 5000, "~nobody-of-this-name/model"])
def test_a_path_that_can_be_none(path, empty_hub):
    with pytest.raises(UsageError, match="can be no folder") as caught:
        shape_of(Model(path=path), HERE)
    assert len(caught.value.you_set) < 100


def test_the_hub_cache_is_read_and_comes_before_the_catalogue(empty_hub):
    snapshot = empty_hub / "models--THUDM--chatglm3-6b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    config = {"model_type": "chatglm", "num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16,
              "ffn_hidden_size": 96, "padded_vocab_size": 100, "multi_query_attention": True,
              "multi_query_group_num": 2}  # fmt: skip
    (snapshot / "config.json").write_text(json.dumps(config))
    # Without a ref the commit itself has to be asked for.
    assert shape_of(Model(path="THUDM/chatglm3-6b"), HERE).num_layers == 28
    assert shape_of(Model(path="THUDM/chatglm3-6b", revision="abc"), HERE).num_layers == 1
    refs = empty_hub / "models--THUDM--chatglm3-6b" / "refs"
    refs.mkdir()
    (refs / "main").write_bytes(b"\xff\xfe")
    assert shape_of(Model(path="THUDM/chatglm3-6b"), HERE).num_layers == 28
    (refs / "main").write_text("abc")
    shape = shape_of(Model(path="THUDM/chatglm3-6b"), HERE)
    assert (shape.num_layers, shape.family, shape.prompts, shape.source) == (1, "glm", "chatglm3", str(snapshot))
