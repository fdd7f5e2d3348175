"""Conversations -> token ids and labels: what is learned, what the model is asked with, and what is cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from launcher.errors import DataError
from launcher.families import template as named_template
from launcher.families import template_names
from launcher.worker.data.dataset import end_ids
from launcher.worker.data.tokens import IGNORED, Prompter, Tokens

SPECIAL = ["<pad>", "<s>", "</s>", "[gMASK]", "sop", "<sop>"]
SPECIAL += ["<|system|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>", "<eoa>"]
SPECIAL += [f"<reserved_{number}>" for number in (102, 103, 106, 107)]
TEXT = "### Instruction:\n### Input:\n### Response:\nInstruction: Input: Answer: Round the sum of is a question answer"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{{ '<assistant>\n' if add_generation_prompt else '' }}"
)


def make_tokenizer(around_text: str = "$A", chat_template: str | None = CHAT) -> Any:
    """A byte-level tokenizer; `around_text` are the special tokens that it puts around a text by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in SPECIAL]
    tokenizer.post_processor = processors.TemplateProcessing(single=around_text, special_tokens=ids)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **names)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


def user(text: str, input_: str | None = None) -> dict[str, str]:
    return {"role": "user", "content": text, **({} if input_ is None else {"input": input_})}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one round": [user("Add 1 and 2."), assistant("It is 3.")],
    "with input": [user("Add.", "1 and 2"), assistant("3")],
    "empty input": [user("Add.", ""), assistant("3")],
    "with system": [SYSTEM, user("加一和二。"), assistant("三 😀")],
    "three rounds": [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f")],
}


def split(tokenizer: Any, tokens: Tokens) -> list[tuple[str, bool]]:
    """The text of a row in pieces, and whether each is learned; a learned token is its own label."""
    assert len(tokens.input_ids) == len(tokens.labels)
    pairs = list(zip(tokens.input_ids, tokens.labels, strict=True))
    assert all(label in (token, IGNORED) for token, label in pairs)
    return [
        (tokenizer.decode([token for token, _ in group]), learned)
        for learned, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    ]


def test_only_the_answer_and_its_end_are_learned(tokenizer):
    tokens = Prompter(tokenizer, "alpaca").tokens([user("Add.", "1 and 2"), assistant("It is 3.")], 100)
    assert split(tokenizer, tokens) == [
        ("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n", False),
        ("It is 3.</s>", True),
    ]
    assert not tokens.cut


def test_of_several_rounds_every_answer_is_learned(tokenizer):
    tokens = Prompter(tokenizer, "context").tokens([user("a"), assistant("b"), user("c"), assistant("d")], 100)
    assert split(tokenizer, tokens) == [
        ("Instruction: a\nAnswer: ", False),
        ("b</s>", True),
        ("\nInstruction: c\nAnswer: ", False),
        ("d</s>", True),
    ]


def test_a_template_that_learns_the_last_answer_has_the_others_as_history_without_an_end(tokenizer):
    tokens = Prompter(tokenizer, "chatglm2").tokens([user("a"), assistant("b"), user("c"), assistant("d")], 100)
    assert split(tokenizer, tokens) == [
        ("[gMASK]sop[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：c\n\n答：", False),
        ("d</s>", True),
    ]


def test_a_chat_format_ends_an_answer_with_its_own_token(tokenizer):
    tokens = Prompter(tokenizer, "qwen-chat").tokens(
        [user("a<|im_end|>"), assistant("b"), user("c"), assistant("d")], 100
    )
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert split(tokenizer, tokens) == [
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\na<|im_end|><|im_end|>\n"
            "<|im_start|>assistant\n",
            False,
        ),
        ("b<|im_end|>", True),
        ("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", False),
        ("d<|im_end|>", True),
    ]
    # What a person typed like a token is none.
    assert (tokens.input_ids.count(start), tokens.input_ids.count(end)) == (5, 5)


@pytest.mark.parametrize(("ends", "more"), [((), "</s>"), ((2, "<|im_end|>"), "")])
def test_a_chat_template_that_closes_an_answer_with_another_token_than_eos(ends, more):
    closed = CHAT.replace("eos_token if", "'<|im_end|>' if")
    tokenizer = make_tokenizer(chat_template=closed)
    ids = [tokenizer.convert_tokens_to_ids(end) if isinstance(end, str) else end for end in ends]
    tokens = Prompter(tokenizer, "chat", ids).tokens([user("a"), assistant("b")], 100)
    assert split(tokenizer, tokens)[-1] == (f"b<|im_end|>\n{more}", True)


def test_what_ends_an_answer_comes_from_four_places(tokenizer, tmp_path):
    eos, turn, agent = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>", "<eoa>"])
    assert end_ids("mistral", tokenizer, tmp_path, "chat") == [eos]
    assert end_ids("qwen2", tokenizer, tmp_path, "chat") == [eos, turn]  # the family's
    assert end_ids("gemma2", tokenizer, tmp_path, "chat") == [eos]  # which this tokenizer does not have
    assert end_ids("mistral", tokenizer, tmp_path, "internlm-chat") == [eos, agent]  # the template's
    for said, wanted in ((7, [eos, 7]), ([7, 5], [eos, 5, 7])):  # generation_config.json
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        assert end_ids("mistral", tokenizer, tmp_path, "alpaca") == wanted


def test_all_of_a_text_is_learned(tokenizer):
    for template in ("plain", "alpaca", "chat"):
        tokens = Prompter(tokenizer, template).tokens([{"role": "text", "content": "one 二"}], 100)
        assert split(tokenizer, tokens) == [("one 二</s>", True)]


def test_a_context_is_used_word_for_word(tokenizer):
    context = "  Instruction: a\nAnswer:"
    tokens = Prompter(tokenizer, "plain").tokens([user(context), assistant(" b")], 100)
    assert split(tokenizer, tokens) == [(context, False), (" b</s>", True)]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("template", [*template_names(), "chat"])
def test_the_model_is_asked_with_the_very_tokens_that_it_was_trained_on(tokenizer, template, messages):
    prompter = Prompter(tokenizer, template)
    tokens, prompt = prompter.tokens(messages, 1000), prompter.prompt(messages[:-1])
    assert tokens.input_ids[: len(prompt)] == prompt
    assert set(tokens.labels[len(prompt) :]).isdisjoint({IGNORED})
    answer = tokenizer.decode(tokens.input_ids[len(prompt) :])
    end = "</s>\n" if template == "chat" else named_template(template).end or "</s>"
    assert answer == messages[-1]["content"] + end


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_in_the_middle_of_a_conversation_too(tokenizer, template):
    prompter, messages = Prompter(tokenizer, template), CONVERSATIONS["three rounds"]
    tokens = prompter.tokens(messages, 1000)
    for place in (2, 4, 6):
        prompt = prompter.prompt(messages[:place])
        assert tokens.input_ids[: len(prompt)] == prompt
        assert tokens.labels[len(prompt) - 1] == IGNORED
        assert tokens.labels[len(prompt)] != IGNORED


@pytest.mark.parametrize("around_text", ["<s> $A", "<s> $A </s>"])
def test_what_the_tokenizer_puts_before_a_text_comes_first_and_once(around_text):
    tokenizer = make_tokenizer(around_text)
    messages = CONVERSATIONS["three rounds"]
    ids = Prompter(tokenizer, "alpaca").tokens(messages, 1000).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 3
    text = Prompter(tokenizer, "plain").tokens([{"role": "text", "content": "one"}], 100)
    assert split(tokenizer, text) == [("<s>", False), ("one</s>", True)]


def test_a_chat_template_writes_its_own_beginning():
    tokenizer = make_tokenizer("<s> $A", "{{ bos_token }}" + CHAT)
    ids = Prompter(tokenizer, "chat").tokens(CONVERSATIONS["one round"], 1000).input_ids
    assert ids[:2] != [tokenizer.bos_token_id] * 2
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("around_text", ["$A", "<s> $A", "$A [gMASK] <sop>"])
def test_prefix_tokens_come_first_instead_of_the_tokenizers_own(around_text):
    tokenizer = make_tokenizer(around_text)
    ids = Prompter(tokenizer, "chatglm2").tokens(CONVERSATIONS["one round"], 1000).input_ids
    assert ids[:2] == tokenizer.convert_tokens_to_ids(["[gMASK]", "sop"])
    assert tokenizer.bos_token_id not in ids


@pytest.mark.parametrize("around_text", ["$A", "$A [gMASK] <sop>"])
def test_answer_tokens_stand_before_the_answer_and_nowhere_else(around_text):
    """ChatGLM-6B's own tokenizer puts [gMASK] <sop> behind every text; here they open the answer."""
    tokenizer = make_tokenizer(around_text)
    prompter = Prompter(tokenizer, "chatglm")
    tokens = prompter.tokens([user("加。"), assistant("三")], 1000)
    assert split(tokenizer, tokens) == [("加。[gMASK]<sop>", False), ("三</s>", True)]
    assert tokenizer.decode(prompter.prompt([user("加。")])) == "加。[gMASK]<sop>"
    rounds = prompter.tokens([user("a"), assistant("b"), user("c"), assistant("d")], 1000)
    assert split(tokenizer, rounds) == [
        ("[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答：[gMASK]<sop>", False),
        ("d</s>", True),
    ]


@pytest.mark.parametrize(
    ("template", "missing"), [("chatglm", "[gMASK] and no token <sop>"), ("chatglm2", "[gMASK] and no token sop")]
)
@pytest.mark.parametrize("unknown", [{}, {"unk_token": "<unk>"}])
def test_a_template_for_another_tokenizer_is_refused(template, missing, unknown):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    with pytest.raises(DataError) as caught:
        Prompter(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **unknown), template)
    assert str(caught.value) == (
        f"data.template: {template}: the tokenizer has no token {missing}\n"
        "  write data.template=auto, or name another template"
    )


def test_a_chat_template_is_cut_where_an_answer_begins_and_ends(tokenizer):
    tokens = Prompter(tokenizer, "chat").tokens(
        [SYSTEM, user("a", "i"), assistant("b"), user("c"), assistant("d")], 1000
    )
    assert split(tokenizer, tokens) == [
        ("<system>\nBe brief.\n<user>\na\n\ni\n<assistant>\n", False),
        ("b</s>\n", True),
        ("<user>\nc\n<assistant>\n", False),
        ("d</s>\n", True),
    ]


@pytest.mark.parametrize(("end", "learned"), [("{{ eos_token }}", "b</s>"), ("<end>\n", "b<end>\n</s>"), ("", "b</s>")])
def test_an_answer_of_a_chat_template_ends_with_one_end_token(end, learned):
    tokenizer = make_tokenizer(chat_template=CHAT.replace("{{ eos_token if m['role'] == 'assistant' else '' }}\n", end))
    assert split(tokenizer, Prompter(tokenizer, "chat").tokens([user("a"), assistant("b")], 1000))[1] == (learned, True)


def test_a_chat_template_that_rewrites_earlier_turns_is_refused():
    without_history = CHAT.replace(
        "{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else '…' }}"
    )
    prompter = Prompter(make_tokenizer(chat_template=without_history), "chat")
    assert prompter.tokens([user("a"), assistant("b")], 100).input_ids
    with pytest.raises(DataError) as caught:
        prompter.tokens([user("a"), assistant("b"), user("c"), assistant("d")], 100)
    assert str(caught.value) == (
        "data.template: chat: the tokenizer's chat template rewrites earlier turns, "
        "so the answers cannot be told from the questions\n"
        "  name a template of your own choice, e.g. data.template=alpaca"
    )


def test_a_conversation_that_a_chat_template_refuses_is_an_error_in_its_words():
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
    )
    prompter = Prompter(make_tokenizer(chat_template=strict), "chat")
    with pytest.raises(DataError) as caught:
        prompter.tokens([SYSTEM, user("a"), assistant("b")], 100)
    assert str(caught.value) == (
        "data.template: chat: the tokenizer's chat template refuses a conversation of system, user: "
        "System role not supported\n  name a template of your own choice, e.g. data.template=alpaca"
    )


# What is too long.

LONG = " ".join(f"word{number}" for number in range(200))
HEAD, TAIL = "### Instruction:\n", "\n\n### Response:\n"


def test_a_row_of_just_max_length_is_whole(tokenizer):
    prompter, messages = Prompter(tokenizer, "alpaca"), [user("a"), assistant("b " * 50)]
    length = len(prompter.tokens(messages, 10_000).input_ids)
    assert not prompter.tokens(messages, length).cut
    cut = prompter.tokens(messages, length - 1)
    assert cut.cut
    assert cut.input_ids == prompter.tokens(messages, length).input_ids[:-1]


def test_a_long_answer_loses_its_end_and_its_end_token(tokenizer):
    tokens = Prompter(tokenizer, "alpaca").tokens([user("a question"), assistant(LONG)], 64)
    assert len(tokens.input_ids) == 64
    (prompt, _), (answer, _) = split(tokenizer, tokens)
    assert prompt == f"{HEAD}a question{TAIL}"
    assert LONG.startswith(answer)


@pytest.mark.parametrize("max_length", [48, 64, 200, 400])
def test_a_long_question_is_cut_inside_of_the_template_and_a_short_answer_stays_whole(tokenizer, max_length):
    tokens = Prompter(tokenizer, "alpaca").tokens([user(LONG), assistant("It is 3.")], max_length)
    assert max_length - 16 < len(tokens.input_ids) <= max_length
    (prompt, _), (answer, _) = split(tokenizer, tokens)
    assert prompt.startswith(HEAD)
    assert prompt.endswith(TAIL)
    assert LONG.startswith(prompt[len(HEAD) : -len(TAIL)])
    assert answer == "It is 3.</s>"


def test_one_token_too_many_costs_a_few_tokens_of_the_question_and_not_a_quarter(tokenizer):
    prompter, messages = Prompter(tokenizer, "alpaca"), [user(LONG), assistant("It is 3.")]
    length = len(prompter.tokens(messages, 100_000).input_ids)
    tokens = prompter.tokens(messages, length - 1)
    assert length - 8 <= len(tokens.input_ids) < length
    assert split(tokenizer, tokens)[-1] == ("It is 3.</s>", True)


@pytest.mark.parametrize("max_length", [48, 64, 100, 256])
def test_beside_a_long_question_an_answer_keeps_a_quarter(tokenizer, max_length):
    tokens = Prompter(tokenizer, "alpaca").tokens([user(LONG), assistant(LONG)], max_length)
    (prompt, _), (answer, _) = split(tokenizer, tokens)
    assert prompt.startswith(HEAD)
    assert prompt.endswith(TAIL)
    assert LONG.startswith(answer)
    learned = sum(label != IGNORED for label in tokens.labels)
    assert max_length // 4 <= learned <= max_length // 4 + 8


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        ("alpaca", [user(LONG, LONG), assistant("It is 3.")]),
        ("alpaca", [{**SYSTEM, "content": LONG}, user(LONG, LONG), assistant("It is 3.")]),
        ("alpaca", [user("short", LONG), assistant("It is 3.")]),
        ("chat", [{**SYSTEM, "content": LONG}, user(LONG, LONG), assistant("It is 3.")]),
        ("chatglm", [user(LONG), assistant(LONG), user(LONG), assistant("It is 3.")]),
        ("chatglm2", [user("a"), assistant(LONG), user("c"), assistant("It is 3.")]),
    ],
)
def test_every_text_before_the_answer_gives_until_the_answer_has_room(tokenizer, template, messages):
    tokens = Prompter(tokenizer, template).tokens(messages, 160)
    assert len(tokens.input_ids) <= 160
    prompt, answer = split(tokenizer, tokens)
    assert answer[0].startswith("It is 3.</s>")
    end = {"chat": "<assistant>\n", "chatglm": "答：[gMASK]<sop>", "chatglm2": "答：", "alpaca": "### Response:\n"}
    assert prompt[0].endswith(end[template])


def test_no_half_character_is_left_where_a_question_was_cut(tokenizer):
    prompter = Prompter(tokenizer, "alpaca")
    for max_length in range(40, 52):
        (prompt, _), _ = split(tokenizer, prompter.tokens([user("数据" * 50 + "😀" * 50), assistant("三")], max_length))
        assert "�" not in prompt


def test_a_template_that_is_longer_than_the_room_is_cut_and_nothing_is_left_of_the_question(tokenizer):
    tokens = Prompter(tokenizer, "alpaca").tokens([user("😀"), assistant("三")], 8)
    assert len(tokens.input_ids) == 8
    assert "😀" not in tokenizer.decode(tokens.input_ids)


def test_later_rounds_that_do_not_fit_are_left_out(tokenizer):
    messages = [user("a"), assistant("b"), user(LONG), assistant(LONG)]
    tokens = Prompter(tokenizer, "alpaca").tokens(messages, 64)
    assert len(tokens.input_ids) == 64
    assert split(tokenizer, tokens)[1] == ("b</s>", True)


def test_a_text_loses_its_end(tokenizer):
    tokens = Prompter(tokenizer, "plain").tokens([{"role": "text", "content": LONG}], 64)
    assert tokens.cut
    assert len(tokens.input_ids) == 64
    (text, learned), *rest = split(tokenizer, tokens)
    assert (learned, rest) == (True, [])
    assert LONG.startswith(text)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("template", [*template_names(), "chat"])
def test_whatever_the_room_no_row_is_longer_and_none_is_cut_that_fits(tokenizer, template, messages):
    prompter = Prompter(tokenizer, template)
    whole = prompter.tokens(messages, 1000)
    for max_length in range(8, len(whole.input_ids) + 2, 5):
        tokens = prompter.tokens(messages, max_length)
        assert len(tokens.input_ids) == len(tokens.labels) <= max_length
        assert tokens.cut == (max_length < len(whole.input_ids))
        assert tokens.cut or tokens == whole
