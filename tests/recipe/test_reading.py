"""A recipe file and overrides -> a frozen Recipe, or one error that names every mistake with its place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from launcher.errors import Problem, RecipeError, UsageError
from launcher.recipe import Recipe, all_keys, load_recipe
from launcher.recipe.reading import _ELSEWHERE

# Two lines that are right; what a test adds starts on line 3.
RIGHT = "model: {path: org/name}\ndata: {path: rows.json}\n"

# The public surface: whoever changes a key of the recipe changes this list, and thinks of those who wrote it.
KEYS = """
model model.path model.config model.revision model.dtype model.quantization model.trust_remote_code
model.code_sha256
data data.path data.format
data.fields data.fields.instruction data.fields.input data.fields.output data.fields.context data.fields.target
data.fields.prompt data.fields.response data.fields.messages data.fields.text data.fields.system
data.template data.system data.max_length data.overlong data.max_rows data.streaming data.shuffle_rows data.bad_rows
data.eval data.eval.fraction data.eval.rows data.eval.path data.questions data.batching
adapter adapter.type adapter.r adapter.alpha adapter.dropout adapter.targets adapter.modules_to_save
adapter.init_r adapter.orth_reg_weight
strategy strategy.type strategy.offload strategy.nvme_path strategy.deepspeed strategy.device_map strategy.schedule
strategy.pipeline
train train.epochs train.max_steps train.lr train.schedule train.warmup train.optimizer train.weight_decay
train.max_grad_norm train.micro_batch train.global_batch train.gradient_checkpointing train.compile train.seed
train.log_every_steps train.eval_every_steps
train.early_stopping train.early_stopping.patience train.early_stopping.min_delta
checkpoint checkpoint.every_steps checkpoint.keep checkpoint.max_shard_size checkpoint.resume checkpoint.init_from
checkpoint.async checkpoint.on_failure
hardware
launch launch.backend launch.run_dir launch.port launch.max_restarts launch.stall_seconds
launch.ssh launch.ssh.user launch.ssh.port launch.ssh.key launch.ssh.python launch.ssh.timeout_s
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a text as recipe.yaml with overrides, from the folder where it lies."""
    monkeypatch.chdir(tmp_path)

    def loaded(text: str, *overrides: str):
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe((tmp_path / "recipe.yaml").relative_to(tmp_path), overrides)

    return loaded


@pytest.fixture
def mistakes(load):
    """The lines of the error that a text with overrides leads to, without the last, which counts them."""

    def found(text: str, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        *lines, last = str(caught.value).splitlines()
        assert last == f"{len(lines)} error{'s' if len(lines) > 1 else ''}, nothing was started"
        assert len(caught.value.problems) == len(lines)
        assert caught.value.exit_code == 2
        return lines

    return found


def test_what_is_left_out_has_the_default_of_the_schema(load):
    recipe = load(RIGHT).recipe
    assert recipe.train.lr == 1e-4
    assert recipe.adapter.type == "lora"
    assert recipe.hardware == "auto"
    assert recipe.checkpoint.async_ is False


def test_yaml_lists_become_tuples_and_whole_numbers_do_for_numbers(load):
    recipe = load(RIGHT + "adapter: {targets: [q_proj, v_proj], alpha: 32}\ntrain: {lr: 3e-4, epochs: 2}\n").recipe
    assert recipe.adapter.targets == ("q_proj", "v_proj")
    assert (recipe.adapter.alpha, recipe.train.lr, recipe.train.epochs) == (32.0, 3e-4, 2.0)


def test_the_name_is_that_of_the_file(load):
    assert load(RIGHT).name == "recipe"


def test_all_mistakes_of_a_file_and_of_the_overrides_come_in_one_go_in_the_order_of_the_file(mistakes):
    text = """\
model: {path: org/name, dtype: bf32}
data:
  path: rows.json
  formt: alpaca
  max_length: "512"
  eval: {fraction: 1.5, row: 3}
trian: {lr: 1}
train:
  learning_rate: 1e-4
  global_batch: -8
  lr: 1e-4
  lr: 2e-4
hardware: [8xA800-80GB, 7]
"""
    assert mistakes(text, "adapter.r=x", "launch.prot=29500") == [
        "recipe.yaml:1:25  model.dtype: expected auto, bf16, fp16 or fp32, found 'bf32'. Did you mean fp32?",
        "recipe.yaml:4:3  data.formt: unknown key. Did you mean data.format?",
        "recipe.yaml:5:3  data.max_length: expected a whole number, found '512'. "
        "The longest sequence in tokens, prompt and answer together.",
        "recipe.yaml:6:10  data.eval.fraction: expected below 1, found 1.5. "
        "Share of the rows kept for evaluation, drawn with train.seed.",
        "recipe.yaml:6:25  data.eval.row: unknown key. Did you mean data.eval.rows?",
        "recipe.yaml:7:1  trian: unknown key. Did you mean train?",
        "recipe.yaml:9:3  train.learning_rate: unknown key. Did you mean train.lr?",
        "recipe.yaml:10:3  train.global_batch: expected at least 1, found -8. Rows in one optimizer step over all "
        "devices; accumulation is derived from it, so it survives other hardware.",
        "recipe.yaml:12:3  train.lr: is set twice (first at recipe.yaml:11:3). Keep one of the two",
        "recipe.yaml:13:25  hardware.1: expected text, found 7. What the recipe is for: `8xA800-80GB`, `2xcpu`, "
        "a list of cards, or `auto` for what this machine has.",
        "override adapter.r=x  adapter.r: expected a whole number, found 'x'. "
        "Rank of the adapter; under adalora the average rank that remains at the end.",
        "override launch.prot=29500  launch.prot: unknown key. Did you mean launch.port?",
    ]


def test_all_broken_rules_come_in_one_go_too(mistakes):
    text = RIGHT + "strategy: {type: ddp, offload: optimizer}\ncheckpoint: {resume: auto}\nadapter: {targets: []}\n"
    assert [line.split("  ")[0] for line in mistakes(text)] == [
        "recipe.yaml:3:23",
        "recipe.yaml:4:14",
        "recipe.yaml:5:11",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "is empty; a recipe is a mapping with the sections model, data, …"),
        (
            "data: {path: a}\n",
            "model: is missing. Which model is trained, and in which precision.",
        ),
        (
            "model: {path: org/name}\n",
            "data: is missing. What is learned from, and how rows become token sequences.",
        ),
        (
            "data: {format: text}\nmodel: {path: org/name}\n",
            "data.path: is missing. JSON, JSONL, Parquet or text file, a folder of such files, or a list of them.",
        ),
    ],
)
def test_what_is_missing_stands_at_the_section_where_it_belongs(mistakes, text, line):
    assert mistakes(text) == [f"recipe.yaml:1:1  {line}"]


@pytest.mark.parametrize(
    ("added", "place", "words"),
    [
        ("lr: 1e-4", "3:1", "lr: unknown key. Did you mean train.lr?"),
        ("train: {epoch: 3}", "3:9", "train.epoch: unknown key. Did you mean train.epochs?"),
        ("train: {alpha: 3}", "3:9", "train.alpha: unknown key. Did you mean adapter.alpha?"),
        ("checkpoint: {async_: true}", "3:14", "checkpoint.async_: unknown key. Did you mean checkpoint.async?"),
        ("train.lr: 1e-4", "3:1", "train.lr: unknown key. In a file write lr inside of train"),
        (
            "train: {early_stopping: {rounds: 3}}",
            "3:26",
            "train.early_stopping.rounds: unknown key. train.early_stopping has: patience, min_delta",
        ),
        *(
            (
                f"{key}: 1",
                "3:1",
                f"{key}: unknown key. "
                "A recipe has: model, data, adapter, strategy, train, checkpoint, hardware, launch",
            )
            for key in ("zzz", "7", "~", "<<", "zzz.lr", "train.zzz.lr")
        ),
    ],
)
def test_an_unknown_key_gets_the_nearest_that_there_is(mistakes, added, place, words):
    assert mistakes(f"{RIGHT}{added}\n") == [f"recipe.yaml:{place}  {words}"]


@pytest.mark.parametrize("name", sorted(_ELSEWHERE))
def test_a_name_from_another_tool_gets_the_one_used_here(mistakes, name):
    line = f"recipe.yaml:3:9  train.{name}: unknown key. Did you mean {_ELSEWHERE[name]}?"
    assert mistakes(f"{RIGHT}train: {{{name}: 1}}\n") == [line]


def test_names_from_other_tools_lead_to_keys_that_exist_and_are_none_themselves():
    for name, here in _ELSEWHERE.items():
        assert re.split(r"[ ,]", here)[0] in all_keys()
        assert name not in [key.rpartition(".")[2] for key in all_keys()]


@pytest.mark.parametrize(
    ("added", "place", "words"),
    [
        ("train: {lr: '1e-4'}", "3:9", "train.lr: expected a number, found '1e-4'."),
        ("train: {lr: true}", "3:9", "train.lr: expected a number, found true."),
        ("train: {lr: null}", "3:9", "train.lr: expected a number, found null."),
        ("train: {lr: 0}", "3:9", "train.lr: expected above 0, found 0."),
        ("train: {lr: -1e-4}", "3:9", "train.lr: expected above 0, found -0.0001."),
        ("train: {lr: .inf}", "3:9", "train.lr: expected a finite number, found inf."),
        ("train: {lr: 1e999}", "3:9", "train.lr: expected a finite number, found inf."),
        ("train: {warmup: .nan}", "3:9", "train.warmup: expected a finite number, found nan."),
        ("train: {epochs: -3}", "3:9", "train.epochs: expected above 0, found -3."),
        ("train: {weight_decay: -0.1}", "3:9", "train.weight_decay: expected at least 0, found -0.1."),
        ("train: {seed: 4294967296}", "3:9", "train.seed: expected below 4,294,967,296, found 4294967296."),
        ("train: {global_batch: 32.0}", "3:9", "train.global_batch: expected a whole number, found 32.0."),
        ("train: {global_batch: '32'}", "3:9", "train.global_batch: expected a whole number, found '32'."),
        ("train: {micro_batch: 0}", "3:9", "train.micro_batch: expected at least 1 or auto, found 0."),
        ("train: {micro_batch: 1.5}", "3:9", "train.micro_batch: expected a whole number or auto, found 1.5."),
        ("train: {micro_batch: true}", "3:9", "train.micro_batch: expected a whole number or auto, found true."),
        ("train: {micro_batch: '4'}", "3:9", "train.micro_batch: expected a whole number or auto, found '4'."),
        (
            "train: {gradient_checkpointing: yes}",
            "3:9",
            "train.gradient_checkpointing: expected true or false or auto, found 'yes'.",
        ),
        ("train: {early_stopping: true}", "3:9", "train.early_stopping: expected a mapping, found true."),
        ("train:", "3:1", "train: expected a mapping, found null."),
        ("train: [1]", "3:1", "train: expected a mapping, found [1]."),
        ("train: fast", "3:1", "train: expected a mapping, found 'fast'."),
        ("launch: {port: 80}", "3:10", "launch.port: expected at least 1,024, found 80."),
        ("launch: {port: 65536}", "3:10", "launch.port: expected at most 65,535, found 65536."),
        ("launch: {run_dir: 7}", "3:10", "launch.run_dir: expected text, found 7."),
        (
            "checkpoint: {max_shard_size: 2 GB}",
            "3:14",
            r"checkpoint.max_shard_size: expected text like ^[1-9]\d*(MB|GB)$, found '2 GB'.",
        ),
        (
            "adapter: {targets: q_proj}",
            "3:11",
            "adapter.targets: expected auto or all-linear or a list, found 'q_proj'.",
        ),
        ("adapter: {targets: [q_proj, 7]}", "3:29", "adapter.targets.1: expected text, found 7."),
        ("adapter: {modules_to_save: lm_head}", "3:11", "adapter.modules_to_save: expected a list, found 'lm_head'."),
        ("adapter: {dropout: 1}", "3:11", "adapter.dropout: expected below 1, found 1."),
        ("hardware: 8", "3:1", "hardware: expected text or a list, found 8."),
        (
            "strategy: {type: 3}",
            "3:12",
            "strategy.type: expected auto, single, ddp, zero1, zero2, zero3, fsdp or device_map, found 3.",
        ),
    ],
)
def test_a_wrong_value_gets_what_is_expected_and_the_sentence_of_the_field(mistakes, added, place, words):
    line = mistakes(f"{RIGHT}{added}\n")[-1]
    key = words.split(":")[0]
    assert line == f"recipe.yaml:{place}  {words} {sentence_of(re.sub(r'[.][0-9]+$', '', key))}"


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ("adapter: {type: lroa}", "expected lora, rslora, dora, adalora or full, found 'lroa'. Did you mean lora?"),
        ("adapter: {type: LoRA}", "expected lora, rslora, dora, adalora or full, found 'LoRA'. Did you mean lora?"),
        ("train: {micro_batch: atuo}", "expected a whole number or auto, found 'atuo'. Did you mean auto?"),
        ("adapter: {targets: all_linear}", "or a list, found 'all_linear'. Did you mean all-linear?"),
    ],
)
def test_a_misspelt_value_gets_the_nearest_that_there_is(mistakes, added, words):
    assert words in mistakes(f"{RIGHT}{added}\n")[-1]


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["train.lr=abc"], ["override train.lr=abc  train.lr: expected a number, found 'abc'. The highest learning rate."]),
        (["train={lr: abc}"], ["override train={lr: abc}  train.lr: expected a number, found 'abc'. The highest learning rate."]),
        (["train.lr.max=1"], ["override train.lr.max=1  train.lr: expected a number, found {'max': 1}. The highest learning rate."]),
        (["trian.lr=1"], ["override trian.lr=1  trian: unknown key. Did you mean train?"]),
        (["train.learning_rate=1"], ["override train.learning_rate=1  train.learning_rate: unknown key. Did you mean train.lr?"]),
        (["train.lr=[", "adapter.r=0"], [
            "override train.lr=[  train.lr: is no valid YAML: expected the node content, but found '<stream end>'",
            "override adapter.r=0  adapter.r: expected at least 1, found 0. "
            "Rank of the adapter; under adalora the average rank that remains at the end.",
        ]),
        (["strategy.type=ddp", "strategy.offload=optimizer"], [
            "override strategy.offload=optimizer  strategy.offload: ddp has no offload. "
            "Set strategy.type=zero2 or zero3, or offload=none",
        ]),
    ],
)  # fmt: skip
def test_a_mistake_of_an_override_names_the_override_and_not_the_line_that_it_replaced(mistakes, overrides, lines):
    assert mistakes(RIGHT + "train: {lr: 1e-4}\n", *overrides) == lines


def test_an_override_mends_a_mistake_of_the_file(load):
    assert load(RIGHT + "train: {lr: fast}\n", "train.lr=2e-4").recipe.train.lr == 2e-4


def test_the_last_override_of_a_key_counts(load):
    assert load(RIGHT, "train.lr=1", "train.lr=2").recipe.train.lr == 2


def test_what_is_no_override_is_a_usage_error(load):
    with pytest.raises(UsageError) as caught:
        load(RIGHT, "train.lr")
    assert not isinstance(caught.value, RecipeError)


def test_paths_count_from_the_folder_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "mine").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "recipes" / "one.yaml").write_text(
        "model: {path: mine}\n"
        "data: {path: [rows.json, ../shared, /data/more.json], eval: {path: eval.json}}\n"
        "launch: {run_dir: ../runs/one}\n"
    )
    recipe = load_recipe(tmp_path / "recipes" / "one.yaml").recipe
    assert recipe.model.path == f"{tmp_path}/recipes/mine"
    assert recipe.data.path == (f"{tmp_path}/recipes/rows.json", f"{tmp_path}/shared", "/data/more.json")
    assert recipe.data.eval is not None
    assert recipe.data.eval.path == f"{tmp_path}/recipes/eval.json"
    assert recipe.launch.run_dir == f"{tmp_path}/runs/one"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("data.path=rows.json", lambda recipe: recipe.data.path, "here/rows.json"),
        ("data.path=[a, b]", lambda recipe: recipe.data.path, ("here/a", "here/b")),
        ("data.eval.path=e.json", lambda recipe: recipe.data.eval.path, "here/e.json"),
        ("data.eval={path: e.json}", lambda recipe: recipe.data.eval.path, "here/e.json"),
        ("model.path=./model", lambda recipe: recipe.model.path, "here/model"),
        ("model.path=model", lambda recipe: recipe.model.path, "here/model"),
        ("launch.run_dir=runs/a", lambda recipe: recipe.launch.run_dir, "here/runs/a"),
        ("train.lr=1e-3", lambda recipe: recipe.data.path, "there/rows.json"),
    ],
)
def test_a_path_of_an_override_counts_from_where_you_are(tmp_path, monkeypatch, override, read, value):
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "there" / "one.yaml").write_text(RIGHT)
    found = read(load_recipe(tmp_path / "there" / "one.yaml", [override]).recipe)
    each = lambda path: f"{tmp_path}/{path}"  # noqa: E731
    assert found == (each(value) if isinstance(value, str) else tuple(map(each, value)))


@pytest.mark.parametrize("name", ["THUDM/chatglm2-6b", "gpt2"])
def test_a_hub_id_stays_as_it_is_unless_there_is_such_a_folder(load, tmp_path, name):
    assert load(RIGHT, f"model.path={name}").recipe.model.path == name
    (tmp_path / name).mkdir(parents=True)
    assert load(RIGHT, f"model.path={name}").recipe.model.path == f"{tmp_path}/{name}"


@pytest.mark.parametrize(("path", "value"), [("~/model", "{home}/model"), ("./model", "{here}/model"), ("/m/..", "/")])
def test_what_is_written_as_a_folder_is_one_before_it_is_there(load, tmp_path, monkeypatch, path, value):
    monkeypatch.setenv("HOME", "/home/somebody")
    expected = value.format(home="/home/somebody", here=tmp_path)
    assert load(RIGHT, f"model.path={path}").recipe.model.path == expected


def test_the_home_of_nobody_is_a_folder_called_so(load, tmp_path):
    assert load(RIGHT, "data.path=~nobody-here/rows.json").recipe.data.path == f"{tmp_path}/~nobody-here/rows.json"


def test_a_recipe_is_frozen_down_to_its_sections(load):
    recipe = load(RIGHT).recipe
    for section, name in ((recipe, "train"), (recipe.train, "lr"), (recipe.data.fields, "input")):
        with pytest.raises(ValidationError, match="frozen_instance"):
            setattr(section, name, 1)


def test_who_knows_a_problem_later_gets_its_place_too(load):
    loaded = load(RIGHT + "train: {global_batch: 7}\n", "strategy.type=ddp")
    with pytest.raises(RecipeError) as caught, loaded.locating():
        raise RecipeError(
            [Problem("strategy.type", "b"), Problem("train.global_batch", "a"), Problem("adapter.r", "c")]
        )
    assert str(caught.value).splitlines() == [
        "recipe.yaml:1:1  adapter.r: c",
        "recipe.yaml:3:9  train.global_batch: a",
        "override strategy.type=ddp  strategy.type: b",
        "3 errors, nothing was started",
    ]


def test_the_keys_of_a_recipe_are_these():
    assert all_keys() == KEYS.split()


@pytest.mark.parametrize("key", all_keys())
def test_every_field_has_one_sentence(key):
    sentence = sentence_of(key)
    assert re.fullmatch(r"[A-Za-z`].+[^.]\.", sentence), sentence
    assert ". " not in sentence


def sentence_of(key: str) -> str:
    """The description of a dotted key, found without the code under test."""
    section: Any = Recipe
    field = None
    for part in key.split("."):
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        field = fields[part]
        candidates = (field.annotation, *getattr(field.annotation, "__args__", ()))
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    assert field is not None
    assert field.description is not None
    return field.description


def test_rules_of_sound_sections_are_reported_beside_mistakes_of_others(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {path: a/b, dtype: bff}\n"
        "data: {path: rows.json}\n"
        "adapter: {type: lora, init_r: 4}\n"
        "strategy: {type: ddp, offload: optimizer}\n"
        "checkpoint: {resume: auto}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["model.dtype", "adapter.init_r", "strategy.offload", "checkpoint.resume"]
