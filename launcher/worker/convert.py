"""A model folder in its original layout in, the same weights in the layout of a transformers class out. No code of it is run.

One shard of the original becomes one of the result, so no more than one is in memory. Everything is strict: each tensor of
the original has to be known, each one of the class has to come out, with the shape that the class has. Precision is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import PreflightError
from launcher.modelshape.files import config_of_folder
from launcher.native import NativeConfig, Refusal, native_config, normalises_head
from launcher.rundir import write_json
from launcher.worker.quiet import quiet_libraries

Progress = Callable[[int, int], None]
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Row:
    """One line of a key map.

    Args:
        source: a key of the original; `*` stands for one part, the same in `targets`.
        targets: keys of the class; several share the rows of the source; none drops it.
    """

    source: str
    targets: tuple[str, ...]

    def match(self, key: str) -> tuple[str, ...] | None:
        """What the stars stand for in a key, None where it is another one."""
        found = re.fullmatch(re.escape(self.source).replace(r"\*", r"([^.]+)"), key)
        return found.groups() if found else None


def filled(pattern: str, parts: tuple[str, ...]) -> str:
    """A pattern of a `Row` with its stars replaced, in order."""
    for part in parts:
        pattern = pattern.replace("*", part, 1)
    return pattern


def _moved(*pairs: tuple[str, str | tuple[str, ...]]) -> tuple[Row, ...]:
    return tuple(Row(source, (targets,) if isinstance(targets, str) else targets) for source, targets in pairs)


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"model.layers.*.self_attn.{name}.{kind}" for name in _QKV)


_CHATGLM2 = _moved(
    ("transformer.embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    ("transformer.encoder.layers.*.input_layernorm.weight", "model.layers.*.input_layernorm.weight"),
    ("transformer.encoder.layers.*.self_attention.query_key_value.weight", _qkv("weight")),
    ("transformer.encoder.layers.*.self_attention.query_key_value.bias", _qkv("bias")),
    ("transformer.encoder.layers.*.self_attention.dense.weight", "model.layers.*.self_attn.o_proj.weight"),
    ("transformer.encoder.layers.*.post_attention_layernorm.weight", "model.layers.*.post_attention_layernorm.weight"),
    # Gate rows first, then up, in both.
    ("transformer.encoder.layers.*.mlp.dense_h_to_4h.weight", "model.layers.*.mlp.gate_up_proj.weight"),
    ("transformer.encoder.layers.*.mlp.dense_4h_to_h.weight", "model.layers.*.mlp.down_proj.weight"),
    ("transformer.encoder.final_layernorm.weight", "model.norm.weight"),
    ("transformer.output_layer.weight", "lm_head.weight"),
    # Only its dtype and device are ever used.
    ("transformer.rotary_pos_emb.inv_freq", ()),
)
_LLAMA = _moved(
    ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ("model.layers.*.*.*.*", "model.layers.*.*.*.*"),
    ("model.layers.*.*.weight", "model.layers.*.*.weight"),
    ("model.norm.weight", "model.norm.weight"),
    ("lm_head.weight", "lm_head.weight"),
)
_ROTARY = _moved(
    ("model.layers.*.self_attn.rotary_emb.inv_freq", ()),
    ("model.layers.*.self_attn.rotary_emb.cos_cached", ()),
    ("model.layers.*.self_attn.rotary_emb.sin_cached", ()),
)
_QWEN = _moved(
    ("transformer.wte.weight", "model.embed_tokens.weight"),
    ("transformer.h.*.ln_1.weight", "model.layers.*.input_layernorm.weight"),
    ("transformer.h.*.ln_2.weight", "model.layers.*.post_attention_layernorm.weight"),
    ("transformer.h.*.attn.c_attn.weight", _qkv("weight")),
    ("transformer.h.*.attn.c_attn.bias", _qkv("bias")),
    ("transformer.h.*.attn.c_proj.weight", "model.layers.*.self_attn.o_proj.weight"),
    ("transformer.h.*.mlp.w2.weight", "model.layers.*.mlp.gate_proj.weight"),
    ("transformer.h.*.mlp.w1.weight", "model.layers.*.mlp.up_proj.weight"),
    ("transformer.h.*.mlp.c_proj.weight", "model.layers.*.mlp.down_proj.weight"),
    ("transformer.ln_f.weight", "model.norm.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("transformer.rotary_emb.inv_freq", ()),
    # Masks and tables that the first revision saved.
    ("transformer.h.*.attn.masked_bias", ()),
    ("transformer.h.*.attn.bias", ()),
)
KEYS: dict[str, tuple[Row, ...]] = {
    "chatglm2": _CHATGLM2,
    "chatglm3": _CHATGLM2,
    "baichuan": (*_ROTARY, *_moved(("model.layers.*.self_attn.W_pack.weight", _qkv("weight"))), *_LLAMA),
    "internlm": (*_ROTARY, *_LLAMA),
    "xverse": (*_ROTARY, *_LLAMA),
    "qwen": _QWEN,
}


def convert_model(folder: Path, into: Path, name: str, progress: Progress) -> NativeConfig:
    """Write config.json and the weights of a folder, as the native class has them, into another one.

    Args:
        name: what the person calls the model.
        progress: called with (shards done, shards in all).

    Raises:
        PreflightError: it has no exact native class, a tensor is unknown, missing or of another shape, a file is broken.
    """
    found = wanted_config(folder, name)
    wanted = expected_shapes(found)
    shards = weight_files(folder, name)
    where: dict[str, str] = {}
    total_bytes = 0
    for place, shard in enumerate(shards, start=1):
        made: dict[str, torch.Tensor] = {}
        for key, tensor in read_shard(shard):
            for target, part in _converted(key, tensor, found, name):
                if target in where or target in made:
                    raise _inexact(name, f"{target} comes twice, the second time from {key} in {shard.name}")
                _check_shape(target, part, wanted, name)
                made[target] = part
        file = f"model-{place:05d}-of-{len(shards):05d}.safetensors"
        if made:
            _write(made, into / file)
        where |= dict.fromkeys(made, file)
        total_bytes += sum(part.numel() * part.element_size() for part in made.values())
        progress(place, len(shards))
    missing = sorted(set(wanted) - set(where))
    if missing:
        raise _inexact(name, f"its files have nothing for {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}")
    write_json(into / _INDEXES[0], {"metadata": {"total_size": total_bytes}, "weight_map": where})
    write_json(into / "config.json", found.config)
    return found


def wanted_config(folder: Path, name: str) -> NativeConfig:
    """The native config of a folder, whose own config.json counts and not what the plan was made from.

    Raises:
        PreflightError: there is none that is exact.
    """
    found = native_config(config_of_folder(folder, name))
    if isinstance(found, NativeConfig):
        return found
    reason = "; ".join(found.reasons) if isinstance(found, Refusal) else "it is none of the families that are converted"
    raise PreflightError(
        f"model {name}",
        f"its config.json is not that of the plan, and has no exact native class: {reason}",
        "give the folder itself, so that it is planned from its own config.json: model.path=DIR",
    )


def expected_shapes(found: NativeConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the native class, from the class itself, built without memory."""
    quiet_libraries()
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in found.config.items() if key not in ("architectures", "dtype")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    assert type(model).__name__ == found.native.target
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files that hold a model's weights: safetensors where there are any, else pickles.

    Raises:
        PreflightError: there are none, or one that the index names is not there.
    """
    for index, pattern in zip(_INDEXES, ("*.safetensors", "pytorch_model*.bin"), strict=True):
        if (folder / index).is_file():
            try:
                names = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise PreflightError(
                    f"model {name}", f"{index} cannot be read: {type(error).__name__}", f"copy {index} again"
                ) from None
            lost = [file for file in names if not (folder / file).is_file()]
            if lost:
                raise PreflightError(
                    f"model {name}",
                    f"{index} names {', '.join(lost)}, which {folder} lacks",
                    f"copy or download {lost[0]} again",
                )
            return [folder / file for file in names]
        files = sorted(folder.glob(pattern))
        if files:
            return files
    raise PreflightError(
        f"model {name}",
        f"{folder} has no *.safetensors and no pytorch_model*.bin",
        "copy or download the weights again",
    )


def read_shard(shard: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in a file, without executing what a pickle may hold.

    Raises:
        PreflightError: it cannot be read.
    """
    import pickle

    from safetensors import SafetensorError, safe_open

    try:
        if shard.suffix == ".safetensors":
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping, it has keys() only)
                    yield key, file.get_tensor(key)
        else:
            yield from _unpickled(shard).items()
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is not None:  # torch refuses every name that a pickle asks for and that is no tensor's
            raise PreflightError(
                f"weights {shard}",
                f"hold more than tensors: reading them would call {named[1]}, and was refused",
                "do not load them otherwise; take safetensors, or these weights from somebody you trust",
            ) from None
        raise PreflightError(
            f"weights {shard}",
            f"cannot be read as plain tensors: {reason}",
            f"copy or download {shard.name} again, or save it as safetensors",
        ) from None


def _unpickled(shard: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, mapped from the file; files of before torch 1.6 are no archives and are read whole."""
    import zipfile

    found = torch.load(shard, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(shard))
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} and no tensors by name")
    return found


def _converted(key: str, tensor: torch.Tensor, found: NativeConfig, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the class that one of the original becomes.

    Raises:
        PreflightError: the key is unknown.
    """
    for row in KEYS[found.native.source]:
        parts = row.match(key)
        if parts is None:
            continue
        if key == "lm_head.weight" and normalises_head(found.native):
            tensor = torch.nn.functional.normalize(tensor)
        pieces = [tensor]
        if len(row.targets) > 1:
            sizes = qkv_rows(found.config)
            if tensor.shape[0] != sum(sizes):
                raise _inexact(name, f"{key} has {tensor.shape[0]} rows instead of {' + '.join(map(str, sizes))}")
            # Rows of one matrix share its memory, which safetensors does not allow.
            pieces = [piece.clone() for piece in tensor.split(sizes)]
        yield from ((filled(target, parts), piece) for target, piece in zip(row.targets, pieces, strict=False))
        return
    raise _inexact(name, f"nobody here knows its tensor {key}")


def qkv_rows(config: Mapping[str, Any]) -> list[int]:
    """How many rows of a fused matrix are query, key and value."""
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return [config["num_attention_heads"] * size, *2 * [config["num_key_value_heads"] * size]]


def _check_shape(key: str, tensor: torch.Tensor, wanted: Mapping[str, tuple[int, ...]], name: str) -> None:
    if key not in wanted:
        raise _inexact(name, f"the native class has no {key}")
    if tuple(tensor.shape) != wanted[key]:
        raise _inexact(name, f"{key} is {list(tensor.shape)}, its config.json says {list(wanted[key])}")


def _inexact(name: str, found: str) -> PreflightError:
    return PreflightError(
        f"model {name}",
        f"cannot be converted to its native class: {found}",
        "check that config.json and weights belong together, and that nothing was added to them (prefix, adapter)",
    )


def _write(tensors: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
