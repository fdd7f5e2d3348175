"""Tiny models with code of their own, in the style of ChatGLM and Baichuan: config, model and tokenizer in separate files.

model/ config.json                auto_map of all classes; the tokenizer's only here, where it is asked for
       configuration_tiny.py      TinyConfig
       modeling_tiny.py           TinyForCausalLM; imports .configuration_tiny and .layers_tiny
       layers_tiny.py             imported by `from . import`, which transformers' own search does not see
       tokenization_tiny.py       TinyTokenizer over a tokenizers model; imports .text_tiny
       text_tiny.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGURATION = """\
from transformers import PretrainedConfig

MARK = {mark!r}


class TinyConfig(PretrainedConfig):
    model_type = "tiny_remote"

    def __init__(self, vocab_size=128, hidden_size=16, num_hidden_layers=2, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**kwargs)
"""
LAYERS = """\
import torch


class Block(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.query_key_value = torch.nn.Linear(size, 3 * size)
        self.dense = torch.nn.Linear(size, size)

    def forward(self, hidden, causal):
        query, key, value = self.query_key_value(hidden).chunk(3, -1)
        scores = (query @ key.transpose(1, 2)) / query.shape[-1] ** 0.5 + causal
        return hidden + self.dense(scores.softmax(-1) @ value)
"""
MODELING = """\
import torch
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from . import layers_tiny
from .configuration_tiny import MARK, TinyConfig


class TinyForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinyConfig
    base_model_prefix = "transformer"
    mark = MARK

    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList(layers_tiny.Block(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.word_embeddings(input_ids)
        length = input_ids.shape[1]
        causal = torch.full((length, length), -1e9, device=input_ids.device).triu(1)
        for layer in self.layers:
            hidden = layer(hidden, causal)
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)
"""
TOKENIZATION = """\
import os

from transformers import PreTrainedTokenizer

from .text_tiny import pieces


class TinyTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tiny.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **kwargs):
        with open(vocab_file, encoding="utf-8") as file:
            self.names = file.read().split("\\n")
        self.numbers = {name: number for number, name in enumerate(self.names)}
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        super().__init__(**(names | kwargs))

    @property
    def vocab_size(self):
        return len(self.names)

    def get_vocab(self):
        return dict(self.numbers)

    def _tokenize(self, text, **kwargs):
        return pieces(text)

    def _convert_token_to_id(self, token):
        return self.numbers.get(token, self.numbers["<unk>"])

    def _convert_id_to_token(self, index):
        return self.names[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = os.path.join(save_directory, "tiny.model")
        with open(path, "w", encoding="utf-8") as file:
            file.write("\\n".join(self.names))
        return (path,)
"""
TEXT = """\
def pieces(text):
    return list(text)
"""
CLASSES = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
TOKENIZER = {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None]}


def sources(mark: str = "first") -> dict[str, str]:
    """The .py files; `mark` is what tells one version of the code from another."""
    return {
        "configuration_tiny.py": CONFIGURATION.format(mark=mark),
        "layers_tiny.py": LAYERS,
        "modeling_tiny.py": MODELING,
        "tokenization_tiny.py": TOKENIZATION,
        "text_tiny.py": TEXT,
    }


def write_model(folder: Path, mark: str = "first", tokenizer_in_config: bool = False, weights: bool = True) -> Path:
    """A whole model folder.

    Args:
        tokenizer_in_config: the tokenizer's code is named by config.json only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in sources(mark).items():
        (folder / name).write_text(text)
    names = ["<pad>", "</s>", "<unk>", *map(chr, range(32, 127))]
    names += [f"<{number}>" for number in range(len(names), 128)]
    sizes = {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 2}
    # What launch needs to count parameters of a family that it does not know.
    more = {"num_attention_heads": 1, "intermediate_size": 16, "tie_word_embeddings": False}
    config: dict[str, Any] = {"model_type": "tiny_remote", **sizes, **more, "auto_map": dict(CLASSES)}
    tokenizer: dict[str, Any] = {"tokenizer_class": "TinyTokenizer"}
    (config if tokenizer_in_config else tokenizer).setdefault("auto_map", {}).update(TOKENIZER)
    (folder / "tiny.model").write_text("\n".join(names))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if weights:
        write_weights(folder)
    return folder


def tensors(vocab_size: int = 128, size: int = 16, num_layers: int = 2) -> dict[str, Any]:
    """Random weights, the same every time."""
    import torch

    draw = torch.Generator().manual_seed(0)
    shapes = {"word_embeddings.weight": (vocab_size, size), "lm_head.weight": (vocab_size, size)}
    for index in range(num_layers):
        shapes |= {
            f"layers.{index}.query_key_value.weight": (3 * size, size),
            f"layers.{index}.query_key_value.bias": (3 * size,),
        }
        shapes |= {f"layers.{index}.dense.weight": (size, size), f"layers.{index}.dense.bias": (size,)}
    return {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in shapes.items()}


def write_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors(), folder / "model.safetensors", metadata={"format": "pt"})
