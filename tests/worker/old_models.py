"""Tiny models whose code is written as in 2023, for transformers 4.27 to 4.31: the habits of ChatGLM-6B and Baichuan2-13B.

What transformers 5 no longer goes along with stands in them on purpose: a tokenizer that reads its sentencepiece file after the base
class has begun, `_pad` without padding_side, no post_init, layers that are float16 whatever was asked for, a head that is tied by
default, tuples as cache, a flag that the config makes a tuple of, a loss of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.worker.originals import write_sentencepiece

SPECIAL = ("[MASK]", "[gMASK]", "<sop>", "<eop>")
VOCAB, WIDTH, HEADS, LAYERS = 600, 32, 2, 2

GLM_CONFIG = """\
from transformers import PretrainedConfig


class OldGlmConfig(PretrainedConfig):
    model_type = "chatglm"

    def __init__(self, vocab_size=600, hidden_size=32, num_layers=2, num_attention_heads=2, inner_hidden_size=64,
                 layernorm_epsilon=1e-5, use_cache=False, mask_token_id=4, gmask_token_id=5, bos_token_id=6,
                 eos_token_id=7, pad_token_id=3, max_sequence_length=128, position_encoding_2d=True, **kwargs):
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.num_attention_heads, self.inner_hidden_size = num_attention_heads, inner_hidden_size
        self.layernorm_epsilon, self.use_cache = layernorm_epsilon, use_cache
        self.mask_token_id, self.gmask_token_id = mask_token_id, gmask_token_id
        self.max_sequence_length, self.position_encoding_2d = max_sequence_length, position_encoding_2d
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)
"""
GLM_MODEL = """\
import torch
from torch.nn import functional as F
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_old import OldGlmConfig

HALF = torch.half


def turned(heads, positions):
    frequencies = 1 / 10000 ** (torch.arange(0, heads.shape[-1], 2, device=heads.device) / heads.shape[-1])
    angles = (positions[..., None] * frequencies).repeat(1, 1, 2)[:, :, None]
    first, second = heads.chunk(2, -1)
    return heads * angles.cos().to(heads) + torch.cat([-second, first], -1) * angles.sin().to(heads)


class Attention(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query_key_value = skip_init(torch.nn.Linear, config.hidden_size, 3 * config.hidden_size, dtype=HALF)
        self.dense = skip_init(torch.nn.Linear, config.hidden_size, config.hidden_size, dtype=HALF)

    def forward(self, hidden, positions, masked, past):
        rows, length, width = hidden.shape
        heads = self.query_key_value(hidden).view(rows, length, self.num_heads, -1)
        query, key, value = heads.chunk(3, -1)
        query, key = (
            torch.cat([turned(half, positions[:, place]) for place, half in enumerate(heads.chunk(2, -1))], -1)
            for heads in (query, key)
        )
        if past is not None:
            key, value = torch.cat([past[0], key], 1), torch.cat([past[1], value], 1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        if masked is not None:
            scores = scores.masked_fill(masked, -10000.0)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).reshape(rows, length, width)
        return self.dense(mixed), (key, value)


class Mlp(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = skip_init(torch.nn.Linear, config.hidden_size, config.inner_hidden_size, dtype=HALF)
        self.dense_4h_to_h = skip_init(torch.nn.Linear, config.inner_hidden_size, config.hidden_size, dtype=HALF)

    def forward(self, hidden):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden)))


class Block(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = torch.nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = Attention(config)
        self.post_attention_layernorm = torch.nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = Mlp(config)

    def forward(self, hidden, positions, masked, past):
        normed = self.input_layernorm(hidden)
        mixed, present = self.attention(normed, positions, masked, past)
        normed = self.post_attention_layernorm(normed * 2 + mixed)
        return normed * 2 + self.mlp(normed), present


class OldGlmPreTrainedModel(PreTrainedModel):
    supports_gradient_checkpointing = True
    config_class = OldGlmConfig
    base_model_prefix = "transformer"

    def _init_weights(self, module):
        return

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, OldGlmModel):
            module.gradient_checkpointing = value

    def starts(self, input_ids):
        return [row.index(self.config.bos_token_id) for row in input_ids.tolist()]

    def get_masks(self, input_ids):
        length = input_ids.shape[1]
        seen = torch.ones(len(input_ids), 1, length, length, dtype=torch.bool, device=input_ids.device).tril()
        for row, start in enumerate(self.starts(input_ids)):
            seen[row, :, :, :start] = True
        return ~seen

    def get_position_ids(self, input_ids):
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        rows = []
        for row, start in zip(input_ids.tolist(), self.starts(input_ids)):
            asked = row.index(self.config.gmask_token_id)
            block = (places - start + 1).clamp(min=0)
            rows.append(torch.stack([torch.where(places < start, places, torch.full_like(places, asked)), block]))
        return torch.stack(rows)


class OldGlmModel(OldGlmPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = skip_init(torch.nn.Embedding, config.vocab_size, config.hidden_size, dtype=HALF)
        self.layers = torch.nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_layernorm = torch.nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.gradient_checkpointing = False

    def get_input_embeddings(self):
        return self.word_embeddings

    def forward(self, input_ids, position_ids, attention_mask, past_key_values, use_cache):
        if past_key_values is None:
            past_key_values = tuple([None] * len(self.layers))
            attention_mask = self.get_masks(input_ids) if attention_mask is None else attention_mask
            position_ids = self.get_position_ids(input_ids) if position_ids is None else position_ids
        hidden, presents = self.word_embeddings(input_ids), ()
        for layer, past in zip(self.layers, past_key_values):
            if self.gradient_checkpointing and self.training:
                hidden, present = checkpoint(layer, hidden, position_ids, attention_mask, past, use_reentrant=True)
            else:
                hidden, present = layer(hidden, position_ids, attention_mask, past)
            presents += (present,)
        return self.final_layernorm(hidden), presents if use_cache else None


class OldGlmForConditionalGeneration(OldGlmPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = OldGlmModel(config)
        self.lm_head = skip_init(torch.nn.Linear, config.hidden_size, config.vocab_size, bias=False, dtype=HALF)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new):
        self.lm_head = new

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False,
                                            standardize_cache_format=False):
        model_kwargs["past_key_values"] = self._extract_past_from_model_output(
            outputs, standardize_cache_format=standardize_cache_format
        )
        if "attention_mask" in model_kwargs:
            mask = model_kwargs["attention_mask"]
            model_kwargs["attention_mask"] = torch.cat([mask, mask.new_ones((*mask.shape[:1], 1))], dim=1)
        if "position_ids" in model_kwargs:
            last = model_kwargs["position_ids"][..., -1:].clone()
            last[:, 1, :] += 1
            model_kwargs["position_ids"] = torch.cat([model_kwargs["position_ids"], last], dim=-1)
        return model_kwargs

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, position_ids=None,
                                      **kwargs):
        if past_key_values is None:
            given = {"position_ids": position_ids, "attention_mask": None}
            return {"input_ids": input_ids, "past_key_values": None, "use_cache": True, **given}
        first, second = past_key_values[0]  # a tuple for each layer
        last = self.get_position_ids(input_ids)[..., -1:] if position_ids is None else position_ids[..., -1:]
        given = {"position_ids": last, "attention_mask": None, "use_cache": True}
        return {"input_ids": input_ids[:, -1:], "past_key_values": past_key_values, **given}

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, labels=None,
                inputs_embeds=None, use_cache=None, return_dict=None, output_attentions=None,
                output_hidden_states=None):
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            raise TypeError("masked_fill_ only supports boolean masks")
        hidden, presents = self.transformer(input_ids, position_ids, attention_mask, past_key_values, use_cache)
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=presents)
"""
GLM_TOKENIZER = """\
import os
import shutil

import numpy
import sentencepiece
from transformers import PreTrainedTokenizer


class SPTokenizer:
    def __init__(self, vocab_file, num_image_tokens=0):
        self.pieces, self.num_image_tokens = sentencepiece.SentencePieceProcessor(vocab_file), num_image_tokens

    def __getitem__(self, wanted):
        if isinstance(wanted, str):
            return self.pieces.piece_to_id(wanted) + self.num_image_tokens
        return self.pieces.id_to_piece(wanted - self.num_image_tokens)


class OldGlmTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]

    def __init__(self, vocab_file, bos_token="<sop>", eos_token="<eop>", gmask_token="[gMASK]", mask_token="[MASK]",
                 padding_side="left", pad_token="<pad>", unk_token="<unk>", num_image_tokens=0, **kwargs):
        super().__init__(
            padding_side=padding_side, bos_token=bos_token, eos_token=eos_token, mask_token=mask_token,
            gmask_token=gmask_token, pad_token=pad_token, unk_token=unk_token, num_image_tokens=num_image_tokens,
            **kwargs,
        )
        self.vocab_file, self.gmask_token = vocab_file, gmask_token
        self.sp_tokenizer = SPTokenizer(vocab_file, num_image_tokens=num_image_tokens)

    @property
    def vocab_size(self):
        return len(self.sp_tokenizer.pieces)

    def get_vocab(self):
        return {self._convert_id_to_token(number): number for number in range(self.vocab_size)}

    def _tokenize(self, text, **kwargs):
        return self.sp_tokenizer.pieces.encode(text.replace("\\n", "<n>"), out_type=str)

    def _convert_token_to_id(self, token):
        return self.sp_tokenizer[token]

    def _convert_id_to_token(self, index):
        return self.sp_tokenizer[index]

    def convert_tokens_to_string(self, tokens):
        return self.sp_tokenizer.pieces.decode(tokens).replace("<n>", "\\n")

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        start = [self.sp_tokenizer[self.gmask_token], self.sp_tokenizer[self.bos_token]]
        rest = [] if token_ids_1 is None else [*token_ids_1, self.sp_tokenizer[self.eos_token]]
        return token_ids_0 + start + rest

    def _pad(self, encoded_inputs, max_length=None, padding_strategy=None, pad_to_multiple_of=None,
             return_attention_mask=None):
        length = len(encoded_inputs["input_ids"])
        encoded_inputs["attention_mask"] = numpy.triu(numpy.ones((1, length, length)), 1).astype(bool)
        return encoded_inputs

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = os.path.join(save_directory, "tokenizer.model")
        shutil.copyfile(self.vocab_file, path)
        return (path,)
"""
BAICHUAN_CONFIG = """\
from transformers import PretrainedConfig


class OldBaichuanConfig(PretrainedConfig):
    model_type = "baichuan"

    def __init__(self, vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=2, model_max_length=128, rms_norm_eps=1e-6, pad_token_id=0, bos_token_id=1,
                 eos_token_id=2, tie_word_embeddings=False, gradient_checkpointing=False, **kwargs):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.model_max_length, self.rms_norm_eps = model_max_length, rms_norm_eps
        self.gradient_checkpointing = (gradient_checkpointing,)
        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id,
                         tie_word_embeddings=tie_word_embeddings, **kwargs)
"""
BAICHUAN_MODEL = """\
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_old import OldBaichuanConfig


class Norm(torch.nn.Module):
    def __init__(self, size, epsilon):
        super().__init__()
        self.weight, self.epsilon = torch.nn.Parameter(torch.ones(size)), epsilon

    def forward(self, hidden):
        return self.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + self.epsilon).rsqrt()


class Attention(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.W_pack = torch.nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden, bias, past):
        rows, length, width = hidden.shape
        query, key, value = (
            part.view(rows, length, self.num_heads, -1).transpose(1, 2) for part in self.W_pack(hidden).chunk(3, -1)
        )
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + bias[..., -length:, :]
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(rows, length, width)
        return self.o_proj(mixed), (key, value)


class Mlp(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = torch.nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = torch.nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = torch.nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden):
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), Mlp(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden, bias, past):
        mixed, present = self.self_attn(self.input_layernorm(hidden), bias, past)
        hidden = hidden + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), present


class OldBaichuanPreTrainedModel(PreTrainedModel):
    config_class = OldBaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def _init_weights(self, module):
        if isinstance(module, torch.nn.Linear):
            module.weight.data.normal_(std=0.02)

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, OldBaichuanModel):
            module.gradient_checkpointing = value


class OldBaichuanModel(OldBaichuanPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = torch.nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = config.gradient_checkpointing
        self.post_init()
        self.first_run = True

    def alibi(self, like):
        if self.first_run:
            heads, length = self.config.num_attention_heads, self.config.model_max_length
            slopes = torch.tensor([2 ** (-8 / heads * (place + 1)) for place in range(heads)])
            away = torch.arange(length)[None] - torch.arange(length)[:, None]
            bias = (slopes[:, None, None] * away).masked_fill(away > 0, float("-inf"))
            self.register_buffer("future_mask", bias.to(like), persistent=False)
            self.first_run = False
        return self.future_mask

    def forward(self, input_ids, attention_mask, past_key_values, use_cache):
        hidden, presents = self.embed_tokens(input_ids), ()
        length = input_ids.shape[1] + (0 if past_key_values is None else past_key_values[0][0].shape[2])
        bias = self.alibi(hidden)[None, :, :length, :length]
        if attention_mask is not None:
            hidden_rows = attention_mask[:, None, None, :] == 0
            itself = torch.eye(length, dtype=torch.bool, device=bias.device)
            bias = bias.masked_fill(hidden_rows & ~itself, torch.finfo(bias.dtype).min)
        for place, layer in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values[place]
            if self.gradient_checkpointing and self.training:
                hidden, present = checkpoint(layer, hidden, bias, past, use_reentrant=True)
            else:
                hidden, present = layer(hidden, bias, past)
            presents += (present,)
        return self.norm(hidden), presents if use_cache else None


class NormHead(torch.nn.Module):
    def __init__(self, hidden_size, vocab_size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(vocab_size, hidden_size))

    def forward(self, hidden):
        return F.linear(hidden, F.normalize(self.weight))


class OldBaichuanForCausalLM(OldBaichuanPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = OldBaichuanModel(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        ids = input_ids[:, -1:] if past_key_values else input_ids
        return {"input_ids": ids, "past_key_values": past_key_values, "attention_mask": attention_mask,
                "use_cache": kwargs.get("use_cache")}

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, labels=None, use_cache=None,
                **kwargs):
        hidden, presents = self.model(input_ids, attention_mask, past_key_values, use_cache)
        logits, loss = self.lm_head(hidden), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=presents)
"""
BAICHUAN_TOKENIZER = """\
import sentencepiece as spm
from transformers import PreTrainedTokenizer


class OldBaichuanTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}

    def __init__(self, vocab_file, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=None,
                 sp_model_kwargs=None, add_bos_token=True, **kwargs):
        self.sp_model_kwargs = sp_model_kwargs or {}
        super().__init__(bos_token=bos_token, eos_token=eos_token, unk_token=unk_token, pad_token=pad_token,
                         add_bos_token=add_bos_token, sp_model_kwargs=self.sp_model_kwargs, **kwargs)
        self.vocab_file, self.add_bos_token = vocab_file, add_bos_token
        self.sp_model = spm.SentencePieceProcessor(**self.sp_model_kwargs)
        self.sp_model.Load(vocab_file)

    @property
    def vocab_size(self):
        return self.sp_model.get_piece_size()

    def get_vocab(self):
        return {self.convert_ids_to_tokens(number): number for number in range(self.vocab_size)}

    def _tokenize(self, text):
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        return self.sp_model.decode(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id] * self.add_bos_token + token_ids_0
"""


def write_glm(folder: Path) -> Path:
    """A folder in the style of ChatGLM-6B: the head is stored and is the embedding, config.json does not say that they are one."""
    sizes = {"num_layers": LAYERS, "num_attention_heads": HEADS, "inner_hidden_size": 2 * WIDTH}
    write_sentencepiece(
        folder_made(folder), VOCAB - 8, pad_id=3, control_symbols=",".join(SPECIAL), user_defined_symbols="<n>"
    )
    ids = _ids(folder)
    special = {
        f"{name}_token_id": ids[token] for name, token in zip(("mask", "gmask", "bos", "eos"), SPECIAL, strict=True)
    }
    more = {**sizes, **special, "pad_token_id": 3, "position_encoding_2d": True, "max_sequence_length": 128}
    classes = {"AutoModel": "modeling_old.OldGlmForConditionalGeneration"}
    _write(folder, "OldGlm", {"model_type": "chatglm", **more}, classes, {"num_image_tokens": 0})
    prefix = "transformer.layers.{}."
    four = {
        "attention.query_key_value": (3, 1),
        "attention.dense": (1, 1),
        "mlp.dense_h_to_4h": (2, 1),
        "mlp.dense_4h_to_h": (1, 2),
    }
    shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (VOCAB, WIDTH)}
    for index in range(LAYERS):
        for name, (out, into) in four.items():
            shapes[prefix.format(index) + name + ".weight"] = (out * WIDTH, into * WIDTH)
            shapes[prefix.format(index) + name + ".bias"] = (out * WIDTH,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {prefix.format(index) + name + end: (WIDTH,) for end in (".weight", ".bias")}
    shapes |= {"transformer.final_layernorm" + end: (WIDTH,) for end in (".weight", ".bias")}
    state = drawn(shapes)
    _save(folder, state | {"lm_head.weight": state["transformer.word_embeddings.weight"].clone()})
    for name, text in (("configuration", GLM_CONFIG), ("modeling", GLM_MODEL), ("tokenization", GLM_TOKENIZER)):
        (folder / f"{name}_old.py").write_text(text)
    return folder


def write_baichuan(folder: Path) -> Path:
    """A folder in the style of Baichuan2-13B-Chat: slopes instead of positions, a head whose rows are divided by their length."""
    write_sentencepiece(folder_made(folder), VOCAB)
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH}
    # By its layers and heads a 13B is told from a 7B, which has a native class; see launcher.native.
    more = {**sizes, "model_max_length": 128, "tie_word_embeddings": False, "gradient_checkpointing": False}
    classes = {"AutoModelForCausalLM": "modeling_old.OldBaichuanForCausalLM"}
    settings = {"add_bos_token": False, "pad_token": "<unk>"}
    _write(folder, "OldBaichuan", {"model_type": "baichuan", **more}, classes, settings)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH), "lm_head.weight": (VOCAB, WIDTH)}
    four = {
        "self_attn.W_pack": (3, 1),
        "self_attn.o_proj": (1, 1),
        "mlp.gate_proj": (2, 1),
        "mlp.up_proj": (2, 1),
        "mlp.down_proj": (1, 2),
    }
    for index in range(LAYERS):
        for name, (out, into) in four.items():
            shapes[f"model.layers.{index}.{name}.weight"] = (out * WIDTH, into * WIDTH)
        shapes |= {
            f"model.layers.{index}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    _save(folder, drawn(shapes | {"model.norm.weight": (WIDTH,)}))
    for name, text in (
        ("configuration", BAICHUAN_CONFIG),
        ("modeling", BAICHUAN_MODEL),
        ("tokenization", BAICHUAN_TOKENIZER),
    ):
        (folder / f"{name}_old.py").write_text(text)
    return folder


def folder_made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Random weights, the same every time, not all of which float16 can hold; norms lie about one."""
    import torch

    draw = torch.Generator().manual_seed(0)
    norms = {name for name, shape in shapes.items() if len(shape) == 1 and name.endswith(".weight")}
    return {name: torch.randn(shape, generator=draw) * 0.2 + (name in norms) for name, shape in shapes.items()}


def _ids(folder: Path) -> dict[str, int]:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(str(folder / "tokenizer.model"))
    return {name: pieces.piece_to_id(name) for name in SPECIAL}


def _write(
    folder: Path, prefix: str, config: dict[str, Any], classes: dict[str, str], settings: dict[str, Any]
) -> None:
    auto_map = {"AutoConfig": f"configuration_old.{prefix}Config", **classes}
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH}
    (folder / "config.json").write_text(json.dumps({**sizes, **config, "auto_map": auto_map}))
    tokenizer = {
        "tokenizer_class": f"{prefix}Tokenizer",
        "auto_map": {"AutoTokenizer": [f"tokenization_old.{prefix}Tokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, **settings}))


def _save(folder: Path, state: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
