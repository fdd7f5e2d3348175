"""A class of a model's own code and the names of its fixes in; the class, mended, out. See `launcher.compat` for what each is for.

Only attributes of that very class change, in this process. A fix looks whether the class has what it is about, and leaves
another one (a later revision of the same code) alone.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F

from launcher.compat import BUILT_FIRST, FIXES
from launcher.worker.data.tokens import IGNORED

_MARK = "_launch_fixes"  # which fixes a class has already


def mend(cls: Any, auto: str, names: Collection[str], version: str) -> Any:
    """Apply to a class those of the named fixes that are for its kind and for this version of transformers.

    Args:
        auto: the auto class that it was found by: AutoConfig, AutoTokenizer, or one of a model.
    """
    kind = {"AutoConfig": "config", "AutoTokenizer": "tokenizer"}.get(auto, "model")
    done = cls.__dict__.get(_MARK, ())
    for fix in FIXES:
        apply = _APPLY[fix.name].get(kind)
        if apply is not None and fix.name in names and fix.is_for(version) and fix.name not in done:
            apply(cls)
            done = (*done, fix.name)
    setattr(cls, _MARK, done)
    return cls


def _vocabulary_first(cls: Any) -> None:
    """What the tokenizer reads in its __init__ is there before the base class begins; its __init__ then reads it again."""
    module = sys.modules[cls.__module__]

    def chatglm(self: Any, vocab_file: str, **options: Any) -> None:
        self.sp_tokenizer = module.SPTokenizer(vocab_file, num_image_tokens=options.get("num_image_tokens", 20000))

    def baichuan(self: Any, vocab_file: str, **options: Any) -> None:
        self.sp_model = module.spm.SentencePieceProcessor(**(options.get("sp_model_kwargs") or {}))
        self.sp_model.Load(vocab_file)

    readers = {"sp_tokenizer": chatglm, "sp_model": baichuan}
    read = next((readers[name] for name in readers if _set_after_base(cls, name)), None)
    if read is not None:
        _before_init(cls, read)


def _padding_side(cls: Any) -> None:
    """Without the argument: the code pads on the side that the tokenizer was made with, and refuses another."""
    pad = cls._pad
    if "padding_side" not in inspect.signature(pad).parameters:

        def _pad(self: Any, *given: Any, padding_side: Any = None, **named: Any) -> Any:
            return pad(self, *given, **named)

        cls._pad = functools.wraps(pad)(_pad)


def _post_init(cls: Any) -> None:
    if "post_init" not in _names_in_init(cls):
        _after_init(cls, lambda self: self.post_init())


def _one_precision(cls: Any) -> None:
    """from_pretrained builds under the precision that was asked for, so weights are read into it without a detour."""
    _after_init(cls, lambda self: self.to(torch.get_default_dtype()))


def _tied_by_config(cls: Any) -> None:
    initialise = cls.__init__

    def __init__(self: Any, *given: Any, **named: Any) -> None:
        initialise(self, *given, **{"tie_word_embeddings": True, **named})

    cls.__init__ = functools.wraps(initialise)(__init__)


def _tied_by_model(cls: Any) -> None:
    if not cls._tied_weights_keys:
        cls._tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}


def _tuple_cache(cls: Any) -> None:
    cls._supports_default_dynamic_cache = classmethod(lambda _: False)


def _cache_from_output(cls: Any) -> None:
    if not hasattr(cls, "_extract_past_from_model_output"):
        cls._extract_past_from_model_output = lambda self, outputs, **_: outputs.past_key_values


def _absent_inputs(cls: Any) -> None:
    update = cls._update_model_kwargs_for_generation

    def _update_model_kwargs_for_generation(
        self: Any, outputs: Any, model_kwargs: Any, *rest: Any, **named: Any
    ) -> Any:
        given = {key: value for key, value in model_kwargs.items() if value is not None}
        return update(self, outputs, given, *rest, **named)

    cls._update_model_kwargs_for_generation = functools.wraps(update)(_update_model_kwargs_for_generation)


def _own_positions(cls: Any) -> None:
    def _prepare_position_ids_for_generation(self: Any, inputs: torch.Tensor, model_kwargs: Any) -> None:
        if inputs.shape[0] > 1:
            raise ValueError("this model generates one answer at a time: its code has no mask for several")

    cls._prepare_position_ids_for_generation = _prepare_position_ids_for_generation


def _checkpointing_flag(cls: Any) -> None:
    def unpack(self: Any) -> None:
        while isinstance(self.gradient_checkpointing, tuple | list):
            self.gradient_checkpointing = self.gradient_checkpointing[0]

    _after_init(cls, unpack)


def _token_loss(cls: Any) -> None:
    """The loss of a causal model as the Trainer counts on it: summed, divided by the supervised tokens of the whole step."""
    compute = cls.forward

    def forward(self: Any, *given: Any, labels: Any = None, num_items_in_batch: Any = None, **named: Any) -> Any:
        output = compute(self, *given, **named)
        if labels is not None:
            output.loss = token_loss(output.logits, labels, num_items_in_batch)
        return output

    cls.forward = functools.wraps(compute)(forward)
    cls.accepts_loss_kwargs = True  # by this the Trainer hands on num_items_in_batch


def token_loss(logits: torch.Tensor, labels: torch.Tensor, num_tokens: Any = None) -> torch.Tensor:
    """Cross entropy in nats of logits (rows, tokens, vocabulary) and labels (rows, tokens), per supervised token.

    Args:
        num_tokens: how many there are in all micro batches of a step; None counts those of this one.
    """
    following = labels[:, 1:].flatten()
    total = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), following, ignore_index=IGNORED, reduction="sum")
    return total / ((following != IGNORED).sum().clamp(min=1) if num_tokens is None else num_tokens)


# Fix -> kind of class -> what is done to it.
_APPLY: dict[str, dict[str, Callable[[Any], None]]] = {
    "vocabulary-first": {"tokenizer": _vocabulary_first},
    "padding-side": {"tokenizer": _padding_side},
    "post-init": {"model": _post_init},
    "one-precision": {"model": _one_precision},
    "tied-head": {"config": _tied_by_config, "model": _tied_by_model},
    "tuple-cache": {"model": _tuple_cache},
    "cache-from-output": {"model": _cache_from_output},
    "absent-inputs": {"model": _absent_inputs},
    "own-positions": {"model": _own_positions},
    "checkpointing-flag": {"config": _checkpointing_flag},
    "token-loss": {"model": _token_loss},
    BUILT_FIRST: {},
}


def _set_after_base(cls: Any, name: str) -> bool:
    """Whether __init__ names an attribute after it has called the base class (names stand in the order of first use)."""
    names = _names_in_init(cls)
    return name in names and "__init__" in names and names.index(name) > names.index("__init__")


def _names_in_init(cls: Any) -> tuple[str, ...]:
    """What the __init__ that the class came with calls, reads and sets."""
    code = getattr(inspect.unwrap(cls.__init__), "__code__", None)  # None: it has no __init__ of its own
    return tuple(code.co_names) if code is not None else ()


def _before_init(cls: Any, first: Callable[..., None]) -> None:
    initialise = cls.__init__

    def __init__(self: Any, *given: Any, **named: Any) -> None:
        values = inspect.signature(initialise).bind(self, *given, **named).arguments
        options = values.pop("kwargs", {})
        first(**{**values, **options})
        initialise(self, *given, **named)

    cls.__init__ = functools.wraps(initialise)(__init__)


def _after_init(cls: Any, then: Callable[[Any], Any]) -> None:
    initialise = cls.__init__

    def __init__(self: Any, *given: Any, **named: Any) -> None:
        initialise(self, *given, **named)
        then(self)

    cls.__init__ = functools.wraps(initialise)(__init__)
