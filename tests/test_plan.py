"""What launcher/plan.py decides, why, and what it refuses: shapes from the shipped catalogue, hardware by name."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launcher.cluster import GIB, resolve_cluster
from launcher.errors import DoesNotFitError, RecipeError
from launcher.families import family
from launcher.modelshape import shape_of
from launcher.plan import Plan, budget_bytes, identity, make_plan, steps_per_epoch, total_steps
from launcher.plan.model import window_steps
from launcher.recipe import Recipe, load_recipe
from launcher.shares import most_rows

SMALL = "Qwen/Qwen2.5-0.5B"
SEVEN = "Qwen/Qwen2.5-7B-Instruct"
BLOOM = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}


@pytest.fixture(autouse=True)
def _a_bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host of 64 GiB whose hub cache is empty."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setattr("launcher.cluster.machine.host_memory_bytes", lambda: 64 * GIB)


def values(hardware: str | Sequence[str], **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe as plain values: a small model on `hardware`, with these sections."""
    model = sections.get("model", {})
    named = "config" in model or "path" in model
    sections["model"] = model if named else {"path": SMALL, **model}
    sections["data"] = {"path": "/data/rows.json", **sections.get("data", {})}
    return {"hardware": hardware, **sections}


def planned(hardware: str | Sequence[str], **sections: dict[str, Any]) -> Plan:
    """The plan of such a recipe."""
    return plan_of(Recipe.model_validate(values(hardware, **sections)))


def plan_of(recipe: Recipe) -> Plan:
    return make_plan("test", recipe, resolve_cluster(recipe.hardware), shape_of(recipe.model, Path("/")))


def refused(hardware: str | Sequence[str], **sections: dict[str, Any]) -> dict[str, str]:
    """The problems that stand against such a recipe: key -> message."""
    with pytest.raises(RecipeError) as caught:
        planned(hardware, **sections)
    assert caught.value.exit_code == 2
    return {problem.key: problem.message for problem in caught.value.problems}


def because(plan: Plan, key: str) -> str | None:
    """The reason of a decision, None where nothing was decided."""
    return next((decision.because for decision in plan.decisions if decision.key == key), None)


# strategy


@pytest.mark.parametrize(
    ("hardware", "strategy", "num_processes", "reason"),
    [
        ("A800-80GB", "single", 1, "there is one device"),
        ("8xA800-80GB", "ddp", 8, "the fastest that fits"),
        ("1xcpu", "single", 1, "there is one device"),
        ("2xcpu", "ddp", 2, "a copy of the model on each of 2 devices"),
    ],
)
def test_strategy_follows_the_number_of_devices(hardware: str, strategy: str, num_processes: int, reason: str) -> None:
    plan = planned(hardware)
    assert (plan.strategy, plan.num_processes) == (strategy, num_processes)
    assert because(plan, "strategy.type") == reason


def test_a_strategy_that_was_asked_for_is_no_decision() -> None:
    plan = planned("8xA800-80GB", strategy={"type": "zero3"})
    assert (plan.strategy, plan.num_processes) == ("zero3", 8)
    assert because(plan, "strategy.type") is None


def test_single_is_refused_on_several_devices() -> None:
    assert refused("2xRTX 3090", strategy={"type": "single"}) == {
        "strategy.type": "single uses one device, the hardware has 2. Set strategy.type=ddp, or add --nproc 1"
    }


def test_python_is_refused_on_several_devices() -> None:
    assert refused("2xRTX 3090", launch={"backend": "python"}) == {
        "launch.backend": "python starts one process, the hardware has 2 devices. Set launch.backend=torchrun"
    }


def test_a_naive_device_map_is_one_process_with_the_memory_of_all_devices() -> None:
    plan = planned(
        ["RTX 3060 Ti 8GiB reserved=921MiB", "RTX 3060 12GiB"],
        model={"path": "THUDM/chatglm2-6b"},
        data={"max_length": 256},
        strategy={"type": "device_map", "schedule": "naive"},
        train={"global_batch": 4},
    )
    assert plan.num_processes == 1
    assert budget_bytes(plan.strategy, plan.cluster) == 20 * GIB - 921 * 2**20
    assert plan.memory.total_bytes > 12 * GIB, "more than either card has"
    assert plan.memory.total_bytes <= 0.9 * budget_bytes(plan.strategy, plan.cluster)


UNLIKE = ["RTX 3060 Ti 8GiB reserved=921MiB", "RTX 3060 12GiB"]


def test_unlike_cards_get_rows_by_speed_and_each_has_room_for_its_own() -> None:
    plan = planned(UNLIKE, strategy={"type": "ddp"}, train={"micro_batch": 8, "gradient_checkpointing": True})
    faster, slower = plan.shares
    assert faster + slower == pytest.approx(1)
    assert 1.2 < faster / slower < 1.35, "as the products of the two cards"
    assert most_rows(plan.shares, 8) == (9, 8)
    assert plan.rank_bytes[0] > plan.rank_bytes[1]
    assert [plan.bytes_of(rank) for rank in (0, 1)] == list(plan.rank_bytes)
    assert plan.tightest == 0
    assert plan.memory.total_bytes == plan.rank_bytes[0] <= 8 * GIB - 921 * 2**20
    assert "so that no card waits for a slower one" in str(because(plan, "shares"))
    # Rows of full length are whole rows: 9 on the card that is 1.26 times as fast as the one with 7.
    alone = [
        planned(name, train={"micro_batch": rows, "global_batch": 2 * rows, "gradient_checkpointing": True}).time
        for name, rows in zip(UNLIKE, (9, 7), strict=True)
    ]
    assert plan.time.forward_s == pytest.approx(max(time.forward_s for time in alone), rel=0.02)


@pytest.mark.parametrize(
    ("hardware", "sections"),
    [
        (["RTX 3060 12GiB", "RTX 3060 12GiB"], {}),
        (UNLIKE, {"data": {"batching": "padded"}}),
        (UNLIKE, {"train": {"micro_batch": 1}}),
        (UNLIKE[:1], {}),
    ],
)
def test_alike_cards_rows_as_they_come_and_single_rows_are_not_shared_by_speed(
    hardware: list[str], sections: dict[str, Any]
) -> None:
    plan = planned(hardware, **sections)
    assert plan.shares == plan.rank_bytes == ()
    assert because(plan, "shares") is None


def test_a_share_that_does_not_fit_the_faster_card_is_refused_for_that_card() -> None:
    train = {"micro_batch": 8, "gradient_checkpointing": False}
    with pytest.raises(DoesNotFitError, match=r"GiB needed on a device with 7\.1 GiB free \(RTX 3060 Ti\)"):
        planned(UNLIKE, strategy={"type": "ddp"}, train=train)


# dtype


@pytest.mark.parametrize(
    ("hardware", "path", "dtype", "reason"),
    [
        ("V100-32GB", SMALL, "fp16", "V100-32GB has no bf16"),
        ("A800-80GB", SMALL, "bf16", "every card has it and it needs no loss scaling"),
        ("2xcpu", SMALL, "fp32", "a CPU computes it fastest"),
        (["A800-80GB", "V100-32GB"], SMALL, "fp16", "V100-32GB has no bf16"),
        ("A800-80GB", "THUDM/chatglm-6b", "fp16", f"not bf16: {family('chatglm').no_bf16}"),
        ("A800-80GB", "THUDM/chatglm2-6b", "bf16", "every card has it and it needs no loss scaling"),
        ("A800-80GB", "THUDM/chatglm3-6b", "bf16", "every card has it and it needs no loss scaling"),
    ],
)
def test_dtype_follows_device_and_model(hardware: str | list[str], path: str, dtype: str, reason: str) -> None:
    plan = planned(hardware, model={"path": path})
    assert plan.dtype == plan.weights_dtype == dtype
    assert because(plan, "model.dtype") == reason


@pytest.mark.parametrize(
    ("hardware", "path", "dtype", "message"),
    [
        ("V100-32GB", SMALL, "bf16", "V100-32GB has no bf16. Set model.dtype=fp16"),
        (
            "2xcpu",
            SMALL,
            "fp16",
            "on a CPU the Trainer would quietly compute in fp32. Set model.dtype=fp32",
        ),
        (
            "A800-80GB",
            "THUDM/chatglm-6b",
            "bf16",
            f"not with chatglm: {family('chatglm').no_bf16}. Set model.dtype=fp16",
        ),
    ],
)
def test_a_dtype_that_cannot_work_is_refused(hardware: str, path: str, dtype: str, message: str) -> None:
    assert refused(hardware, model={"path": path, "dtype": dtype}) == {"model.dtype": message}


@pytest.mark.parametrize("strategy", ["single", "device_map"])
def test_full_training_keeps_weights_in_fp32(strategy: str) -> None:
    section = {"type": strategy, "device_map": "any"} if strategy == "device_map" else {"type": strategy}
    plan = planned("A800-80GB", adapter={"type": "full"}, strategy=section)
    assert (plan.dtype, plan.weights_dtype) == ("bf16", "fp32")
    assert because(plan, "weights") == "bf16 alone loses small updates of trained weights"
    assert plan.targets == ()
    assert plan.trainable_parameters == plan.shape.num_parameters


# batch


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"global_batch": 100}, "100 is no multiple of 8 ranks. Nearest that are: 96, 104"),
        ({"global_batch": 3}, "3 is no multiple of 8 ranks. Nearest that are: 8"),
        (
            {"global_batch": 104, "micro_batch": 4},
            "104 is no multiple of 8 ranks × micro batch 4. Nearest that are: 96, 128",
        ),
        (
            {"global_batch": 8, "micro_batch": 4},
            "8 is no multiple of 8 ranks × micro batch 4. Nearest that are: 32",
        ),
    ],
)
def test_a_global_batch_that_does_not_divide_is_refused_with_the_nearest(train: dict[str, int], message: str) -> None:
    assert refused("8xA800-80GB", train=train) == {"train.global_batch": message}


@pytest.mark.parametrize("hardware", ["8xA800-80GB", "2xRTX 3060 12GiB", "RTX 2080 Ti", "2xcpu"])
@pytest.mark.parametrize("global_batch", [16, 48, 640])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_micro_batch_divides_and_none_is_faster(hardware: str, global_batch: int, checkpointing: bool) -> None:
    train = {"global_batch": global_batch, "gradient_checkpointing": checkpointing}
    plan = planned(hardware, train=train)
    assert plan.micro_batch * plan.accumulation * plan.num_processes == plan.global_batch == global_batch
    budget = 0.9 * budget_bytes(plan.strategy, plan.cluster)  # an automatic choice leaves a tenth free
    assert plan.memory.total_bytes <= budget
    rows = global_batch // plan.num_processes
    largest = min(rows, 64 if plan.kind == "cuda" else 8)
    for size in (size for size in range(1, largest + 1) if rows % size == 0):
        try:
            other = planned(hardware, strategy={"type": plan.strategy}, train={**train, "micro_batch": size})
        except DoesNotFitError:
            continue
        if other.memory.total_bytes <= budget:
            assert other.time.total_s * 1.03 >= plan.time.total_s
            assert size <= plan.micro_batch or other.time.total_s > plan.time.total_s


@pytest.mark.parametrize("hardware", ["8xA800-80GB", "2xRTX 3090"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_no_strategy_that_fits_is_clearly_faster_than_the_chosen_one(hardware: str, adapter: str) -> None:
    sections: dict[str, Any] = {"adapter": {"type": adapter}, "data": {"max_length": 512}}
    if hardware == "8xA800-80GB":
        sections["model"] = {"path": SEVEN}
    plan = planned(hardware, **sections)
    tried = []
    for strategy in ("ddp", "fsdp", "zero1", "zero2", "zero3"):
        try:
            tried.append(planned(hardware, strategy={"type": strategy}, **sections).time.total_s)
        except DoesNotFitError:
            continue
    assert min(tried) * 1.03 >= plan.time.total_s
    first, *others = plan.alternatives
    assert (first.strategy, first.micro_batch) == (plan.strategy, plan.micro_batch)
    assert first.step_s == plan.time.total_s
    assert [other.fits for other in others] == sorted((other.fits for other in others), reverse=True)


def test_quantised_weights_are_not_sharded_by_choice() -> None:
    plan = planned("2xRTX 3090", model={"path": SEVEN, "quantization": "nf4"})
    assert {other.strategy for other in plan.alternatives} == {"ddp"}


def test_the_global_batch_that_was_asked_for_is_kept_whatever_is_chosen() -> None:
    for global_batch in (8, 24, 1000):
        plan = planned("8xA800-80GB", model={"path": SEVEN}, train={"global_batch": global_batch})
        assert plan.micro_batch * plan.accumulation * 8 == plan.global_batch == global_batch


def test_the_same_step_survives_other_hardware() -> None:
    train = {"global_batch": 64}
    plans = [planned(hardware, train=train) for hardware in ("A800-80GB", "8xA800-80GB", "4xT4", "2xcpu")]
    assert {plan.global_batch for plan in plans} == {64}
    assert len({json.dumps(identity(plan), sort_keys=True) for plan in plans}) == 1


def test_a_micro_batch_that_was_asked_for_is_no_decision() -> None:
    plan = planned("A800-80GB", train={"micro_batch": 2, "global_batch": 16})
    assert (plan.micro_batch, plan.accumulation) == (2, 8)
    assert because(plan, "train.micro_batch") is None


def test_the_reason_of_the_micro_batch_names_the_room() -> None:
    plan = planned("A800-80GB", model={"path": SEVEN}, data={"max_length": 512}, train={"global_batch": 64})
    assert because(plan, "train.micro_batch") == (
        "the fastest that fits 72.0 GiB, at most 64, and divides the global batch"
    )


# gradient checkpointing


def test_activations_are_kept_where_they_fit() -> None:
    plan = planned("A800-80GB")
    assert not plan.gradient_checkpointing
    assert because(plan, "train.gradient_checkpointing") == "everything fits without computing layers twice"


def test_activations_are_computed_again_where_they_do_not_fit() -> None:
    section = {"global_batch": 8, "micro_batch": 8}
    plan = planned("RTX 3090", model={"path": SEVEN, "quantization": "nf4"}, data={"max_length": 512}, train=section)
    assert plan.gradient_checkpointing
    assert because(plan, "train.gradient_checkpointing") == (
        "activations do not fit without, or only of batches too small to be fast"
    )
    with pytest.raises(DoesNotFitError):
        planned(
            "RTX 3090",
            model={"path": SEVEN, "quantization": "nf4"},
            data={"max_length": 512},
            train={**section, "gradient_checkpointing": False},
        )


@pytest.mark.parametrize("asked", [True, False])
def test_checkpointing_that_was_asked_for_is_no_decision(asked: bool) -> None:
    plan = planned("A800-80GB", train={"gradient_checkpointing": asked})
    assert plan.gradient_checkpointing is asked
    assert because(plan, "train.gradient_checkpointing") is None


# rows and targets


def test_packing_is_refused_where_rows_would_see_each_other() -> None:
    assert refused("2xcpu", model={"config": BLOOM}, data={"batching": "packed"}) == {
        "data.batching": "rows packed together would see each other in bloom, which ignores position ids. "
        "Set data.batching=bucketed"
    }


def test_packing_is_planned_where_the_family_can() -> None:
    plan = planned("2xcpu", data={"batching": "packed"})
    assert plan.batching == "packed"
    assert because(plan, "data.batching") is None


def _installed(monkeypatch: pytest.MonkeyPatch, flash: bool) -> None:
    """flash-attn, or none."""
    monkeypatch.setattr("launcher.plan.packing.version_of", lambda name: "2.8.3" if flash else None)


@pytest.mark.parametrize(
    ("hardware", "path", "train", "flash", "batching", "reason"),
    [
        (
            "2xcpu",
            SMALL,
            {},
            True,
            "bucketed",
            r"a pack takes 1\.\d+ × .*no kernel for a CPU is told where rows begin",
        ),
        (
            "A100-80GB",
            SEVEN,
            {},
            False,
            "bucketed",
            r"a pack takes 1\.\d+ × .* square of its length \(flash-attn is not inst",
        ),
        (
            "A100-80GB",
            SEVEN,
            {},
            True,
            "packed",
            r"takes 0\.95 × .* 5% padding: flash-attn 2\.8\.3 is told where rows begin",
        ),
        ("A100-80GB", SEVEN, {"micro_batch": 1}, True, "bucketed", r"a micro batch is one row, so none is padded"),
        ("V100-32GB", SMALL, {}, True, "bucketed", r"flash attention has no kernels for one of the cards"),
        ("A100-80GB", "bigscience/bloom-7b1", {}, True, "bucketed", r"rows of a pack would see each other in bloom"),
    ],
)
def test_rows_are_packed_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch,
    hardware: str,
    path: str,
    train: dict[str, Any],
    flash: bool,
    batching: str,
    reason: str,
) -> None:
    _installed(monkeypatch, flash)
    plan = planned(hardware, model={"path": path}, train=train)
    assert plan.batching == batching
    assert plan.attention == ("flash_attention_2" if batching == "packed" else "sdpa")
    assert re.search(reason, str(because(plan, "data.batching")))


def test_a_pack_whose_rows_attention_is_told_of_has_no_mask_to_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {}
    for flash in (False, True):
        _installed(monkeypatch, flash)
        plan = planned("A100-80GB", model={"path": SEVEN}, data={"batching": "packed"}, train={"micro_batch": 4})
        assert plan.attention == ("flash_attention_2" if flash else "sdpa")
        needed[flash] = plan.memory.activations_bytes, plan.time.total_s
    assert needed[True] < needed[False]


def test_targets_that_match_nothing_are_named_with_those_there_are() -> None:
    model = {"path": "THUDM/chatglm2-6b"}
    assert refused("A800-80GB", model=model, adapter={"targets": ["query_key_value", "q_proj"]}) == {
        "adapter.targets": "query_key_value match nothing in THUDM/chatglm2-6b as GlmForCausalLM. "
        "It has: q_proj, k_proj, v_proj, o_proj, gate_up_proj, down_proj"
    }


def test_only_the_targets_that_match_nothing_are_named() -> None:
    message = refused("2xcpu", adapter={"targets": ["q_proj", "W_pack"]})["adapter.targets"]
    assert message.startswith(f"W_pack match nothing in {SMALL}. It has: q_proj, k_proj, ")


@pytest.mark.parametrize(
    ("model", "targets", "reason"),
    [
        ({"path": SMALL}, ("q_proj", "v_proj"), "the attention projections of qwen2"),
        ({"path": "THUDM/chatglm-6b"}, ("query_key_value",), "the attention projections of chatglm"),
        ({"config": BLOOM}, ("query_key_value",), "the attention projections of bloom"),
    ],
)
def test_targets_follow_the_family(model: dict[str, Any], targets: tuple[str, ...], reason: str) -> None:
    plan = planned("A800-80GB", model=model)
    assert plan.targets == targets
    assert because(plan, "adapter.targets") == reason


def test_a_family_that_is_not_known_gets_adapters_everywhere() -> None:
    config = {
        "model_type": "novel", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 256,
    }  # fmt: skip
    plan = planned("2xcpu", model={"config": config})
    assert plan.targets == "all-linear"
    assert because(plan, "adapter.targets") == "novel is no family known here"


def test_a_template_that_is_not_there_is_named_with_those_there_are() -> None:
    message = refused("2xcpu", data={"template": "alpacca"})["data.template"]
    assert message.startswith("there is no template 'alpacca'. There are: auto, chat, plain, alpaca, ")


@pytest.mark.parametrize(
    ("path", "template", "reason"),
    [
        ("baichuan-inc/Baichuan2-7B-Base", "alpaca", "for a chat model: data.template=baichuan2-chat or baichuan-chat"),
        (
            "baichuan-inc/Baichuan2-7B-Chat",
            "baichuan2-chat",
            "the name says chat; for a base model: data.template=alpaca",
        ),
    ],
)
def test_the_template_of_a_chat_model_follows_its_name_and_is_said(path: str, template: str, reason: str) -> None:
    plan = planned("A100-80GB", model={"path": path})
    assert plan.shape.template == template
    assert (because(plan, "data.template") or "").endswith(reason)
    assert because(planned("A100-80GB", model={"path": path}, data={"template": "plain"}), "data.template") is None
    assert because(planned("A100-80GB", model={"path": path}, data={"format": "text"}), "data.template") is None


def test_all_problems_come_at_once() -> None:
    problems = refused(
        "V100-32GB",
        model={"path": "THUDM/chatglm-6b", "dtype": "bf16"},
        data={"batching": "packed", "template": "none"},
        adapter={"targets": ["query"]},
        train={"global_batch": 6, "micro_batch": 4},
    )
    assert set(problems) == {"data.template", "model.dtype", "adapter.targets", "data.batching", "train.global_batch"}


# what does not fit


def _remedy(line: str) -> tuple[str, float, str]:
    """`    key=value   11.1 GiB   1.29 × the time` -> override, GiB, price."""
    found = re.fullmatch(
        r" {4}(\S.*?) +([\d.]+) GiB(?: {3}(same time|[\d.]+ × the time))?(?: {3}[\d,.]+ GiB of host memory)?", line
    )
    assert found is not None, line
    return found[1], float(found[2]), found[3] or ""


@pytest.mark.parametrize(
    ("hardware", "sections", "offered"),
    [
        (
            "RTX 3090",
            {"model": {"path": SEVEN}, "data": {"max_length": 2048}, "train": {"micro_batch": 16}},
            {"train.micro_batch=auto", "model.quantization=nf4"},
        ),
        (
            "8xA800-80GB",
            {"model": {"path": SEVEN}, "adapter": {"type": "full"}, "strategy": {"type": "ddp"}},
            {"strategy.type=fsdp", "strategy.type=zero3", "adapter.type=lora"},
        ),
        (
            "RTX 3090",
            {"data": {"max_length": 4096}, "train": {"micro_batch": 8, "gradient_checkpointing": False}},
            {"train.micro_batch=4"},
        ),
        (
            ["RTX 3060 Ti", "RTX 3060 12GiB"],
            {
                "model": {"path": SEVEN},
                "adapter": {"type": "full"},
                "data": {"max_length": 256},
                "strategy": {"type": "device_map", "schedule": "pipelined"},
            },
            {"adapter.type=lora"},
        ),
    ],
)
def test_every_remedy_plans_as_it_is_typed(
    hardware: str | list[str], sections: dict[str, Any], offered: set[str], tmp_path: Path
) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        planned(hardware, **sections)
    assert caught.value.exit_code == 3
    first, *lines = caught.value.to_type.splitlines()
    assert first == "fits, cheapest first:"
    remedies = {override: (gib, times) for override, gib, times in map(_remedy, lines)}
    assert offered <= set(remedies)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(values(hardware, **sections)), encoding="utf-8")
    for override, (gib, _) in remedies.items():
        plan = plan_of(load_recipe(file, override.split()).recipe)
        assert plan.memory.total_bytes / GIB == pytest.approx(gib, abs=0.051)
        assert plan.memory.total_bytes <= budget_bytes(plan.strategy, plan.cluster)


def test_what_does_not_fit_says_what_takes_most() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        planned("RTX 3060 Ti 8GiB reserved=921MiB", model={"path": SEVEN})
    assert caught.value.you_set == "test on hardware: RTX 3060 Ti 8GiB reserved=921MiB"
    assert (
        "GiB needed on a device with 7.1 GiB free (RTX 3060 Ti); largest part: weights 14.2 GiB" in caught.value.found
    )


def test_a_device_map_that_does_not_fit_counts_all_devices() -> None:
    strategy = {"type": "device_map", "device_map": "any"}
    with pytest.raises(DoesNotFitError) as caught:
        planned(["RTX 3060 Ti", "RTX 3060 12GiB"], model={"path": SEVEN}, adapter={"type": "full"}, strategy=strategy)
    assert "on 2 devices with 20.0 GiB free together (RTX 3060 Ti + RTX 3060 12GB)" in caught.value.found


def test_where_no_single_change_helps_two_are_offered() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        planned("RTX 3060 12GiB", model={"path": SEVEN}, data={"max_length": 2048}, train={"micro_batch": 8})
    remedies = [_remedy(line) for line in caught.value.to_type.splitlines()[1:]]
    assert "train.micro_batch=4 model.quantization=nf4" in [override for override, _, _ in remedies]


def test_where_two_changes_do_not_help_none_is_offered() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        planned("RTX 2060 6GB reserved=5GiB", model={"path": "meta-llama/Llama-3.1-70B"}, adapter={"type": "full"})
    assert caught.value.to_type == "no one or two changes make it fit: use a smaller model or more memory"


@pytest.mark.parametrize(
    ("hardware", "sections", "offered"),
    [
        ("RTX 3060 12GB", {"adapter": {"type": "full"}}, "adapter.type=lora model.quantization=nf4"),
        ("8xA800-80GB", {"data": {"max_length": 2**20}}, "data.max_length=131072"),
        ("2xRTX 3090", {"model": {"path": "meta-llama/Llama-3.1-70B", "quantization": "nf4"}}, "strategy.type=device_map"),
        ("8xA800-80GB", {"model": {"path": "mistralai/Mixtral-8x7B-v0.1", "quantization": "nf4"}}, "model.quantization=none"),
        (
            "8xA800-80GB",
            {"model": {"path": "meta-llama/Llama-3.1-70B"}, "adapter": {"type": "full"}},
            "strategy.type=zero3 strategy.offload=optimizer",
        ),
    ],
    ids=["full to lora over nf4", "halves of halves", "a device map", "whole weights, shared out", "offload"],
)  # fmt: skip
def test_ways_out_that_are_neither_near_nor_single(hardware: str, sections: dict[str, Any], offered: str) -> None:
    sections = {"model": {"path": SEVEN}, "data": {"max_length": 1024}, "train": {"global_batch": 16}, **sections}
    with pytest.raises(DoesNotFitError) as caught:
        planned(hardware, **sections)
    line = next(line for line in caught.value.to_type.splitlines()[1:] if _remedy(line)[0] == offered)
    assert ("GiB of host memory" in line) is ("offload" in offered)


def test_offload_on_a_cpu_takes_the_memory_that_it_saves() -> None:
    """Ranks on a CPU have no other memory than the host's."""
    whole, offloaded = (
        planned(
            "2xcpu", adapter={"type": "full"}, strategy={"type": "zero3", "offload": what}, train={"global_batch": 2}
        )
        for what in ("none", "parameters")
    )
    assert offloaded.memory == whole.memory


def test_a_row_of_few_tokens_is_not_cut_further() -> None:
    sections = {"model": {"path": SEVEN}, "data": {"max_length": 8}}
    with pytest.raises(DoesNotFitError) as caught:
        planned("RTX 3060 12GiB", **sections)
    assert "data.max_length" not in caught.value.to_type


# the plan itself


def test_a_plan_is_frozen() -> None:
    plan = planned("2xcpu")
    with pytest.raises(ValidationError):
        plan.micro_batch = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"adapter": {"targets": "all-linear"}},
        {"adapter": {"type": "adalora", "init_r": 12, "targets": ["q_proj", "v_proj"]}},
        {"adapter": {"type": "full"}, "checkpoint": {"keep": 3}},
        {"model": {"config": BLOOM}},
        {"data": {"path": ["/data/a.json", "/data/b.json"], "eval": {"rows": 5}}, "train": {"early_stopping": {}}},
    ],
    ids=["defaults", "all-linear", "adalora", "full", "config", "early stopping"],
)
def test_json_reads_back_as_it_was_written(sections: dict[str, Any]) -> None:
    plan = planned("2xcpu", **sections)
    assert Plan.model_validate_json(plan.model_dump_json(by_alias=True)) == plan


@pytest.mark.parametrize(
    ("sections", "same"),
    [
        ({}, True),
        ({"train": {"lr": 5e-5, "epochs": 9}}, True),
        ({"adapter": {"targets": ["q_proj", "v_proj"]}}, True),
        ({"checkpoint": {"keep": 5}}, True),
        ({"adapter": {"r": 16}}, False),
        ({"adapter": {"type": "adalora"}}, False),
        ({"adapter": {"type": "adalora", "init_r": 16}}, False),
        ({"adapter": {"targets": "all-linear"}}, False),
        ({"train": {"seed": 1}}, False),
        ({"train": {"global_batch": 64}}, False),
        ({"data": {"batching": "padded"}}, False),
        ({"model": {"path": "Qwen/Qwen2.5-1.5B"}}, False),
    ],
)
def test_identity_is_what_a_checkpoint_depends_on(sections: dict[str, Any], same: bool) -> None:
    assert (identity(planned("2xcpu")) == identity(planned("2xcpu", **sections))) is same


def test_identity_holds_the_rank_that_adalora_starts_with() -> None:
    first, second = (planned("2xcpu", adapter={"type": "adalora", "init_r": rank}) for rank in (12, 16))
    assert identity(first) != identity(second)


def test_identity_survives_json() -> None:
    """The manifest of a checkpoint holds it."""
    found = identity(planned("2xcpu"))
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("train", "num_rows", "an_epoch", "in_all"),
    [
        ({"epochs": 3, "global_batch": 640}, 49_847, 78, 234),
        ({"epochs": 0.5, "global_batch": 16}, 100, 7, 4),
        ({"epochs": 1, "global_batch": 16, "max_steps": 5}, 100, 7, 5),
        ({"epochs": 0.01, "global_batch": 16}, 20, 2, 1),
    ],
)
def test_steps_are_counted_from_rows(train: dict[str, Any], num_rows: int, an_epoch: int, in_all: int) -> None:
    """The first is the write-up's own count: 49,847 rows, 234 steps."""
    plan = planned("A800-80GB", train=train)
    assert steps_per_epoch(plan, num_rows) == an_epoch
    assert total_steps(plan, num_rows) == in_all


def test_a_stream_has_windows_and_no_epochs() -> None:
    data = {"streaming": True, "shuffle_rows": 100}
    plan = planned("2xcpu", data=data, train={"max_steps": 250, "global_batch": 32})
    assert window_steps(plan) == 3
    assert (steps_per_epoch(plan, 96), total_steps(plan, 96)) == (25, 250), "evaluated and saved ten times"
    other = planned("2xcpu", data={**data, "shuffle_rows": 200}, train={"max_steps": 250, "global_batch": 32})
    assert identity(plan) != identity(other), "other windows are other steps"


def test_what_is_compiled_is_neither_foreign_code_nor_under_deepspeed() -> None:
    model = {"path": "THUDM/chatglm-6b", "trust_remote_code": True}
    found = refused("A100-80GB", model=model, train={"compile": True})
    assert found == {
        "train.compile": "the code that comes with THUDM/chatglm-6b was not written for a compiler. Set train.compile=false"
    }
    plan = planned("8xA800-80GB", model={"path": SEVEN}, adapter={"type": "full"}, train={"compile": True})
    assert plan.strategy == "fsdp"
    assert {other.strategy for other in plan.alternatives} <= {"ddp", "fsdp"}


def test_a_tiny_model_is_not_packed_because_python_hides_its_mask() -> None:
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "vocab_size": 320}  # fmt: skip
    plan = planned(
        "1xcpu", model={"config": config}, data={"max_length": 48}, train={"global_batch": 8, "micro_batch": 2}
    )
    assert plan.batching == "bucketed"
    assert "a mask of its length squared" in str(because(plan, "data.batching"))


def test_what_fits_with_less_than_a_tenth_to_spare_is_taken_and_said() -> None:
    full = planned(
        "16xA800-80GB",
        model={"path": "meta-llama/Llama-3.1-70B"},
        adapter={"type": "full"},
        data={"max_length": 1024},
        train={"global_batch": 64},
    )
    assert 0.9 < full.memory.total_bytes / budget_bytes(full.strategy, full.cluster) <= 1
    others = [other.step_s for other in full.alternatives if other.fits]
    assert full.time.total_s == min(others)
    because = {decision.key: decision.because for decision in full.decisions}
    assert because["train.micro_batch"].startswith("fits 80.0 GiB with less than a tenth of it to spare")
