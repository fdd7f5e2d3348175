"""Conversion to native classes: the same logits and tokens as the original layouts, and errors where that cannot be."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher import supervise
from launcher.errors import DataError, PreflightError, UsageError
from launcher.rundir import RunDir
from launcher.worker.convert import convert_model, wanted_config
from launcher.worker.data.tokens import Prompter
from launcher.worker.fused_adapter import write_fused
from launcher.worker.modelfiles import hash_model
from launcher.worker.native_tokenizer import convert_tokenizer, from_sentencepiece, texts
from launcher.worker.original import original_layout, require_way_back
from launcher.worker.prepared import read_prepared
from tests.worker import originals
from tests.worker.conftest import Job

IDS = [3, 17, 256, 9, 41, 5, 600, 31, 17, 2]
NATIVE = {
    "chatglm2": "GlmForCausalLM", "chatglm3": "GlmForCausalLM", "baichuan": "LlamaForCausalLM",
    "baichuan2": "LlamaForCausalLM", "internlm": "LlamaForCausalLM", "internlm 20B": "LlamaForCausalLM",
    "xverse": "LlamaForCausalLM", "qwen": "Qwen2ForCausalLM",
}  # fmt: skip


def converted(folder: Path, into: Path) -> Any:
    """The converted model, loaded as anybody would."""
    from transformers import AutoModelForCausalLM

    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    convert_model(folder, into, folder.name, lambda done, total: None)
    model, left = AutoModelForCausalLM.from_pretrained(into, dtype="auto", output_loading_info=True)
    assert not left["missing_keys"]
    assert not left["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickled"])
@pytest.mark.parametrize("kind", NATIVE)
def test_the_native_class_computes_the_same(kind: str, pickled: bool, tmp_path: Path) -> None:
    state = originals.random_state(kind)
    originals.write_model(tmp_path / "original", kind, state, pickled=pickled)
    model = converted(tmp_path / "original", tmp_path / "native")
    assert type(model).__name__ == NATIVE[kind]
    with torch.no_grad():
        found = model(torch.tensor([IDS])).logits[0]
    wanted = originals.logits(kind, state, IDS)
    assert wanted.abs().max() > 1
    assert (found - wanted).abs().max() < 1e-5
    tokens = model.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert tokens[0, len(IDS) :].tolist() == originals.greedy(kind, state, IDS, 12)


def test_precision_is_kept(tmp_path: Path) -> None:
    state = originals.random_state("chatglm2", dtype=torch.float16)
    originals.write_model(tmp_path / "original", "chatglm2", state, torch_dtype="float16")
    model = converted(tmp_path / "original", tmp_path / "native")
    assert model.dtype == torch.float16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32, "positions are exact in every precision"
    head = model.lm_head.weight
    assert torch.equal(head, state["transformer.output_layer.weight"])


def _drop(state: originals.State) -> None:
    del state["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"]


def _prefix(state: originals.State) -> None:
    state["transformer.prefix_encoder.embedding.weight"] = torch.zeros(4, 8)


def _narrow(state: originals.State) -> None:
    name = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    state[name] = state[name][:-1].clone()


def _wide(state: originals.State) -> None:
    state["transformer.output_layer.weight"] = torch.zeros(700, originals.HIDDEN)


def _third_layer(state: originals.State) -> None:
    state["transformer.encoder.layers.2.input_layernorm.weight"] = torch.ones(originals.HIDDEN)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_drop, "its files have nothing for model.layers.1.mlp.down_proj.weight"),
        (_prefix, "nobody here knows its tensor transformer.prefix_encoder.embedding.weight"),
        (_narrow, "query_key_value.weight has 63 rows instead of 32 + 16 + 16"),
        (_wide, "lm_head.weight is [700, 32], its config.json says [640, 32]"),
        (_third_layer, "the native class has no model.layers.2.input_layernorm.weight"),
    ],
)
def test_weights_that_do_not_belong_are_refused(change: Any, found: str, tmp_path: Path) -> None:
    state = originals.random_state("chatglm2")
    change(state)
    originals.write_model(tmp_path, "chatglm2", state)
    (tmp_path / "native").mkdir()
    with pytest.raises(PreflightError) as caught:
        convert_model(tmp_path, tmp_path / "native", "tiny", lambda done, total: None)
    assert found in caught.value.found
    assert caught.value.exit_code == 4


class _Trap:
    def __reduce__(self) -> Any:
        return print, ("code from a pickle ran",)


@pytest.mark.parametrize("broken", ["cut", "pickle", "missing", "index", "none"])
def test_files_that_cannot_be_read_are_named(broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    originals.write_model(tmp_path, "chatglm2", originals.random_state("chatglm2"), pickled=broken == "pickle")
    shard = sorted(tmp_path.glob("*-00002-*"))[0]
    if broken == "cut":
        shard.write_bytes(shard.read_bytes()[:-64])
    elif broken == "pickle":
        torch.save({"x": _Trap()}, shard)
    elif broken == "missing":
        shard.unlink()
    elif broken == "index":
        (tmp_path / "model.safetensors.index.json").write_text("[]")
    else:
        for file in tmp_path.glob("*model*"):
            file.unlink()
    (tmp_path / "native").mkdir()
    with pytest.raises(PreflightError) as caught:
        convert_model(tmp_path, tmp_path / "native", "tiny", lambda done, total: None)
    wanted = {"index": "model.safetensors.index.json", "none": "has no *.safetensors"}.get(broken, shard.name)
    assert wanted in str(caught.value)
    assert "code from a pickle" not in capsys.readouterr().out


def test_a_folder_whose_config_is_not_the_plans_is_refused(tmp_path: Path) -> None:
    originals.write_model(tmp_path, "chatglm2", originals.random_state("chatglm2"), quantization_bit=4)
    with pytest.raises(PreflightError, match="quantization_bit is 4"):
        convert_model(tmp_path, tmp_path, "tiny", lambda done, total: None)


def test_other_weights_are_another_model_in_the_cache(tmp_path: Path) -> None:
    originals.write_model(tmp_path, "chatglm2", originals.random_state("chatglm2"))
    first = hash_model(tmp_path)
    assert hash_model(tmp_path) == first, "from what was kept"
    shard = next(tmp_path.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert hash_model(tmp_path) != first
    shard.write_bytes(content)
    assert hash_model(tmp_path) == first
    (tmp_path / "config.json").write_text("{}")
    assert hash_model(tmp_path) != first


# tokenizer


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    originals.write_sentencepiece(folder)
    return folder


def native_tokenizer(folder: Path, source: str, into: Path) -> Any:
    from transformers import AutoTokenizer

    from launcher.native import Native

    into.mkdir(exist_ok=True)
    convert_tokenizer(folder, into, Native(source=source, target=NATIVE[source]), "tiny")
    return AutoTokenizer.from_pretrained(into)


@pytest.mark.parametrize("source", ["chatglm2", "chatglm3"])
def test_chatglms_tokens_are_those_of_sentencepiece(source: str, sentences: Path, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    tokenizer = native_tokenizer(sentences, source, tmp_path / "native")
    plain = SentencePieceProcessor(model_file=str(sentences / "tokenizer.model"))
    first = plain.vocab_size()
    special = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    special += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"] if source == "chatglm3" else []
    assert tokenizer.convert_tokens_to_ids(special) == list(range(first, first + len(special)))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 0, first + len(special))
    for text in [*texts(500), "[gMASK]sop 你好", "<|user|>\n hi <|assistant|>"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == plain.encode(text), text
        assert tokenizer.decode(ids) == plain.decode(ids), text
    assert tokenizer("你好")["input_ids"] == [first + 1, first + 3, *plain.encode("你好")]
    assert tokenizer.decode([first + 1, first + 3, *plain.encode("你好"), 2], skip_special_tokens=True) == "你好"
    ends = json.loads((tmp_path / "native" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == ([2] if source == "chatglm2" else [2, first + 6, first + 8])


def test_chatglm3s_prompt_is_made_of_pieces_and_role_tokens(sentences: Path, tmp_path: Path) -> None:
    """As build_single_message of its own code: token, sentencepiece of the line break, sentencepiece of the content."""
    from sentencepiece import SentencePieceProcessor

    encode = SentencePieceProcessor(model_file=str(sentences / "tokenizer.model")).encode
    tokenizer = native_tokenizer(sentences, "chatglm3", tmp_path / "native")
    user, assistant, start = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "[gMASK]"])
    prompter = Prompter(tokenizer, "chatglm3")
    asked = {"role": "user", "content": "你好 <|user|>"}
    prompt = [start, start + 2, user, *encode("\n"), *encode("你好 <|user|>"), assistant, *encode("\n")]
    assert prompter.prompt([asked]) == prompt
    answered = prompter.tokens([asked, {"role": "assistant", "content": "世界"}], 128)
    assert answered.input_ids == [*prompt, *encode("世界"), 2]
    assert answered.labels == [-100] * len(prompt) + [*encode("世界"), 2]
    cut = prompter.tokens([{"role": "user", "content": "你好 " * 50}, {"role": "assistant", "content": "世界"}], 40)
    assert (cut.input_ids[:3], cut.input_ids[-len(encode("世界")) - 1 :]) == (prompt[:3], [*encode("世界"), 2])


def test_text_never_becomes_a_control_or_byte_piece(sentences: Path) -> None:
    tokenizer, plain = from_sentencepiece(sentences / "tokenizer.model", "tiny")
    tokenizer.encode_special_tokens = True
    for text in ("</s>", "a</s>b", "<0x0A>", "<unk><s>"):
        assert tokenizer.encode(text, add_special_tokens=False).ids == plain.encode(text)


@pytest.mark.parametrize("source", ["baichuan", "internlm", "xverse"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_llama_like_tokens_are_those_of_sentencepiece(source: str, add_bos: bool, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    whole = ["<reserved_1>", "<reserved_10>", "▁▁▁▁", "0", "1"]
    originals.write_sentencepiece(tmp_path, user_defined_symbols=whole)
    plain = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    first = plain.vocab_size()
    config = {"add_bos_token": add_bos, "pad_token": {"content": "<pad>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<eoh>": first + 1, "<pad>": first}))
    ends = {"eos_token_id": [2, first + 1], "chat_format": "raw"}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    tokenizer = native_tokenizer(tmp_path, source, tmp_path / "native")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, first)
    more = [
        "<reserved_10>",
        "a<reserved_1>b",
        "<reserved_1><reserved_10> x    y",
        "    ",
        "100 0 1    01",
        "0</s>1",
        "0<0x0A>0<unk>1",
    ]
    for text in [*texts(500), *more]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == plain.encode(text), text
        assert tokenizer.decode(ids) == plain.decode(ids), text
    assert tokenizer("你好")["input_ids"] == [1] * add_bos + plain.encode("你好")
    kept = json.loads((tmp_path / "native" / "generation_config.json").read_text())
    assert kept == {"eos_token_id": [2, first + 1]}


@pytest.mark.parametrize(
    ("source", "template", "tokens"),
    [
        ("baichuan", "baichuan2-chat", ["<reserved_106>", "<reserved_107>"]),
        ("baichuan", "baichuan-chat", ["<reserved_102>", "<reserved_103>"]),
    ],
)
def test_baichuans_chat_is_role_tokens_and_pieces(
    source: str, template: str, tokens: list[str], tmp_path: Path
) -> None:
    """As build_chat_input of its own code: the id of the role, then sentencepiece of the content by itself."""
    originals.write_sentencepiece(tmp_path, user_defined_symbols=tokens)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    tokenizer = native_tokenizer(tmp_path, source, tmp_path / "native")
    _, plain = from_sentencepiece(tmp_path / "tokenizer.model", "tiny")
    user, assistant = (plain.piece_to_id(token) for token in tokens)
    prompter = Prompter(tokenizer, template)
    asked = [{"role": "user", "content": "你好 "}]
    assert prompter.prompt(asked) == [user, *plain.encode("你好 "), assistant]
    answered = prompter.tokens([*asked, {"role": "assistant", "content": "世界"}], 128)
    assert answered.input_ids == [user, *plain.encode("你好 "), assistant, *plain.encode("世界"), 2]
    with pytest.raises(DataError, match="no token <eoa>"):
        Prompter(tokenizer, "internlm-chat")


def test_internlms_answer_ends_with_its_own_token_which_is_not_shown(tmp_path: Path) -> None:
    originals.write_sentencepiece(tmp_path, user_defined_symbols=["<eoa>"])
    tokenizer = native_tokenizer(tmp_path, "internlm", tmp_path / "native")
    _, plain = from_sentencepiece(tmp_path / "tokenizer.model", "tiny")
    rows = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "世界"}]
    learned = Prompter(tokenizer, "internlm-chat").tokens(rows, 128)
    prompt = [1, *plain.encode("<|User|>:你好\n<|Bot|>:")]
    assert learned.input_ids == [*prompt, *plain.encode("世界"), plain.piece_to_id("<eoa>")]
    assert tokenizer.decode(learned.input_ids[len(prompt) :], skip_special_tokens=True) == "世界"


def test_added_tokens_keep_their_ids_or_are_refused(tmp_path: Path) -> None:
    originals.write_sentencepiece(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<eoh>": 9999}))
    with pytest.raises(PreflightError, match="its files say 9999"):
        native_tokenizer(tmp_path, "internlm", tmp_path / "native")


def test_a_fast_tokenizer_of_its_own_is_taken_as_it_is(sentences: Path, tmp_path: Path) -> None:
    made, _ = from_sentencepiece(sentences / "tokenizer.model", "tiny")
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = native_tokenizer(tmp_path, "xverse", tmp_path / "native")
    assert tokenizer("你好")["input_ids"] == made.encode("你好").ids
    assert tokenizer.eos_token_id == 2


def ranks_of(texts: list[str], num: int) -> dict[bytes, int]:
    """A vocabulary as tiktoken has it: bytes in its own order, then the most frequent pairs of words."""
    words = [[bytes([byte]) for byte in word.encode()] for text in texts for word in text.split(" ")]
    ranks = {bytes([byte]): 255 - byte for byte in range(256)}
    while len(ranks) < num:
        pairs = Counter(left + right for word in words for left, right in pairwise(word))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[best] = len(ranks)
        for word in words:
            place = 0
            while place < len(word) - 1:
                if word[place] + word[place + 1] == best:
                    word[place : place + 2] = [best]
                place += 1
    return ranks


def by_ranks(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Qwen's own way, with the words of its class: normalise, split, then the pair of the lowest rank again and again."""
    import regex

    pattern = (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
        r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
    )
    ids = []
    for word in regex.findall(pattern, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            able = [(ranks[a + b], n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not able:
                break
            place = min(able)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_qwens_tokens_are_those_of_its_ranks(tmp_path: Path) -> None:
    ranks = ranks_of([*texts(60), originals.TEXT], 500)
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()]
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
    tokenizer = native_tokenizer(tmp_path, "qwen", tmp_path / "native")
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [500, 501, 502]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (500, 500, 708)
    for text in [*texts(500), "I'm here, you'LL see  \n\n  x"]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == by_ranks(text, ranks), text
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("content", [None, b"no base64!\n", b"YQ== 0\n", b"YQ==\n"])
def test_a_tiktoken_file_that_is_none(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(PreflightError, match="cannot be read"):
        native_tokenizer(tmp_path, "qwen", tmp_path / "native")


@pytest.mark.parametrize(
    ("options", "found"),
    [({"model_type": "unigram"}, "is no BPE"), ({"remove_extra_whitespaces": True}, "rewrites spaces")],
)
def test_a_vocabulary_that_cannot_be_expressed_is_refused(options: Any, found: str, tmp_path: Path) -> None:
    originals.write_sentencepiece(tmp_path, size=400, **options)
    with pytest.raises(PreflightError, match=found):
        native_tokenizer(tmp_path, "chatglm2", tmp_path / "native")


@pytest.mark.parametrize("content", [None, b"no model"])
def test_a_tokenizer_model_that_is_none(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(PreflightError, match="cannot be read"):
        native_tokenizer(tmp_path, "chatglm2", tmp_path / "native")


# a whole run

ROTARY = "transformer.rotary_pos_emb.inv_freq"
POISON = "raise RuntimeError('the code of the model was executed')\n"


@pytest.fixture(scope="module")
def chatglm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as its authors publish it, whose code must not run, and a recipe for it."""
    folder = tmp_path_factory.mktemp("models") / "chatglm2-tiny"
    originals.write_sentencepiece(folder)
    originals.write_model(folder, "chatglm2", originals.random_state("chatglm2"))
    for name in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py"):
        (folder / name).write_text(POISON)
    code = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer", "auto_map": code}))
    rows = [{"prompt": f"你好 {n} <|user|> [gMASK]", "response": f"今天天气很好 {n}。"} for n in range(12)]
    (folder.parent / "rows.json").write_text(json.dumps(rows))
    (folder.parent / "recipe.yaml").write_text(f"""
model: {{path: {folder}}}
data: {{path: {folder.parent / "rows.json"}, format: prompt_response, max_length: 96}}
adapter: {{type: lora, r: 4, alpha: 8}}
train: {{max_steps: 2, lr: 5e-3, global_batch: 4, micro_batch: 2, log_every_steps: 1}}
hardware: 2xcpu
""")
    return folder


def test_a_chatglm2_folder_is_trained_without_its_code(
    chatglm2: Path, rank_server: subprocess.Popen[str], tmp_path: Path
) -> None:
    from datasets import load_from_disk
    from sentencepiece import SentencePieceProcessor

    job = Job(rank_server, chatglm2.parent / "recipe.yaml", tmp_path / "run")
    assert job.start() == [0, 0], job.logs()
    assert sorted(job.losses()) == [1, 2]
    plan, prepared = job.plan(), read_prepared(job.run)
    assert (plan.shape.family, plan.shape.prompts, plan.shape.remote_code) == ("glm", "chatglm2", False)
    assert plan.targets == ("q_proj", "k_proj", "v_proj")
    assert prepared.template == "chatglm2"
    assert (prepared.eos_token_ids, prepared.pad_token_id) == ((2,), 0)
    assert prepared.source_dir == str(chatglm2)
    assert not list(Path(prepared.model_dir).glob("*.py"))
    # [gMASK] sop, the question as the family's own code writes it, the answer by itself, </s>.
    plain = SentencePieceProcessor(model_file=str(chatglm2 / "tokenizer.model"))
    first = plain.vocab_size()
    asked = plain.encode("[Round 1]\n\n问：你好 3 <|user|> [gMASK]\n\n答：")
    rows = {tuple(row["input_ids"]) for row in load_from_disk(str(Path(prepared.data_dir) / "train"))}
    assert (first + 1, first + 3, *asked, *plain.encode("今天天气很好 3。"), 2) in rows
    exported_in_the_original_layout(job, chatglm2)
    # Another run converts nothing.
    supervise.Supervisor(plan, job.run, lambda event: None).prepare_only()
    assert "native" in read_prepared(job.run).cached


def exported_in_the_original_layout(job: Job, source: Path) -> None:
    """It computes what the trained model computes, and carries the authors' files."""
    out = job.folder / "original"
    done = run_verb("export", job, "--out", str(out), "--layout", "original", "--max-shard-size", "1MB")
    assert done.returncode == 0, done.stderr
    assert "same logits" in done.stdout
    for file in source.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            assert (out / file.name).read_bytes() == file.read_bytes()
    state = {name: tensor for shard in out.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    first = originals.random_state("chatglm2")
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in first.items()}
    changed = {name for name in first if not torch.equal(state[name], first[name])} - {ROTARY}
    fused = "transformer.encoder.layers.{}.self_attention.query_key_value.weight"
    assert changed == {fused.format(0), fused.format(1)}, "the adapter is in the fused matrices, and nowhere else"
    # The adapter by itself, for the weights as they were: what PEFT would add to them is what has been merged.
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert config["target_modules"] == ["query_key_value"]
    rank, alpha = config["rank_pattern"]["query_key_value"], config["alpha_pattern"]["query_key_value"]
    assert (rank, alpha) == (12, 24)
    for layer in range(2):
        name = f"base_model.model.{fused.format(layer).removesuffix('.weight')}"
        added = alpha / rank * adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
        torch.testing.assert_close(first[fused.format(layer)] + added, state[fused.format(layer)])


def run_verb(name: str, job: Job, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", name, str(job.folder), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["chatglm2", "qwen", "internlm"])
def test_the_way_back_is_exact(kind: str, tmp_path: Path) -> None:
    state = originals.random_state(kind)
    originals.write_model(tmp_path / "original", kind, state)
    model = converted(tmp_path / "original", tmp_path / "native")
    back = original_layout(model.state_dict(), wanted_config(tmp_path / "original", "tiny"))
    weights = {name for name in state if "inv_freq" not in name}
    assert weights == {name for name in back if "inv_freq" not in name}
    assert all(torch.equal(back[name], state[name]) for name in weights)
    with pytest.raises(ValueError, match=r"no place .* for extra\.weight"):
        original_layout(
            {**model.state_dict(), "extra.weight": torch.zeros(1)}, wanted_config(tmp_path / "original", "x")
        )


def test_a_run_that_was_not_converted_has_no_original_layout(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    plan = Job(None, recipe, tmp_path).plan("hardware=1xcpu")  # type: ignore[arg-type]
    (tmp_path / "plan.json").write_text(plan.model_dump_json(by_alias=True))
    with pytest.raises(UsageError, match="was not converted"):
        require_way_back(RunDir(tmp_path))


@pytest.mark.parametrize(("targets", "rslora"), [(["q_proj", "v_proj"], False), ("all-linear", True)])
def test_an_adapter_goes_back_without_the_base(targets: list[str] | str, rslora: bool, tmp_path: Path) -> None:
    """PEFT reads what was written, on a model whose modules are called as in the original, and computes the same delta."""
    import peft

    original = tmp_path / "original"
    originals.write_model(original, "chatglm2", originals.random_state("chatglm2"))
    model = peft.get_peft_model(
        converted(original, tmp_path / "native"),
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, use_rslora=rslora, init_lora_weights=False),
    )
    model.save_pretrained(str(tmp_path / "checkpoint"))
    assert write_fused(tmp_path / "checkpoint", wanted_config(original, "tiny"), tmp_path / "adapter")
    merged = original_layout(model.merge_and_unload().state_dict(), wanted_config(original, "tiny"))

    class Named(torch.nn.Module):
        """Linear layers under the original's names, with its weights."""

        def __init__(self, state: dict[str, torch.Tensor]) -> None:
            super().__init__()
            for name, tensor in state.items():
                *path, leaf, kind = name.split(".")
                inside: torch.nn.Module = self
                for part in path:
                    if not hasattr(inside, part):
                        inside.add_module(part, torch.nn.Module())
                    inside = getattr(inside, part)
                if kind == "weight" and tensor.dim() == 2 and "embedding" not in name:
                    linear = torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
                    linear.weight.data = tensor.clone()
                    inside.add_module(leaf, linear)

    named = peft.PeftModel.from_pretrained(Named(originals.random_state("chatglm2")), str(tmp_path / "adapter"))
    for name, tensor in named.merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor, merged[name], msg=name)


def test_a_pickle_that_would_call_something_is_named_for_what_it_is(tmp_path: Path) -> None:
    import os

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch " + str(tmp_path / "called"),)

    originals.write_model(tmp_path / "evil", "chatglm2", originals.random_state("chatglm2"), pickled=True)
    (shard, *_) = sorted((tmp_path / "evil").glob("*.bin"))
    torch.save({"transformer.embedding.word_embeddings.weight": Evil()}, shard)
    with pytest.raises(PreflightError, match=r"hold more than tensors: reading them would call posix\.system"):
        converted(tmp_path / "evil", tmp_path / "native")
    assert not (tmp_path / "called").exists()


def test_pickles_of_before_the_zip_format_are_read(tmp_path: Path) -> None:
    state = originals.random_state("chatglm2")
    originals.write_model(tmp_path / "old", "chatglm2", state, pickled=True)
    for shard in (tmp_path / "old").glob("*.bin"):
        torch.save(torch.load(shard, weights_only=True), shard, _use_new_zipfile_serialization=False)
    model = converted(tmp_path / "old", tmp_path / "native")
    torch.testing.assert_close(model.model.embed_tokens.weight, state["transformer.embedding.word_embeddings.weight"])
