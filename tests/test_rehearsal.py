"""Plans of rehearsals: what is kept of the real one, what is small, and what is said about the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.plan import Plan
from launcher.recipe.shipped import recipes
from launcher.rehearsal import one_more_step, rehearsal_of
from launcher.rundir import RunDir
from launcher.start import Asked, Where, plan_recipe

SHIPPED = sorted(path.stem for path in recipes())
KEPT = ("strategy", "schedule", "num_processes", "backend", "gradient_checkpointing", "batching")


def planned(recipe: str, *overrides: str, hostfile: str | None = None) -> Plan:
    return plan_recipe(Asked(recipe, overrides, Where(hostfile=hostfile)))[1]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_rehearsal_of_a_shipped_recipe_keeps_what_is_rehearsed(name: str, tmp_path: Path) -> None:
    real = planned(name)
    small = rehearsal_of(real, RunDir(tmp_path))
    assert [getattr(small, key) for key in KEPT] == [getattr(real, key) for key in KEPT]
    assert len(small.stages) == len(real.stages)
    assert small.kind == "cpu"
    assert small.shape.num_parameters < 10e6
    assert small.accumulation == (len(real.stages) if real.schedule == "pipelined" else min(2, real.accumulation))
    before, after = real.recipe, small.recipe
    assert after.adapter.model_copy(update={"targets": before.adapter.targets}) == before.adapter
    assert (after.model.quantization, after.train.optimizer) == (before.model.quantization, before.train.optimizer)
    steps = 3 if before.adapter.type == "adalora" else 1
    assert after.train.max_steps == steps
    assert one_more_step(small).recipe.train.max_steps == steps + 1
    assert Plan.model_validate_json(small.model_dump_json(by_alias=True)) == small


def test_what_could_not_be_kept_is_said(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"node{number} slots=8\n" for number in range(4)))
    real = planned("alpaca_lora_8xa800", "hardware=8xA800-80GB", "train.global_batch=640", hostfile=str(hosts))
    notes = rehearsal_of(real, RunDir(tmp_path)).rehearsal
    assert notes is not None
    assert notes.notes == (
        "16 ranks on one host in the place of 32 on 4",
        "fp32 in the place of fp16, which a CPU does not compute in",
        "a Llama in the place of THUDM/chatglm-6b, whose own code is not here",
        "a tokenizer made from the rows, since the model's own is not here",
        "199 shipped rows in the place of alpaca_data_cleaned.jsonl, which is not here",
    )


@pytest.mark.parametrize(
    ("format_", "expected"),
    [
        ("alpaca", {"task", "output"}),
        ("context_target", {"context", "target"}),
        ("prompt_response", {"prompt", "response"}),
        ("messages", {"messages"}),
        ("text", {"text"}),
    ],
)
def test_rows_that_are_not_here_are_shipped_ones_in_the_recipes_format(
    tmp_path: Path, format_: str, expected: set[str]
) -> None:
    overrides = ("data.path=nowhere.json", f"data.format={format_}", "data.fields.instruction=task")
    small = rehearsal_of(planned("quickstart", *overrides), RunDir(tmp_path))
    rows = json.loads(Path(str(small.recipe.data.path)).read_text())
    assert all(set(row) == expected for row in rows)


def test_stages_stay_uneven_in_the_order_of_the_cards(tmp_path: Path) -> None:
    real = planned("chatglm2_lora_2gpu_mixed")
    small = rehearsal_of(real, RunDir(tmp_path))
    sizes, small_sizes = ([stage.stop - stage.first for stage in plan.stages] for plan in (real, small))
    assert sorted(small_sizes) == [1, 2]
    assert (sizes[0] > sizes[1]) == (small_sizes[0] > small_sizes[1])


def test_a_model_folder_that_is_here_lends_its_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936,
              "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
              "layer_types": ["full_attention"] * 24}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    small = rehearsal_of(planned("quickstart", "model.config=null", f"model.path={folder}"), RunDir(tmp_path))
    assert small.rehearsal is not None
    assert small.rehearsal.folder == str(folder)
    assert small.recipe.model.config is not None
    assert small.recipe.model.config["vocab_size"] == 151936
    assert len(small.recipe.model.config["layer_types"]) == small.shape.num_layers == 2
    assert not any("tokenizer" in note for note in small.rehearsal.notes)
