"""In: the family of a model that brings its own code, and the version of transformers. Out: the fixes that its classes need there.

The code of ChatGLM-6B and Baichuan-13B was written for transformers 4.27 to 4.31 and has no native class to become. Each fix
mends one thing about the model's own classes, in the process that imports them (`worker.compat` holds how): files stay as
they are, and transformers is not changed. A fix without a range is about a mistake that every version meets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Fix:
    """One fix.

    Args:
        mends: what would happen without it.
        since: first version of transformers that needs it; empty for every version.
        families: whose code it is for; none where `prepare` finds by trial that it is needed (`worker.code_trial`).
    """

    name: str
    mends: str
    since: str
    families: tuple[str, ...]

    def is_for(self, version: str | None) -> bool:
        """Whether this version of transformers needs it; None counts as the newest there is."""
        return not self.since or version is None or _numbers(version) >= _numbers(self.since)

    @property
    def range(self) -> str:
        """The versions of transformers that it is for, as a person reads it."""
        return f"transformers >={self.since}" if self.since else "any transformers"


# Found by trial, not by family: the model is built on the device and filled (worker.staged.load_weights).
BUILT_FIRST = "built-first"
FIXES = (
    Fix(
        "vocabulary-first",
        "the base class asks for the vocabulary before the tokenizer's own __init__ has read it",
        "4.34",
        ("chatglm", "baichuan"),
    ),
    Fix("padding-side", "_pad is given a padding_side that it does not know", "4.45", ("chatglm",)),
    Fix("post-init", "__init__ ends without post_init, so nothing knows which weights are tied", "5.0", ("chatglm",)),
    Fix("one-precision", "half of its layers are float16 whatever precision was asked for", "", ("chatglm",)),
    Fix(
        "tied-head",
        "head and embedding are one, which config.json leaves to a default that is gone",
        "5.0",
        ("chatglm",),
    ),
    Fix("tuple-cache", "generate hands it a cache object, its code reads tuples", "4.55", ("chatglm", "baichuan")),
    Fix("cache-from-output", "it takes the cache from an output by a function that is gone", "4.42", ("chatglm",)),
    Fix(
        "absent-inputs",
        "generate hands on masks and positions that are None, its code counts on them",
        "5.0",
        ("chatglm",),
    ),
    Fix(
        "own-positions",
        "generate makes up one row of positions, its code has two and makes them itself",
        "5.0",
        ("chatglm",),
    ),
    Fix("checkpointing-flag", "its config makes a tuple of the flag, which is always true", "", ("baichuan",)),
    Fix(
        "token-loss",
        "its loss is the mean of a micro batch, not of a step's supervised tokens",
        "",
        ("chatglm", "baichuan"),
    ),
    Fix(BUILT_FIRST, "from_pretrained leaves empty what its code computes while it is built", "5.0", ()),
)


def fix_named(name: str) -> Fix:
    """The fix of that name; KeyError for another."""
    return {fix.name: fix for fix in FIXES}[name]


def fixes_for(family: str, version: str | None) -> tuple[Fix, ...]:
    """The fixes of a family under a version of transformers."""
    return tuple(fix for fix in FIXES if family in fix.families and fix.is_for(version))


def _numbers(version: str) -> tuple[int, ...]:
    """5.23.0.dev0 -> (5, 23, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("dev")[0])[:3])
