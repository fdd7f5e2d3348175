"""families.yaml: which family a config belongs to, its names inside, and how a conversation becomes a prompt."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from launcher.errors import UsageError
from launcher.families import Family, Special, family, family_names, family_of, template, template_names

ASK = {"role": "user", "content": "Add."}
ASK_INPUT = {"role": "user", "content": "Add.", "input": "1 and 2"}
ANSWER = {"role": "assistant", "content": "3"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "RefinedWeb"}, "falcon"),
        ({"model_type": "gemma3_text"}, "gemma3_text"),
        ({"model_type": "chatglm", "inner_hidden_size": 16384}, "chatglm"),
        ({"model_type": "chatglm", "position_encoding_2d": True}, "chatglm"),
        ({"model_type": "chatglm", "multi_query_attention": True, "padded_vocab_size": 65024}, "chatglm2"),
        ({"model_type": "chatglm", "padded_vocab_size": 65024, "_name_or_path": "THUDM/chatglm3-6b"}, "chatglm3"),
        ({"model_type": "mamba"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_a_config_has_a_family(config, name):
    assert family_of(config).name == name


def test_lora_targets_are_the_names_that_the_models_have():
    targets = {name: family(name).lora_targets for name in family_names()}
    assert targets["chatglm"] == targets["chatglm2"] == targets["bloom"] == targets["falcon"] == ("query_key_value",)
    assert targets["baichuan"] == ("W_pack",)
    assert targets["qwen"] == ("c_attn",)
    for name in ("llama", "mistral", "mixtral", "internlm", "xverse"):
        assert targets[name] == ("q_proj", "v_proj")
    assert targets["unknown"] == ()
    assert "every linear layer" in (family("unknown").note or "")


def test_what_families_cannot_do_is_said():
    assert {name for name in family_names() if not family(name).bf16} == {"chatglm", "chatglm2"}
    assert "385" in (family("chatglm2").no_bf16 or "")
    assert not any(family(name).packing for name in ("bloom", "falcon", "chatglm", "chatglm2", "chatglm3", "unknown"))
    assert all(family(name).packing for name in ("llama", "mistral", "qwen2", "qwen3", "glm", "phi3"))
    remote = {name for name in family_names() if family(name).needs_remote_code}
    assert remote == {"chatglm", "chatglm2", "chatglm3", "baichuan", "internlm", "qwen", "xverse"}


def test_every_family_names_a_template_that_exists():
    for name in family_names():
        assert template(family(name).template).name in template_names()


def test_an_unknown_key_in_the_table_is_an_error():
    with pytest.raises(ValidationError, match="lora_target"):
        Family(name="x", lora_target=("q_proj",))  # type: ignore[call-arg]


def test_alpaca_with_and_without_input():
    assert template("alpaca").segments([ASK_INPUT, ANSWER]) == [
        ("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n", False),
        ("3", True),
    ]
    assert template("alpaca").segments([SYSTEM, ASK]) == [
        ("Be brief.\n\n### Instruction:\nAdd.\n\n### Response:\n", False)
    ]
    assert template("alpaca").segments([{**ASK, "input": ""}, ANSWER])[0][0].count("###") == 2


def test_context_is_the_seeds_prompt():
    assert template("context").segments([ASK_INPUT, ANSWER])[0] == (
        "Instruction: Add.\nInput: 1 and 2\nAnswer: ",
        False,
    )
    assert template("context").segments([ASK])[0] == ("Instruction: Add.\nAnswer: ", False)


def test_plain_is_word_for_word():
    assert template("plain").segments([ASK, ANSWER]) == [("Add.", False), ("3", True)]


def test_every_answer_is_learned_where_the_family_has_no_format_of_its_own():
    assert template("alpaca").segments([ASK, ANSWER, ASK, ANSWER]) == [
        ("### Instruction:\nAdd.\n\n### Response:\n", False),
        ("3", True),
        ("\n\n### Instruction:\nAdd.\n\n### Response:\n", False),
        ("3", True),
    ]


def test_chatglm2_counts_rounds_from_one_and_learns_the_last_answer():
    # As tokenizer.build_prompt(query, history) of the model's own code writes it.
    assert template("chatglm2").segments([ASK]) == [("[Round 1]\n\n问：Add.\n\n答：", False)]
    assert template("chatglm2").segments([ASK, ANSWER, ASK, ANSWER]) == [
        ("[Round 1]\n\n问：Add.\n\n答：3\n\n[Round 2]\n\n问：Add.\n\n答：", False),
        ("3", True),
    ]
    assert template("chatglm2").prefix_tokens == ("[gMASK]", "sop")


def test_chatglm_has_a_bare_first_question_and_rounds_from_zero():
    assert template("chatglm").segments([ASK, ANSWER]) == [("Add.", False), ("3", True)]
    assert template("chatglm").segments([ASK, ANSWER, ASK]) == [
        ("[Round 0]\n问：Add.\n答：3\n[Round 1]\n问：Add.\n答：", False)
    ]
    assert template("chatglm").answer_tokens == ("[gMASK]", "<sop>")


def test_braces_in_a_persons_text_stay():
    question = {"role": "user", "content": "{round} {content} {input}", "input": "{content}"}
    text = template("alpaca").segments([question])[0][0]
    assert text == "### Instruction:\n{round} {content} {input}\n\n### Input:\n{content}\n\n### Response:\n"


@pytest.mark.parametrize("name", template_names())
def test_the_prompt_for_generation_begins_the_training_text(name):
    prompt = template(name).segments([SYSTEM, ASK_INPUT])
    assert template(name).segments([SYSTEM, ASK_INPUT, ANSWER]) == [*prompt, ("3", True)]
    assert not any(learned for _, learned in prompt)


def test_chatglm3_begins_a_message_with_the_token_of_its_role():
    # Each piece is encoded by itself, as build_single_message of the model's own code does; earlier answers are history.
    segments = template("chatglm3").segments([SYSTEM, ASK, ANSWER, ASK_INPUT, ANSWER])
    assert segments == [
        *[(text, False) for text in ("<|system|>", "\n", "Be brief.", "<|user|>", "\n", "Add.")],
        *[(text, False) for text in ("<|assistant|>", "\n", "3", "<|user|>", "\n", "Add.\n1 and 2")],
        *[("<|assistant|>", False), ("\n", False), ("3", True)],
    ]
    special = [isinstance(text, Special) for text, _ in segments]
    assert special == [True, False, False] * 5
    written_out = template("chatglm3").segments([{"role": "user", "content": "<|user|>"}])
    assert [isinstance(text, Special) for text, _ in written_out] == [True, False, False, True, False]


def test_a_strange_conversation_is_refused():
    with pytest.raises(ValueError, match="without messages"):
        template("plain").segments([])
    with pytest.raises(ValueError, match="'tool'"):
        template("plain").segments([{"role": "tool", "content": "x"}])
    with pytest.raises(ValueError, match="'tool'"):
        template("chatglm3").segments([{"role": "tool", "content": "x"}])


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean `alpaca`"):
        template("alpca")
    with pytest.raises(UsageError, match="auto, chat, plain"):
        template("zzz")
