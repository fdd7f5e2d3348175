"""Conversations in, token ids and labels out. Training and chat go through the same `Prompter`, so they cannot differ.

A conversation becomes text segments that are supervised (the assistant's) or not; each segment is encoded by itself, as it is
when the model answers, and an end-of-sequence token follows each supervised one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from launcher.errors import DataError
from launcher.families import Special
from launcher.families import template as named_template
from launcher.worker.data.rows import Message

IGNORED = -100
Segment = tuple[str, bool]


@dataclass(frozen=True)
class Tokens:
    """One row: equally long ids and labels; `cut` when it was longer than max_length."""

    input_ids: list[int]
    labels: list[int]
    cut: bool


class Prompter:
    """Turns conversations into tokens for one tokenizer and one template.

    Args:
        tokenizer: a transformers tokenizer with an eos token.
        template: `chat` for the tokenizer's own chat template, else a name of families.yaml.
        end_ids: every token that ends an answer; the tokenizer's eos alone where none are given.
    """

    def __init__(self, tokenizer: Any, template: str, end_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.named = named_template(template) if template != "chat" else None
        self.start, self.before_answer = self._special_tokens()
        self.end_ids = {tokenizer.eos_token_id, *end_ids}
        self.end = tokenizer.eos_token_id
        if self.named is not None and self.named.end is not None:
            self.end = self._ids_of((self.named.end,))[0]

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The text of a conversation in order, and which parts are learned."""
        if messages[-1]["role"] == "text":
            return [(messages[-1]["content"], True)]
        return self.named.segments(messages) if self.named else self._chat_segments(messages)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that the model continues with its answer; the last message is the user's."""
        return self._assemble(messages)[0] + self.before_answer

    def tokens(self, messages: Sequence[Message], max_length: int) -> Tokens:
        """A conversation as at most `max_length` tokens.

        What is too long loses the answer's end first, but keeps a quarter of the room for it; then the end of the question. The
        template around the question is never cut.
        """
        ids, labels = self._assemble(messages)
        if len(ids) <= max_length:
            return Tokens(ids, labels, cut=False)
        before, prompt_length = len(ids) + 1, _num_before_answer(labels)
        room = max_length - min(len(ids) - prompt_length, max(1, max_length // 4))
        # Once for every long field; a template alone that is longer than the room ends it.
        while room < prompt_length < before and len(messages) > 1:
            messages = self._shortened(messages, prompt_length - room)
            ids, labels = self._assemble(messages)
            before, prompt_length = prompt_length, _num_before_answer(labels)
        return Tokens(ids[:max_length], labels[:max_length], cut=True)

    def _assemble(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        ids = list(self.start)
        labels = [IGNORED] * len(ids)
        for text, supervised in self.segments(messages):
            part = self._encode(text, supervised)
            if supervised:
                ids += self.before_answer
                labels += [IGNORED] * len(self.before_answer)
            ids += part
            labels += part if supervised else [IGNORED] * len(part)
        return ids, labels

    def _encode(self, text: str, supervised: bool) -> list[int]:
        if isinstance(text, Special):
            return self._ids_of((text,))
        # Only a chat template writes special tokens as text; elsewhere a literal "</s>" is what a person typed.
        plain = self.named is not None
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
        # A chat template closes an answer itself, often with a line break after the end token.
        return [*ids, self.end] if supervised and (self.named or self.end_ids.isdisjoint(ids[-2:])) else ids

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Ids before everything, and ids before every answer."""
        if self.named is None:
            return [], []  # a chat template writes its own
        if self.named.prefix_tokens or self.named.answer_tokens:
            return self._ids_of(self.named.prefix_tokens), self._ids_of(self.named.answer_tokens)
        text: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole: list[int] = self.tokenizer("a")["input_ids"]
        places = range(len(whole) - len(text) + 1)
        at = next((place for place in places if whole[place : place + len(text)] == text), len(whole))
        eos = self.tokenizer.eos_token_id
        # What a tokenizer puts behind a question (the first ChatGLM: [gMASK] <sop>) is where its answer begins.
        before, behind = whole[:at], whole[at + len(text) :]
        return [token for token in before if token != eos], [token for token in behind if token != eos]

    def _ids_of(self, names: Sequence[str]) -> list[int]:
        """The ids of special tokens.

        Raises:
            DataError: the tokenizer has none of that name.
        """
        ids: list[int] = self.tokenizer.convert_tokens_to_ids(list(names))
        missing = [name for name, token in zip(names, ids, strict=True) if token in (None, self.tokenizer.unk_token_id)]
        if missing:
            found = f"the tokenizer has no token {' and no token '.join(missing)}"
            raise DataError(
                f"data.template: {self.template}", found, "write data.template=auto, or name another template"
            )
        return ids

    def _shortened(self, messages: Sequence[Message], excess: int) -> list[Message]:
        """The conversation with `excess` tokens less in the longest text (or its input) before the first learned answer."""
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        learned = answers[-1 if self.named is not None and self.named.supervise == "last" else 0]
        encoded: dict[tuple[int, str], list[int]] = {
            (place, name): self.tokenizer(messages[place][name], add_special_tokens=False)["input_ids"]
            for place in range(learned)
            for name in ("content", "input")
            if messages[place].get(name)
        }
        if not encoded:
            return list(messages)
        (place, name), ids = max(encoded.items(), key=lambda item: len(item[1]))
        # A few more go, because the cut end may be encoded in more pieces.
        kept = self.tokenizer.decode(ids[: max(1, len(ids) - excess - 4)], skip_special_tokens=True)
        changed = {**messages[place], name: kept.rstrip("�")}
        return [*messages[:place], changed, *messages[place + 1 :]]

    def _chat_segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The chat template's text, cut where an answer begins and ends."""
        plain = [{"role": m["role"], "content": _with_input(m)} for m in messages]
        segments: list[Segment] = []
        done = ""
        for place, message in enumerate(plain):
            if message["role"] != "assistant":
                continue
            before = self._render(plain[:place], generation=True)
            after = self._render(plain[: place + 1], generation=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise DataError(
                    "data.template: chat",
                    "the tokenizer's chat template rewrites earlier turns, so the answers cannot be told from the questions",
                    "name a template of your own choice, e.g. data.template=alpaca",
                )
            segments += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        if plain[-1]["role"] != "assistant":
            segments.append((self._render(plain, generation=True)[len(done) :], False))
        return segments

    def _render(self, messages: list[Message], generation: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                "data.template: chat",
                f"the tokenizer's chat template refuses a conversation of {roles}: {error}",
                "name a template of your own choice, e.g. data.template=alpaca",
            ) from None


def _num_before_answer(labels: Sequence[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))


def _with_input(message: Message) -> str:
    return f"{message['content']}\n\n{message['input']}" if message.get("input") else message["content"]
