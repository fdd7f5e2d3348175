"""In: a transformers config. Out: its `Family` (module names, LoRA targets, what it can do) and prompt `Template`s.

Both tables stand in families.yaml; the classes here give the meaning of their keys.
"""

from __future__ import annotations

import difflib
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

    Defaults are Llama's. `name` is the model_type, `aliases` are further ones. `rotary` is None where positions need no
    module of their own beside the layers; `others` are further modules beside them, which a device map has to place.
    `layout` names the formulas in `modelshape.layouts`. An empty `lora_targets` means every linear layer but the head.
    `own_mask`: its code makes mask and positions from the ids, so rows are padded on the right and come without a mask.
    `no_bf16` is the reason why bf16 is refused. `eager_attention`: its code writes attention out, and keeps
    scores that grow with the square of the length. `defaults`: what transformers takes where the config is silent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    aliases: tuple[str, ...] = ()
    layout: Layout = "split"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str | None = "model.rotary_emb"
    others: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    template: str = "alpaca"
    own_mask: bool = False
    packing: bool = True
    eager_attention: bool = False
    needs_remote_code: bool = False
    no_bf16: str | None = None
    note: str | None = None
    defaults: dict[str, Any] = {}

    @property
    def bf16(self) -> bool:
        """Whether the family computes rightly in bf16."""
        return self.no_bf16 is None


class Special(str):
    """A piece of a prompt that is one special token, named; text that happens to read the same is only text."""


class Template(BaseModel):
    """A prompt template, made of pieces with {content}, {input} and {round} in them.

    `input` is added after a user message that has an `input`. `assistant` opens an answer, `separator` follows an
    answer that is not the last. `single` and `single_assistant` replace `user` and `assistant` in a conversation of one
    round. `supervise: last` learns the last answer only: earlier ones are history, without an end token, as the
    family's own chat code writes them. With `roles` a message is the special token of its role, the piece for its role
    with {content} left out, and its content, each encoded by itself as the family's own code does. `prefix_tokens` are
    special tokens before the first text (empty: the tokenizer's own bos, if it has one), `answer_tokens` those before a
    supervised segment. A special token is looked up by name, never found in text.
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
    first_round: int = 1
    supervise: Literal["all", "last"] = "all"
    roles: dict[str, str] = {}
    prefix_tokens: tuple[str, ...] = ()
    answer_tokens: tuple[str, ...] = ()

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
        if self.roles:
            return self._by_roles(messages)
        single = sum(message["role"] == "user" for message in messages) == 1
        opening = self.single_assistant if single and self.single_assistant is not None else self.assistant
        segments: list[tuple[str, bool]] = []
        prompt = ""
        num_users = 0
        last = len(messages) - 1
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt += opening
                if self.supervise == "all" or position == last:
                    segments += [(prompt, False), (message["content"], True)]
                    prompt = ""
                else:
                    prompt += message["content"]
                prompt += self.separator if position < last else ""
            else:
                prompt += self._asked(message, single, self.first_round + num_users)
                num_users += message["role"] == "user"
        if messages[last]["role"] == "user":
            prompt += opening
        if prompt:
            segments.append((prompt, False))
        return [(text, learned) for text, learned in segments if text or learned]

    def _by_roles(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[str, bool]]:
        """The pieces of a conversation whose messages begin with a special token."""
        openings = {"system": self.system, "user": self.user, "assistant": self.assistant}
        segments: list[tuple[str, bool]] = []
        last = len(messages) - 1
        for position, message in enumerate(messages):
            role = message["role"]
            if role not in self.roles:
                raise ValueError(f"a message of the role {role!r}; known: {', '.join(_ROLES)}")
            more = self.input.replace("{input}", message["input"]) if message.get("input") else ""
            learned = role == "assistant" and (self.supervise == "all" or position == last)
            segments += [(Special(self.roles[role]), False), (openings[role].replace("{content}", ""), False)]
            segments.append((message["content"] + more, learned))
        if messages[last]["role"] == "user":
            segments += [(Special(self.roles["assistant"]), False), (self.assistant, False)]
        return [(text, learned) for text, learned in segments if text or learned]

    def _asked(self, message: Mapping[str, str], single: bool, round_: int) -> str:
        """A system's or user's message in the template's words. The content goes in last: braces in it stay braces."""
        if message["role"] not in _ROLES:
            raise ValueError(f"a message of the role {message['role']!r}; known: {', '.join(_ROLES)}")
        if message["role"] == "system":
            return self.system.replace("{content}", message["content"])
        piece = self.single if single and self.single is not None else self.user
        text = piece.replace("{round}", str(round_)).replace("{content}", message["content"])
        return text + (self.input.replace("{input}", message["input"]) if message.get("input") else "")


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
    """The family of a transformers config, `unknown` where the table has none.

    ChatGLM-6B, ChatGLM2 and ChatGLM3 share the model_type `chatglm`; they are told apart by keys that only one has, and
    the second from the third, whose keys are the same, by the name in `_name_or_path`.
    """
    model_type = str(config.get("model_type", ""))
    if model_type == "chatglm":
        if "inner_hidden_size" in config or "position_encoding_2d" in config:
            return family("chatglm")
        third = "chatglm3" in str(config.get("_name_or_path", "")).lower().replace("-", "")
        return family("chatglm3" if third else "chatglm2")
    if model_type in family_names():
        return family(model_type)
    return next((known for known in map(family, family_names()) if model_type in known.aliases), family("unknown"))


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
