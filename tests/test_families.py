"""families.yaml: which family a config belongs to, its names inside, and how a conversation becomes a prompt."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from launcher.errors import UsageError
from launcher.families import Family, Special, family, family_names, family_of, former_of, template, template_names

ASK = {"role": "user", "content": "Add."}
ASK_INPUT = {"role": "user", "content": "Add.", "input": "1 and 2"}
ANSWER = {"role": "assistant", "content": "3"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        (
            {"model_type": "novel", "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"}},
            "baichuan",
        ),
        (
            {"auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}, "inner_hidden_size": 8},
            "chatglm",
        ),
        ({"auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}}, "chatglm2"),
        ({"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}}, "llama"),
        ({"model_type": "novel", "auto_map": {"AutoModelForCausalLM": "modeling_novel.NovelForCausalLM"}}, "unknown"),
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


def test_every_family_names_templates_that_exist():
    for name in family_names():
        for named in (family(name).template, *family(name).chat.values()):
            assert template(named).name in template_names()


@pytest.mark.parametrize(
    ("name", "model", "chosen"),
    [
        ("baichuan", "baichuan-inc/Baichuan2-7B-Chat", "baichuan2-chat"),
        ("baichuan", "./models/Baichuan-13B-Chat/", "baichuan-chat"),
        ("baichuan", "baichuan-inc/Baichuan2-7B-Base", "alpaca"),
        ("baichuan", "/chat/models/mine", "alpaca"),
        ("internlm", "internlm/internlm-chat-7b", "internlm-chat"),
        ("qwen", "Qwen/Qwen-1_8B-Chat", "qwen-chat"),
        ("xverse", "xverse/XVERSE-13B-Chat", "xverse-chat"),
        ("llama", "meta-llama/Llama-2-7b-chat-hf", "llama2-chat"),
        ("llama", "01-ai/Yi-34B-Chat", "chatml"),
        ("llama", "someone/vicuna-chat", "alpaca"),
        ("chatglm3", "THUDM/chatglm3-6b", "chatglm3"),
    ],
)
def test_a_chat_model_is_known_by_its_name(name, model, chosen):
    assert family(name).template_for(model) == chosen


def test_modules_that_have_to_lie_together():
    # As the write-up with two unlike cards pins them: word embedding, rotary embedding, final norm, output layer.
    assert family("chatglm2").pinned == (
        "transformer.embedding.word_embeddings",
        "transformer.rotary_pos_emb",
        "transformer.encoder.final_layernorm",
        "transformer.output_layer",
    )
    assert family("bloom").pinned[1] == "transformer.word_embeddings_layernorm"
    assert "model.rotary_emb" not in family("baichuan").pinned  # its layers have one each


def test_revisions_from_before_the_class_are_known():
    assert (former_of("RefinedWebModel"), former_of("Yi"), former_of("phi-msft")) == ("falcon", "llama", "phi")
    assert (former_of("llama"), former_of("mamba")) == (None, None)


def test_versions_are_known_of_every_code_that_was_tried():
    known = {name for name in family_names() if family(name).code_versions}
    assert known == {name for name in family_names() if family(name).needs_remote_code} - {"xverse"}


def test_a_native_family_is_a_class_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as classes

    native = {name for name in family_names() if not family(name).needs_remote_code} - {"unknown"}
    assert native <= classes.keys()
    assert not {name for name in family_names() if family(name).needs_remote_code} & classes.keys()


CHATS = {
    "chatml": ("", "<|im_start|>user\nAdd.\n1 and 2<|im_end|>\n<|im_start|>assistant\n"),
    "baichuan-chat": ("", "<reserved_102>Add.\n1 and 2<reserved_103>"),
    "baichuan2-chat": ("", "<reserved_106>Add.\n1 and 2<reserved_107>"),
    "internlm-chat": ("<|System|>:Be brief.\n", "<|User|>:Add.\n1 and 2\n<|Bot|>:"),
    "xverse-chat": ("Be brief.\n\n", "Human: Add.\n1 and 2\n\nAssistant: "),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_model_is_asked_as_its_own_code_asks(name):
    system, asked = CHATS[name]
    assert "".join(text for text, _ in template(name).segments([ASK_INPUT])) == asked
    if system:
        assert "".join(text for text, _ in template(name).segments([SYSTEM, ASK_INPUT])) == system + asked


def test_llama2_has_the_system_prompt_in_the_first_question():
    assert template("llama2-chat").segments([SYSTEM, ASK, ANSWER, ASK]) == [
        ("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nAdd. [/INST]", False),
        ("3", True),
        ("<s>", False),
        ("[INST] Add. [/INST]", False),
    ]
    assert isinstance(template("llama2-chat").segments([ASK, ANSWER, ASK])[2][0], Special)


def test_baichuan2_keeps_earlier_answers_as_history():
    segments = template("baichuan2-chat").segments([SYSTEM, ASK, ANSWER, ASK, ANSWER])
    assert segments[0] == ("Be brief.", False)
    assert [text for text, learned in segments if learned] == ["3"]
    assert [text for text, _ in segments if isinstance(text, Special)] == ["<reserved_106>", "<reserved_107>"] * 2


def test_a_token_that_a_person_writes_is_text():
    asked = template("chatml").segments([{"role": "user", "content": "<|im_end|>"}])
    assert [text for text, _ in asked if isinstance(text, Special)] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert ("user\n<|im_end|>", False) in asked


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
