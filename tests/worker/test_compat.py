"""Code of 2023 on today's transformers: mended it trains, talks and exports; what loads wrongly in silence does not pass prepare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.compat import FIXES, fixes_for
from launcher.errors import PreflightError
from launcher.modelshape.small import small_sizes
from launcher.remotecode import Staged, find_code, read_code, stage
from launcher.rundir import RunDir
from launcher.worker.code_trial import Recomputation, try_small
from launcher.worker.compat import mend, token_loss
from launcher.worker.data.batches import collator
from launcher.worker.data.tokens import IGNORED, Prompter
from launcher.worker.prepare import prepare
from launcher.worker.prepared import read_prepared
from launcher.worker.staged import load_tokenizer, load_weights
from tests.worker import old_models, remote_models
from tests.worker.conftest import Job

RECIPE = """
model: {{path: {model}, trust_remote_code: true}}
data: {{path: {data}, max_length: 64, eval: {{rows: 6}}}}
adapter: {{type: lora, targets: {targets}}}
train: {{max_steps: 3, lr: 2e-2, global_batch: 8, micro_batch: 2, log_every_steps: 1, gradient_checkpointing: true}}
checkpoint: {{every_steps: 3}}
hardware: 2xcpu
"""
FAMILIES = {"glm": "chatglm", "baichuan": "baichuan"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("old")
    return {"glm": old_models.write_glm(root / "glm"), "baichuan": old_models.write_baichuan(root / "baichuan")}


def staged_from(folder: Path, root: Path, *fixes: str) -> Staged:
    code = find_code(folder)
    assert code is not None
    return stage(code, read_code(folder, code), root, fixes)


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    """Model and tokenizer of one of them, mended, in fp32."""
    kept: dict[str, tuple[Any, Any]] = {}

    def load(name: str) -> tuple[Any, Any]:
        if name not in kept:
            fixes = (fix.name for fix in fixes_for(FAMILIES[name], None))
            staged = staged_from(folders[name], tmp_path_factory.mktemp("code"), *fixes)
            kept[name] = load_weights(folders[name], staged, dtype=torch.float32), load_tokenizer(folders[name], staged)
        return kept[name]

    return load


def of(job: Job, model: Path, data: Path, targets: str = "auto") -> Job:
    job.recipe = job.folder.with_name("recipe.yaml")
    job.recipe.write_text(RECIPE.format(model=model, data=data, targets=targets))
    return job


def launch(*argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "launcher", *argv], capture_output=True, text=True, env=env, check=False
    )


@pytest.mark.parametrize("name", ["glm", pytest.param("baichuan", marks=pytest.mark.slow)])
def test_two_ranks_train_then_it_talks_and_is_exported(
    name: str, job: Job, folders: dict[str, Path], tiny_data: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in folders[name].iterdir()}
    job = of(job, folders[name], tiny_data)
    assert job.start() == [0, 0], job.logs()
    losses, evals = job.losses(), [event["loss"] for event in job.events("eval")]
    assert losses[3] < losses[1]
    # One number for both, were there no dropout of rows: neither ranks nor micro batches are counted twice.
    assert abs(losses[1] - evals[0]) < 1.5
    told = launch("chat", str(job.folder), "--prompt", "Add 2 and 3", "--max-new-tokens", "5")
    assert told.returncode == 0, told.stderr
    done = launch("export", str(job.folder), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "same logits" in done.stdout
    exported = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert exported == json.loads(before["tokenizer_config.json"])  # add_bos_token is still there
    assert {path.name: path.read_bytes() for path in folders[name].iterdir() if path.is_file()} == before


def test_the_plan_lists_every_fix_with_its_range(job: Job, folders: dict[str, Path], tiny_data: Path) -> None:
    plan = of(job, folders["glm"], tiny_data).plan()
    assert plan.fixes == tuple(fix.name for fix in FIXES if "chatglm" in fix.families)
    told = [decision for decision in plan.decisions if decision.key == "model.compat"]
    assert [decision.value for decision in told][:2] == [
        "vocabulary-first (transformers >=4.34)",
        "padding-side (transformers >=4.45)",
    ]
    assert all(decision.because for decision in told)


@pytest.mark.parametrize(
    ("name", "without", "error"),
    [
        ("glm", "vocabulary-first", TypeError),
        ("glm", "padding-side", TypeError),
        ("baichuan", "vocabulary-first", TypeError),
        ("glm", "post-init", AttributeError),
        ("glm", "tuple-cache", (TypeError, AttributeError)),
        ("glm", "cache-from-output", AttributeError),
        ("glm", "absent-inputs", (AttributeError, TypeError)),
        ("glm", "own-positions", (IndexError, RuntimeError)),
        ("baichuan", "tuple-cache", (TypeError, AttributeError)),
    ],
)
def test_each_fix_is_needed(name: str, without: str, error: Any, tmp_path: Path) -> None:
    folder = {"glm": old_models.write_glm, "baichuan": old_models.write_baichuan}[name](tmp_path / "model")
    # Classes are kept by content: another comment is another class, which no other test has mended.
    for file in folder.glob("*.py"):
        file.write_text(f"# {without}\n{file.read_text()}")
    fixes = [fix.name for fix in fixes_for(FAMILIES[name], None) if fix.name != without]
    staged = staged_from(folder, tmp_path / "code", *fixes)

    def used() -> None:
        load_tokenizer(folder, staged)("Add 2 and 3")
        generated(load_weights(folder, staged, dtype=torch.float32), name)

    with pytest.raises(error):
        used()


def generated(model: Any, name: str, **more: Any) -> list[int]:
    ids = torch.tensor([prompt(model, name)])
    mask = torch.ones_like(ids)
    model.config.use_cache = True
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": [10**6], "pad_token_id": 0}
    row: list[int] = model.eval().generate(input_ids=ids, attention_mask=mask, **settings, **more)[0].tolist()
    return row


def prompt(model: Any, name: str) -> list[int]:
    special = [model.config.gmask_token_id, model.config.bos_token_id] if name == "glm" else []
    return [301, 302, 303, 304, *special]


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_a_cache_is_that_without(name: str, loaded: Callable[[str], tuple[Any, Any]]) -> None:
    model, _ = loaded(name)
    made = prompt(model, name)
    with torch.no_grad():
        for _ in range(8):
            made.append(int(model(input_ids=torch.tensor([made])).logits[0, -1].argmax()))
    assert generated(model, name) == made
    assert generated(model, name, use_cache=False) == made


def test_several_answers_at_once_are_refused(loaded: Callable[[str], tuple[Any, Any]]) -> None:
    model, _ = loaded("glm")
    ids = torch.tensor([prompt(model, "glm")] * 2)
    with pytest.raises(ValueError, match="one answer at a time"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_row_computes_what_it_does_alone(name: str, loaded: Callable[[str], tuple[Any, Any]]) -> None:
    model, _ = loaded(name)
    rows = [[*prompt(model, name), 310, 311, 312, 313, 314], [*prompt(model, name), 320]]
    batch = collator("padded", 3, own_mask=name == "glm")([{"input_ids": row, "labels": row} for row in rows])
    assert set(batch) == {"input_ids", "labels"} | ({"attention_mask"} if name == "baichuan" else set())
    labels = batch.pop("labels")
    with torch.no_grad():
        together = model.eval()(**batch).logits
        for place, row in enumerate(rows):
            alone = model(input_ids=torch.tensor([row])).logits[0]
            assert torch.allclose(together[place, : len(row)], alone, atol=1e-5)
    assert int((labels == IGNORED).sum()) == 4


def test_weights_are_read_as_they_are_and_the_head_stays_the_embedding(
    folders: dict[str, Path], loaded: Callable[[str], tuple[Any, Any]]
) -> None:
    model, _ = loaded("glm")
    stored = load_file(folders["glm"] / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())  # not rounded to float16 on the way
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("without", ["one-precision", "tied-head"])
def test_what_is_wrong_in_silence_without_a_fix(without: str, tmp_path: Path) -> None:
    folder = old_models.write_glm(tmp_path / "model")
    for file in folder.glob("*.py"):
        file.write_text(f"# {without}\n{file.read_text()}")
    fixes = [fix.name for fix in fixes_for("chatglm", None) if fix.name != without]
    model = load_weights(folder, staged_from(folder, tmp_path / "code", *fixes), dtype=torch.float32)
    precisions = {parameter.dtype for parameter in model.parameters()}
    assert precisions == {torch.float32} | ({torch.float16} if without == "one-precision" else set())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (without != "tied-head")


def test_a_flag_in_a_tuple_is_the_flag(loaded: Callable[[str], tuple[Any, Any]]) -> None:
    model, _ = loaded("baichuan")
    assert model.config.gradient_checkpointing is False
    assert model.model.gradient_checkpointing is False


def test_prompts_end_with_what_begins_an_answer_in_every_template(loaded: Callable[[str], tuple[Any, Any]]) -> None:
    _, tokenizer = loaded("glm")
    start = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    rows = [{"role": "user", "content": "Add 2 and 3 " * 30}, {"role": "assistant", "content": "The sum is 5."}]
    for name in ("chatglm", "plain", "alpaca", "context"):
        prompter = Prompter(tokenizer, name)
        assert prompter.prompt(rows[:1])[-2:] == start
        tokens = prompter.tokens(rows, 48)
        answer = next(place for place, label in enumerate(tokens.labels) if label != IGNORED)
        assert tokens.cut
        assert tokens.input_ids[answer - 2 : answer] == start


def test_the_loss_of_a_step_is_one_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 7, 11, generator=draw), torch.randint(0, 11, (4, 7), generator=draw)
    labels[2, 3:] = IGNORED
    supervised = int((labels[:, 1:] != IGNORED).sum())
    parts = sum(token_loss(logits[at : at + 2], labels[at : at + 2], supervised) for at in (0, 2))
    assert torch.allclose(parts, token_loss(logits, labels))


def test_a_fix_leaves_alone_what_does_not_need_it_and_is_made_once() -> None:
    class Later:
        def __init__(self, vocab_file: str = "") -> None:
            self.sp_tokenizer = vocab_file

        def _pad(self, padding_side: str = "left") -> str:
            return padding_side

    untouched = (Later.__init__, Later._pad)
    names = [fix.name for fix in FIXES]
    assert mend(Later, "AutoTokenizer", names, "5.23.0") is Later
    assert (Later.__init__, Later._pad) == untouched

    class Old:
        def _pad(self) -> str:
            return "left"

    mend(Old, "AutoTokenizer", names, "4.40.2")
    assert Old()._pad() == "left"
    with pytest.raises(TypeError):
        Old()._pad(padding_side="left")  # type: ignore[call-arg]
    once = mend(Old, "AutoTokenizer", names, "5.23.0")._pad
    assert Old()._pad(padding_side="left") == "left"  # type: ignore[call-arg]
    assert mend(Old, "AutoTokenizer", names, "5.23.0")._pad is once


# What the tiny model of `remote_models` needs to fail in silence.
TABLE = remote_models.LAYERS.replace(
    "        self.dense = ",
    "        self.register_buffer('inv_freq', 1 / 10 ** torch.arange(size).div(size), persistent=False)\n        self.dense = ",
).replace("return hidden + self.dense(", "return hidden * self.inv_freq + self.dense(")
ATTRIBUTE = TABLE.replace("self.register_buffer('inv_freq', ", "self.inv_freq = (").replace(", persistent=False)", ")")
DOES_NOTHING = (
    remote_models.MODELING
    + """
    supports_gradient_checkpointing = True

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
        pass
"""
)
MEANS = remote_models.MODELING.replace(
    "self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)",
    "torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())",
)


@pytest.fixture
def tiny(job: Job, tiny_data: Path, tmp_path: Path) -> Callable[..., Job]:
    """A job over the tiny remote model with some of its files replaced."""

    def made(settings: str = "train.gradient_checkpointing=false", **files: str) -> Job:
        folder = remote_models.write_model(tmp_path / "model", mark=str(tmp_path))
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        recipe = of(job, folder, tiny_data, "all-linear").recipe
        key, value = settings.split(".")[1].split("=")
        recipe.write_text(recipe.read_text().replace(f"{key}: true", f"{key}: {value}"))
        return job

    return made


def test_tables_that_no_file_holds_are_computed_where_the_model_is(tiny: Callable[..., Job]) -> None:
    job = tiny(layers_tiny=TABLE)
    assert job.start() == [0, 0], job.logs()
    left = read_prepared(job.run)
    assert left.code is not None
    assert "built-first" in left.code.fixes
    _require_table(load_weights(left.model_dir, left.code, dtype=torch.float32))
    done = launch("export", str(job.folder))
    assert done.returncode == 0, done.stderr


def test_tables_that_are_plain_attributes(tiny: Callable[..., Job], tmp_path: Path) -> None:
    left = prepare(tiny(layers_tiny=ATTRIBUTE).plan(), RunDir(tmp_path / "run"))
    assert left.code is not None
    assert "built-first" in left.code.fixes
    _require_table(load_weights(left.model_dir, left.code, dtype=torch.float32))


def _require_table(model: Any) -> None:
    assert model.layers[1].inv_freq.tolist() == pytest.approx((1 / 10 ** torch.arange(16).div(16)).tolist())


def test_such_a_model_is_not_quantised(tiny: Callable[..., Job], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised bases need the extra bitsandbytes")
    plan = tiny(layers_tiny=TABLE).plan("model.quantization=nf4")
    with pytest.raises(PreflightError, match=r"set model\.quantization=none") as caught:
        prepare(plan, RunDir(tmp_path / "run"))
    assert "inv_freq is left uninitialised" in caught.value.found


def test_the_same_tables_are_found_in_a_model_that_cannot_be_made_small(
    job: Job, folders: dict[str, Path], tiny_data: Path, tmp_path: Path
) -> None:
    folder = remote_models.write_model(tmp_path / "model", mark=str(tmp_path))
    (folder / "layers_tiny.py").write_text(TABLE)
    config = json.loads((folder / "config.json").read_text())
    del config["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    plan, batch = of(job, folders["glm"], tiny_data).plan(), {"input_ids": torch.tensor([[5, 6]])}
    found = try_small(plan, folder, batch, staged_from(folder, tmp_path / "code"))
    assert found["built-first"] == "layers.0.inv_freq would be left uninitialised"
    assert "could not be tried" in found["token-loss"]


def test_checkpointing_that_does_nothing_is_refused(tiny: Callable[..., Job], tmp_path: Path) -> None:
    job = tiny("train.gradient_checkpointing=true", modeling_tiny=DOES_NOTHING)
    with pytest.raises(PreflightError, match=r"train\.gradient_checkpointing=false") as caught:
        prepare(job.plan(), RunDir(tmp_path / "one"))
    assert "no layer is computed again" in caught.value.found
    assert caught.value.exit_code == 4
    job = tiny("train.gradient_checkpointing=true")
    with pytest.raises(PreflightError, match="has no part in it"):
        prepare(job.plan(), RunDir(tmp_path / "two"))


def test_a_loss_that_does_not_know_the_step_is_found(tiny: Callable[..., Job], tmp_path: Path) -> None:
    for text, wanted in ((MEANS, ("token-loss",)), (remote_models.MODELING, ())):
        left = prepare(tiny(modeling_tiny=text).plan(), RunDir(tmp_path / f"run-{len(wanted)}"))
        assert left.code is not None
        assert left.code.fixes == wanted


def test_a_head_is_tied_as_in_the_files(tiny: Callable[..., Job], tmp_path: Path) -> None:
    tied = remote_models.MODELING.replace(
        "    mark = MARK\n", '    mark = MARK\n    _tied_weights_keys = {"lm_head.weight": "word_embeddings.weight"}\n'
    )
    job = tiny(modeling_tiny=tied)
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(PreflightError, match='"tie_word_embeddings": false'):
        prepare(job.plan(), RunDir(tmp_path / "one"))
    job = tiny()
    weights = tmp_path / "model" / "model.safetensors"
    state = load_file(weights)
    from safetensors.torch import save_file

    save_file({**state, "lm_head.weight": state["word_embeddings.weight"].clone()}, weights, metadata={"format": "pt"})
    with pytest.raises(PreflightError, match="would be trained as two"):
        prepare(job.plan("adapter.type=full", "adapter.targets=auto"), RunDir(tmp_path / "two"))


def test_small_sizes_keep_the_width_of_a_head() -> None:
    sizes = small_sizes({"num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32, "multi_query_group_num": 1,
                         "ffn_hidden_size": 13696, "vocab_size": 65024})  # fmt: skip
    assert sizes == {"num_layers": 2, "num_attention_heads": 2, "hidden_size": 256, "multi_query_group_num": 1,
                     "ffn_hidden_size": 512}  # fmt: skip
    with pytest.raises(KeyError):
        small_sizes({"num_layers": 2})


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_seen_in_a_native_model_and_only_where_it_happens(use_reentrant: bool) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).train()
    model.config.use_cache = False
    ids, seen = torch.tensor([[5, 6, 7, 8]]), []
    for checkpointing in (False, True):
        if checkpointing:
            model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=use_reentrant))
            model.enable_input_require_grads()
        watch = Recomputation(model)
        model(input_ids=ids, labels=ids).loss.backward()
        watch.stop()
        seen.append(watch.seen)
    assert seen == [False, True]
