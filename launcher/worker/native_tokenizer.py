"""tokenizer.model or qwen.tiktoken of a model in, a tokenizer.json that gives the same ids out. Its Python class is not run.

What comes out is compared with the sentencepiece library on texts of every kind before it is used, so a vocabulary that
`tokenizers` cannot express ends in an error and not in other ids.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import PreflightError
from launcher.native import Native
from launcher.rundir import read_json, write_json

# Ids beyond the vocabulary, in the order in which the original's own class counts them on.
_CHATGLM2 = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_CHATGLM3 = (*_CHATGLM2, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # types of a piece
_BPE = 2  # type of a sentencepiece model
_NUM_TEXTS = 400
_WORDS = (
    "the", "quick", "brown", "fox", "今天", "天气", "很好", "，", "。", "？", "你好", "世界", "Hello,", "world!", "naïve", "café",
    "Ünïcödé", "ﬁne", "１２３", "12345", "3.14", "'quoted'", '"double"', "C++", "a_b_c", "foo(bar)", "{x}", "[gMASK]", "<|user|>",
    "</s>", "<unk>", "<s>", "<0x0A>", "sop", "▁", "▁▁", "😀", "👨\u200d👩\u200d👧", "🇨🇳", "العربية", "हिन्दी", "русский", "日本語",
    "한국어", "e\u0301", "\u00e9", "﷽", "aaaaaaaa", "----", "====", "....", "https://example.org/a?b=c&d=e", "x²", "e=mc²",
    "\u200b", "\ufeff", "\u00a0",
)  # fmt: skip
_SPACES = (" ", " ", " ", "", "  ", "    ", "\n", "\n\n", "\t", " \n ", "\r\n", "\u3000")


def convert_tokenizer(folder: Path, into: Path, native: Native, name: str) -> None:
    """Write tokenizer.json and tokenizer_config.json of a folder's tokenizer, and its generation config.

    Raises:
        PreflightError: its files are not there, or no tokenizer.json gives the same ids.
    """
    if native.source in ("chatglm2", "chatglm3"):
        _chatglm(folder, into, native.source, name)
    elif (folder / "tokenizer.json").is_file():
        _copied(folder, into)
    else:
        raise _unlike(name, f"{native.source} has no tokenizer that is converted")


def _chatglm(folder: Path, into: Path, source: str, name: str) -> None:
    special = _CHATGLM3 if source == "chatglm3" else _CHATGLM2
    tokenizer, sentencepiece = from_sentencepiece(folder / "tokenizer.model", name)
    first = sentencepiece.vocab_size()
    _add_special(tokenizer, special)
    _start_with(tokenizer, ("[gMASK]", "sop"))
    # As the original's class does it: a special token is never found in text.
    tokens = {"unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    _save(tokenizer, into, {**tokens, "padding_side": "left", "split_special_tokens": True})
    _require_same(into, sentencepiece, name)
    ends = (
        [2]
        if source == "chatglm2"
        else [2, first + special.index("<|user|>"), first + special.index("<|observation|>")]
    )
    write_json(into / "generation_config.json", {"eos_token_id": ends, "pad_token_id": 0})


def from_sentencepiece(file: Path, name: str) -> tuple[Any, Any]:
    """A `tokenizers` BPE with the pieces of a sentencepiece model, and that model.

    Raises:
        PreflightError: the file is missing or broken, or no BPE with byte fallback and plain spaces.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    proto = ModelProto()
    try:
        raw = file.read_bytes()
        proto.ParseFromString(raw)
        processor = SentencePieceProcessor(model_proto=raw)
    except (OSError, DecodeError, RuntimeError) as error:
        found = f"{file.name} cannot be read: {type(error).__name__}"
        raise PreflightError(f"model {name}", found, f"copy or download {file.name} again") from None
    spec = proto.normalizer_spec
    if proto.trainer_spec.model_type != _BPE:
        raise _unlike(name, f"{file.name} is no BPE")
    if spec.remove_extra_whitespaces or not spec.escape_whitespaces:
        raise _unlike(name, f"{file.name} rewrites spaces (normaliser {spec.name})")
    byte_fallback = any(piece.type == _BYTE for piece in proto.pieces)
    vocabulary = {piece.piece: place for place, piece in enumerate(proto.pieces)}
    model = models.BPE(
        vocab=vocabulary, merges=_merges(proto.pieces), byte_fallback=byte_fallback, unk_token="<unk>", fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    steps += [normalizers.Prepend("▁")] if spec.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_special(tokenizer, [piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _UNKNOWN)])
    for piece in proto.pieces:
        if piece.type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False)])
    return tokenizer, processor


def _merges(pieces: Sequence[Any]) -> list[tuple[str, str]]:
    """All pairs that make a piece, the best piece first. Control and byte pieces are never made from text."""
    scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    merges = [
        (-score, place, (piece[:cut], piece[cut:]))
        for place, (piece, score) in enumerate(scores.items())
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [pair for _, _, pair in sorted(merges, key=lambda merge: merge[:2])]


def _add_special(tokenizer: Any, names: Iterable[str]) -> None:
    """Tokens that decoding can leave out; one that the vocabulary has keeps its id, others count on."""
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])


def _start_with(tokenizer: Any, names: Sequence[str]) -> None:
    """What a text begins with when special tokens are asked for."""
    from tokenizers import processors

    if names:
        tokens = [(name, tokenizer.token_to_id(name)) for name in names]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*names, "$A"], pair=[*names, "$A", "$B:1"], special_tokens=tokens
        )


def _save(tokenizer: Any, into: Path, config: dict[str, Any]) -> None:
    tokenizer.save(str(into / "tokenizer.json"))
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(into / "tokenizer_config.json", {**more, **config})


def _copied(folder: Path, into: Path) -> None:
    """A tokenizer.json of the original's own, with what its config says and without the class that it names."""
    shutil.copyfile(folder / "tokenizer.json", into / "tokenizer.json")
    config = read_json(folder / "tokenizer_config.json") or {}
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    write_json(into / "tokenizer_config.json", {**kept, "tokenizer_class": "PreTrainedTokenizerFast"})


def _require_same(folder: Path, sentencepiece: Any, name: str) -> None:
    """Compare the saved tokenizer with the sentencepiece library.

    Raises:
        PreflightError: a text has other ids.
    """
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in texts(_NUM_TEXTS):
        ids = made(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if ids != sentencepiece.encode(text):
            raise _unlike(name, f"{text!r} would have other ids than sentencepiece gives")


def texts(num: int) -> list[str]:
    """Texts of every kind: scripts, emoji, runs of spaces, line breaks, special tokens written out."""
    rng = random.Random(0)
    return ["", *_WORDS, *_SPACES] + [
        "".join(rng.choice(_SPACES) + rng.choice(_WORDS) for _ in range(rng.randint(1, 12))) for _ in range(num)
    ]


def _unlike(name: str, found: str) -> PreflightError:
    return PreflightError(
        f"tokenizer of {name}",
        f"cannot be converted exactly: {found}",
        "put a tokenizer.json beside its weights, or report this, please",
    )
