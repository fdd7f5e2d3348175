"""In: a transformers config. Out: its `Family` (module names, LoRA targets, what it can do) and prompt `Template`s.

Both tables stand in families.yaml; the classes here give the meaning of their keys.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML

from launcher.errors import UsageError

Layout = Literal["split", "fused", "moe", "phi", "falcon", "bloom", "chatglm", "chatglm2", "baichuan", "qwen"]
_ROLES = ("system", "user", "assistant")


class Family(BaseModel):
    """What the launcher has to know about a family of models. Module names are paths inside the causal LM.

    Defaults are Llama's. `name` is the model_type. `classes` are the causal LMs that an auto_map may name, for a config
    with another model_type; `former` are model_types of revisions from before transformers had the class. `rotary` is
    None where positions need no module of their own beside the layers; `others` are further modules beside them.
    `layout` names the formulas in `modelshape.layouts`. An empty `lora_targets` means every linear layer but the head.
    `template` serves where the tokenizer has none; `chat` says which one instead in a model whose name has "chat" and all
    words of the key. `end_tokens` end an answer even where tokenizer and generation config leave them out.
    `code_versions`: the oldest and newest transformers on which code that comes with the weights ran unchanged.
    `own_mask`: its code makes mask and positions from the ids, so rows are padded on the right and come without a mask.
    `loss_at_labels`: it hands its head's logits to transformers' loss function; `changes_logits`: after doing something to them.
    `no_bf16` is the reason why bf16 is refused. `eager_attention`: its code writes attention out, and keeps
    scores that grow with the square of the length. `defaults`: what transformers takes where the config is silent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    classes: tuple[str, ...] = ()
    former: tuple[str, ...] = ()
    layout: Layout = "split"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str | None = "model.rotary_emb"
    others: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    template: str = "alpaca"
    chat: dict[str, str] = {}
    end_tokens: tuple[str, ...] = ()
    own_mask: bool = False
    packing: bool = True
    loss_at_labels: bool = True
    changes_logits: bool = False
    eager_attention: bool = False
    needs_remote_code: bool = False
    code_versions: tuple[str, str] | None = None
    no_bf16: str | None = None
    note: str | None = None
    defaults: dict[str, Any] = {}

    @property
    def bf16(self) -> bool:
        """Whether the family computes rightly in bf16."""
        return self.no_bf16 is None

    @property
    def pinned(self) -> tuple[str, ...]:
        """Modules beside the layers, which have to lie on one device: positions are looked up in the rotary table with
        the device of the ids, a tied head is the embedding, and old code computes the loss where the ids are."""
        ends = (self.embedding, self.rotary, *self.others, self.norm, self.head)
        return tuple(module for module in ends if module is not None)

    def template_for(self, name: str) -> str:
        """The template of a model of that name or path whose tokenizer has none."""
        words = set(re.findall(r"[^\W_]+", Path(name).name.lower()))
        found = (template for key, template in self.chat.items() if words.issuperset(["chat", *key.split()]))
        return next(found, self.template)


class Special(str):
    """A piece of a prompt that is one special token, named; text that happens to read the same is only text."""


class Template(BaseModel):
    """A prompt template, made of pieces with {content}, {input} and {round} in them.

    `input` follows the content of a user message that has an `input`. `assistant` opens an answer, `separator` follows an
    answer that is not the last. `single` and `single_assistant` replace `user` and `assistant` in a conversation of one
    round, `after_system` replaces `user` behind a system message; `default_system` stands in where there is none.
    `supervise: last` learns the last answer only: earlier ones are history, without an end token, as the
    family's own chat code writes them. With `roles` a message is the special token of its role, the piece for its role
    with {content} left out, and its content, each encoded by itself as the family's own code does. `tokens` are special
    tokens that stand in the pieces. `prefix_tokens` are those before the first text (empty: the tokenizer's own bos, if it
    has one), `answer_tokens` those before a supervised segment, `end` the one behind it (null: the tokenizer's eos). A
    special token is looked up by name, never found in a person's text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    system: str
    user: str
    input: str
    assistant: str
    separator: str = ""
    single: str | None = None
    single_assistant: str | None = None
    after_system: str | None = None
    default_system: str | None = None
    first_round: int = 1
    supervise: Literal["all", "last"] = "all"
    roles: dict[str, str] = {}
    tokens: tuple[str, ...] = ()
    prefix_tokens: tuple[str, ...] = ()
    answer_tokens: tuple[str, ...] = ()
    end: str | None = None

    def segments(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[str, bool]]:
        """The text of a conversation in order, and for each piece of it whether it is learned.

        Neighbours that are not learned are one segment. The caller puts the end token after each learned one. A
        conversation that ends with a user's message gives the prompt for generation, and nothing that is learned.

        Args:
            messages: `{role: system|user|assistant, content}`; a user's message may have an `input`.

        Raises:
            ValueError: no message, or one with another role.
        """
        if not messages:
            raise ValueError("a conversation without messages")
        strange = next((message["role"] for message in messages if message["role"] not in _ROLES), None)
        if strange is not None:
            raise ValueError(f"a message of the role {strange!r}; known: {', '.join(_ROLES)}")
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        return self._by_roles(messages) if self.roles else self._in_pieces(messages)

    def _in_pieces(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[str, bool]]:
        """The segments of a conversation whose pieces are text, with special tokens in it."""
        single = sum(message["role"] == "user" for message in messages) == 1
        opening = self.single_assistant if single and self.single_assistant is not None else self.assistant
        segments: list[tuple[str, bool]] = []
        prompt: list[str] = []
        num_users = 0
        last = len(messages) - 1
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt += self._parts(opening)
                if self.supervise == "all" or position == last:
                    segments += [*_unlearned(prompt), (message["content"], True)]
                    prompt = []
                else:
                    prompt.append(message["content"])
                prompt += self._parts(self.separator if position < last else "")
            else:
                after_system = position > 0 and messages[position - 1]["role"] == "system"
                piece = self._piece(message["role"], single, after_system).replace(
                    "{round}", str(self.first_round + num_users)
                )
                prompt += self._parts(piece, message["content"] + self._more(message))
                num_users += message["role"] == "user"
        if messages[last]["role"] == "user":
            prompt += self._parts(opening)
        segments += _unlearned(prompt)
        return [(text, learned) for text, learned in segments if text or learned]

    def _by_roles(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[str, bool]]:
        """The pieces of a conversation whose messages begin with a special token; a role without one has none."""
        openings = {"system": self.system, "user": self.user, "assistant": self.assistant}
        segments: list[tuple[str, bool]] = []
        last = len(messages) - 1
        for position, message in enumerate(messages):
            role = message["role"]
            learned = role == "assistant" and (self.supervise == "all" or position == last)
            segments += [(Special(self.roles.get(role, "")), False), (openings[role].replace("{content}", ""), False)]
            segments.append((message["content"] + self._more(message), learned))
        if messages[last]["role"] == "user":
            segments += [(Special(self.roles["assistant"]), False), (self.assistant, False)]
        return [(text, learned) for text, learned in segments if text or learned]

    def _piece(self, role: str, single: bool, after_system: bool) -> str:
        """The piece for a system's or user's message."""
        if role == "system":
            return self.system
        if after_system and self.after_system is not None:
            return self.after_system
        return self.single if single and self.single is not None else self.user

    def _more(self, message: Mapping[str, str]) -> str:
        """What follows the content of a message that has an input."""
        return self.input.replace("{input}", message["input"]) if message.get("input") else ""

    def _parts(self, piece: str, content: str = "") -> list[str]:
        """Text and special tokens of a piece. The content goes in last: braces and tokens in it stay text."""
        before, mark, after = piece.partition("{content}")
        return [*self._named(before), *([content] if mark else []), *self._named(after)]

    def _named(self, text: str) -> list[str]:
        if not self.tokens:
            return [text]
        cut = re.split(f"({'|'.join(map(re.escape, self.tokens))})", text)
        return [Special(part) if part in self.tokens else part for part in cut]


def _unlearned(parts: Sequence[str]) -> list[tuple[str, bool]]:
    """Neighbouring texts as one segment, so that they are encoded together; each special token by itself."""
    segments: list[tuple[str, bool]] = []
    for part in parts:
        if part and segments and not isinstance(part, Special) and not isinstance(segments[-1][0], Special):
            segments[-1] = (segments[-1][0] + part, False)
        elif part:
            segments.append((part, False))
    return segments


@cache
def _lines() -> dict[str, dict[str, str]]:
    """The lines of families.yaml by section and name. YAML is slow here: all of it takes 25 ms, a line about one."""
    lines: dict[str, dict[str, str]] = {}
    section: dict[str, str] = {}
    for line in (Path(__file__).parent / "families.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            section[line.split(":", 1)[0].strip()] = line
        elif line and not line.startswith("#"):
            section = lines.setdefault(line.rstrip(":"), {})
    return lines


def _row(section: str, name: str) -> dict[str, Any]:
    """One entry of families.yaml; KeyError where there is none."""
    row: dict[str, Any] = YAML(typ="safe", pure=False).load(_lines()[section][name])[name]
    return row


@cache
def family(name: str) -> Family:
    """The family of that name, such as `ModelShape.family` holds; KeyError for another."""
    return Family(name=name, **_row("families", name))


def family_names() -> tuple[str, ...]:
    """Names of all families, `unknown` last."""
    return tuple(_lines()["families"])


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a transformers config, by its model_type, else by the class that its auto_map names; else `unknown`.

    ChatGLM-6B, ChatGLM2 and ChatGLM3 share the model_type `chatglm`; they are told apart by keys that only one has, and
    the second from the third, whose keys are the same, by the name in `_name_or_path`.
    """
    name = str(config.get("model_type", ""))
    if name not in family_names():
        name = _by_class(config)
    if name.startswith("chatglm"):
        if "inner_hidden_size" in config or "position_encoding_2d" in config:
            return family("chatglm")
        third = "chatglm3" in str(config.get("_name_or_path", "")).lower().replace("-", "")
        return family("chatglm3" if third else "chatglm2")
    return family(name)


def _by_class(config: Mapping[str, Any]) -> str:
    """The family that a class of auto_map belongs to; `unknown` where it names none, or another one."""
    auto_map = config.get("auto_map")
    references = (
        auto_map.values() if isinstance(auto_map, Mapping) else ()
    )  # what else it is, is refused where it is read
    classes = {str(reference).rpartition(".")[2] for reference in references}
    found = (name for name in family_names() if classes.intersection(family(name).classes))
    return next(found, "unknown") if classes else "unknown"


def former_of(model_type: str) -> str | None:
    """The family whose early revisions had this model_type; None for every other one."""
    if model_type in family_names():
        return None
    return next((name for name in family_names() if model_type in family(name).former), None)


def template_names() -> tuple[str, ...]:
    """Names that `data.template` may have beside `auto` and `chat`."""
    return tuple(_lines()["templates"])


@cache
def template(name: str) -> Template:
    """The template of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in template_names():
        near = difflib.get_close_matches(name, template_names(), n=1)
        names = ", ".join(["auto", "chat", *template_names()])
        raise UsageError(
            f"data.template: {name}",
            "no template is called so",
            f"did you mean `{near[0]}`?" if near else f"write one of: {names}",
        )
    return Template(name=name, **_row("templates", name))
