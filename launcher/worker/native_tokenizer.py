"""tokenizer.model or qwen.tiktoken of a model in, a tokenizer.json that gives the same ids out. Its Python class is not run.

What comes out is compared with the sentencepiece library on texts of every kind before it is used, so a vocabulary that
`tokenizers` cannot express ends in an error and not in other ids.
"""

from __future__ import annotations

import base64
import random
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from launcher.errors import PreflightError
from launcher.families import family
from launcher.native import Native
from launcher.rundir import read_json, write_json

# Ids beyond the vocabulary, in the order in which the original's own class counts them on.
_CHATGLM2 = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_CHATGLM3 = (*_CHATGLM2, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{place}|>" for place in range(205)))
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
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
    elif native.source == "qwen":
        _qwen(folder, into, name)
    else:
        _llama(folder, into, native.source, name)


def _chatglm(folder: Path, into: Path, source: str, name: str) -> None:
    special = _CHATGLM3 if source == "chatglm3" else _CHATGLM2
    tokenizer, sentencepiece = from_sentencepiece(folder / "tokenizer.model", name)
    first = sentencepiece.vocab_size()
    _add_special(tokenizer, special)
    _start_with(tokenizer, ("[gMASK]", "sop"))
    # As the original's class does it: a special token is never found in text.
    tokens = {"unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    _save(tokenizer, into, {**tokens, "padding_side": "left", "split_special_tokens": True})
    _require_same(into, sentencepiece.encode, name)
    ends = (
        [2]
        if source == "chatglm2"
        else [2, first + special.index("<|user|>"), first + special.index("<|observation|>")]
    )
    write_json(into / "generation_config.json", {"eos_token_id": ends, "pad_token_id": 0})


def _llama(folder: Path, into: Path, source: str, name: str) -> None:
    """Baichuan, InternLM and XVERSE: pieces as they are, the tokens that their own config adds, `<s>` where it says so."""
    tokenizer, sentencepiece = from_sentencepiece(folder / "tokenizer.model", name)
    config = read_json(folder / "tokenizer_config.json") or {}
    known = {**(read_json(folder / "special_tokens_map.json") or {}), **config}
    for token, wanted in _added(folder, config):
        _add_special(tokenizer, [token])
        if tokenizer.token_to_id(token) != wanted:
            raise _unlike(name, f"{token} would be {tokenizer.token_to_id(token)}, its files say {wanted}")
    # A piece that ends an answer is no part of what is shown of it.
    _add_special(tokenizer, [token for token in family(source).end_tokens if tokenizer.token_to_id(token) is not None])
    if config.get("add_bos_token", True):  # the default of their classes
        _start_with(tokenizer, ("<s>",))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    tokens = {key: _text(known.get(key)) or default for key, default in names.items()}
    _save(tokenizer, into, tokens)
    _require_same(into, sentencepiece.encode, name)
    _keep_generation(folder, into)


def _added(folder: Path, config: dict[str, Any]) -> list[tuple[str, int]]:
    """Tokens beyond the vocabulary that a folder's files name, by their ids."""
    listed = {token: int(place) for token, place in (read_json(folder / "added_tokens.json") or {}).items()}
    for place, token in config.get("added_tokens_decoder", {}).items():
        listed[_text(token)] = int(place)
    return sorted(listed.items(), key=lambda item: item[1])


def _text(token: Any) -> str:
    """A token, which files write as text or as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else token or ""


def _keep_generation(folder: Path, into: Path) -> None:
    """Which tokens end an answer, from the original's generation config; what else stands there is for its own code."""
    config = read_json(folder / "generation_config.json") or {}
    kept = {key: config[key] for key in ("eos_token_id", "pad_token_id", "bos_token_id") if key in config}
    if kept:
        write_json(into / "generation_config.json", kept)


def _qwen(folder: Path, into: Path, name: str) -> None:
    """Qwen 1: byte-level BPE from a list of tokens and ranks; what merges to what follows from the ranks."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ranks = _read_tiktoken(folder / "qwen.tiktoken", name)
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _merged(token, ranks, rank)
            if len(parts) != 2:
                raise _unlike(name, f"token {rank} of qwen.tiktoken is not made of two others")
            merges.append((spelled[parts[0]], spelled[parts[1]]))
    tokenizer = Tokenizer(models.BPE(vocab={spelled[token]: rank for token, rank in ranks.items()}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, _QWEN)
    _save(tokenizer, into, {"eos_token": _QWEN[0], "pad_token": _QWEN[0]})
    _require_same(into, lambda text: _by_ranks(text, ranks), name)
    _keep_generation(folder, into)


def _read_tiktoken(file: Path, name: str) -> dict[bytes, int]:
    """Token -> rank.

    Raises:
        PreflightError: the file is missing, or a line is not a token and its place.
    """
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("ranks have gaps")
    except (OSError, ValueError) as error:
        found = f"{file.name} cannot be read: {type(error).__name__}"
        raise PreflightError(f"model {name}", found, f"copy or download {file.name} again") from None
    return ranks


def _merged(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """The pieces of a word after all merges whose result has a rank below that."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 1:
        found = [ranks.get(left + right, below) for left, right in pairwise(parts)]
        best = min(found)
        if best >= below:
            break
        place = found.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _by_ranks(text: str, ranks: dict[bytes, int]) -> list[int]:
    """What tiktoken does, without it: words by the pattern, then merges by rank."""
    import regex

    words = regex.findall(_QWEN_WORDS, unicodedata.normalize("NFC", text))
    return [ranks[part] for word in words for part in _merged(word.encode(), ranks, len(ranks))]


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level vocabulary: itself where it is printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


def from_sentencepiece(file: Path, name: str) -> tuple[Any, Any]:
    """A `tokenizers` BPE with the pieces of a sentencepiece model, and that model.

    Raises:
        PreflightError: the file is missing or broken, or no BPE with byte fallback and plain spaces.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import Tokenizer, decoders, models, normalizers

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
    whole = sorted((piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED), key=len, reverse=True)
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(proto.pieces),
        byte_fallback=byte_fallback,
        unk_token="<unk>",
        fuse_unk=True,
        ignore_merges=bool(whole),
    )
    tokenizer = Tokenizer(model)
    if whole:
        tokenizer.pre_tokenizer = _whole_pieces(proto.pieces, whole)
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    steps += [normalizers.Prepend("▁")] if spec.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_special(tokenizer, [piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _UNKNOWN)])
    return tokenizer, processor


def _whole_pieces(pieces: Sequence[Any], whole: Sequence[str]) -> Any:
    """Cuts out the pieces that are found before any merge, the longest first; the model then takes them as they are.

    It would take a control piece so too where one is written out between two of them, which is cut once more.
    """
    from tokenizers import Regex, pre_tokenizers

    found = Regex("|".join(re.escape(piece) for piece in whole))
    never = [piece.piece for piece in pieces if piece.type in (_UNKNOWN, _CONTROL, _BYTE)]
    rest = Regex("|".join(rf"\A{re.escape(piece[0])}(?={re.escape(piece[1:])}\z)" for piece in never))
    return pre_tokenizers.Sequence([pre_tokenizers.Split(cut, behavior="isolated") for cut in (found, rest)])


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
    _keep_generation(folder, into)


def _require_same(folder: Path, encode: Callable[[str], list[int]], name: str) -> None:
    """Compare the saved tokenizer with another way to the ids.

    Raises:
        PreflightError: a text has other ids.
    """
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in texts(_NUM_TEXTS):
        ids = made(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if ids != encode(text):
            raise _unlike(name, f"{text!r} would have other ids")


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
        "check that its tokenizer files are those of the authors; if they are, report this, please",
    )
