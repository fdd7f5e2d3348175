"""Tiny models in their original layouts, written down once more by hand: config, weights, tokenizer, and what they compute.

The forward passes are plain torch and share nothing with the classes they are compared with. All of them: RMSNorm before
attention and before a gated MLP, causal attention, no dropout.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize, silu

State = dict[str, torch.Tensor]
HIDDEN, HEADS, LAYERS, MLP, VOCAB = 32, 4, 2, 48, 640
SIZE = HIDDEN // HEADS
GROUPS = 2

CHATGLM2: dict[str, Any] = {
    "model_type": "chatglm", "_name_or_path": "THUDM/chatglm2-6b", "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig",
                 "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True, "ffn_hidden_size": MLP, "fp32_residual_connection": False, "hidden_dropout": 0.0,
    "hidden_size": HIDDEN, "kv_channels": SIZE, "layernorm_epsilon": 1e-5, "multi_query_attention": True,
    "multi_query_group_num": GROUPS, "num_attention_heads": HEADS, "num_layers": LAYERS, "original_rope": True,
    "padded_vocab_size": VOCAB, "post_layer_norm": True, "rmsnorm": True, "seq_length": 256, "use_cache": True,
    "torch_dtype": "float32", "transformers_version": "4.27.1", "tie_word_embeddings": False, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "chatglm2": CHATGLM2,
    "chatglm3": {**CHATGLM2, "_name_or_path": "THUDM/chatglm3-6b"},
    "baichuan": {"model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"], **_LLAMA},
    "baichuan2": {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        **_LLAMA,
        "model_max_length": 64,
        "z_loss_weight": 0,
    },
    "internlm": {"model_type": "internlm", **_LLAMA, "bias": True, "rotary": {"base": 10000, "type": "dynamic"}},
    "internlm 20B": {"model_type": "internlm", **_LLAMA, "bias": False},
    "xverse": {"model_type": "xverse", **_LLAMA},
    "qwen": {
        "model_type": "qwen", "hidden_size": HIDDEN, "intermediate_size": 2 * MLP, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "kv_channels": SIZE, "vocab_size": VOCAB, "seq_length": 64, "no_bias": True,
        "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True,
        "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "use_dynamic_ntk": True, "use_logn_attn": True,
        "tie_word_embeddings": False, "torch_dtype": "float32", "max_position_embeddings": 64,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Names:
    """How an original layout calls its tensors; `{}` is the layer."""

    embedding: str
    layer: str
    norm: str
    head: str
    qkv: tuple[str, ...]
    out: str
    gate_up: tuple[str, ...]
    down: str
    norms: tuple[str, str]


_LLAMA_NAMES = Names(
    "model.embed_tokens", "model.layers.{}.", "model.norm", "lm_head",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", ("input_layernorm", "post_attention_layernorm"),
)  # fmt: skip
_CHATGLM_NAMES = Names(
    "transformer.embedding.word_embeddings", "transformer.encoder.layers.{}.", "transformer.encoder.final_layernorm",
    "transformer.output_layer", ("self_attention.query_key_value",), "self_attention.dense",
    ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", ("input_layernorm", "post_attention_layernorm"),
)  # fmt: skip
_BAICHUAN_NAMES = Names(**{**vars(_LLAMA_NAMES), "qkv": ("self_attn.W_pack",)})
NAMES = {
    "chatglm2": _CHATGLM_NAMES, "chatglm3": _CHATGLM_NAMES, "baichuan": _BAICHUAN_NAMES, "baichuan2": _BAICHUAN_NAMES,
    "internlm": _LLAMA_NAMES, "internlm 20B": _LLAMA_NAMES, "xverse": _LLAMA_NAMES,
    # Qwen's second matrix is the one that goes through the activation.
    "qwen": Names("transformer.wte", "transformer.h.{}.", "transformer.ln_f", "lm_head", ("attn.c_attn",),
                  "attn.c_proj", ("mlp.w2", "mlp.w1"), "mlp.c_proj", ("ln_1", "ln_2")),
}  # fmt: skip
_BIASES = {"chatglm2": "qkv", "chatglm3": "qkv", "qwen": "qkv", "internlm": "qkv out"}
_BUFFERS = {
    "chatglm2": ("transformer.rotary_pos_emb.inv_freq",),
    "chatglm3": ("transformer.rotary_pos_emb.inv_freq",),
    "baichuan": tuple(f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(LAYERS)),
    "qwen": ("transformer.rotary_emb.inv_freq",),
}


def random_state(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """Weights of that kind's layout; norms away from one, so that a lost one shows."""
    names, chatglm = NAMES[kind], kind.startswith("chatglm")
    generator = torch.Generator().manual_seed(seed)
    draw: Callable[..., torch.Tensor] = lambda *size: torch.randn(*size, generator=generator) * 0.2  # noqa: E731
    groups = GROUPS if chatglm else HEADS
    rows = (HIDDEN + 2 * groups * SIZE) // len(names.qkv)
    biases = _BIASES.get(kind, "")
    state = {f"{names.embedding}.weight": draw(VOCAB, HIDDEN) * 4, f"{names.head}.weight": draw(VOCAB, HIDDEN)}
    state[f"{names.norm}.weight"] = 1 + draw(HIDDEN)
    for layer in range(LAYERS):
        prefix = names.layer.format(layer)
        for norm in names.norms:
            state[f"{prefix}{norm}.weight"] = 1 + draw(HIDDEN)
        for name in names.qkv:
            state[f"{prefix}{name}.weight"] = draw(rows, HIDDEN)
            if "qkv" in biases:
                state[f"{prefix}{name}.bias"] = draw(rows)
        state[f"{prefix}{names.out}.weight"] = draw(HIDDEN, HIDDEN)
        if "out" in biases:
            state[f"{prefix}{names.out}.bias"] = draw(HIDDEN)
        for name in names.gate_up:
            state[f"{prefix}{name}.weight"] = draw(2 * MLP // len(names.gate_up), HIDDEN)
        state[f"{prefix}{names.down}.weight"] = draw(HIDDEN, MLP)
    state |= {name: torch.ones(SIZE // 4) for name in _BUFFERS.get(kind, ())}
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def logits(kind: str, state: State, ids: list[int]) -> torch.Tensor:
    """What the original computes for one row: (tokens, vocabulary)."""
    names, config = NAMES[kind], CONFIGS[kind]
    eps = config.get("layernorm_epsilon", config.get("rms_norm_eps", config.get("layer_norm_epsilon")))
    hidden = state[f"{names.embedding}.weight"][torch.tensor(ids)]
    for layer in range(LAYERS):
        prefix = names.layer.format(layer)
        before, after = (state[f"{prefix}{norm}.weight"] for norm in names.norms)
        hidden = hidden + _attention(kind, state, prefix, _rms(hidden, before, eps))
        inner = _rms(hidden, after, eps)
        gate, up = torch.cat([inner @ state[f"{prefix}{n}.weight"].T for n in names.gate_up], dim=-1).chunk(2, dim=-1)
        hidden = hidden + (silu(gate) * up) @ state[f"{prefix}{names.down}.weight"].T
    head = state[f"{names.head}.weight"]
    if kind == "baichuan2":
        head = normalize(head)
    return _rms(hidden, state[f"{names.norm}.weight"], eps) @ head.T


def _rms(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return hidden / (hidden.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _attention(kind: str, state: State, prefix: str, hidden: torch.Tensor) -> torch.Tensor:
    names, chatglm = NAMES[kind], kind.startswith("chatglm")
    groups = GROUPS if chatglm else HEADS

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ state[f"{prefix}{name}.weight"].T + state.get(f"{prefix}{name}.bias", torch.zeros(1))

    fused = torch.cat([linear(name, hidden) for name in names.qkv], dim=-1)
    query, key, value = fused.split([HEADS * SIZE, groups * SIZE, groups * SIZE], dim=-1)
    query = query.view(-1, HEADS, SIZE)
    key, value = (part.view(-1, groups, SIZE) for part in (key, value))
    turn = _interleaved_half if chatglm else _two_halves
    query, key = turn(query), turn(key)
    length = len(hidden)
    mask = torch.full((length, length), -math.inf).triu(1)
    answers = []
    for head in range(HEADS):
        group = head // (HEADS // groups)
        scores = query[:, head] @ key[:, group].T / math.sqrt(SIZE) + mask
        answers.append(scores.softmax(-1) @ value[:, group])
    return linear(names.out, torch.cat(answers, dim=-1))


def _angles(length: int, size: int) -> torch.Tensor:
    frequencies = 1 / 10000 ** (torch.arange(0, size, 2) / size)
    return torch.arange(length)[:, None] * frequencies


def _interleaved_half(heads: torch.Tensor) -> torch.Tensor:
    """ChatGLM2: the first half of a head turns, each even place with the odd one beside it; the other half stays."""
    turning, staying = heads.split(SIZE // 2, dim=-1)
    angles = _angles(len(heads), SIZE // 2)[:, None]
    even, odd = turning[..., ::2], turning[..., 1::2]
    turned = torch.stack([even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()], dim=-1)
    return torch.cat([turned.flatten(-2), staying], dim=-1)


def _two_halves(heads: torch.Tensor) -> torch.Tensor:
    """Llama: all of a head turns, each place of the first half with the same place of the second."""
    angles = _angles(len(heads), SIZE)[:, None]
    first, second = heads.chunk(2, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def greedy(kind: str, state: State, ids: list[int], num: int) -> list[int]:
    """The most likely continuation."""
    made = list(ids)
    for _ in range(num):
        made.append(int(logits(kind, state, made)[-1].argmax()))
    return made[len(ids) :]


def write_model(folder: Path, kind: str, state: State, shards: int = 3, pickled: bool = False, **changed: Any) -> None:
    """config.json and weights of a model, in so many files with an index."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIGS[kind], **changed}))
    names = list(state)
    where = {}
    for place in range(shards):
        part = {name: state[name] for name in names[place::shards]}
        stem = f"{'pytorch_model' if pickled else 'model'}-{place + 1:05d}-of-{shards:05d}"
        file = folder / (stem + (".bin" if pickled else ".safetensors"))
        if pickled:
            torch.save(part, file)
        else:
            save_file(part, file)
        where |= dict.fromkeys(part, file.name)
    index = "pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


TEXT = """The quick brown fox jumps over the lazy dog. Add two and three please; the sum is five.
今天天气很好，我们去公园玩。你好，世界！问：你是谁？ 答：我是一个语言模型。
def add(a, b):
    return a + b    # four spaces
naïve café, 12345 numbers 3.14, [Round 1] and [Round 2], e-mail: a@b.org
"""


def write_sentencepiece(folder: Path, size: int = 560, **options: Any) -> None:
    """tokenizer.model as these families have it: BPE, byte fallback, text as it is."""
    from sentencepiece import SentencePieceTrainer

    made = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 4), model_writer=made,
        **{"vocab_size": size, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
           "remove_extra_whitespaces": False, "character_coverage": 1.0, "hard_vocab_limit": False,
           "minloglevel": 2, **options},
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(made.getvalue())
