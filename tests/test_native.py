"""native_config: the config of the native class for every family that has one, and every reason why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher import preflight
from launcher.cluster import resolve_cluster
from launcher.errors import RecipeError
from launcher.modelshape import shape_of
from launcher.native import NativeConfig, Refusal, native_config, normalises_head
from launcher.plan import Plan, make_plan
from launcher.recipe import Recipe
from launcher.rundir import write_json
from tests.worker.originals import CONFIGS


def native(kind: str, **changed: Any) -> NativeConfig:
    found = native_config({**CONFIGS[kind], **changed})
    assert isinstance(found, NativeConfig), found
    return found


def reasons(kind: str, **changed: Any) -> str:
    found = native_config({**CONFIGS[kind], **changed})
    assert isinstance(found, Refusal), found
    return "; ".join(found.reasons)


def test_chatglm2_is_a_glm() -> None:
    found = native("chatglm2")
    assert (found.native.source, found.native.target) == ("chatglm2", "GlmForCausalLM")
    assert found.config == {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "vocab_size": 640,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "pad_token_id": 0,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    assert native("chatglm3").native.source == "chatglm3"


@pytest.mark.parametrize(
    ("kind", "target", "wanted"),
    [
        ("baichuan", "LlamaForCausalLM", {"model_type": "llama", "attention_bias": False, "num_key_value_heads": 4}),
        ("internlm", "LlamaForCausalLM", {"attention_bias": True}),
        ("internlm 20B", "LlamaForCausalLM", {"attention_bias": False}),
        ("xverse", "LlamaForCausalLM", {"max_position_embeddings": 64, "rms_norm_eps": 1e-6}),
        ("qwen", "Qwen2ForCausalLM", {"model_type": "qwen2", "intermediate_size": 48, "max_position_embeddings": 64}),
    ],
)
def test_the_others_are_what_they_descend_from(kind: str, target: str, wanted: dict[str, Any]) -> None:
    found = native(kind)
    assert found.native.target == target
    assert {key: found.config[key] for key in wanted} == wanted
    assert "auto_map" not in found.config


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"quantization_bit": 4}, "quantization_bit is 4: its weights are stored quantised"),
        ({"pre_seq_len": 128}, "pre_seq_len is 128: it has a P-tuning prefix"),
        ({"rope_ratio": 16}, "rope_ratio is 16: nobody has compared stretched positions"),
        ({"original_rope": False}, "original_rope is False: its rotary embedding is another one"),
        ({"multi_query_attention": False}, "multi_query_attention is False"),
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"post_layer_norm": False}, "post_layer_norm is False"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
        ({"fp32_residual_connection": True}, "fp32_residual_connection is True"),
        ({"hidden_dropout": 0.1}, "hidden_dropout is 0.1: the native class has no such dropout"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"vocab_size": 600}, "vocab_size is 600: padded_vocab_size is 640"),
        ({"kv_channels": None}, "its config lacks kv_channels"),
        ({"sliding_window": 512}, "its config has sliding_window, which this version does not know"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: its weights are stored quantised"),
    ],
)
def test_a_chatglm2_that_is_not_exact_is_refused_with_the_reason(changed: dict[str, Any], reason: str) -> None:
    assert reason in reasons("chatglm2", **changed)


def test_all_reasons_come_at_once() -> None:
    assert reasons("chatglm2", quantization_bit=8, pre_seq_len=64).count(";") == 1


@pytest.mark.parametrize("changed", [{}, {"quantization_bit": 0}, {"pre_seq_len": None}, {"rope_ratio": 1.0}])
def test_defaults_written_out_change_nothing(changed: dict[str, Any]) -> None:
    assert native("chatglm2", **changed) == native("chatglm2")


@pytest.mark.parametrize(
    ("kind", "changed", "reason"),
    [
        ("baichuan2", {"max_position_embeddings": None}, "the 13B counts positions by ALiBi"),
        ("baichuan2", {"hidden_size": 5120}, "the 13B counts positions by ALiBi"),
        ("baichuan", {"architectures": ["BaichuanForCausalLM"]}, "tells Baichuan from Baichuan2"),
        ("baichuan", {"architectures": []}, "tells Baichuan from Baichuan2"),
        ("internlm", {"num_key_value_heads": 2}, "as many key heads as query heads"),
        ("xverse", {"num_experts": 64}, "its config has num_experts"),
        ("xverse", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is"),
        ("internlm", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen", {"no_bias": False}, "no_bias is False"),
        ("qwen", {"rotary_pct": 0.5}, "rotary_pct is 0.5"),
        ("qwen", {"kv_channels": 16}, "kv_channels is 16"),
        ("qwen", {"emb_dropout_prob": 0.1}, "emb_dropout_prob is 0.1"),
        ("qwen", {"n_embd": 32, "hidden_size": None}, "its config lacks hidden_size"),
    ],
)
def test_the_others_are_refused_with_the_reason(kind: str, changed: dict[str, Any], reason: str) -> None:
    assert reason in reasons(kind, **changed)


def test_a_config_as_it_was_published_is_known_to_the_last_key() -> None:
    """InternLM-20B's and Baichuan2-7B's own config.json."""
    common = {
        "auto_map": {}, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": True, "max_position_embeddings": 4096,
    }  # fmt: skip
    internlm = native_config({
        **common, "architectures": ["InternLMForCausalLM"], "bias": False, "hidden_size": 5120,
        "intermediate_size": 13824, "model_type": "internlm", "num_attention_heads": 40, "num_hidden_layers": 60,
        "num_key_value_heads": 40, "pad_token_id": 2, "pretraining_tp": 1, "vocab_size": 103168,
        "rotary": {"base": 10000, "type": "dynamic"},
    })  # fmt: skip
    assert isinstance(internlm, NativeConfig)
    assert internlm.native.exact_length == 4096
    baichuan2 = native_config({
        **common, "_from_model_config": True, "architectures": ["BaichuanForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 11008, "model_max_length": 4096, "model_type": "baichuan", "num_attention_heads": 32,
        "num_hidden_layers": 32, "pad_token_id": 0, "vocab_size": 125696, "z_loss_weight": 0,
    })  # fmt: skip
    assert isinstance(baichuan2, NativeConfig)
    assert normalises_head(baichuan2.native)


def test_what_has_no_native_class_says_so_and_what_needs_none_is_left_alone() -> None:
    assert isinstance(native_config({"model_type": "chatglm", "position_encoding_2d": True}), Refusal)
    assert native_config({"model_type": "llama"}) is None
    assert native_config({"model_type": "novel", "auto_map": {}}) is None


def test_only_baichuan2_has_a_head_of_unit_rows() -> None:
    assert {kind for kind in CONFIGS if normalises_head(native(kind).native)} == {"baichuan2"}


# plans


def planned(folder: Path, kind: str, sections: dict[str, Any] | None = None, **changed: Any) -> Plan:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", {**CONFIGS[kind], **changed})
    values = {"model": {"path": str(folder)}, "data": {"path": "rows.json", "max_length": 64}, "hardware": "1xcpu"}
    recipe = Recipe.model_validate({**values, **(sections or {})})
    return make_plan("tiny", recipe, resolve_cluster(recipe.hardware), shape_of(recipe.model, folder))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_plan_is_that_of_the_native_class(kind: str, tmp_path: Path) -> None:
    plan = planned(tmp_path / "model", kind)
    source = CONFIGS[kind]["model_type"].replace("chatglm", kind)
    decision = plan.decisions[0]
    assert decision.key == "model.native"
    assert decision.value.startswith(f"{source} → ")
    assert not plan.shape.remote_code
    assert not [finding for finding in preflight.check(plan, tmp_path) if "its code" in finding.found]
    assert set(plan.targets) <= {"q_proj", "k_proj", "v_proj"}
    assert plan.shape.prompts == source
    assert Plan.model_validate_json(plan.model_dump_json(by_alias=True)) == plan


def test_code_on_a_transformers_that_it_was_not_written_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path / "model", "chatglm2", quantization_bit=4)
    wanted = "runs unchanged on transformers 4.30.2 to 4.33.3; 5.23.0 is installed"
    for version, num in (("5.23.0", 1), ("4.33.3", 0), ("4.30.2", 0), ("4.4.0", 1)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        found = [one.found for one in preflight.check(plan, tmp_path) if "runs unchanged" in one.found]
        assert found == [wanted.replace("5.23.0", version)] * num


def test_a_refused_model_needs_its_code_and_the_reasons_are_shown(tmp_path: Path) -> None:
    plan = planned(tmp_path / "model", "chatglm2", quantization_bit=4)
    assert plan.shape.remote_code
    assert plan.targets == ("query_key_value",)
    assert (plan.decisions[0].value, plan.decisions[0].because[:23]) == ("no", "quantization_bit is 4: ")
    found = [finding for finding in preflight.check(plan, tmp_path) if finding.level == "error"]
    assert any("its code is not part of transformers" in one.found and "quantization_bit" in one.found for one in found)


@pytest.mark.parametrize(
    ("adapter", "key"),
    [
        ({"type": "full"}, "adapter.type"),
        ({"modules_to_save": ["lm_head"]}, "adapter.modules_to_save"),
        ({"targets": ["q_proj", "lm_head"]}, "adapter.targets"),
    ],
)
def test_the_head_of_baichuan2_is_not_trained(adapter: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(tmp_path / "model", "baichuan2", {"adapter": adapter})
    assert [problem.key for problem in caught.value.problems] == [key]
    assert "divides each row by its length" in caught.value.problems[0].message
    assert planned(tmp_path / "model", "baichuan", {"adapter": adapter}).shape.native
    assert planned(tmp_path / "model", "baichuan2", {"adapter": {"targets": "all-linear"}}).shape.native


@pytest.mark.parametrize("kind", ["qwen", "internlm"])
def test_longer_rows_than_are_exact_are_refused(kind: str, tmp_path: Path) -> None:
    data = {"path": "rows.json", "max_length": 65}
    with pytest.raises(RecipeError) as caught:
        planned(tmp_path / "model", kind, {"data": data})
    assert [problem.key for problem in caught.value.problems] == ["data.max_length"]
    assert caught.value.problems[0].message.endswith("Set data.max_length=64")


@pytest.mark.parametrize(
    ("folder", "source"), [("chatglm3-6b", "chatglm3"), ("chatglm2-6b", "chatglm2"), ("mine", "chatglm2")]
)
def test_a_folder_that_says_nothing_is_what_its_name_says(folder: str, source: str, tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIGS["chatglm2"].items() if key != "_name_or_path"}
    (tmp_path / folder).mkdir()
    write_json(tmp_path / folder / "config.json", config)
    recipe = Recipe.model_validate({"model": {"path": str(tmp_path / folder)}, "data": {"path": "x.json"}})
    assert shape_of(recipe.model, tmp_path).prompts == source
